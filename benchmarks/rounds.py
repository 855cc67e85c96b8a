"""Benchmarks that compare: sides take turns, round by round, in one run."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import results

from translora_ray.cluster import Vllm
from translora_ray.config import Adapter
from translora_ray.engines.base import AdapterRef
from translora_ray.engines.select import open_engine
from translora_ray.evaluation.compare import answer_all
from translora_ray.evaluation.statistics import wilson
from translora_ray.kit import Kit, choose_seeds, load
from translora_ray.progress import Display
from translora_ray.prompts import task_prompt
from translora_ray.reading import load_task
from translora_ray.recipe import Recipe
from translora_ray.records import Pack, TaskRow, read_rows, request_pack

SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
EXAMPLE = results.ROOT / "examples" / "support_routing"
SETTINGS = Vllm(cpu_cache_gib=1.0)
CPUS = 2
LORA = Adapter(type="lora", rank=16, alpha=32.0, dropout=0.0, modules="all-linear")
"""The usual adapter, for benchmarks in which what it has learnt does not matter."""
Round = Callable[[int], tuple[float, int, int]]
"""Round number -> (seconds, tokens, candidates that are kept)."""
Found = TypeVar("Found", bound=tuple[Any, ...])
"""What a side's round comes to: (seconds, tokens, ...)."""
Part = Callable[[int, int, str], list[str]]
"""(rounds, prompts a round, base) -> lines of RESULTS.md."""


class Side:
    """One side of a comparison in a process of its own, idle while it is not its turn."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(*arguments, theirs))
        self.process.start()
        theirs.close()  # so that a side that dies ends the benchmark
        self.ready = self.pipe.recv()
        """What the side said when it was ready."""

    def round(self, variant: str) -> Callable[[int], Any]:
        def run(turn: int) -> Any:
            self.pipe.send((variant, turn))
            return self.pipe.recv()

        return run

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def example_kit() -> Kit:
    task = load_task(EXAMPLE / "task.yaml")
    rows = read_rows(task.train)
    nothing = AdapterRef("", "")
    return Kit("", task, SOURCE, "", len(rows), choose_seeds(rows, task.seeds, 0), None, "", nothing, SOURCE, "", nothing, None, nothing)


def translora(*arguments: str, allowed: tuple[int, ...] = (0,)) -> None:
    """One of the commands, which must end with one of the codes that are `allowed`."""
    print("translora", *arguments, flush=True)
    code = subprocess.run([sys.executable, "-m", "translora_ray.cli", *arguments], cwd=results.ROOT, check=False).returncode
    if code not in allowed:
        sys.exit(f"translora {arguments[0]} ended with {code}.")


def judged_kit() -> Kit:
    """The example's kit with its discriminator; made where there is none by the same code."""
    code = b"".join((results.ROOT / "translora_ray" / name).read_bytes() for name in ("kit.py", "preparing.py"))
    place = results.ROOT / "runs" / f"bench-kit-{hashlib.sha256(code).hexdigest()[:8]}"
    if not place.exists():
        translora("prepare", str(EXAMPLE / "task.yaml"), "--base", SOURCE, "--out", str(place), "--engine", "transformers")
    return load(place)


def answered(kit: Kit, base: str, adapter: AdapterRef | None, rows: Sequence[TaskRow], result: Path) -> list[float]:
    """Scores of the rows, as `translora evaluate` finds them, of one arm alone, on the transformers engine, which serves every type. They lie in the file
    `result`, and are not computed again where it is there."""
    if result.exists():
        before: list[float] = json.loads(result.read_text())
        return before
    prompts = [task_prompt(kit.task.prompt, row.input, kit.task.format) for row in rows]
    engine = open_engine("transformers", base, [adapter] if adapter else [])
    with Display() as display:
        scores = answer_all(engine, {"accuracy": (prompts, adapter)}, kit, list(rows), display)["accuracy"].scores
    engine.close()
    result.write_text(json.dumps(scores))
    return scores


def accuracy_of(kit: Kit, base: str, adapter: AdapterRef | None, rows: Sequence[TaskRow], result: Path) -> list[float]:
    """Accuracy on the rows and its 95 % interval, from `answered`."""
    scores = answered(kit, base, adapter, rows, result)
    return [sum(scores) / len(scores), *wilson(sum(scores), len(scores))]


def packs_of(turn: int, packs: int, size: int) -> list[Pack]:
    """Requests of a round, others in every round: those that a stream makes, whose pack 0 comes before the first round."""
    return [request_pack(Recipe().seed, 1 + turn * packs + number, size) for number in range(packs)]


def kept(packs: Sequence[Pack]) -> int:
    """Different candidates that no stage has rejected."""
    return len({candidate.input for pack in packs for candidate in pack.open()})


def alternate(sides: Mapping[str, Callable[[int], Found]], rounds: int) -> dict[str, list[Found]]:
    """All sides in turn, round after round, the first of each round changing."""
    measured: dict[str, list[Found]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            found = sides[name](turn)
            print(f"round {turn}: {name} {found[0]:.1f} s, {found[1] / found[0]:.0f} tokens/s", flush=True)
            if turn:  # round 0 warms up
                measured[name].append(found)
    return measured


def table(measured: Mapping[str, Sequence[tuple[Any, ...]]], against: str) -> list[str]:
    """Tokens and kept candidates per second, and their ratio to the side `against` round by round."""
    lines = ["| | tokens/s | kept candidates/s | tokens/s, ratio | candidates/s, ratio |", "|---|---|---|---|---|"]
    for name, rounds in measured.items():
        tokens, candidates = ([found[part] / found[0] for found in rounds] for part in (1, 2))
        other = [[found[part] / found[0] for found in measured[against]] for part in (1, 2)]
        ratios = [results.spread([a / b for a, b in zip(ours, theirs, strict=True)]) for ours, theirs in zip((tokens, candidates), other, strict=True)]
        lines.append(f"| {name} | {results.spread(tokens, 0)} | {results.spread(candidates, 2)} | {' | '.join(ratios)} |")
    return lines


def run_parts(about: str | None, parts: dict[str, Part]) -> None:
    """The command line of a benchmark: chosen parts, each written to RESULTS.md under its name and its base's."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=128, help="prompts a round")
    options.add_argument("--base", choices=[SOURCE, TARGET], default=SOURCE)
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(CPUS)
    for name in chosen.parts or parts:
        head = f"Commit {results.commit()}; medians of {chosen.rounds} rounds (least to most), {chosen.requests} prompts each, {chosen.base}."
        text = "\n".join([head, "", *parts[name](chosen.rounds, chosen.requests, chosen.base)])
        results.replace(f"{name} {chosen.base}", text)
        print(text, flush=True)
