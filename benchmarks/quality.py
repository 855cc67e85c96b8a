"""How much of what real rows teach does a transfer keep? The default, the paper's way, one without a discriminator, on public tasks, SmolLM2 to Gemma.

    make bench-quality         (or: python benchmarks/quality.py --data ../shared/data --seeds 3 [--quick | --more])

Each (task, seed) is a whole chain: a kit, a transfer in each way, the arms made from the paper's candidates, and an oracle on the real rows. --quick takes
three tasks; --more adds transfers with the discriminator's cut or another generator, and more arms. --jobs chains run at a time, on an even share of the
cores each.

Logs and runs lie in runs/quality/; what is there is not computed again. Figures of finished chains are kept in benchmarks/quality.json, so that chains may be
run on several days; table and plot are made from it, and say of which commits they are. A chain of another task, recipe or set of ways replaces what was kept.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import results
import transfer
import yaml
from rounds import answered, translora

from translora_ray.answers import find_answers
from translora_ray.config import EPOCHS, Recipe, Synthesis
from translora_ray.engines.base import AdapterRef
from translora_ray.evaluation import gate
from translora_ray.evaluation.compare import summary
from translora_ray.kit import load
from translora_ray.reading import load_task
from translora_ray.records import read_rows
from translora_ray.storage import RunStore
from translora_ray.stream.dedup import normal

SHORT = 4
"""Epochs where there are `CHOSEN_FOR_A_ROW` examples for each row: fewer than `EPOCHS`, as chains are long enough."""
# As many seeds as the paper's hardest task had (15), or one for each label where there are more. Of one seed for each label, as snips_intents would have with
# 7, a base writes little else than copies: 3 % of its candidates became examples, of two for each label 12 % (counted without a look at accuracy).
INTENT = {"prompt": "Message: {input}\nIntent:", "max_new_tokens": 10, "source_training": {"epochs": 5}}
TASKS: dict[str, dict[str, Any]] = {
    "intents/clinc_utility": {"task": {**INTENT, "seeds": 15}, "recipe": {"training": {"epochs": SHORT}}},
    "intents/banking_cards": {"task": {**INTENT, "seeds": 16}, "recipe": {"training": {"epochs": SHORT}}},
    "intents/snips_intents": {"task": {**INTENT, "seeds": 15}, "recipe": {"training": {"epochs": SHORT}}},
    "slots/snips_GetWeather": {
        "task": {"prompt": "Message: {input}\nSlots:", "max_new_tokens": 48, "seeds": 15, "source_training": {"epochs": 4}},
        "recipe": {"training": {"epochs": SHORT}},
    },
    "bbh/boolean_expressions": {
        "task": transfer.TASKS["bbh/boolean_expressions"]["task"],
        "recipe": {"training": {"epochs": 6}, "synthesis": {"temperature": 1.0}},
    },
}
QUICK = list(TASKS)[:3]
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"selection": {"method": "discriminator"}, "synthesis": {"fewest_shots": Synthesis().shots}},
    "default": {},
    "alone": {"selection": {"method": "none"}},
}
"""A recipe's sections that turn the default into each transfer's way. The paper's has as many examples as rows, and a kit of its own, whose task is `open`: a
list of seeds goes on, the discriminator has learnt from such lists, and any answer of the teacher counts. `alone` is a kit without a discriminator; where the
default asks none, it is the default."""
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "cut": {"selection": {"method": "discriminator"}},
    "target": {"synthesis": {"generator": "target"}},
    "turns": {"synthesis": {"generator": ["source", "target"]}},
    "adapter": {"synthesis": {"generator": "adapter"}},
}
"""More ways to do it."""
ARMS, MORE_ARMS = ["unfiltered"], ["seeds_only", "importance", "excess", "both"]
"""Arms that are made from the paper's candidates."""
SHOWN: dict[str, str] = {
    "target_base": "bare target",
    "target_few_shot": "few-shot target",
    "seeds_only": "seeds alone",
    "unfiltered": "list, unfiltered",
    "paper": "list, discriminator (paper)",
    "importance": "list, importance",
    "excess": "list, excess",
    "both": "list, both",
    "default": "default",
    "alone": "default, for a kit without a discriminator",
    "cut": "default, by the discriminator's cut",
    "target": "default, the target base writes",
    "turns": "default, source and target base write in turn",
    "adapter": "default, a generator adapter writes",
    "source_adapter": "source adapter",
    "oracle": "oracle",
}
"""Rows of the table: a transfer's way, or an arm of the paper's evaluation, and its title."""
PAIRS = [("default", "unfiltered"), ("default", "paper"), ("alone", "unfiltered")]
"""Which should be above which."""
DRAWS = 10_000
KEPT = results.ROOT / "benchmarks" / "quality.json"
Chain = dict[str, Any]
"""What is kept of a chain: `commit`, `settings` (a digest), `accuracy` of each of `SHOWN`, and by way `verdicts` (without and with real rows), `agreement` with
the teacher (value and ends), by which a verdict without real rows can be told anew where the gate's rule changes, and `candidates`."""


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


