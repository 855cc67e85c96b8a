"""Between training and manifest: which examples are trained on and which are kept back, and what the finished adapter does with the latter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from translora_ray.engines.base import AdapterRef, Generate, Sampling
from translora_ray.engines.select import opener
from translora_ray.evaluation import gate
from translora_ray.evaluation.metrics import METRICS
from translora_ray.placement import Run
from translora_ray.progress import Display
from translora_ray.prompts import answer_stops, clean_answer, task_prompt
from translora_ray.records import Candidate, TaskRow
from translora_ray.storage import ADAPTER, RunStore
from translora_ray.stream.choose import choose
from translora_ray.stream.collect import Totals
from translora_ray.stream.plan import Plan
from translora_ray.stream.teach import OTHER_LABEL

MOST_DISPUTED = 64
"""Prompts answered with another label than asked for that the adapter is asked."""


def examples(plan: Plan, store: RunStore) -> tuple[list[Candidate], list[Candidate]]:
    """(trained on, held out): what `choose` makes of the committed shards."""
    return choose(plan, store.candidates())


def pass_gate(plan: Plan, store: RunStore, candidates: Sequence[Candidate], totals: Totals, run: Run, display: Display) -> dict[str, Any] | None:
    """The verdict on the adapter in the run, None where the recipe holds nothing out for it. Its engine is loaded by `run`.

    Agreement with the teacher is that on all prompts that look like the task's: on examples held out, and on prompts that the teacher answered with another
    label than asked for, which nobody trained on either, each weighted by how many of its kind there are. The former alone are the easy ones.
    """
    if not plan.held_out:
        return None
    trained, held_out = choose(plan, candidates)
    disputed = [candidate for candidate in candidates if candidate.reason == OTHER_LABEL]
    groups = {"held_out": held_out, "disputed": disputed[-MOST_DISPUTED:]}
    phase = display.phase("gate")
    phase.update(0, 1, "loading the adapter")
    rows = [[TaskRow(candidate.input, candidate.target or "") for candidate in group] for group in groups.values()]
    scores = iter(run(_scores, plan, store, [*rows[0], *rows[1], *plan.kit.seeds]))
    phase.update(1, 1)
    agreed = {name: _mean(list(islice(scores, len(group)))) for name, group in groups.items() if group}
    shares = {"held_out": totals.accepted, "disputed": len(disputed)}
    agreement = sum(value * shares[name] for name, value in agreed.items()) / sum(shares[name] for name in agreed)
    answers = gate.answers(plan.kit.task.classes, plan.kit.seeds, [candidate.target or "" for candidate in trained])
    measured = {"agreement": agreement, "seeds": _mean(list(scores))}
    found = gate.without_rows(plan.recipe.gate, measured, totals.accepted / totals.candidates, answers)
    return {**found, **{name: len(group) for name, group in groups.items()}, "agreed": agreed}


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


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
