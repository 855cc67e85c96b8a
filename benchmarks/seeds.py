"""Do a kit's seeds stand for the kinds of answers that its rows have? Ways to choose them, on tasks whose answers are lists of slots.

    make bench-seeds           (or: python benchmarks/seeds.py --data DIR)

A slot's name is a kind of answer, which kit and transfer know nothing of. What no seed has, a base seldom writes. Training rows alone, no model.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import results
import transfer

from translora_ray.kit import by_coverage, choose_seeds
from translora_ray.records import TaskRow, read_rows

SEEDS, DRAWS = 15, 20
TASKS = ["snips_GetWeather", "snips_PlayMusic", "snips_AddToPlaylist"]


def drawn(rows: Sequence[TaskRow], seed: int) -> list[TaskRow]:
    return random.Random(seed).sample(list(rows), SEEDS)


def by_inputs(rows: Sequence[TaskRow], seed: int) -> list[TaskRow]:
    return by_coverage(random.Random(seed).sample(list(rows), len(rows)), SEEDS)


def ours(rows: Sequence[TaskRow], seed: int) -> list[TaskRow]:
    return choose_seeds(rows, SEEDS, seed)


WAYS: dict[str, Callable[[Sequence[TaskRow], int], list[TaskRow]]] = {"drawn": drawn, "by inputs alone": by_inputs, "default: by inputs and answers": ours}


def kinds(rows: Sequence[TaskRow]) -> dict[str, float]:
    """The share of the rows whose answer has each slot."""
    found = Counter(name for row in rows for name in {slot.split("=")[0] for slot in row.target.split("; ")})
    return {name: count / len(rows) for name, count in found.items()}


def measured(real: dict[str, float], seeds: Sequence[TaskRow]) -> tuple[float, float]:
    """(slots of a row that no seed has, distance: the sum over slots of how far their shares of rows and of seeds lie apart); `real` are the rows' kinds."""
    shown = kinds(seeds)
    return sum(share for name, share in real.items() if name not in shown), sum(abs(share - shown.get(name, 0)) for name, share in real.items())


def main() -> None:
    data = transfer.with_data(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)).data
    lines = [f"Commit {results.commit()}; {SEEDS} seeds, means of {DRAWS} random seeds.", ""]
    lines += ["| task | seeds | slots of a row that no seed has | distance |", "|---|---|---|---|"]
    for name in TASKS:
        rows = read_rows(data / "slots" / name / "train.jsonl")
        real = kinds(rows)
        for way, choose in WAYS.items():
            missing, apart = map(statistics.mean, zip(*(measured(real, choose(rows, seed)) for seed in range(DRAWS)), strict=True))
            lines.append(f"| {name} | {way} | {missing:.2f} of {sum(real.values()):.2f} | {apart:.2f} |")
    results.replace("seeds", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
