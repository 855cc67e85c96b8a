"""The end of the stream: packs come back in any order, are decided in theirs, and are committed in shards. No Ray here.

Which rows are accepted is therefore the same for any number of actors, any timing and any number of interruptions; what was computed ahead
of the quota and not needed is thrown away.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from translora_ray.errors import RunFailed
from translora_ray.evaluation.metrics import reading
from translora_ray.records import Candidate, Pack
from translora_ray.storage import RunStore
from translora_ray.stream.dedup import COPIES, Seen
from translora_ray.stream.plan import Plan

NOT_NEEDED = "quota was full"
LABEL_FULL = "enough of this label"


@dataclass
class Totals:
    """What the stream came to, over all attempts: the manifest's counts."""

    packs: int = 0
    candidates: int = 0
    accepted: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    loads: dict[str, list[str]] = field(default_factory=dict)
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """The one that goes on now."""

    @property
    def loaded(self) -> list[str]:
        """Bases that this attempt had loaded by its last commit."""
        return self.loads.get(self.attempt, [])

    @property
    def seed_copies(self) -> float:
        """Share of the candidates that were blocked because they copy a seed."""
        return sum(self.rejects[reason] for reason in COPIES) / max(1, self.candidates)

    def add(self, last_pack: int, candidates: list[Candidate], facts: dict[str, Any]) -> None:
        self.packs = last_pack + 1
        self.candidates += len(candidates)
        self.accepted += sum(candidate.accepted for candidate in candidates)
        self.rejects.update(candidate.reason for candidate in candidates if candidate.reason)
        self.tokens.update(facts["tokens"])
        self.seconds.update(facts["seconds"])
        self.loads[facts["attempt"]] = facts["loads"]


class Collector:
    """Takes packs in any order, decides in pack order, commits shards. Knows from the store what was decided before."""

    def __init__(self, plan: Plan, store: RunStore) -> None:
        self.plan, self.store = plan, store
        self.totals = Totals()
        self.seen = Seen(plan.recipe.selection.near_duplicate)
        self.labels: Counter[str] = Counter()
        self.most = plan.most_of_a_label(plan.wanted)
        for last, candidates, facts in store.shards():
            self.totals.add(last, candidates, facts)
            for candidate in candidates:
                if candidate.accepted:
                    self.seen.add(candidate.input)
                    self.labels[self._label(candidate)] += 1
        self.next = self.totals.packs
        self.accepted = self.totals.accepted
        self._require_room()
        self._waiting: dict[int, Pack] = {}
        self._decided: list[Pack] = []
        self._committed_at = time.monotonic()

    @property
    def full(self) -> bool:
        return self.accepted >= self.plan.wanted

    def take(self, pack: Pack, loads: list[str]) -> None:
        if pack.number >= self.next:  # else it was handed out twice
            self._waiting[pack.number] = pack
        while not self.full and not self._spent and self.next in self._waiting:
            self._decide(self._waiting.pop(self.next))
            self.next += 1
        if self._decided and (self.full or self._spent or time.monotonic() - self._committed_at >= self.plan.cluster.commit_seconds):
            self.commit(loads)
        self._require_room()

    @property
    def _spent(self) -> bool:
        """Whether there are as many candidates as there may be."""
        limit = self.plan.wanted * self.plan.recipe.selection.max_candidates
        return self.next * self.plan.recipe.synthesis.pack_size >= limit

    def _require_room(self) -> None:
        """Raise `RunFailed` where as many candidates as there may be are too few examples: so it stays when the command is given again."""
        if self._spent and not self.full:
            less = "selection.quota or selection.threshold" if self.plan.cuts else "selection.quota"
            raise RunFailed(
                f"Only {self.accepted} of {self.plan.wanted} examples after {self.totals.candidates} candidates "
                f"({_reasons(self.totals)}): lower {less}, or prepare the kit with more seeds."
            )

    def _decide(self, pack: Pack) -> None:
        for candidate in pack.open():
            label = self._label(candidate)
            if self.full:
                candidate.reason = NOT_NEEDED
            elif repeat := self.seen.repeats(candidate.input):
                candidate.reason = repeat
            elif self.most is not None and self.labels[label] >= self.most:
                candidate.reason = LABEL_FULL
            else:
                self.seen.add(candidate.input)
                self.labels[label] += 1
                self.accepted += 1
        self._decided.append(pack)

    def _label(self, candidate: Candidate) -> str:
        """What its answer says, where there may be too many of one label."""
        return "" if self.most is None else reading(self.plan.kit.task, candidate.target or "")

    def commit(self, loads: list[str]) -> None:
        if not self._decided:
            return
        first, last = self._decided[0].number, self._decided[-1].number
        candidates = [candidate for pack in self._decided for candidate in pack.candidates]
        tokens: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for pack in self._decided:
            tokens.update(pack.tokens)
            seconds.update(pack.seconds)
        facts = {"attempt": self.totals.attempt, "loads": loads, "tokens": dict(tokens), "seconds": dict(seconds)}
        self.store.write_shard(first, last, candidates, facts)
        self.totals.add(last, candidates, facts)
        self._decided = []
        self._committed_at = time.monotonic()


def _reasons(totals: Totals) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in totals.rejects.most_common())
