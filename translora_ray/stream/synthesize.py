"""The generator's stage: a pack of requests becomes a pack of candidates."""

from __future__ import annotations

import time

from translora_ray.config import Synthesis
from translora_ray.engines.base import Engine, Generate, Sampling
from translora_ray.prompts import parse_synthesis, synthesis_prompt, synthesis_stops
from translora_ray.records import TOO_LONG, Pack

ROLE = "generator"


class Synthesizer:
    """Lets a base continue a numbered list of seed inputs, one item per request (Trans-LoRA, section 3.2).

    The seeds are drawn and shuffled anew for each pack, and are the same within one: the engine reads them once per pack.
    """

    def __init__(self, engine: Engine, settings: Synthesis, seeds: list[str]) -> None:
        self.engine, self.settings, self.seeds = engine, settings, seeds
        self.max_tokens = settings.max_tokens or 2 * max(map(engine.count_tokens, seeds)) + 8

    def process(self, pack: Pack) -> Pack:
        began = time.perf_counter()
        settings = self.settings
        prompt = synthesis_prompt(self.seeds, settings.shots, pack.candidates[0].seed)
        sampling = Sampling(self.max_tokens, settings.temperature, settings.min_p, synthesis_stops(self.seeds))
        written = self.engine.generate([Generate(prompt, sampling, seed=candidate.seed) for candidate in pack.candidates])
        for candidate, generation in zip(pack.candidates, written, strict=True):
            candidate.input = parse_synthesis(generation.text)
            if not generation.finished:
                candidate.reason = TOO_LONG
            elif not candidate.input:
                candidate.reason = "empty prompt"
        pack.spend(ROLE, sum(generation.tokens for generation in written), time.perf_counter() - began)
        return pack
