"""Repetition: a candidate must not copy a seed, nor a prompt that was accepted before it.

Copies of seeds are dropped before anything is spent on them. What was accepted before is known for certain only where packs are put
in order, so that check runs there (`stream/collect.py`), and its outcome does not depend on timing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rapidfuzz import process
from rapidfuzz.distance import Indel

from translora_ray.records import Pack

SEED_COPY = "copies a seed"
SEED_PASSAGE = "repeats a seed's words"
COPIES = (SEED_COPY, SEED_PASSAGE)
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate"
WORDS = 5
"""Of a run of words that is looked for in another text."""
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


class Passages:
    """Finds texts that take over most of a known text, or lie inside one, whatever stands around it: what an edit distance does not see.

    Counted in runs of `WORDS` words. Runs that several of the known texts have are the task's frame, and count on neither side; shorter texts are left to
    the edit distance.
    """

    def __init__(self, texts: Sequence[str], share: float) -> None:
        self.share = share
        runs = [grams(text) for text in dict.fromkeys(map(normal, texts))]
        self._frame = {run for run, times in Counter(run for each in runs for run in each).items() if times > 1}
        self._owner = {run: text for text, each in enumerate(runs) for run in each - self._frame}
        self._sizes = Counter(self._owner.values())

    def repeats(self, text: str) -> bool:
        """Whether `share` of the runs of one of the two, the text or a known one, are in the other."""
        runs = grams(text) - self._frame
        common = Counter(self._owner[run] for run in runs if run in self._owner)
        return any(count >= self.share * min(len(runs), self._sizes[known]) for known, count in common.items())


def grams(text: str, words: int = WORDS) -> set[tuple[str, ...]]:
    """All runs of so many words; none where the text is shorter."""
    found = normal(text).split()
    return {tuple(found[start : start + words]) for start in range(len(found) - words + 1)}


class SeedFilter:
    """Rejects candidates that copy a seed, take over `overlap` of its words in their order, or copy another candidate of their own pack."""

    def __init__(self, seeds: list[str], near: float, overlap: float | None = None) -> None:
        self._seen = Seen(near, seeds)
        self._passages = Passages([] if overlap is None else seeds, overlap or 1.0)

    def process(self, pack: Pack) -> Pack:
        inside: set[str] = set()
        for candidate in pack.open():
            if self._seen.repeats(candidate.input):
                candidate.reason = SEED_COPY
            elif self._passages.repeats(candidate.input):
                candidate.reason = SEED_PASSAGE
            elif normal(candidate.input) in inside:
                candidate.reason = DUPLICATE
            inside.add(normal(candidate.input))
        return pack
