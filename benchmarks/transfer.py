"""Does a transfer reach what training on the real rows reaches? Two public tasks, SmolLM2-135M-Instruct to Gemma-3-270m.

    make bench-transfer        (or: python benchmarks/transfer.py --data DIR --seeds 3)

Each (task, seed) is a whole chain: source adapter, discriminator, transfer, evaluation with the oracle; each seed changes all random
choices. --jobs chains run at a time, on an even share of the cores each: two on one core each finish sooner than one after the other on
two. Results and logs lie in runs/bench/; what is there is not computed again. The table goes to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import results
import yaml

from translora_ray.reading import load_config, load_task

ROOT = Path(__file__).parent.parent
SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
TASKS: dict[str, dict[str, Any]] = {
    "bbh/boolean_expressions": {
        # Epochs and learning rate were chosen on the training rows alone, trained on 100 of the 150 and scored on the other 50, three splits and
        # two seeds: 0.690 after 8 epochs at 1e-3, 0.750 after 20 at 5e-4, 0.763 after 16 at 1e-3.
        "task": {"prompt": "Q: {input}\nA:", "max_new_tokens": 4, "source_training": {"epochs": 16, "learning_rate": 1e-3}},
        # Few shapes of prompts: at temperature 0.7 nearly half of the candidates repeat each other. More examples than rows: they cost nothing but time.
        "recipe": {"training": {"epochs": 6}, "synthesis": {"temperature": 1.0}, "selection": {"quota": 400}},
        "targets": "source+adapter at least 0.80, transferred at least 0.73",
    },
    "intents/clinc_utility": {
        "task": {"prompt": "Message: {input}\nIntent:", "max_new_tokens": 10, "seeds": 15, "source_training": {"epochs": 5}},
        "recipe": {"training": {"epochs": 2}},
        "targets": "source+adapter at least 0.90, recovery at least 0.75",
    },
}


class Failed(RuntimeError):
    """A command of a chain that did not come to its end."""


def translora(here: Path, threads: int, *arguments: str, allowed: tuple[int, ...] = (0,)) -> None:
    """One command of a chain, on `threads` cores, its output in the chain's log; it must end with one of the codes that are `allowed`."""
    began = time.monotonic()
    with (here / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "translora_ray.cli", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=log, stderr=log, check=False).returncode
    if code not in allowed:
        raise Failed(f"{arguments[0]} failed: see {here / 'log.txt'}")
    print(f"{here.name}: {arguments[0]} {time.monotonic() - began:.0f} s", flush=True)


def transferred(here: Path, threads: int, run: Path, *arguments: str) -> dict[str, Any]:
    """The manifest of a transfer. What the gate refuses counts like the rest; what ends with the same code and without a manifest has failed."""
    translora(here, threads, "transfer", *arguments, "--out", str(run), allowed=(0, 1))
    if not (run / "manifest.json").exists():
        raise Failed(f"transfer failed: see {here / 'log.txt'}")
    manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return manifest


def keep_to(here: Path, settings: dict[str, Any]) -> None:
    """Write down what the chain in `here` is made with. Raises `Failed` where it was made with something else, so that a table does not mix them."""
    stored = here / "settings.json"
    if stored.exists() and json.loads(stored.read_text()) != settings:
        raise Failed(f"{here} was made with other settings or defaults: remove it, so that the table does not mix them")
    stored.write_text(json.dumps(settings))


