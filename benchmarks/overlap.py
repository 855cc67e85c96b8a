"""What `overlap: true` gains: the same transfer with training after the stream, and beside it.

    make bench-overlap         (or: python benchmarks/overlap.py)

The example's kit, all candidates taken, each transfer a command of its own; both ways have the same cores: two engines and then a worker on both, or an
engine and a worker on one each. The sides take turns. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import results
from rounds import EXAMPLE, TARGET, judged_kit, translora

QUOTA = 96
RECIPE = ("selection.method=none", f"selection.quota={QUOTA}", "gate.held_out=0", "training.epochs=4")
SIDES = {"in turn": ("cluster.engines=[2,2]",), "overlapped": ("overlap=true", "cluster.engines=[1,1]", "cluster.commit_seconds=0")}


def transfer(kit: str, side: str, seed: int, run: Path) -> tuple[float, float, float]:
    """Seconds of (transfer, stream, training)."""
    settings = [part for setting in (*RECIPE, *SIDES[side], f"seed={seed}") for part in ("--set", setting)]
    translora("transfer", kit, "--target", TARGET, "--out", str(run), "--engine", "transformers", *settings)
    manifest = json.loads((run / "manifest.json").read_text())
    attempt = manifest["last_attempt_seconds"]
    return attempt["transfer"], attempt["stream"], manifest["seconds"]["training"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    kit = judged_kit().path
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            for side in list(SIDES)[:: 1 if turn % 2 else -1]:
                found[side].append(transfer(kit, side, turn, Path(scratch) / f"{side.replace(' ', '-')}-{turn}"))
    head = f"Commit {results.commit()}; {rounds} rounds, {QUOTA} examples of {EXAMPLE.name}, SmolLM2 to Gemma, transformers; seconds."
    lines = [head, "", "| | transfer | stream | training | ratio to in turn |", "|---|---|---|---|---|"]
    for side, measured in found.items():
        ratio = results.spread([ours[0] / theirs[0] for ours, theirs in zip(measured, found["in turn"], strict=True)], 2)
        lines.append(f"| {side} | {' | '.join(results.spread(column, 0) for column in zip(*measured, strict=True))} | {ratio} |")
    results.replace("overlap", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
