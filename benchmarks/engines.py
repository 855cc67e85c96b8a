"""Does it matter to the adapter which engine wrote its examples? One kit, transfers on each engine with several seeds, one test set.

    make bench-engines         (or: python benchmarks/engines.py)

The kit is made, and each adapter asked, on the transformers engine, so that the transfers alone differ. Another seed draws other candidates and
another order of training: what two transfers of one engine differ in says how much of the engines' difference is chance. Runs lie in
runs/engines/; what is there is not computed again.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import results
from rounds import EXAMPLE, TARGET, judged_kit, translora

from translora_ray.engines.base import AdapterRef
from translora_ray.engines.select import open_engine
from translora_ray.evaluation.compare import answer_all
from translora_ray.evaluation.statistics import wilson
from translora_ray.kit import Kit
from translora_ray.progress import Display
from translora_ray.prompts import task_prompt
from translora_ray.records import read_rows

SEEDS = 3
WORK = results.ROOT / "runs" / "engines" / results.commit().replace(" ", "-")
"""Of one commit: another's runs would say nothing of it."""
SIDES = {"transformers": "cluster.engines=[2,2]", "vllm": "cluster.engines=[1,1]"}
"""As many engines of each kind as do best on two cores: vLLM's one uses both."""


def main() -> None:
    kit = judged_kit()
    lines = ["| | seed | accuracy (95 % interval) | accepted | candidates | gate |", "|---|---|---|---|---|---|"]
    means = []
    for engine in SIDES:
        arms = []
        for seed in range(SEEDS):
            accuracy, manifest = transferred(kit, engine, seed)
            arms.append(accuracy)
            counts, gate = manifest["counts"], manifest["gate"]["verdict"]
            lines.append(f"| {engine} | {seed} | {results.interval(*arms[-1])} | {counts['accepted']} | {counts['candidates']} | {gate} |")
        means.append([statistics.mean(figures) for figures in zip(*arms, strict=True)])
        lines.append(f"| {engine} | mean | {results.interval(*means[-1])} | | | |")
    (first, low, high), (second, least, most) = means
    within = low <= second <= high and least <= first <= most
    head = f"Commit {results.commit()}; {SEEDS} transfers each. Wanted: each mean within the other's interval; it is{'' if within else ' not'} so."
    results.replace("engines", "\n".join([head, "", *lines]))
    print("\n".join(lines))


def transferred(kit: Kit, engine: str, seed: int) -> tuple[list[float], dict[str, Any]]:
    """The accuracy of a transfer with its interval, and its manifest. What the gate refuses is counted like the rest."""
    run, result = WORK / f"{engine}-{seed}", WORK / f"{engine}-{seed}.json"
    options = ("--recipe", str(EXAMPLE / "recipe.yaml"), "--engine", engine, "--set", SIDES[engine], "--set", f"seed={seed}")
    translora("transfer", kit.path, "--target", TARGET, "--out", str(run), *options, allowed=(0, 1))
    if not result.exists():
        result.write_text(json.dumps(accuracy_of(kit, AdapterRef("transferred", str(run / "adapter")))))
    return json.loads(result.read_text()), json.loads((run / "manifest.json").read_text())


def accuracy_of(kit: Kit, adapter: AdapterRef) -> list[float]:
    """Accuracy on the test rows and its 95 % interval, as `translora evaluate` finds them, without the arms that all transfers have in common."""
    rows = read_rows(EXAMPLE / "test.jsonl")
    prompts = [task_prompt(kit.task.prompt, row.input, kit.task.format) for row in rows]
    engine = open_engine("transformers", TARGET, [adapter])
    with Display() as display:
        scores = answer_all(engine, {"transferred": (prompts, adapter)}, kit.task, kit.seeds, rows, display)["transferred"].scores
    engine.close()
    return [sum(scores) / len(scores), *wilson(sum(scores), len(scores))]


if __name__ == "__main__":
    main()
