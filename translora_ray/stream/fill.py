"""Seeds with other values: what answers copy from their inputs, such as the values of slots, can be exchanged, and the base knows more of each kind."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from translora_ray.answers import Value, values
from translora_ray.config import Task
from translora_ray.engines.base import Engine, Generate, Generation, Sampling
from translora_ray.prompts import clean_answer, labelled_prompt, synthesis_stops
from translora_ray.recipe import Selection, Synthesis
from translora_ray.records import TOO_LONG, Candidate, Pack, TaskRow, derive_seed
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.synthesize import EMPTY, ROLE, Synthesizer

_BLANK = "…"


def fillable(task: Task, seeds: Sequence[TaskRow]) -> list[tuple[str, list[Value]]]:
    """Seeds' inputs and their values, of a task whose answers are copies and no labels. Left out is a long one in which values are so little that whatever
    stands in their place is a copy of it by the defaults of `selection`."""
    if task.classes or not isinstance(task.answer_words, list):
        return []
    copies = SeedFilter([seed.input for seed in seeds], Selection().near_duplicate, Selection().seed_overlap)
    found = [(seed.input, listed) for seed in seeds if (listed := values(seed, task.answer_words))]
    emptied = Pack(0, [Candidate(number, 0, _put(text, listed, [_BLANK] * len(listed))) for number, (text, listed) in enumerate(found)])
    return [found[candidate.index] for candidate in copies.process(emptied).open()]


class FillingSynthesizer(Synthesizer):
    """Lets a base write every other pack as seeds' inputs with other values in them, each of which goes on from the seeds' values of that kind and its name.

    Lists bring new requests about the same few things, these new things in the same few requests; an adapter needs both, as it has to copy what it has never
    seen (`make bench-selection`). The teacher answers both alike.
    """

    def __init__(self, engine: Engine, settings: Synthesis, seeds: Sequence[TaskRow], task: Task) -> None:
        """`settings` are settled ones; seeds that are not `fillable` are for lists alone."""
        super().__init__(engine, settings, seeds)
        self.filled = fillable(task, seeds)
        self.known = [TaskRow(text[value.start : value.end], value.kind) for text, found in self.filled for value in found]
        self.value_stops = synthesis_stops([row.input for row in self.known])
        self.value_tokens = settings.max_tokens or 2 * max(engine.count_tokens(row.input) for row in self.known) + 8

    def process(self, pack: Pack) -> Pack:
        if not self.settings.fills(pack.number):
            return super().process(pack)
        began, settings, of_pack = time.perf_counter(), self.settings, pack.candidates[0].seed
        sampling = Sampling(self.value_tokens, settings.high_temperature or 0.0, settings.min_p, self.value_stops)
        chosen = [random.Random(candidate.seed).choice(self.filled) for candidate in pack.candidates]
        prompts = {kind: labelled_prompt(self.known, settings.shots, of_pack, kind) for kind in {row.target for row in self.known}}
        asked = [
            Generate(prompts[value.kind], sampling, None, derive_seed(candidate.seed, place))
            for candidate, (_, found) in zip(pack.candidates, chosen, strict=True)
            for place, value in enumerate(found)
        ]
        written = self.engine.generate(asked)
        rest = iter(written)
        for candidate, (text, found) in zip(pack.candidates, chosen, strict=True):
            _fill(candidate, text, [(value, next(rest)) for value in found])
        pack.spend(ROLE, sum(generation.tokens for generation in written), time.perf_counter() - began)
        return pack


def _fill(candidate: Candidate, text: str, written: Sequence[tuple[Value, Generation]]) -> None:
    """The candidate is the text with what was written in place of the values."""
    given = [clean_answer(generation.text) for _, generation in written]
    candidate.input = _put(text, [value for value, _ in written], given)
    if not all(generation.finished for _, generation in written):
        candidate.reason = TOO_LONG
    elif not all(given):
        candidate.reason = EMPTY


def _put(text: str, places: Sequence[Value], given: Sequence[str]) -> str:
    """The text with what is given in place of its values."""
    ends = [0, *(value.end for value in places)]
    kept = [text[end:start] for end, start in zip(ends, [*(value.start for value in places), len(text)], strict=True)]
    return "".join(part for pair in zip(kept, [*given, ""], strict=True) for part in pair)
