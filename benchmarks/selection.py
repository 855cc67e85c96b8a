"""Which prompts should an adapter of a task with many labels learn from? Ways to write and to select them, and an adapter trained on as many of each.

    make bench-selection       (or: python benchmarks/selection.py --data ../shared/data [--task intents/snips_intents])

Adapters on Gemma are asked the training rows that are no seeds, which no transfer sees, so that defaults can be chosen without a look at test rows. In each
way the teacher must answer with the label that was asked for. Files lie in runs/selection/; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import quality
import results
import transfer
from rounds import SOURCE, TARGET, accuracy_of

from translora_ray import adapters, models
from translora_ray.config import CHOOSING, EXAMPLES_FOR_A_ROW, Adapter, Recipe, Selection, Synthesis, Training
from translora_ray.engines.base import AdapterRef, Engine
from translora_ray.engines.select import open_engine
from translora_ray.kit import Kit, load
from translora_ray.progress import Display
from translora_ray.records import Candidate, Pack, TaskRow, read_rows, request_pack
from translora_ray.stream.dedup import SeedFilter, Seen
from translora_ray.stream.discriminate import Discriminator
from translora_ray.stream.synthesize import Synthesizer
from translora_ray.stream.teach import Teacher
from translora_ray.training.task import task_pairs, train_adapter

WORK = results.ROOT / "runs" / "selection"
TASKS = ["intents/clinc_utility", "intents/snips_intents"]
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "the discriminator's cut": ({}, {"method": "discriminator"}),
    "excess, of twice as many": ({}, {"method": "excess"}),
    "temperature 1.5": ({"temperature": 1.5}, {}),
    "two seeds shown, not five": ({"shots": 2}, {}),
    "the target base writes": ({"generator": "target"}, {}),
}
"""Title: what differs from the default in synthesis and in selection."""
AT_ONCE = 4
"""Packs that an engine gets together."""
MOST = 6144
"""Candidates after which a way is left with what it has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--task", action="append", choices=TASKS, help="default: both")
    options = transfer.with_data(parser)
    data = options.data.resolve()
    lines = ["| task | way | examples | of candidates | copies of seeds | least of a label | accuracy (95 % interval) |", "|---|---|---|---|---|---|---|"]
    for name in options.task or TASKS:
        here = WORK / name.split("/")[1]
        kit = load(quality.prepared(name, here, data, options.engine, quality.TASKS[name]["task"]))
        learnt = read_rows(data / name / "train.jsonl")
        asked = [row for row in learnt if row.input not in kit.seed_inputs]
        for way in WAYS:
            lines.append(f"| {kit.task.name} | {way} | {' | '.join(compared(kit, here / way.replace(' ', '-'), way, asked, len(learnt), options.engine))} |")
    head = f"Commit {results.commit()}; {EXAMPLES_FOR_A_ROW} examples for each row, {quality.EPOCHS} epochs, one training each."
    results.replace("selection", "\n".join([head, "", *lines]))
    print("\n".join([head, *lines]))


def compared(kit: Kit, here: Path, way: str, asked: list[TaskRow], rows: int, engine: Any) -> list[str]:
    """Cells of the table for one way, whose files lie in `here`."""
    here.mkdir(exist_ok=True)
    if not (here / "written.json").exists():
        (here / "written.json").write_text(json.dumps(written(kit, way, rows, engine)))
    found = json.loads((here / "written.json").read_text())
    examples = [TaskRow(*pair) for pair in found["examples"]]
    if not (here / "adapter").exists():
        wanted = adapters.inherit(adapters.inspect(kit.adapter.path), Adapter(), models.linear_shapes(TARGET))
        with Display() as display:
            pairs, training = task_pairs(kit.task, examples), Training(epochs=quality.EPOCHS)
            train_adapter(TARGET, pairs, wanted, training, 0, here / "adapter", display.phase(way).step)
    accuracy = accuracy_of(kit, TARGET, AdapterRef("adapter", str(here / "adapter")), asked, here / "scores.json")
    least = min(Counter(row.target for row in examples)[label] for label in kit.task.classes)
    counts = [len(examples), found["candidates"], f"{found['copies'] / found['candidates']:.0%}", least]
    return [*map(str, counts), results.interval(*accuracy)]


def written(kit: Kit, way: str, rows: int, kind: Any) -> dict[str, Any]:
    """The examples of one way, as a stream finds them, but for its engines and its order of packs."""
    synthesis, selection = Synthesis.model_validate(WAYS[way][0]), Selection.model_validate(WAYS[way][1])
    recipe = Recipe(synthesis=synthesis, selection=selection).decided(kit.task.classes, rows, judged=True)
    settings, selection = recipe.synthesis.settled(kit.task.classes), recipe.selection.settled(by_label=True, judged=True)
    engine = open_engine(kind, SOURCE, [kit.adapter, kit.discriminator_adapter])
    writer = open_engine(kind, TARGET, []) if synthesis.generator == ("target",) else engine
    quota, chooses = recipe.selection.quota or 0, selection.method in CHOOSING
    with Display() as display:
        accepted, counts = accept(kit, engine, Synthesizer(writer, settings, kit.seeds, kit.task.classes), selection, quota * (2 if chooses else 1), display)
    for each in {id(engine): engine, id(writer): writer}.values():
        each.close()
    if chooses:
        accepted.sort(key=lambda candidate: -(candidate.excess or 0.0))
    return {"examples": [(candidate.input, candidate.target) for candidate in accepted[:quota]], **counts}


def accept(kit: Kit, engine: Engine, writer: Synthesizer, selection: Selection, wanted: int, display: Display) -> tuple[list[Candidate], dict[str, int]]:
    """(accepted candidates, counts of all candidates and of those that copy a seed)."""
    copies = SeedFilter(kit.seed_inputs, selection.near_duplicate, selection.seed_overlap)
    judge = Discriminator(engine, kit.task.name, kit.discriminator_adapter, selection.threshold)
    teacher = Teacher(engine, kit.task, kit.adapter, selection=selection, by_excess=selection.method == "excess")
    seen, accepted, counts, phase = Seen(selection.near_duplicate), list[Candidate](), Counter[str](), display.phase("examples")
    size = writer.settings.pack_size
    while len(accepted) < wanted and counts["candidates"] < MOST:
        first = counts["candidates"] // size
        pack = Pack(0, [candidate for number in range(first, first + AT_ONCE) for candidate in request_pack(0, number, size).candidates])
        copies.process(writer.process(pack))
        counts.update(candidates=len(pack.candidates), copies=sum("seed" in (candidate.reason or "") for candidate in pack.candidates))
        if selection.method == "discriminator":
            judge.process(pack)
        for candidate in teacher.process(pack).open():
            if not seen.repeats(candidate.input):
                seen.add(candidate.input)
                accepted.append(candidate)
        phase.update(min(wanted, len(accepted)), wanted, f"{counts['candidates']} candidates")
    return accepted, counts


if __name__ == "__main__":
    main()
