"""Repetition: a candidate must not copy a seed, nor a prompt that was accepted before it.

Copies of seeds are dropped before anything is spent on them. What was accepted before is known for certain only where packs are put
in order, so that check runs there (`stream/pipeline.py`), and its outcome does not depend on timing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rapidfuzz import process
from rapidfuzz.distance import Indel

from translora_ray.records import Pack

SEED_COPY = "copies a seed"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate"
_BLANKS = re.compile(r"\s+")


def normal(text: str) -> str:
    """Case and blanks do not make a difference."""
    return _BLANKS.sub(" ", text).strip().casefold()


class Seen:
    """Texts that must not come again, exactly or nearly (normalised Indel similarity, rapidfuzz)."""

    def __init__(self, near: float, texts: Iterable[str] = ()) -> None:
        self.near = near
        self._exact: set[str] = set()
        self._texts: list[str] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        if normal(text) not in self._exact:
            self._exact.add(normal(text))
            self._texts.append(normal(text))

    def repeats(self, text: str) -> str | None:
        """`DUPLICATE`, `NEAR_DUPLICATE` or None."""
        wanted = normal(text)
        if wanted in self._exact:
            return DUPLICATE
        if self.near < 1 and process.extractOne(wanted, self._texts, scorer=Indel.normalized_similarity, score_cutoff=self.near):
            return NEAR_DUPLICATE
        return None


class SeedFilter:
    """Rejects candidates that copy a seed, or another candidate of their own pack."""

    def __init__(self, seeds: list[str], near: float) -> None:
        self.seeds, self.near = seeds, near
        self._seen = Seen(near, seeds)

    def process(self, pack: Pack) -> Pack:
        inside: set[str] = set()
        for candidate in pack.open():
            if self._seen.repeats(candidate.input):
                candidate.reason = SEED_COPY
            elif normal(candidate.input) in inside:
                candidate.reason = DUPLICATE
            inside.add(normal(candidate.input))
        return pack
