"""The teacher's stage: source base and source adapter answer the prompts that were accepted, and no others."""

from __future__ import annotations

import time
from collections.abc import Callable

from translora_ray.adapters import inspect
from translora_ray.config import Task
from translora_ray.engines.base import AdapterRef, Engine, Generate, Sampling
from translora_ray.prompts import Prompt, clean_answer, task_prompt
from translora_ray.records import TOO_LONG, Candidate, Pack

ROLE = "teacher"


class Teacher:
    """Greedy answers as hard text labels, so the tokenizers of source and target may differ (Trans-LoRA, section 3.3)."""

    def __init__(self, engine: Engine, task: Task, adapter: AdapterRef, learnable: Callable[[Prompt, str], bool] = lambda prompt, answer: True) -> None:
        """`learnable` says whether the target base can take a prompt and its answer whole."""
        self.engine, self.task, self.adapter, self.learnable = engine, task, adapter, learnable

        self.virtual_tokens = inspect(adapter.path).virtual_tokens

    def _prompt(self, candidate: Candidate) -> Prompt:
        return task_prompt(self.task.prompt, candidate.input, self.task.format)

    def process(self, pack: Pack) -> Pack:
        began = time.perf_counter()
        pack.reject(lambda candidate: not self.engine.fits(self._prompt(candidate), self.task.max_new_tokens + self.virtual_tokens), TOO_LONG)
        candidates = pack.open()
        sampling = Sampling(self.task.max_new_tokens)
        prompts = [self._prompt(candidate) for candidate in candidates]
        answers = self.engine.generate([Generate(prompt, sampling, self.adapter) for prompt in prompts])
        for candidate, answer in zip(candidates, answers, strict=True):
            candidate.target = clean_answer(answer.text)
            if not answer.finished:
                candidate.reason = "answer too long"
            elif not candidate.target:
                candidate.reason = "empty answer"
            elif not self.learnable(self._prompt(candidate), candidate.target):
                candidate.reason = TOO_LONG
        pack.spend(ROLE, sum(answer.tokens for answer in answers), time.perf_counter() - began)
        return pack
