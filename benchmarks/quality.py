"""How much of what real rows teach does a transfer keep? The default, the paper's way and the other arms, on public tasks, SmolLM2 to Gemma.

    make bench-quality         (or: python benchmarks/quality.py --data ../shared/data --seeds 3 [--quick])

Each (task, seed) is a whole chain: a kit, a transfer by default, a transfer in the paper's way (a list of seeds to continue, the discriminator's cut), one
with each other generator, the arms made from the candidates of the first two, and an oracle on the real rows. --quick takes three tasks and fewer arms.
--jobs chains run at a time, on an even share of the cores each. Results and logs lie in runs/quality/; what is there is not computed again. The table goes to
benchmarks/RESULTS.md, the plot beside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
import transfer
import yaml

from translora_ray.evaluation import compare
from translora_ray.evaluation.statistics import paired_interval
from translora_ray.reading import load_task
from translora_ray.records import read_rows
from translora_ray.stream.dedup import normal

INTENT = {"prompt": "Message: {input}\nIntent:", "max_new_tokens": 10, "source_training": {"epochs": 5}}
TASKS: dict[str, dict[str, Any]] = {
    "intents/clinc_utility": {"task": {**INTENT, "seeds": 15}, "recipe": {"training": {"epochs": 4}}},
    "intents/banking_cards": {"task": {**INTENT, "seeds": 16}, "recipe": {"training": {"epochs": 4}}},
    "intents/snips_intents": {"task": {**INTENT, "seeds": 7}, "recipe": {"training": {"epochs": 4}}},
    "slots/snips_GetWeather": {
        "task": {"prompt": "Message: {input}\nSlots:", "max_new_tokens": 48, "seeds": 15, "source_training": {"epochs": 4}},
        "recipe": {"training": {"epochs": 4}},
    },
    "bbh/boolean_expressions": {  # as many examples as rows, like the others, so that the oracle takes as many steps
        "task": transfer.TASKS["bbh/boolean_expressions"]["task"],
        "recipe": {"training": {"epochs": 6}, "synthesis": {"temperature": 1.0}},
    },
}
QUICK = list(TASKS)[:3]
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {"synthesis": {"by_label": False}, "selection": {"method": "discriminator"}},
    "target": {"synthesis": {"generator": "target"}},
    "turns": {"synthesis": {"generator": ["source", "target"]}},
    "adapter": {"synthesis": {"generator": "adapter"}},
}
"""A recipe's sections that turn the default into each transfer's way."""
ARMS: dict[str, list[str]] = {way: [] for way in WAYS}
ARMS |= {"default": ["unfiltered", "excess"], "paper": ["unfiltered", "seeds_only", "importance", "excess", "both"]}
"""Arms that are made from the candidates of each transfer."""
QUICK_ARMS = {"default": [], "paper": ["unfiltered"]}
SHOWN: dict[str, tuple[str, str]] = {
    "bare target": ("paper", "target_base"),
    "few-shot target": ("paper", "target_few_shot"),
    "seeds alone": ("paper", "seeds_only"),
    "list, unfiltered": ("paper", "unfiltered"),
    "list, discriminator (paper)": ("paper", "transferred"),
    "list, importance": ("paper", "importance"),
    "list, excess (no discriminator)": ("paper", "excess"),
    "list, both": ("paper", "both"),
    "default": ("default", "transferred"),
    "default's candidates, unfiltered": ("default", "unfiltered"),
    "default's candidates, excess (no discriminator)": ("default", "excess"),
    "default, the target base writes": ("target", "transferred"),
    "default, source and target base write in turn": ("turns", "transferred"),
    "default, a generator adapter writes": ("adapter", "transferred"),
    "source adapter": ("paper", "source_adapter"),
    "oracle": ("paper", "oracle"),
}
"""Rows of the table: (transfer, arm of its evaluation)."""
Chain = dict[str, dict[str, Any]]
"""{transfer: {"evaluation", "manifest"}} of a chain; nothing in it where the transfer failed."""


def write_task(name: str, here: Path, data: Path, tested: int | None = None, **keys: object) -> Path:
    """The task's file, and beside it as test.jsonl the first `tested` test rows that are not among the training rows, as one of banking_cards is."""
    here.mkdir(parents=True, exist_ok=True)
    rows = data / name
    learnt = {normal(row.input) for row in read_rows(rows / "train.jsonl")}
    unseen = [row for row in read_rows(rows / "test.jsonl") if normal(row.input) not in learnt][:tested]
    (here / "test.jsonl").write_text("".join(json.dumps({"input": row.input, "target": row.target}) + "\n" for row in unseen))
    task = {"name": name.split("/")[1], "train": str(rows / "train.jsonl"), **keys}
    (here / "task.yaml").write_text(yaml.safe_dump(task))
    return here / "task.yaml"


