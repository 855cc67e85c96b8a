"""Seeds with other values: what answers copy from their inputs, such as the values of slots, can be exchanged, and the base knows more of each kind."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from translora_ray.answers import Value, values
from translora_ray.config import Synthesis, Task
from translora_ray.engines.base import Engine, Generate, Generation, Sampling
from translora_ray.prompts import clean_answer, labelled_prompt, synthesis_stops
from translora_ray.records import TOO_LONG, Candidate, Pack, TaskRow, derive_seed
from translora_ray.stream.synthesize import EMPTY, ROLE, Synthesizer


class FillingSynthesizer(Synthesizer):
    """Lets a base write every other pack as seeds' inputs with other values in them, each of which goes on from the seeds' values of that kind and its name.

    Lists bring new requests about the same few things, these new things in the same few requests; an adapter needs both, as it has to copy what it has never
    seen (`make bench-selection`). The teacher answers both alike.
    """

    def __init__(self, engine: Engine, settings: Synthesis, seeds: Sequence[TaskRow], task: Task) -> None:
        """`settings` are settled ones; seeds whose answers copy nothing are for lists alone."""
        super().__init__(engine, settings, seeds)
        self.filled = [(seed.input, found) for seed in seeds if (found := values(seed, task.answer_words))]
        self.known = [TaskRow(text[value.start : value.end], value.kind) for text, found in self.filled for value in found]
        self.value_stops = synthesis_stops([row.input for row in self.known])
        self.value_tokens = settings.max_tokens or 2 * max(engine.count_tokens(row.input) for row in self.known) + 8

    def process(self, pack: Pack) -> Pack:
        if not self.settings.fills(pack.number):
            return super().process(pack)
        began, settings, of_pack = time.perf_counter(), self.settings, pack.candidates[0].seed
        sampling = Sampling(self.value_tokens, settings.high_temperature or 0.0, settings.min_p, self.value_stops)
        chosen = [random.Random(candidate.seed).choice(self.filled) for candidate in pack.candidates]
        asked = [
            Generate(labelled_prompt(self.known, settings.shots, of_pack, value.kind), sampling, None, derive_seed(candidate.seed, place))
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
    parts, after = list[str](), 0
    for value, generation in written:
        parts += [text[after : value.start], clean_answer(generation.text)]
        after = value.end
    candidate.input = "".join([*parts, text[after:]])
    if not all(generation.finished for _, generation in written):
        candidate.reason = TOO_LONG
    elif not all(parts[1::2]):
        candidate.reason = EMPTY