def prepared(name: str, here: Path, data: Path, engine: str, task: dict[str, Any], tested: int | None = None) -> Path:
    """The kit of a task, made where it is not there yet; its test rows lie beside it."""
    file = write_task(name, here, data, tested, **task)
    if not (here / "kit").exists():
        translora("prepare", str(file), "--base", transfer.SOURCE, "--out", str(here / "kit"), "--engine", engine)
    return here / "kit"


def run(name: str, seed: int, data: Path, work: Path, threads: int, more: bool) -> Chain:
    """One chain, on `threads` cores."""
    here, ways = work / f"{name.split('/')[1]}-{seed}", WAYS | (OTHERS if more else {})
    task = write_task(name, here, data, seed=seed, generator_adapter=more, **TASKS[name]["task"])
    rows, asked = read_rows(data / name / "train.jsonl"), load_task(task)
    found = find_answers(asked, rows)
    labels, checked = found.classes, bool(found.classes) or found.answer_words != "any"
    common = {way: {**TASKS[name]["recipe"], **(_as_paper(len(rows), labels) if way == "paper" else {})} for way in ways}
    decide = {
        way: partial(
            Recipe.decided,
            classes=[] if way == "paper" else labels,
            rows=len(rows),
            discriminator={"calibration": []},
            copies=way != "paper" and isinstance(found.answer_words, list),
        )
        for way in ways
    }
    recipes = {way: _recipe(here, way, seed, threads, common[way], sections, decide[way]) for way, sections in ways.items()}
    decided = {way: decide[way](recipe) for way, recipe in recipes.items()}
    if decided["default"].selection.method == "none":
        del ways["alone"], decided["alone"]
    settings = {"task": asked.model_dump() | {"train": name}, "recipes": {way: recipe.model_dump() for way, recipe in decided.items()}, "more": more}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    if (kept := finished().get(name, {}).get(str(seed))) and kept["settings"] == digest:
        return dict(kept)
    transfer.keep_to(here, settings)
    kit = here / "kit"
    if not kit.exists():
        transfer.translora(here, threads, "prepare", str(task), "--base", transfer.SOURCE, "--out", str(kit))
    kits = dict.fromkeys(ways, kit) | ({"paper": _paper_kit(name, here, data, threads, seed)} if checked else {})
    arms, oracle = [*ARMS, *(MORE_ARMS if more else [])], data / name / "train.jsonl"
    chain: Chain = {"commit": results.commit(), "settings": digest, "accuracy": {}, "verdicts": {}, "agreement": {}, "candidates": {}}
    answers: dict[str, list[float]] = {}
    for way in ways:
        out = here / way
        manifest = transfer.transferred(here, threads, out, str(kits[way]), "--target", transfer.TARGET, "--recipe", str(here / f"{way}.yaml"))
        if way == "paper":
            result = _evaluated(here, threads, out, arms, oracle)
            given = RunStore(str(out)).answers()
            answers = {arm: [row["scores"][arm] for row in given] for arm in result["arms"]}
            chain["accuracy"] = {arm: value["accuracy"] for arm, value in result["arms"].items() if arm in SHOWN}
        else:
            adapter = AdapterRef("transferred", str(out / "adapter"))
            scores = answered(load(kit), transfer.TARGET, adapter, read_rows(here / "test.jsonl"), here / f"{way}-scores.json")
            result = summary(answers | {"transferred": scores}, "exact_match")
            result["gate"] = gate.on_rows(recipes[way].gate, result["against"])
        chain["accuracy"][way] = result["arms"]["transferred"]["accuracy"]
        chain["verdicts"][way] = [manifest["gate"]["verdict"], result["gate"]["verdict"]]
        chain["agreement"][way] = agreement(manifest)
        chain["candidates"][way] = manifest["counts"]["candidates"]
    if "alone" not in ways:
        chain["accuracy"]["alone"] = chain["accuracy"]["default"]
    return chain