def run(name: str, seed: int, data: Path, work: Path, threads: int, arms: dict[str, list[str]]) -> Chain:
    """One chain, on `threads` cores."""
    here = work / f"{name.split('/')[1]}-{seed}"
    task = write_task(name, here, data, seed=seed, generator_adapter=True, **TASKS[name]["task"])
    transfer.keep_to(here, {"commit": results.commit(), "task": load_task(task).model_dump()})
    if not (here / "kit").exists():
        transfer.translora(here, threads, "prepare", str(task), "--base", transfer.SOURCE, "--out", str(here / "kit"))
    found: Chain = {}
    for way, extra in arms.items():
        recipe = {"seed": seed, "cluster": {"engine_cpus": threads, "worker_cpus": threads}, **TASKS[name]["recipe"]}
        for section, keys in WAYS[way].items():
            recipe[section] = {**recipe.get(section, {}), **keys}
        (here / f"{way}.yaml").write_text(yaml.safe_dump(recipe))
        try:
            made = (str(here / "kit"), "--target", transfer.TARGET, "--recipe", str(here / f"{way}.yaml"))
            manifest = transfer.transferred(here, threads, here / way, *made)
            result = here / f"{way}-{'-'.join(extra)}.json"
            if not result.exists():
                asked = ["--data", str(here / "test.jsonl"), "--json", str(result), *(["--oracle", str(data / name / "train.jsonl")] if way == "paper" else [])]
                transfer.translora(here, threads, "evaluate", str(here / way), *asked, *(["--arms", *extra] if extra else []))
        except transfer.Failed:
            if way == "paper":  # its arms are those that the others are compared with
                raise
            found[way] = {}
            continue
        found[way] = {"evaluation": json.loads(result.read_text()), "manifest": manifest}
    return found


def accuracy(chain: Chain, arm: str) -> float | None:
    way, name = SHOWN[arm]
    found = _arms(chain, way).get(name)
    return None if found is None else float(found["accuracy"])


def recovery(chain: Chain, arm: str) -> float | None:
    """Of an arm, whichever transfer it belongs to; None where it was not made."""
    way, name = SHOWN[arm]
    found = _arms(chain, way)
    return compare.recovery({**_arms(chain, "paper"), name: found[name]}, name) if name in found else None


def _arms(chain: Chain, way: str) -> dict[str, Any]:
    arms: dict[str, Any] = chain.get(way, {}).get("evaluation", {}).get("arms", {})
    return arms


def interval(ours: Sequence[float], theirs: Sequence[float] = ()) -> str:
    """Mean of chains with its 95 % interval, of the differences where there are others."""
    return results.interval(*paired_interval(ours, theirs or [0.0] * len(ours)))


