"""Adapters of one type moved to another: LoRA, DoRA and prompt tuning, each as source and as target.

    make bench-types           (or: python benchmarks/adapter_types.py)

A kit for each source type on the example's rows, without a discriminator, and a transfer to each target type. Runs lie in runs/types/; what
is there is not computed again.
"""

from __future__ import annotations

import json
from typing import Any

import results
import yaml
from rounds import EXAMPLE, SOURCE, TARGET, translora

WORK = results.ROOT / "runs" / "types"
TYPES: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 4, "learning_rate": 5e-4},
    "dora": {"epochs": 4, "learning_rate": 5e-4},
    "prompt_tuning": {"epochs": 10, "learning_rate": 0.02},
}
"""How an adapter of each type is trained, as source and as target."""
QUOTA, TESTED = 120, 100
ENGINE = ("--engine", "transformers")
"""It serves every type."""


def kit(source: str) -> str:
    place = WORK / source / "kit"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        task = yaml.safe_load((EXAMPLE / "task.yaml").read_text())
        task |= {"train": str(EXAMPLE / "train.jsonl"), "source_adapter": {"type": source}, "source_training": TYPES[source]}
        (place.parent / "task.yaml").write_text(yaml.safe_dump(task))
        translora("prepare", str(place.parent / "task.yaml"), "--base", SOURCE, "--out", str(place), "--no-discriminator", *ENGINE)
    return str(place)


def moved(source: str, target: str) -> dict[str, Any]:
    """The evaluation of a transfer from one type to another."""
    run, result = WORK / source / target, WORK / source / f"{target}.json"
    recipe = {
        "selection": {"quota": QUOTA, "method": "none"},
        "gate": {"held_out": 0.0},
        "training": TYPES[target],
        "adapter": {"type": target},
        "cluster": {"engines": [2, 2]},
    }
    (WORK / source / f"{target}.yaml").write_text(yaml.safe_dump(recipe))
    translora("transfer", kit(source), "--target", TARGET, "--out", str(run), "--recipe", str(WORK / source / f"{target}.yaml"), *ENGINE)
    if not result.exists():
        rows = WORK / "test.jsonl"
        rows.write_text("\n".join((EXAMPLE / "test.jsonl").read_text().splitlines()[:TESTED]) + "\n")
        translora("evaluate", str(run), "--data", str(rows), "--json", str(result), *ENGINE)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def main() -> None:
    lines = [f"Commit {results.commit()}; {QUOTA} examples a transfer, no discriminator, n = {TESTED} test rows, one run each.", ""]
    lines += [f"| source adapter | on {SOURCE} | bare target | to LoRA | to DoRA | to prompt tuning |", "|---|---|---|---|---|---|"]
    for source in TYPES:
        kit(source)
        arms = [moved(source, target)["arms"] for target in TYPES]
        cells = [f"{arms[0][arm]['accuracy']:.2f}" for arm in ("source_adapter", "target_base")]
        cells += [results.interval(*(one["transferred"][figure] for figure in ("accuracy", "low", "high")), digits=2) for one in arms]
        lines.append(f"| {source.replace('_', ' ')} | {' | '.join(cells)} |")
        results.replace("types", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
