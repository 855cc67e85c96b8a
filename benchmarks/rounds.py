"""Benchmarks that compare: sides take turns, round by round, in one run."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import results

from translora_ray.config import Adapter, Recipe, Vllm
from translora_ray.engines.base import AdapterRef
from translora_ray.kit import Kit, choose_seeds, load
from translora_ray.reading import load_task
from translora_ray.records import Pack, read_rows, request_pack

SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
EXAMPLE = results.ROOT / "examples" / "support_routing"
SETTINGS = Vllm(cpu_cache_gib=1.0)
CPUS = 2
LORA = Adapter(type="lora", rank=16, alpha=32.0, dropout=0.0, modules="all-linear")
"""The usual adapter, for benchmarks in which what it has learnt does not matter."""
Round = Callable[[int], tuple[float, int, int]]
"""Round number -> (seconds, tokens, candidates that are kept)."""
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

    def round(self, variant: str) -> Round:
        def run(turn: int) -> tuple[float, int, int]:
            self.pipe.send((variant, turn))
            answer: tuple[float, int, int] = self.pipe.recv()
            return answer

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
    """The example's kit with its discriminator, in runs/bench-kit; made where it is not there."""
    place = results.ROOT / "runs" / "bench-kit"
    if not place.exists():
        translora("prepare", str(EXAMPLE / "task.yaml"), "--base", SOURCE, "--out", str(place), "--engine", "transformers")
    return load(place)


def packs_of(turn: int, packs: int, size: int) -> list[Pack]:
    """Requests of a round, others in every round: those that a stream makes, whose pack 0 comes before the first round."""
    return [request_pack(Recipe().seed, 1 + turn * packs + number, size) for number in range(packs)]


def kept(packs: Sequence[Pack]) -> int:
    """Different candidates that no stage has rejected."""
    return len({candidate.input for pack in packs for candidate in pack.open()})


def alternate(sides: dict[str, Round], rounds: int) -> dict[str, list[tuple[float, int, int]]]:
    """All sides in turn, round after round, the first of each round changing."""
    measured: dict[str, list[tuple[float, int, int]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            found = sides[name](turn)
            print(f"round {turn}: {name} {found[0]:.1f} s, {found[1] / found[0]:.0f} tokens/s", flush=True)
            if turn:  # round 0 warms up
                measured[name].append(found)
    return measured


def table(measured: dict[str, list[tuple[float, int, int]]], against: str) -> list[str]:
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