def table(finished: dict[str, dict[int, Chain]]) -> str:
    """Markdown for what is finished: {task: {seed: chain}}."""
    tasks = {name: list(by_seed.values()) for name, by_seed in finished.items() if by_seed}
    chains = [chain for found in tasks.values() for chain in found]
    lines = [f"Commit {results.commit()}. Accuracy on the test rows, mean of the seeds; recovery over all chains with a 95 % interval.", ""]
    heads = [f"{name.split('/')[1]} ({len(found)} seeds)" for name, found in tasks.items()]
    lines += [f"| | {' | '.join(heads)} | recovery |", "|---" * (len(tasks) + 2) + "|"]
    for arm in SHOWN:
        cells = [_mean([accuracy(chain, arm) for chain in found]) for found in tasks.values()]
        recovered = [value for value in (recovery(chain, arm) for chain in chains) if value is not None]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {arm} | {' | '.join(cells)} | {interval(recovered) if recovered else '-'} |")
    for other in ("list, unfiltered", "list, discriminator (paper)"):
        pairs = [(recovery(chain, "default"), recovery(chain, other)) for chain in chains]
        sides = list(zip(*[(a, b) for a, b in pairs if a is not None and b is not None], strict=True))
        if sides:
            lines += ["", f"Default less {other}, chain by chain: {interval(*sides)} of recovery."]
    failed = [way for chain in chains for way, parts in chain.items() if not parts]
    lines += ["", *(f"Failed, and in no mean: {way}, {failed.count(way)} of {len(chains)}." for way in sorted(set(failed)))]
    return "\n".join([*lines, "", *verdicts(chains)])


def verdicts(chains: Sequence[Chain]) -> list[str]:
    """The gate's verdict without real rows beside the one on the test rows. They contradict each other where one ships what the other refuses."""
    pairs = [(found["manifest"]["gate"]["verdict"], found["evaluation"]["gate"]["verdict"]) for chain in chains for found in chain.values() if found]
    counted = {pair: pairs.count(pair) for pair in sorted(set(pairs))}
    lines = ["| gate without real rows | on the test rows | transfers |", "|---|---|---|"]
    lines += [f"| {before} | {after} | {count} |" for (before, after), count in counted.items()]
    return [*lines, "", f"Contradictions: {sum(set(pair) == {'ship', 'refuse'} for pair in pairs)} of {len(pairs)}."]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if known else "-"


def plot(finished: dict[str, dict[int, Chain]], place: Path) -> None:
    """Recovery of each arm in each chain."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    chains = {name: list(by_seed.values()) for name, by_seed in finished.items() if by_seed}
    arms = [arm for arm in SHOWN if arm not in {"bare target", "oracle"} and any(recovery(c, arm) is not None for found in chains.values() for c in found)]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(arms) + 1.2), layout="constrained")
    for number, (name, found) in enumerate(chains.items()):
        points = [(recovery(chain, arm), line) for line, arm in enumerate(arms) for chain in found]
        known = [(value, line + 0.12 * (number - len(chains) / 2)) for value, line in points if value is not None]
        axes.plot(*zip(*known, strict=True), "o", markersize=4, label=name.split("/")[1])
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.axvline(0.9, color="0.7", linewidth=1)
    axes.set_xlabel("recovery: (arm - bare target) / (oracle - bare target)")
    axes.legend(fontsize="small")
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    chosen, threads = transfer.options(__doc__, list(TASKS), "quality", quick=True)
    names = chosen.task or (QUICK if chosen.quick else list(TASKS))
    arms = QUICK_ARMS if chosen.quick else ARMS

    def work(name: str, seed: int) -> Chain:
        return run(name, seed, chosen.data.resolve(), chosen.work.resolve(), threads, arms)

    def show(finished: dict[str, dict[int, Chain]]) -> None:
        if any(finished.values()):
            results.replace("quality-quick" if chosen.quick else "quality", table(finished))
            plot(finished, results.ROOT / "benchmarks" / f"quality{'-quick' if chosen.quick else ''}.svg")

    transfer.run_all(chosen, names, work, show)


if __name__ == "__main__":
    main()