def run(name: str, seed: int, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """One chain; returns evaluation and manifest."""
    here = work / f"{name.split('/')[1]}-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    rows = data / name
    task = {"name": name.split("/")[1], "train": str(rows / "train.jsonl"), "seed": seed, **TASKS[name]["task"]}
    (here / "task.yaml").write_text(yaml.safe_dump(task))
    cluster = {"engine_cpus": threads, "worker_cpus": threads}
    (here / "recipe.yaml").write_text(yaml.safe_dump({"seed": seed, "cluster": cluster, **TASKS[name]["recipe"]}))
    settings = {"task": load_task(here / "task.yaml").model_dump(), "recipe": load_config(here / "recipe.yaml", []).recipe.model_dump()}
    keep_to(here, settings)
    if not (here / "kit").exists():
        translora(here, threads, "prepare", str(here / "task.yaml"), "--base", SOURCE, "--out", str(here / "kit"))
    manifest = transferred(here, threads, here / "run", str(here / "kit"), "--target", TARGET, "--recipe", str(here / "recipe.yaml"))
    if not (here / "result.json").exists():
        extra = ("--oracle", str(rows / "train.jsonl"), "--json", str(here / "result.json"))
        translora(here, threads, "evaluate", str(here / "run"), "--data", str(rows / "test.jsonl"), *extra)
    return {
        "evaluation": json.loads((here / "result.json").read_text()),
        "manifest": manifest,
        "kit": json.loads((here / "kit" / "kit.json").read_text()),
    }


def table(finished: dict[str, dict[int, dict[str, Any]]], jobs: int, threads: int) -> str:
    """Markdown for what is finished: {task: {seed: chain}}."""
    lines = [f"Commit {results.commit()}; {jobs} chains at a time, {threads} core(s) each: seconds are those of such a share.", ""]
    for name, by_seed in finished.items():
        if not by_seed:
            continue
        seeds = sorted(by_seed)
        chains = [by_seed[seed] for seed in seeds]
        arms = list(chains[0]["evaluation"]["arms"])
        lines += [f"### {name}", "", f"n = {chains[0]['evaluation']['n']} test rows; wanted: {TASKS[name]['targets']}.", ""]
        lines += ["| seed | " + " | ".join(arms) + " | recovery | candidates | stream s | training s |", "|---" * (len(arms) + 5) + "|"]
        for seed, chain in zip(seeds, chains, strict=True):
            cells = [f"{chain['evaluation']['arms'][arm]['accuracy']:.3f}" for arm in arms]
            manifest = chain["manifest"]
            spent = [manifest["counts"]["candidates"], round(manifest["last_attempt_seconds"]["stream"]), round(manifest["seconds"]["training"])]
            lines.append("| " + " | ".join(map(str, [seed, *cells, share(chain["evaluation"]["recovery"]), *spent])) + " |")
        means = [spread([chain["evaluation"]["arms"][arm]["accuracy"] for chain in chains]) for arm in arms]
        lines += ["| mean (min to max) | " + " | ".join([*means, spread([chain["evaluation"]["recovery"] or 0.0 for chain in chains])]) + " | | | |", ""]
    return "\n".join(lines)


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def with_data(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with --data: a folder of task rows, which must be there."""
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    chosen = parser.parse_args()
    if not chosen.data.exists():
        sys.exit(f"{chosen.data} does not exist: name the folder with the task rows with --data.")
    return chosen


def options(about: str | None, tasks: Sequence[str] = (), work: str = "bench", quick: bool = False) -> tuple[argparse.Namespace, int]:
    """The command line, and the cores of each chain. `tasks` are those to choose from, `work` is the folder in runs/."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / work)
    parser.add_argument("--jobs", type=int, default=2)
    if tasks:
        parser.add_argument("--task", action="append", choices=tasks, help="default: all")
    if quick:
        parser.add_argument("--quick", action="store_true", help="three tasks")
        parser.add_argument("--more", action="store_true", help="other generators, and more arms")
    chosen = with_data(parser)
    return chosen, max(1, (os.cpu_count() or 1) // chosen.jobs)


def run_all(chosen: argparse.Namespace, tasks: Sequence[str], work: Callable[[str, int], Any], show: Callable[[dict[str, dict[int, Any]]], None]) -> None:
    """`work(task, seed)` for all of them, `chosen.jobs` at a time; `show` gets {task: {seed: chain}} whenever one ended. Exits with 1 where one failed."""
    finished: dict[str, dict[int, Any]] = {name: {} for name in tasks}
    with ThreadPoolExecutor(chosen.jobs) as pool:
        chains = {pool.submit(work, name, seed): (name, seed) for seed in range(chosen.seeds) for name in tasks}
        for chain in as_completed(chains):
            name, seed = chains[chain]
            try:
                finished[name][seed] = chain.result()
            except Failed as failure:
                print(f"{name}, seed {seed}: {failure}", file=sys.stderr, flush=True)
            show(finished)
    if any(len(found) < chosen.seeds for found in finished.values()):
        sys.exit("not all chains came to their end")


def main() -> None:
    chosen, threads = options(__doc__, list(TASKS))

    def work(name: str, seed: int) -> dict[str, Any]:
        return run(name, seed, chosen.data.resolve(), chosen.work.resolve(), threads)

    run_all(chosen, chosen.task or list(TASKS), work, lambda finished: results.replace("transfer", table(finished, chosen.jobs, threads)))


if __name__ == "__main__":
    main()
