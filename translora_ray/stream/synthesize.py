"""The generator's stage: a pack of requests becomes a pack of candidates."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial

from translora_ray.config import Task
from translora_ray.engines.base import AdapterRef, Engine, Generate, Sampling
from translora_ray.prompts import (
    Prompt,
    clean_answer,
    generator_prompt,
    has_numbered_lines,
    labelled_prompt,
    parse_synthesis,
    synthesis_prompt,
    synthesis_stops,
)
from translora_ray.recipe import Synthesis
from translora_ray.records import TOO_LONG, Candidate, Pack, TaskRow, derive_seed

ROLE = "generator"
EMPTY = "empty prompt"


class Synthesizer:
    """Lets a base continue a numbered list of seed inputs, one item per request (Trans-LoRA, section 3.2), or a list of inputs after their labels.

    Seeds, and how many, are drawn and shuffled anew for each request of a list. By label they are for each pack, and in it for each label: an engine that keeps
    what it has read reads those once, and as many candidates differ from each other (`benchmarks/generation.py choices`).
    """

    adapter: AdapterRef | None = None

    def __init__(self, engine: Engine, settings: Synthesis, seeds: Sequence[TaskRow], classes: Sequence[str] = ()) -> None:
        """`settings` are settled ones; `classes` are the task's labels, which `by_label` asks for."""
        self.engine, self.settings, self.seeds, self.classes = engine, settings, seeds, classes
        self.inputs = [seed.input for seed in seeds]
        self.stops, self.whole = synthesis_stops(self.inputs), bool(settings.by_label) or any(map(has_numbered_lines, self.inputs))
        self.max_tokens = settings.max_tokens or 2 * max(map(engine.count_tokens, self.inputs)) + 8

    def _prompts(self, pack: Pack) -> list[Prompt | None]:
        """The prompt of each candidate, None where even one seed is too long."""
        most, seed = self.settings.shots, pack.candidates[0].seed
        if not self.settings.by_label:
            return [self._fitting(partial(synthesis_prompt, self.inputs, seed=each.seed), self._shots(each)) for each in pack.candidates]
        labels = [candidate.label_of(self.classes) for candidate in pack.candidates]
        prompts = {label: self._fitting(partial(labelled_prompt, self.seeds, seed=seed, label=label), most) for label in set(labels)}
        return [prompts[label] for label in labels]

    def _shots(self, candidate: Candidate) -> int:
        most = self.settings.shots
        return random.Random(derive_seed(candidate.seed, "shots")).randint(self.settings.fewest_shots or most, most)

    def _fitting(self, prompt: Callable[..., Prompt], most: int) -> Prompt | None:
        """The prompt with as many seeds as leave room for another."""
        return next((made for shots in range(most, 0, -1) if self.engine.fits(made := prompt(shots=shots), self.max_tokens)), None)

    def _read(self, text: str) -> str:
        return parse_synthesis(text, self.whole)

    def process(self, pack: Pack) -> Pack:
        began = time.perf_counter()
        settings = self.settings
        temperature = settings.high_temperature if settings.warmer(pack.number) else settings.temperature
        sampling = Sampling(self.max_tokens, temperature or 0.0, settings.min_p, self.stops)
        asked = []
        for candidate, prompt in zip(pack.candidates, self._prompts(pack), strict=True):
            if prompt:
                asked.append(Generate(prompt, sampling, self.adapter, candidate.seed))
            else:
                candidate.reason = TOO_LONG
        written = self.engine.generate(asked)
        for candidate, generation in zip(pack.open(), written, strict=True):
            candidate.input = self._read(generation.text)
            if not generation.finished:
                candidate.reason = TOO_LONG
            elif not candidate.input:
                candidate.reason = EMPTY
        pack.spend(ROLE, sum(generation.tokens for generation in written), time.perf_counter() - began)
        return pack


class LearntSynthesizer(Synthesizer):
    """Lets a generator adapter write inputs as it has learnt them: each after its label, or after the task's name, without seeds, to where it ends them."""

    def __init__(self, engine: Engine, settings: Synthesis, seeds: Sequence[TaskRow], task: Task, adapter: AdapterRef) -> None:
        super().__init__(engine, settings, seeds, task.classes or [task.name])
        self.adapter, self.stops = adapter, ()

    def _prompts(self, pack: Pack) -> list[Prompt | None]:
        return [generator_prompt(candidate.label_of(self.classes)) for candidate in pack.candidates]

    def _read(self, text: str) -> str:
        return clean_answer(text)
