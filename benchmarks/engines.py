"""Does it matter to the adapter which engine wrote its examples? One kit, transfers on each engine with several seeds, one test set.

    make bench-engines         (or: python benchmarks/engines.py)

The kit is made, and each adapter asked, on the transformers engine, so that the transfers alone differ. Another seed draws other candidates and
another order of training: what two transfers of one engine differ in says how much of the engines' difference is chance. Runs lie in
runs/engines/; what is there is not computed again.
"""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import results
from rounds import EXAMPLE, TARGET, accuracy_of, judged_kit, translora

from translora_ray.engines.base import AdapterRef
from translora_ray.kit import Kit
from translora_ray.records import read_rows

SEEDS = 3
WORK = results.ROOT / "runs" / "engines" / results.commit().replace(" ", "-")
"""Of one commit: another's runs would say nothing of it."""
SIDES = {"transformers": "cluster.engines=[2,2]", "vllm": "cluster.engines=[1,1]"}
"""As many engines of each kind as do best on two cores: vLLM's one uses both."""


def main() -> None:
    kit = judged_kit()
    lines = ["| | seed | accuracy (95 % interval) | accepted | candidates | gate |", "|---|---|---|---|---|---|"]
    means, accuracies = [], []
    for engine in SIDES:
        arms = []
        for seed in range(SEEDS):
            accuracy, manifest = transferred(kit, engine, seed)
            arms.append(accuracy)
            counts, gate = manifest["counts"], manifest["gate"]["verdict"]
            lines.append(f"| {engine} | {seed} | {results.interval(*arms[-1])} | {counts['accepted']} | {counts['candidates']} | {gate} |")
        accuracies.append([arm[0] for arm in arms])
        means.append([statistics.mean(figures) for figures in zip(*arms, strict=True)])
        lines.append(f"| {engine} | mean | {results.interval(*means[-1])} | | | |")
    (first, low, high), (second, least, most) = means
    within = low <= second <= high and least <= first <= most
    head = f"Commit {results.commit()}; {SEEDS} transfers each. Wanted: each mean within the other's interval; it is{'' if within else ' not'} so."
    error = math.sqrt(sum(statistics.variance(found) / SEEDS for found in accuracies))
    foot = f"Transfers of one engine differ, too: the difference of the means is {second - first:+.3f}, its standard error by them {error:.3f}."
    results.replace("engines", "\n".join([head, "", *lines, "", foot]))
    print("\n".join(lines))


def transferred(kit: Kit, engine: str, seed: int) -> tuple[list[float], dict[str, Any]]:
    """The accuracy of a transfer with its interval, and its manifest. What the gate refuses is counted like the rest."""
    run, result = WORK / f"{engine}-{seed}", WORK / f"{engine}-{seed}.json"
    options = ("--recipe", str(EXAMPLE / "recipe.yaml"), "--engine", engine, "--set", SIDES[engine], "--set", f"seed={seed}")
    translora("transfer", kit.path, "--target", TARGET, "--out", str(run), *options, allowed=(0, 1))
    accuracy = accuracy_of(kit, TARGET, AdapterRef("transferred", str(run / "adapter")), read_rows(EXAMPLE / "test.jsonl"), result)
    return accuracy, json.loads((run / "manifest.json").read_text())


if __name__ == "__main__":
    main()
