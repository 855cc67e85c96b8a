"""What the stream's generator asks of an engine, for those that ask the same in other ways. A module of its own, because Ray's workers import it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rounds import CPUS, SETTINGS, example_kit, kept

from translora_ray import models
from translora_ray.answers import find_answers
from translora_ray.cluster import Cluster
from translora_ray.kit import Kit
from translora_ray.prompts import labelled_prompt, prompt_ids, synthesis_prompt, synthesis_stops
from translora_ray.recipe import Recipe, Selection, Synthesis
from translora_ray.records import Pack, read_rows
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.plan import Plan, Pool
from translora_ray.stream.synthesize import ROLE

LIST, LABEL = (Synthesis(by_label=by_label).settled(()) for by_label in (False, True))
MIN_P: dict[str, float | None] = {"min_p": LIST.min_p}


class Variant(NamedTuple):
    """How seeds are shown and tokens drawn. `each`: a draw of seeds for each request, not for a pack, which an engine reads once."""

    drawn: dict[str, float | None]
    by_label: bool = False
    each: bool = False


VARIANTS = {
    "by label": Variant({"temperature": LABEL.temperature, **MIN_P}, by_label=True),
    "by label, a draw of seeds for each request": Variant({"temperature": LABEL.temperature, **MIN_P}, by_label=True, each=True),
    "by label, temperature alone": Variant({"temperature": LABEL.temperature}, by_label=True),
    "by label, top_p 0.95": Variant({"temperature": LABEL.temperature, "top_p": 0.95}, by_label=True),
    "by label, a list's temperature": Variant({"temperature": LIST.temperature, **MIN_P}, by_label=True),
    "list": Variant({"temperature": LIST.temperature, **MIN_P}, each=True),
    "list, one draw of seeds for a pack": Variant({"temperature": LIST.temperature, **MIN_P}),
    "list, temperature alone": Variant({"temperature": LIST.temperature}, each=True),
    "list, top_p 0.95": Variant({"temperature": LIST.temperature, "top_p": 0.95}, each=True),
}
PLAIN = next(iter(VARIANTS))
"""What the stream does for a task with many labels, with which engines are compared."""


Requests = Callable[[Pack, Variant], list[tuple[list[int], dict[str, Any]]]]
"""(pack, how it is asked) -> token ids and `SamplingParams` of each request, as the stream has them."""


def labelled_kit() -> Kit:
    kit = example_kit()
    return replace(kit, task=find_answers(kit.task, read_rows(kit.task.train)))


def asked(base: str) -> Requests:
    kit, tokenizer = labelled_kit(), models.load_tokenizer(base)
    longest = 2 * max(len(tokenizer(seed, add_special_tokens=False)["input_ids"]) for seed in kit.seed_inputs) + 8
    stops = list(synthesis_stops(kit.seed_inputs))

    def requests(pack: Pack, variant: Variant) -> list[tuple[list[int], dict[str, Any]]]:
        found = []
        for candidate in pack.candidates:
            seed = (candidate if variant.each else pack.candidates[0]).seed
            if variant.by_label:
                shown = labelled_prompt(kit.seeds, LABEL.shots, seed, candidate.label_of(kit.task.classes))
            else:
                shown = synthesis_prompt(kit.seed_inputs, LIST.shots, seed)
            found.append((prompt_ids(tokenizer, shown), {"max_tokens": longest, "stop": stops, "seed": candidate.seed, **variant.drawn}))
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
    """The transfer's own stream as far as candidates: one engine on all cores, `packs` packs of `size` requests at once, by label."""
    cluster = Cluster(vllm=SETTINGS.model_copy(update={"packs": packs}))
    settings = Synthesis(generator=("target",), pack_size=size, temperature=LABEL.temperature)
    return Writing(labelled_kit(), base, Recipe(synthesis=settings), cluster, "vllm", CPUS, 0)