def _as_paper(rows: int, labels: object) -> dict[str, Any]:
    """As many examples as rows. Of snips_GetWeather's candidates the cut leaves one in thirty, so there may be more."""
    return {"selection": {"quota": rows, **({} if labels else {"max_candidates": 100})}}


def _recipe(
    here: Path, way: str, seed: int, threads: int, common: dict[str, Any], sections: dict[str, dict[str, Any]], decide: Callable[[Recipe], Recipe]
) -> Recipe:
    """The recipe of a way, which also lies in a file. The task's epochs are for `CHOSEN_FOR_A_ROW` examples a row; more examples take no more steps."""
    recipe = {"seed": seed, **common}
    for section, keys in sections.items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    if way != "paper":
        epochs, asked = recipe["training"]["epochs"], decide(Recipe.model_validate({**recipe, "training": {}}))
        recipe["training"] = {**recipe["training"], "epochs": max(1, round(epochs * asked.training.passes / EPOCHS))}
    (here / f"{way}.yaml").write_text(yaml.safe_dump({"cluster": {"engine_cpus": threads, "worker_cpus": threads}, **recipe}))
    return Recipe.model_validate(recipe)


def _paper_kit(name: str, here: Path, data: Path, threads: int, seed: int) -> Path:
    """The same source adapter, any answer of the teacher, and a discriminator that has learnt from lists that go on."""
    kit = here / "paper-kit"
    task = write_task(name, here / "open", data, seed=seed, labels="open", **TASKS[name]["task"])
    if not kit.exists():
        transfer.translora(here, threads, "prepare", str(task), "--base", transfer.SOURCE, "--adapter", str(here / "kit" / "adapter"), "--out", str(kit))
    return kit


def _evaluated(here: Path, threads: int, out: Path, arms: list[str], oracle: Path) -> dict[str, Any]:
    result = here / f"{out.name}-{'-'.join(arms)}.json"
    if not result.exists():
        options = ("--oracle", str(oracle), "--arms", *arms, "--json", str(result))
        transfer.translora(here, threads, "evaluate", str(out), "--data", str(here / "test.jsonl"), *options)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def agreement(manifest: dict[str, Any]) -> list[float]:
    """Agreement with the teacher, as the gate measured it, and the ends of its interval."""
    (found,) = (each for each in manifest["gate"]["checks"] if each["name"] == "agreement with the teacher")
    return [found["value"], found["low"], found["high"]]


