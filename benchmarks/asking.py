"""What the stream's generator asks of an engine, for those that ask the same in other ways. A module of its own, because Ray's workers import it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rounds import CPUS, SETTINGS, example_kit, kept

from translora_ray import models
from translora_ray.config import Cluster, Recipe, Selection, Synthesis
from translora_ray.kit import find_labels
from translora_ray.prompts import labelled_prompt, prompt_ids, synthesis_prompt, synthesis_stops
from translora_ray.records import Pack, read_rows
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.plan import Plan, Pool
from translora_ray.stream.synthesize import ROLE

LIST, LABEL = (Synthesis(by_label=by_label).settled(()) for by_label in (False, True))


class Variant(NamedTuple):
    """How seeds are shown and tokens drawn. `alike`: one draw of seeds for a whole pack, which an engine reads once."""

    drawn: dict[str, float | None]
    by_label: bool = False
    alike: bool = False


VARIANTS = {
    "list, as the stream does it": Variant({"temperature": LIST.temperature, "min_p": LIST.min_p}),
    "list, one draw of seeds for a pack": Variant({"temperature": LIST.temperature, "min_p": LIST.min_p}, alike=True),
    "list, temperature alone": Variant({"temperature": LIST.temperature}),
    "list, top_p 0.95": Variant({"temperature": LIST.temperature, "top_p": 0.95}),
    "by label, as the stream does it": Variant({"temperature": LABEL.temperature, "min_p": LABEL.min_p}, by_label=True),
    "by label, one draw of seeds for a pack": Variant({"temperature": LABEL.temperature, "min_p": LABEL.min_p}, by_label=True, alike=True),
    "by label, temperature alone": Variant({"temperature": LABEL.temperature}, by_label=True),
    "by label, top_p 0.95": Variant({"temperature": LABEL.temperature, "top_p": 0.95}, by_label=True),
    "by label, a list's temperature": Variant({"temperature": LIST.temperature, "min_p": LIST.min_p}, by_label=True),
}
PLAIN = next(iter(VARIANTS))
"""The variant in which engines are compared."""


Requests = Callable[[Pack, Variant], list[tuple[list[int], dict[str, Any]]]]
"""(pack, how it is asked) -> token ids and `SamplingParams` of each request, as the stream has them."""


def asked(base: str) -> Requests:
    kit, tokenizer = example_kit(), models.load_tokenizer(base)
    longest = 2 * max(len(tokenizer(seed, add_special_tokens=False)["input_ids"]) for seed in kit.seed_inputs) + 8
    stops = list(synthesis_stops(kit.seed_inputs))
    labels = find_labels(kit.task, read_rows(kit.task.train)).classes

    def requests(pack: Pack, variant: Variant) -> list[tuple[list[int], dict[str, Any]]]:
        found = []
        for candidate in pack.candidates:
            seed = (pack.candidates[0] if variant.alike else candidate).seed
            shown = synthesis_prompt(kit.seed_inputs, LIST.shots, seed)
            if variant.by_label:
                shown = labelled_prompt(kit.seeds, LABEL.shots, seed, candidate.label_of(labels))
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
    """The transfer's own stream as far as candidates: one engine on all cores, `packs` packs of `size` requests at once, which continue a list."""
    cluster = Cluster(vllm=SETTINGS.model_copy(update={"packs": packs}))
    settings = Synthesis(generator=("target",), by_label=False, pack_size=size)
    return Writing(example_kit(), base, Recipe(synthesis=settings), cluster, "vllm", CPUS, 0)
