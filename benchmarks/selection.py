"""Which prompts should an adapter learn from? Ways to write and to select them, and an adapter trained on as many of each.

    make bench-selection       (or: python benchmarks/selection.py --data DIR [--task intents/snips_intents])

Two tasks with many labels, whose prompts are written by label, so that the teacher must answer with the label that was asked for; one whose answers are open.
Adapters on Gemma are asked the training rows that are no seeds, which no transfer sees, so that defaults can be chosen without a look at test rows. Files lie
in runs/selection/; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quality
import results
import transfer
from rounds import TARGET, accuracy_of

from translora_ray import adapters, models
from translora_ray.cluster import Cluster
from translora_ray.config import Adapter, EngineKind, Training
from translora_ray.engines.base import AdapterRef
from translora_ray.engines.select import choose_engine, open_engine
from translora_ray.kit import Kit, load
from translora_ray.progress import Display, Phase
from translora_ray.recipe import CHOSEN_FOR_A_ROW, TAKEN_FOR_A_ROW, Gate, Recipe, Selection, Synthesis
from translora_ray.records import Candidate, TaskRow, read_rows, request_pack
from translora_ray.stream.actor import STAGES, Stage
from translora_ray.stream.choose import choose
from translora_ray.stream.dedup import COPIES, Seen
from translora_ray.stream.plan import Plan
from translora_ray.training.task import task_pairs, train_adapter

WORK = results.ROOT / "runs" / "selection"
Ways = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Title: what differs from the default in synthesis and in selection."""
BY_LABEL: Ways = {
    "default: as they come, half of them at 1.5": ({}, {}),
    "temperature 1": ({"temperature": 1.0}, {}),
    "the discriminator's cut": ({}, {"method": "discriminator"}),
    "excess, of twice as many": ({}, {"method": "excess"}),
    "temperature 1.5": ({"temperature": 1.5}, {}),
    "two seeds shown, not five": ({"shots": 2}, {}),
    "the target base writes": ({"generator": "target"}, {}),
}
OPEN: Ways = {
    "default: half lists, by importance, half seeds with other values": ({}, {}),
    "lists alone": ({"fill": False}, {}),
    "five seeds in each request": ({"fewest_shots": 5}, {}),
    "as they come": ({}, {"method": "none"}),
    "excess, of twice as many": ({}, {"method": "excess"}),
}
TASKS = {
    "intents/clinc_utility": (BY_LABEL, TAKEN_FOR_A_ROW),
    "intents/snips_intents": (BY_LABEL, TAKEN_FOR_A_ROW),
    "slots/snips_GetWeather": (OPEN, CHOSEN_FOR_A_ROW),
}
"""Ways, and how many examples for each row every way makes."""
MOST = 16_384
"""Candidates after which a way is left with what it has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--task", action="append", choices=TASKS, help="default: all")
    options = transfer.with_data(parser)
    data = options.data.resolve()
    for name in options.task or TASKS:
        lines = ["| way | examples | of candidates | copies of seeds | least of a label | accuracy (95 % interval) |", "|---|---|---|---|---|---|"]
        here = WORK / name.split("/")[1]
        kit = load(quality.prepared(name, here, data, options.engine, quality.TASKS[name]["task"]))
        learnt = read_rows(data / name / "train.jsonl")
        asked = [row for row in learnt if row.input not in kit.seed_inputs]
        ways, amount = TASKS[name]
        for way, settings in ways.items():
            recipe = decided(kit, *settings, amount)
            place = here / f"{''.join(letter for letter in way if letter.isalnum())}-{recipe.digest()}"  # what an older way of that name left is another one's
            lines.append(f"| {way} | {' | '.join(compared(kit, place, recipe, amount, asked, choose_engine(options.engine)))} |")
        head = f"{kit.task.name}, commit {results.commit()}; {amount} examples for each row, {_epochs(amount)} epochs, one training each."
        results.replace(f"selection {kit.task.name}", "\n".join([head, "", *lines]))
        print("\n".join([head, *lines]))


def _epochs(amount: int) -> int:
    """As many steps for any amount of examples."""
    return quality.SHORT * CHOSEN_FOR_A_ROW // amount


def compared(kit: Kit, here: Path, recipe: Recipe, amount: int, asked: list[TaskRow], engine: EngineKind) -> list[str]:
    """Cells of the table for one way, whose files lie in `here`."""
    here.mkdir(exist_ok=True)
    if not (here / "written.json").exists():
        (here / "written.json").write_text(json.dumps(written(kit, recipe, engine)))
    found = json.loads((here / "written.json").read_text())
    examples = [TaskRow(*pair) for pair in found["examples"]]
    if not (here / "adapter").exists():
        wanted = adapters.inherit(adapters.inspect(kit.adapter.path), Adapter(), models.linear_shapes(TARGET))
        with Display() as display:
            pairs, training = task_pairs(kit.task, examples), Training(epochs=_epochs(amount))
            train_adapter(TARGET, pairs, wanted, training, 0, here / "adapter", display.phase("training").step)
    accuracy = accuracy_of(kit, TARGET, AdapterRef("adapter", str(here / "adapter")), asked, here / "scores.json")
    labels = Counter(row.target for row in examples)
    least = min(labels[label] for label in kit.task.classes) if kit.task.classes else "-"
    counts = [len(examples), found["candidates"], f"{found['copies'] / found['candidates']:.0%}", least]
    return [*map(str, counts), results.interval(*accuracy)]


def decided(kit: Kit, synthesis: dict[str, Any], selection: dict[str, Any], amount: int) -> Recipe:
    selects = Selection.model_validate({"quota": amount * kit.rows, **selection})
    recipe = Recipe(gate=Gate(held_out=0), synthesis=Synthesis.model_validate(synthesis), selection=selects)
    return recipe.decided(kit.task.classes, kit.rows, kit.discriminator, kit.copies)


def written(kit: Kit, recipe: Recipe, kind: EngineKind) -> dict[str, Any]:
    """The examples of one way, by the stream's own stages, and counts of all candidates and of those that copy a seed."""
    plan = Plan(kit, TARGET, recipe, Cluster(), kind, 1.0, 0.0)
    pools = [(pool, open_engine(pool.engine, pool.base, plan.adapters(pool))) for pool in plan.pools()]
    stages = [stage for pool, engine in pools for role in pool.roles for stage in STAGES[role](plan, pool, engine)]
    with Display() as display:
        accepted, counts = accept(plan, stages, display.phase("examples"))
    for _, engine in pools:
        engine.close()
    return {"examples": [(candidate.input, candidate.target) for candidate in choose(plan, accepted)[0]], **counts}


def accept(plan: Plan, stages: Sequence[Stage], phase: Phase) -> tuple[list[Candidate], dict[str, int]]:
    """(accepted candidates, counts)."""
    size = plan.recipe.synthesis.pack_size
    seen, accepted, counts = Seen(plan.selection.near_duplicate), list[Candidate](), Counter[str]()
    while len(accepted) < plan.wanted and counts["candidates"] < MOST:
        pack = request_pack(0, counts["candidates"] // size, size)
        for stage in stages:
            pack = stage.process(pack)
        counts.update(candidates=len(pack.candidates), copies=sum(candidate.reason in COPIES for candidate in pack.candidates))
        for candidate in pack.open():
            if not seen.repeats(candidate.input):
                seen.add(candidate.input)
                accepted.append(candidate)
        phase.update(min(plan.wanted, len(accepted)), plan.wanted, f"{counts['candidates']} candidates")
    return accepted[: plan.wanted], counts


if __name__ == "__main__":
    main()
