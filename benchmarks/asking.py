"""What the stream's generator asks of an engine, for those that ask the same in other ways. A module of its own, because Ray's workers import it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rounds import CPUS, SETTINGS, example_kit, kept

from translora_ray import models
from translora_ray.config import Cluster, Recipe, Selection, Synthesis
from translora_ray.prompts import prompt_ids, synthesis_prompt, synthesis_stops
from translora_ray.records import Pack
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.plan import Plan, Pool
from translora_ray.stream.synthesize import ROLE

LIST = Synthesis().settled(())
VARIANTS: dict[str, tuple[bool, dict[str, float | None]]] = {
    "as the stream does it": (False, {"temperature": LIST.temperature, "min_p": LIST.min_p}),
    "one draw of seeds for a pack": (True, {"temperature": LIST.temperature, "min_p": LIST.min_p}),
    "temperature alone": (False, {"temperature": LIST.temperature}),
    "top_p 0.95": (False, {"temperature": LIST.temperature, "top_p": 0.95}),
}
"""How seeds are shown and tokens drawn: (one draw of seeds for a pack, sampling)."""


Requests = Callable[[Pack, bool, dict[str, float | None]], list[tuple[list[int], dict[str, Any]]]]
"""(pack, one draw of seeds for all of it, sampling) -> token ids and `SamplingParams` of each request, as the stream has them."""


def asked(base: str) -> Requests:
    kit, tokenizer = example_kit(), models.load_tokenizer(base)
    longest = 2 * max(len(tokenizer(seed, add_special_tokens=False)["input_ids"]) for seed in kit.seed_inputs) + 8
    stops = list(synthesis_stops(kit.seed_inputs))

    def requests(pack: Pack, alike: bool, drawn: dict[str, float | None]) -> list[tuple[list[int], dict[str, Any]]]:
        found = []
        for candidate in pack.candidates:
            shown = synthesis_prompt(kit.seed_inputs, LIST.shots, (pack.candidates[0] if alike else candidate).seed)
            found.append((prompt_ids(tokenizer, shown), {"max_tokens": longest, "stop": stops, "seed": candidate.seed, **drawn}))
        return found

    return requests


def written(packs: Sequence[Pack], texts: Iterable[tuple[str, bool]]) -> int:
    """Candidates that are kept of what an engine wrote: (text, ended by itself) for each request in turn."""
    for candidate, (text, ended) in zip([candidate for pack in packs for candidate in pack.candidates], texts, strict=True):
        candidate.input = text.strip()
        if not ended or not candidate.input:
            candidate.reason = "unfinished or empty"
    copies = SeedFilter(example_kit().seed_inputs, Selection().near_duplicate, Selection().seed_overlap)
    return kept([copies.process(pack) for pack in packs])


class Writing(Plan):
    """A stream whose only role is the generator."""

    def pools(self) -> list[Pool]:
        return [Pool("vllm", self.target, (ROLE,))]


def writing(base: str, packs: int, size: int) -> Writing:
    """The transfer's own stream as far as candidates: one engine on all cores, `packs` packs of `size` requests at once."""
    cluster = Cluster(vllm=SETTINGS.model_copy(update={"packs": packs}))
    return Writing(example_kit(), base, Recipe(synthesis=Synthesis(generator=("target",), pack_size=size)), cluster, "vllm", CPUS, 0)
