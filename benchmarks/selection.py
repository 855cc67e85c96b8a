"""Which prompts should an adapter learn from? The candidates of one run, what each rule takes of them, and an adapter trained on as many of each.

    make bench-selection       (or: python benchmarks/selection.py)

Adapters are asked the example's training rows that are no seeds, so that defaults can be chosen without a look at test rows. Files lie in
runs/selection/; what is there is not computed again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import results
from rounds import EXAMPLE, SOURCE, TARGET, accuracy_of, judged_kit, translora

from translora_ray.config import Recipe
from translora_ray.engines.base import AdapterRef
from translora_ray.engines.select import open_engine
from translora_ray.evaluation.arms import WRITTEN, Arms
from translora_ray.evaluation.metrics import says
from translora_ray.kit import Kit
from translora_ray.progress import Display
from translora_ray.records import Candidate, Pack, TaskRow, read_rows
from translora_ray.storage import RunStore
from translora_ray.stream.dedup import Seen
from translora_ray.stream.teach import Teacher

WORK = results.ROOT / "runs" / "selection" / results.commit().replace(" ", "-")
THRESHOLDS: tuple[float, ...] = (0.0, -2.0, float("-inf"))


def main() -> None:
    kit, run = judged_kit(), WORK / "run"
    options = ("--recipe", str(EXAMPLE / "recipe.yaml"), "--set", "selection.method=discriminator", "--set", "selection.threshold=0")
    translora("transfer", kit.path, "--target", TARGET, "--out", str(run), "--engine", "transformers", *options, allowed=(0, 1))
    store = RunStore(str(run))  # under the strictest of the rules, so that all of them find enough
    quota, labels = store.read_json("manifest.json")["counts"]["quota"], kit.task.classes
    candidates = answered(kit, store.candidates())
    rows = [row for row in read_rows(EXAMPLE / "train.jsonl") if row.input not in kit.seed_inputs]
    lines = ["| verdict above | teacher says | examples | of candidates | least of a label | accuracy (95 % interval) |", "|---|---|---|---|---|---|"]
    for threshold in THRESHOLDS:
        for as_asked in (False, True):

            def taken(candidate: Candidate, least: float = threshold, asked: bool = as_asked) -> bool:
                return (candidate.verdict or 0.0) > least and (not asked or says(kit.task, candidate.target or "", candidate.label_of(labels)))

            chosen = [candidate for candidate in candidates if taken(candidate)][:quota]
            name = f"{threshold:g}-{as_asked}"
            found = accuracy_of(kit, TARGET, AdapterRef(name, str(adapter_of(kit, store, name, chosen))), rows, WORK / f"{name}.json")
            least = min(Counter(candidate.target for candidate in chosen)[label] for label in labels)
            said = "the label asked for" if as_asked else "anything"
            lines.append(f"| {threshold:g} | {said} | {len(chosen)} | {1 + chosen[-1].index} | {least} | {results.interval(*found)} |")
    head = f"Commit {results.commit()}; {len(rows)} training rows that are no seeds, one training each."
    results.replace("selection", "\n".join([head, "", *lines]))
    print("\n".join(lines))


def answered(kit: Kit, candidates: Sequence[Candidate]) -> list[Candidate]:
    """All well-written candidates that are no copies, each with the teacher's answer, in their order."""
    file, seen, found = WORK / "answers.json", Seen(0.95), list[Candidate]()
    for candidate in candidates:
        if candidate.reason in WRITTEN and candidate.verdict is not None and not seen.repeats(candidate.input):
            seen.add(candidate.input)
            candidate.reason = None
            found.append(candidate)
    if not file.exists():
        engine, size = open_engine("transformers", SOURCE, [kit.adapter]), 64
        teacher = Teacher(engine, kit.task, kit.adapter)
        with Display() as display:
            phase = display.phase("answers")
            for start in range(0, len(found), size):
                teacher.process(Pack(0, found[start : start + size]))
                phase.update(min(len(found), start + size), len(found))
        engine.close()
        file.write_text(json.dumps([[candidate.target, candidate.reason] for candidate in found]))
    for candidate, (target, reason) in zip(found, json.loads(file.read_text()), strict=True):
        candidate.target, candidate.reason = target, reason
    return [candidate for candidate in found if candidate.accepted]


def adapter_of(kit: Kit, store: RunStore, name: str, chosen: Sequence[Candidate]) -> Path:
    """Trained as the run's own was."""
    out, manifest = WORK / name, store.read_json("manifest.json")
    if not out.exists():
        rows = [TaskRow(candidate.input, candidate.target or "") for candidate in chosen]
        with Display() as display:
            Arms(kit, manifest, Recipe.model_validate(manifest["recipe"]), store, WORK, display).trained((), {name: rows})
    return out


if __name__ == "__main__":
    main()
