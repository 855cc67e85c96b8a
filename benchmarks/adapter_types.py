"""Adapters of one type moved to another: LoRA, DoRA and prompt tuning, each as source and as target.

    make bench-types           (or: python benchmarks/adapter_types.py)

A kit for each source type on the example's rows, without a discriminator, and a transfer to each target type. Runs lie in runs/types/; what
is there is not computed again.
"""

from __future__ import annotations

from typing import Any

import results
import yaml
from rounds import EXAMPLE, SOURCE, TARGET, accuracy_of, translora

from translora_ray.engines.base import AdapterRef
from translora_ray.kit import Kit, load
from translora_ray.records import read_rows

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


def made(source: str) -> Kit:
    place = WORK / source / "kit"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        task = yaml.safe_load((EXAMPLE / "task.yaml").read_text())
        task |= {"train": str(EXAMPLE / "train.jsonl"), "source_adapter": {"type": source}, "source_training": TYPES[source]}
        (place.parent / "task.yaml").write_text(yaml.safe_dump(task))
        translora("prepare", str(place.parent / "task.yaml"), "--base", SOURCE, "--out", str(place), "--no-discriminator", *ENGINE)
    return load(place)


def moved(kit: Kit, source: str, target: str) -> AdapterRef:
    """The adapter of a transfer from one type to another."""
    run = WORK / source / target
    recipe = {
        "selection": {"quota": QUOTA, "method": "none"},
        "gate": {"held_out": 0.0},
        "training": TYPES[target],
        "adapter": {"type": target},
        "cluster": {"engines": [2, 2]},
    }
    (WORK / source / f"{target}.yaml").write_text(yaml.safe_dump(recipe))
    translora("transfer", kit.path, "--target", TARGET, "--out", str(run), "--recipe", str(WORK / source / f"{target}.yaml"), *ENGINE)
    return AdapterRef(target, str(run / "adapter"))


def measured(name: str, kit: Kit, base: str, adapter: AdapterRef | None) -> list[float]:
    return accuracy_of(kit, base, adapter, read_rows(EXAMPLE / "test.jsonl")[:TESTED], WORK / f"{name}.json")


def main() -> None:
    lines = [f"Commit {results.commit()}; {QUOTA} examples a transfer, no discriminator, n = {TESTED} test rows, one run each.", ""]
    lines += [f"| source adapter | on {SOURCE} | bare target | to LoRA | to DoRA | to prompt tuning |", "|---|---|---|---|---|---|"]
    for source in TYPES:
        kit = made(source)
        arms = [measured(source, kit, SOURCE, kit.adapter), measured("bare", kit, TARGET, None)]
        arms += [measured(f"{source}-{target}", kit, TARGET, moved(kit, source, target)) for target in TYPES]
        lines.append(f"| {source.replace('_', ' ')} | {' | '.join(results.interval(*arm, digits=2) for arm in arms)} |")
        results.replace("types", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
