"""The stream's requests as others take them: a bare engine, `ray.data.llm`. A module of its own, because Ray's workers import it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
from rounds import example_kit

from translora_ray import models
from translora_ray.config import Recipe, Synthesis
from translora_ray.prompts import prompt_ids, synthesis_prompt, synthesis_stops
from translora_ray.records import Pack, packs_from_table
from translora_ray.stream.requests import PackSource

VARIANTS: dict[str, tuple[bool, dict[str, float]]] = {
    "as the stream does it": (True, {"temperature": Synthesis().temperature, "min_p": Synthesis().min_p}),
    "seeds shuffled for every request": (False, {"temperature": Synthesis().temperature, "min_p": Synthesis().min_p}),
    "temperature alone": (True, {"temperature": Synthesis().temperature}),
    "top_p 0.95": (True, {"temperature": Synthesis().temperature, "top_p": 0.95}),
}
"""How seeds are shown and tokens drawn: (one order of seeds for a pack, sampling)."""


Requests = Callable[[Pack, bool, dict[str, float]], list[tuple[list[int], dict[str, Any]]]]
"""(pack, one order of seeds for all of it, sampling) -> token ids and `SamplingParams` of each request, as the stream has them."""


def asked(base: str) -> Requests:
    kit, tokenizer = example_kit(), models.load_tokenizer(base)
    longest = 2 * max(len(tokenizer(seed, add_special_tokens=False)["input_ids"]) for seed in kit.seed_inputs) + 8
    stops = list(synthesis_stops(kit.seed_inputs))

    def requests(pack: Pack, alike: bool, drawn: dict[str, float]) -> list[tuple[list[int], dict[str, Any]]]:
        found = []
        for candidate in pack.candidates:
            shown = synthesis_prompt(kit.seed_inputs, Synthesis().shots, (pack.candidates[0] if alike else candidate).seed)
            found.append((prompt_ids(tokenizer, shown), {"max_tokens": longest, "stop": stops, "seed": candidate.seed, **drawn}))
        return found

    return requests


class Prompts(PackSource):
    """The stream's requests as rows for `ray.data.llm`, behind the same gate."""

    def __init__(self, desk: Any, size: int, base: str) -> None:
        super().__init__(desk, [(Recipe().seed, size)])
        self.base = base

    def _packs(self) -> Iterable[pa.Table]:
        requests = asked(self.base)
        for block in super()._packs():
            yield rows_of(requests, *packs_from_table(block))


BLOCK = 1 << 20
"""Bytes from which a Ray Data source lets go of a block. A pack's rows are padded to a little more: less would wait for the next pack, much more would
be split."""


def rows_of(requests: Requests, pack: Pack) -> pa.Table:
    made = requests(pack, *next(iter(VARIANTS.values())))
    pad = "-" * int(1.1 * BLOCK / len(made))
    return pa.Table.from_pylist([{"pack": pack.number, "row": row, "ids": ids, "sampling": drawn, "pad": pad} for row, (ids, drawn) in enumerate(made)])
