"""How many examples should an adapter learn from? Adapters trained on more and more of one run's, and longer on as many.

    make bench-amount          (or: python benchmarks/amount.py --data DIR)

They are asked the training rows of clinc_utility that are no seeds, which no transfer sees, so that the default can be chosen without a look at test rows.
Files lie in runs/amount/; what is there is not computed again.
"""

from __future__ import annotations

import argparse

import quality
import results
import transfer
from rounds import TARGET, accuracy_of, translora

from translora_ray.engines.base import AdapterRef
from translora_ray.evaluation.arms import Arms
from translora_ray.kit import load
from translora_ray.progress import Display
from translora_ray.recipe import Recipe
from translora_ray.records import TaskRow, read_rows
from translora_ray.storage import MANIFEST, RunStore

NAME = "intents/clinc_utility"
WORK = results.ROOT / "runs" / "amount"
MOST = 2
WAYS: list[tuple[float, int, int]] = [(1, 4, 2), (1, 8, 1), (1.5, 4, 1), (2, 2, 1), (2, 4, 2)]
"""(examples for a row, epochs, trainings)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    options = transfer.with_data(parser)
    data = options.data.resolve()
    kit, run = load(quality.prepared(NAME, WORK, data, options.engine, quality.TASKS[NAME]["task"])), WORK / "run"
    learnt = read_rows(data / NAME / "train.jsonl")
    asked = [row for row in learnt if row.input not in kit.seed_inputs]
    sets = ("--set", f"selection.quota={MOST * len(learnt)}", "--set", "gate.held_out=0", "--set", "training.epochs=1")
    translora("transfer", kit.path, "--target", TARGET, "--out", str(run), "--engine", options.engine, *sets)
    store = RunStore(str(run))
    manifest = store.read_json(MANIFEST)
    accepted = [TaskRow(candidate.input, candidate.target or "") for candidate in store.candidates() if candidate.accepted]
    lines = ["| examples for a row | epochs | steps | accuracy of each training (95 % interval) |", "|---|---|---|---|"]
    for times, epochs, trainings in WAYS:
        rows, found = accepted[: round(times * len(learnt))], []
        recipe = Recipe.model_validate({**manifest["recipe"], "training": {**manifest["recipe"]["training"], "epochs": epochs}})
        for again in range(trainings):
            name = f"{times:g}x-{epochs}"
            place = WORK / (f"{name}-{again}" if again else name)
            if not place.exists():
                with Display() as display:
                    Arms(kit, manifest, recipe, store, WORK, display).trained((), {name: rows}, again)
            found.append(results.interval(*accuracy_of(kit, TARGET, AdapterRef(place.name, str(place)), asked, WORK / f"{place.name}.json")))
        steps = epochs * -(-len(rows) // recipe.training.batch_size)
        lines.append(f"| {times:g} | {epochs} | {steps} | {'; '.join(found)} |")
    counts = manifest["counts"]
    head = f"Commit {results.commit()}; {len(learnt)} rows, {len(asked)} of them asked; {counts['accepted']} of {counts['candidates']} candidates accepted."
    results.replace("amount", "\n".join([head, "", *lines]))
    print("\n".join([head, *lines]))


if __name__ == "__main__":
    main()
