"""Between training and manifest: which examples are trained on and which are kept back, and what the finished adapter does with the latter."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy

from translora_ray import models
from translora_ray.adapters import inspect
from translora_ray.engines.base import AdapterRef, Generate, Sampling
from translora_ray.engines.select import opener
from translora_ray.evaluation import gate
from translora_ray.evaluation.metrics import METRICS, agreement, reading
from translora_ray.evaluation.statistics import chance_interval, wilson
from translora_ray.placement import Run
from translora_ray.progress import Display
from translora_ray.prompts import clean_answer, task_prompt
from translora_ray.records import Candidate
from translora_ray.storage import ADAPTER, RunStore
from translora_ray.stream.choose import choose
from translora_ray.stream.collect import Totals
from translora_ray.stream.dedup import normal
from translora_ray.stream.plan import Plan
from translora_ray.stream.teach import OTHER_LABEL

Chosen = tuple[list[Candidate], list[Candidate]]
"""(trained on, held out)"""
MOST_BETWEEN = 64
"""Prompts between labels that the gate asks."""


def examples(plan: Plan, store: RunStore) -> Chosen:
    """What `choose` makes of the committed shards."""
    return choose(plan, store.candidates())


def pass_gate(
    plan: Plan, store: RunStore, candidates: Sequence[Candidate], chosen: Chosen, totals: Totals, run: Run, display: Display
) -> dict[str, Any] | None:
    """The verdict on the adapter in the run, None where the recipe holds nothing out for it. `chosen` is what `choose` made of the candidates. Its engine is
    loaded by `run`.

    Examples alone would flatter the adapter: prompts that the teacher gave another label than they were written for are no examples, and the harder ones. So
    some of those are asked, too, and count for as much as they are among the prompts that look like the task: those of packs that are not warmer, as warmth is
    there for variety, and strays from the labels. How many real prompts lie between labels nobody knows, perhaps none: so the upper end of the interval is that
    of the examples alone. Where even that is too low, the adapter is refused.
    """
    if not plan.held_out:
        return None
    phase = display.phase("gate")
    phase.update(0, 1, "loading the adapter")
    trained, held_out = chosen
    cool = [candidate for candidate in candidates if not plan.warmer(candidate.index)]
    unsettled = between(cool, trained)
    asked = [[candidate.row for candidate in side] for side in (held_out, unsettled[:MOST_BETWEEN])]
    task, seeds = plan.kit.task, plan.kit.seeds
    given = iter(run(_given, plan, store, [row.input for rows in (*asked, seeds) for row in rows]))
    phase.update(1, 1)
    alike, unlike, known = ([(row, answer) for row in rows if (answer := next(given)) is not None] for rows in (*asked, seeds))
    harder = len(unsettled) / max(1, len(unsettled) + sum(candidate.accepted for candidate in cool))
    examples, unsure = (_figure([agreement(task, answer, row.target) for row, answer in side]) for side in (alike, unlike))
    agreed, low, _ = ((1 - harder) * easy + harder * hard for easy, hard in zip(examples, unsure, strict=True))
    right, *right_ends = _figure([METRICS[task.metric](answer, seed.target) for seed, answer in known])
    measured: dict[str, Any] = {"agreement": agreed, "agreement_ends": (low, examples[2])}
    if task.metric != "code":  # a seed's program is not a test of another one
        measured |= {"seeds": right, "seeds_ends": tuple(right_ends)}
    measured |= likeness(plan.kit.discriminator or {}, [candidate for candidate in trained if not plan.fills(candidate.index)])  # all filled seeds look real
    answers = gate.answers(task.classes, seeds, [reading(task, candidate.target or "") for candidate in trained])
    counted = {"held_out": len(alike), "between": len(unlike)}
    return {**gate.without_rows(plan.recipe.gate, measured, totals.accepted / totals.candidates, answers), **counted}


def _figure(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the scores, with Wilson's 95 % interval."""
    return (sum(scores) / len(scores), *wilson(sum(scores), len(scores))) if scores else (0.0, 0.0, 0.0)


def between(candidates: Sequence[Candidate], trained: Sequence[Candidate]) -> list[Candidate]:
    """Prompts that lie between labels, each once, in the order of their index: the teacher gave them another one than they were written for."""
    known, found = {normal(candidate.input) for candidate in trained}, []
    for candidate in sorted(candidates, key=lambda candidate: candidate.index):
        if candidate.reason == OTHER_LABEL and normal(candidate.input) not in known:
            known.add(normal(candidate.input))
            found.append(candidate)
    return found


def likeness(discriminator: dict[str, Any], trained: Sequence[Candidate]) -> dict[str, float]:
    """`likeness`: chance that the discriminator finds an example more like the task than a real prompt that it was not trained on, ties by half; `chance`: the
    least that is no surprise where the two can not be told apart. Nothing where the kit or the examples have no verdicts."""
    judged = [candidate.verdict for candidate in trained if candidate.verdict is not None]
    if not judged or not (real := discriminator.get("real_verdicts")):
        return {}
    places = [numpy.searchsorted(real, judged, side) for side in ("left", "right")]
    low, _ = chance_interval(len(judged), discriminator["held_out_real"])
    return {"likeness": float(numpy.mean(places)) / len(real), "chance": low}


def _given(plan: Plan, store: RunStore, inputs: Sequence[str]) -> list[str | None]:
    """What the run's adapter answers; None where an input and the longest answer are too long for the target."""
    task = plan.kit.task
    models.require_same(plan.target, plan.target_fingerprint, "this transfer began with")
    with tempfile.TemporaryDirectory() as scratch:
        adapter = AdapterRef("transferred", str(store.fetch_folder(ADAPTER, Path(scratch) / ADAPTER)))
        sampling = Sampling(task.max_new_tokens, stop=plan.kit.answer_stops)
        with closing(opener(plan.engine, plan.cluster.vllm, plan.engine_gpus, lambda message: None)(plan.target, [adapter])) as engine:
            prompts = [task_prompt(task.prompt, text, task.format) for text in inputs]
            new_tokens = task.max_new_tokens + inspect(adapter.path).virtual_tokens
            fit = [engine.fits(prompt, new_tokens) for prompt in prompts]
            given = iter(engine.generate([Generate(prompt, sampling, adapter) for prompt, fits in zip(prompts, fit, strict=True) if fits]))
    return [clean_answer(next(given).text) if fits else None for fits in fit]
