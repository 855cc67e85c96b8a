"""The discriminator's stage: a candidate gets a verdict, and is rejected when it does not look like the task."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy

from translora_ray.engines.base import AdapterRef, Engine, Score
from translora_ray.prompts import NO, YES, discriminator_prompt
from translora_ray.records import TOO_LONG, Pack

ROLE = "discriminator"
OFF_TASK = "off task"


def verdicts(engine: Engine, task_name: str, inputs: Sequence[str], adapter: AdapterRef) -> list[float]:
    """log p(yes) - log p(no) for each input."""
    scores = engine.score([Score(discriminator_prompt(task_name, text), (YES, NO), adapter) for text in inputs])
    return [yes - no for yes, no in scores]


def calibrate(real: Sequence[float], synthetic: Sequence[float]) -> tuple[float, float]:
    """(a, b), so that a * verdict + b is the logarithm of how much likelier a prompt is among real ones than among synthetic ones.

    Platt's scaling (1999) on verdicts that the discriminator was not trained on, with his smoothed targets and each side counting the same; Newton's steps.
    """
    verdict = numpy.asarray([*real, *synthetic], dtype=float)
    target = numpy.asarray([(len(real) + 1) / (len(real) + 2)] * len(real) + [1 / (len(synthetic) + 2)] * len(synthetic))
    weight = numpy.asarray([1 / len(real)] * len(real) + [1 / len(synthetic)] * len(synthetic))
    rows, found = numpy.stack([verdict, numpy.ones_like(verdict)], axis=1), numpy.zeros(2)
    for _ in range(50):
        likely = 1 / (1 + numpy.exp(-numpy.clip(rows @ found, -30, 30)))
        slope = rows.T @ (weight * (likely - target)) + 1e-3 * found
        found = found - numpy.linalg.solve((rows * (weight * likely * (1 - likely))[:, None]).T @ rows + 1e-3 * numpy.eye(2), slope)
    return float(found[0]), float(found[1])


def outline(verdicts: Sequence[float]) -> list[float]:
    """Where verdicts lie: 19 quantiles, rounded to a quarter, so that none of them tells of a text whether it is among the judged ones."""
    return [round(4 * float(verdict)) / 4 for verdict in numpy.quantile(verdicts, numpy.linspace(0.05, 0.95, 19))]


class Discriminator:
    """Gives verdicts, and accepts a candidate whose verdict is above the threshold (Trans-LoRA: p(yes) > p(no), so 0)."""

    def __init__(self, engine: Engine, task_name: str, adapter: AdapterRef, threshold: float) -> None:
        self.engine, self.task_name, self.adapter, self.threshold = engine, task_name, adapter, threshold

    def process(self, pack: Pack) -> Pack:
        began = time.perf_counter()
        pack.reject(lambda candidate: not self.engine.fits(discriminator_prompt(self.task_name, candidate.input), 1), TOO_LONG)
        candidates = pack.open()
        inputs = [candidate.input for candidate in candidates]
        for candidate, verdict in zip(candidates, verdicts(self.engine, self.task_name, inputs, self.adapter), strict=True):
            candidate.verdict = verdict
            if not verdict > self.threshold:  # a verdict that is not a number accepts nothing
                candidate.reason = OFF_TASK
        pack.spend(ROLE, len(candidates), time.perf_counter() - began)
        return pack
