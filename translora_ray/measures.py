"""Prometheus metrics of drivers, through Ray, which exports those of every process at its node's metrics port, under names that begin with `ray_`.

Two labels, both of few values: the phase (a role of the stream, training, gate, evaluation) and the state of transfers. None names a transfer or an
adapter: of these a fleet may have thousands. `cluster/grafana.json` shows them. To be made when Ray runs: a Ray that ended takes them along.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter as Amounts
from collections.abc import Iterator, Mapping, Sequence

from ray.util.metrics import Counter, Gauge

from translora_ray.stream.collect import Totals

PHASE = ("phase",)
TRAINING, GATE, EVALUATION = "training", "gate", "evaluation"


class PhaseMeasures:
    """What phases cost, counted when it is known: of the stream's roles with each commit, of the others at their end."""

    def __init__(self) -> None:
        self._tokens = Counter("translora_phase_tokens", "Tokens written, or trained on, and prompts that the discriminator judged, by phase", PHASE)
        self._seconds = Counter("translora_phase_seconds", "Seconds that engines and workers were busy, by phase", PHASE)

    def spent(self, phase: str, seconds: float, tokens: float = 0) -> None:
        for metric, amount in ((self._seconds, seconds), (self._tokens, tokens)):
            if amount > 0:
                metric.inc(amount, {"phase": phase})

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Counts the seconds of the block, unless it raises."""
        began = time.monotonic()
        yield
        self.spent(phase, time.monotonic() - began)


class StreamMeasures:
    """What is committed of a stream's transfers. What earlier attempts committed, which `totals` begin with, was counted by them."""

    def __init__(self, totals: Sequence[Totals]) -> None:
        self._candidates = Counter("translora_candidates", "Candidates that were accepted or rejected, and committed")
        self._accepted = Counter("translora_accepted", "Candidates that were accepted, and committed")
        self._phases = PhaseMeasures()
        self._counted = [_amounts(each) for each in totals]

    def committed(self, transfer: int, totals: Totals) -> None:
        now = _amounts(totals)
        new, self._counted[transfer] = now - self._counted[transfer], now
        for metric, name in ((self._candidates, "candidates"), (self._accepted, "accepted")):
            if new[name]:
                metric.inc(new[name])
        for role in totals.seconds:
            self._phases.spent(role, new[f"seconds {role}"], new[f"tokens {role}"])


def _amounts(totals: Totals) -> Amounts[str]:
    costs = {f"{what} {role}": amount for what in ("seconds", "tokens") for role, amount in getattr(totals, what).items()}
    return Amounts({"candidates": totals.candidates, "accepted": totals.accepted, **costs})


class FleetMeasures:
    """Where the transfers of a fleet are. `states` are all that there can be, so that one which nothing is in any more is exported as 0."""

    def __init__(self, states: Sequence[str]) -> None:
        self.states = states
        self._transfers = Gauge("translora_transfers", "Transfers of the fleet, by state", ("state",))

    def transfers(self, counts: Mapping[str, int]) -> None:
        for state in self.states:
            self._transfers.set(counts.get(state, 0), {"state": state})
