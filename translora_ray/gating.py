"""Between training and manifest: which examples are trained on and which are kept back, and what the finished adapter does with the latter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from translora_ray.engines.base import AdapterRef, Generate, Sampling
from translora_ray.engines.select import opener
from translora_ray.evaluation import gate
from translora_ray.evaluation.metrics import METRICS
from translora_ray.evaluation.statistics import chance_interval
from translora_ray.placement import Run
from translora_ray.progress import Display
from translora_ray.prompts import answer_stops, clean_answer, task_prompt
from translora_ray.records import Candidate, TaskRow
from translora_ray.storage import ADAPTER, RunStore
from translora_ray.stream.choose import choose
from translora_ray.stream.collect import Totals
from translora_ray.stream.plan import Plan


def examples(plan: Plan, store: RunStore) -> tuple[list[Candidate], list[Candidate]]:
    """(trained on, held out): what `choose` makes of the committed shards."""
    return choose(plan, store.candidates())


def pass_gate(
    plan: Plan, store: RunStore, trained: Sequence[Candidate], held_out: Sequence[Candidate], totals: Totals, run: Run, display: Display
) -> dict[str, Any] | None:
    """The verdict on the adapter in the run, None where the recipe holds nothing out for it. Its engine is loaded by `run`."""
    if not plan.held_out:
        return None
    phase = display.phase("gate")
    phase.update(0, 1, "loading the adapter")
    rows = [TaskRow(candidate.input, candidate.target or "") for candidate in held_out]
    scores = run(_scores, plan, store, [*rows, *plan.kit.seeds])
    phase.update(1, 1)
    sides = {"agreement": scores[: len(rows)], "seeds": scores[len(rows) :]}
    measured = {name: sum(side) / len(side) for name, side in sides.items()}
    measured |= likeness(plan.kit.discriminator or {}, trained)
    answers = gate.answers(plan.kit.task.classes, plan.kit.seeds, [candidate.target or "" for candidate in trained])
    return {**gate.without_rows(plan.recipe.gate, measured, totals.accepted / totals.candidates, answers), "held_out": len(rows)}


def likeness(discriminator: dict[str, Any], trained: Sequence[Candidate]) -> dict[str, float]:
    """`likeness`: chance that the discriminator finds an example more like the task than a real prompt that it was not trained on, ties by half; `chance`: the
    least that is no surprise where the two can not be told apart. Nothing where the kit or the examples have no verdicts."""
    judged = [candidate.verdict for candidate in trained if candidate.verdict is not None]
    if not judged or not (real := discriminator.get("real_verdicts")):
        return {}
    places = [numpy.searchsorted(real, judged, side) for side in ("left", "right")]
    low, _ = chance_interval(len(judged), discriminator["held_out_real"])
    return {"likeness": float(numpy.mean(places)) / len(real), "chance": low}


def _scores(plan: Plan, store: RunStore, rows: Sequence[TaskRow]) -> list[float]:
    """What the run's adapter makes of rows, by the task's metric."""
    task = plan.kit.task
    with tempfile.TemporaryDirectory() as scratch:
        adapter = AdapterRef("transferred", str(store.fetch_folder(ADAPTER, Path(scratch) / ADAPTER)))
        engine = opener(plan.engine, plan.cluster.vllm, plan.engine_gpus, lambda message: None)(plan.target, [adapter])
        sampling = Sampling(task.max_new_tokens, stop=answer_stops([seed.target for seed in plan.kit.seeds], task.format))
        try:
            given = engine.generate([Generate(task_prompt(task.prompt, row.input, task.format), sampling, adapter) for row in rows])
        finally:
            engine.close()
    return [METRICS[task.metric](clean_answer(answer.text), row.target) for answer, row in zip(given, rows, strict=True)]
