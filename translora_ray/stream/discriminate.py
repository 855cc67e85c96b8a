"""The discriminator's stage: a candidate gets a verdict, and is rejected when it does not look like the task."""

from __future__ import annotations

import time
from collections.abc import Sequence

from translora_ray.engines.base import AdapterRef, Engine, Score
from translora_ray.prompts import NO, YES, discriminator_prompt
from translora_ray.records import TOO_LONG, Pack

ROLE = "discriminator"
OFF_TASK = "off task"


def verdicts(engine: Engine, task_name: str, inputs: Sequence[str], adapter: AdapterRef) -> list[float]:
    """log p(yes) - log p(no) for each input."""
    scores = engine.score([Score(discriminator_prompt(task_name, text), (YES, NO), adapter) for text in inputs])
    return [yes - no for yes, no in scores]


class Discriminator:
    """Accepts a candidate whose verdict is above the threshold (Trans-LoRA: p(yes) > p(no), so 0)."""

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