def finished() -> dict[str, dict[str, Chain]]:
    """{task: {seed: chain}} of what is kept."""
    found: dict[str, dict[str, Chain]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return found


def keep(chains: dict[str, dict[int, Chain]]) -> dict[str, dict[str, Chain]]:
    """Add chains to what is kept; returns all of it."""
    found = finished()
    for name, by_seed in chains.items():
        found.setdefault(name, {}).update({str(seed): chain for seed, chain in by_seed.items()})
    kept = {name: dict(sorted(found[name].items())) for name in TASKS if found.get(name)}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def recovery(chain: Chain, arm: str) -> float | None:
    """(arm - bare target) / (oracle - bare target); None where the arm was not made."""
    found = chain["accuracy"]
    return (found[arm] - found["target_base"]) / (found["oracle"] - found["target_base"]) if arm in found else None


def interval(by_task: Sequence[Sequence[float]]) -> str:
    """Mean of the tasks' means, with a 95 % interval over seeds: chains are drawn anew within each task, whose test rows its seeds share, and their deviations
    taken by sqrt(n / (n - 1)), as few chains vary too little among themselves. Of single seeds there is none."""
    mean = statistics.mean(map(statistics.mean, by_task))
    if min(map(len, by_task)) < 2:
        return f"{mean:.3f}"
    draw = numpy.random.default_rng(0)
    apart = [draw.choice(values, (DRAWS, len(values))).mean(axis=1) - statistics.mean(values) for values in by_task]
    wider = [deviations * (len(values) / (len(values) - 1)) ** 0.5 for deviations, values in zip(apart, by_task, strict=True)]
    return results.interval(mean, *(mean + float(end) for end in numpy.quantile(numpy.mean(wider, axis=0), (0.025, 0.975))))


def gain(chain: Chain, ours: str, theirs: str) -> float | None:
    """By how much more one arm recovers than another."""
    a, b = recovery(chain, ours), recovery(chain, theirs)
    return None if a is None or b is None else a - b


def by_task(kept: dict[str, dict[str, Chain]], figure: Callable[[Chain], float | None]) -> list[list[float]]:
    """The figure of each task's chains, where they have it; tasks of which none has it left out."""
    found = [[value for chain in by_seed.values() if (value := figure(chain)) is not None] for by_seed in kept.values()]
    return [values for values in found if values]


def table(kept: dict[str, dict[str, Chain]]) -> str:
    """Markdown for what is finished."""
    chains = [chain for by_seed in kept.values() for chain in by_seed.values()]
    commits = ", ".join(sorted({chain["commit"] for chain in chains}))
    lines = [f"Commits {commits}. Accuracy on the test rows, mean of the seeds; recovery is the mean of the tasks', with a 95 % interval over seeds.", ""]
    heads = [f"{name.split('/')[1]} ({len(by_seed)} seeds)" for name, by_seed in kept.items()]
    lines += [f"| | {' | '.join(heads)} | recovery |", "|---" * (len(kept) + 2) + "|"]
    for arm, title in SHOWN.items():
        cells = [[chain["accuracy"][arm] for chain in by_seed.values() if arm in chain["accuracy"]] for by_seed in kept.values()]
        if recovered := by_task(kept, partial(recovery, arm=arm)):
            lines.append(f"| {title} | {' | '.join(f'{statistics.mean(cell):.3f}' if cell else '-' for cell in cells)} | {interval(recovered)} |")
    lines.append("")
    for ours, theirs in PAIRS:
        if apart := by_task(kept, partial(gain, ours=ours, theirs=theirs)):
            lines.append(f"{SHOWN[ours][0].upper()}{SHOWN[ours][1:]} less {SHOWN[theirs]}, chain by chain: {interval(apart)} of recovery.  ")
    return "\n".join([*lines, "", *verdicts(chains)])


def verdicts(chains: Sequence[Chain]) -> list[str]:
    """The gate's verdict without real rows beside the one on the test rows, of chains whose agreement was kept: by today's rule. They contradict each other
    where one ships what the other refuses."""
    counted = Counter(tuple(pair) for chain in chains for way, pair in chain["verdicts"].items() if way in chain["agreement"])
    lines = ["| gate without real rows | on the test rows | transfers |", "|---|---|---|"]
    lines += [f"| {before} | {after} | {counted[before, after]} |" for before, after in sorted(counted)]
    same, contradictions = (sum(count for pair, count in counted.items() if wrong(pair)) for wrong in (_same, _contradicting))
    return [*lines, "", f"The same in {same} of {counted.total()}; contradictions (one ships what the other refuses): {contradictions}."]


def _same(pair: tuple[str, ...]) -> bool:
    return len(set(pair)) == 1


def _contradicting(pair: tuple[str, ...]) -> bool:
    return set(pair) == {"ship", "refuse"}


def plot(kept: dict[str, dict[str, Chain]], place: Path) -> None:
    """Recovery of each arm in each chain."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    chains = {name: list(by_seed.values()) for name, by_seed in kept.items()}
    arms = [arm for arm in SHOWN if arm not in {"target_base", "oracle"} and any(recovery(c, arm) is not None for found in chains.values() for c in found)]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(arms) + 1.2), layout="constrained")
    for number, (name, found) in enumerate(chains.items()):
        points = [(recovery(chain, arm), line) for line, arm in enumerate(arms) for chain in found]
        known = [(value, line + 0.12 * (number - len(chains) / 2)) for value, line in points if value is not None]
        axes.plot(*zip(*known, strict=True), "o", markersize=4, label=name.split("/")[1])
    axes.set_yticks(range(len(arms)), [SHOWN[arm] for arm in arms])
    axes.invert_yaxis()
    axes.axvline(0.9, color="0.7", linewidth=1)
    axes.set_xlabel("recovery: (arm - bare target) / (oracle - bare target)")
    axes.legend(fontsize="small")
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    chosen, threads = transfer.options(__doc__, list(TASKS), "quality", quick=True)
    names = chosen.task or (QUICK if chosen.quick else list(TASKS))

    def work(name: str, seed: int) -> Chain:
        return run(name, seed, chosen.data.resolve(), chosen.work.resolve(), threads, chosen.more)

    def show(chains: dict[str, dict[int, Chain]]) -> None:
        if any(chains.values()):
            kept = keep(chains)
            results.replace("quality", table(kept))
            plot(kept, KEPT.with_suffix(".svg"))

    transfer.run_all(chosen, names, work, show)


if __name__ == "__main__":
    main()
