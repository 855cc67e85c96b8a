"""Prometheus metrics, through Ray, which exports those of every replica at its node's metrics port. One label: the release."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from ray.util.metrics import Counter, Histogram

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
RELEASE = ("release",)


class EngineMeasures:
    """Adapters that come and go in an engine's memory."""

    def __init__(self) -> None:
        self._loads = Counter("translora_adapter_loads", "Adapters loaded", RELEASE)
        self._evictions = Counter("translora_adapter_evictions", "Adapters that made room for others", RELEASE)
        self._failures = Counter("translora_adapter_failures", "Adapters that could not be fetched, or are damaged", RELEASE)
        self._seconds = Histogram("translora_adapter_load_seconds", "Time to fetch and check an adapter", SECONDS, RELEASE)

    @contextlib.contextmanager
    def fetch(self, release: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except Exception:
            self._failures.inc(1, {"release": release})
            raise
        self._seconds.observe(time.monotonic() - began, {"release": release})

    def loaded(self, release: str) -> None:
        self._loads.inc(1, {"release": release})

    def evicted(self, release: str) -> None:
        self._evictions.inc(1, {"release": release})


class RequestMeasures:
    """What the ingress sees. Requests that name no release of the caller's count under the release `none`: a stranger must not make labels."""

    def __init__(self) -> None:
        self._requests = Counter("translora_requests", "Requests by HTTP status", ("release", "status"))
        self._tokens = Counter("translora_tokens", "Tokens read and written", ("release", "kind"))
        self._seconds = Histogram("translora_request_seconds", "From the request to the end of its answer", SECONDS, RELEASE)
        self._shadows = Counter("translora_shadow_requests", "Requests on a channel with a shadow, by whether it agreed", ("release", "shadow", "outcome"))
        self._first = Histogram("translora_first_piece_seconds", "From the request to the first piece of its answer", SECONDS, RELEASE)

    def request(self, release: str, status: int, seconds: float, first: float | None, prompt_tokens: int, tokens: int) -> None:
        self._requests.inc(1, {"release": release, "status": str(status)})
        self._seconds.observe(seconds, {"release": release})
        if first is not None:
            self._first.observe(first, {"release": release})
        for kind, count in (("prompt", prompt_tokens), ("answer", tokens)):
            if count:
                self._tokens.inc(count, {"release": release, "kind": kind})

    def shadow(self, release: str, shadow: str, outcome: str) -> None:
        """`outcome` is one of `trials.py`."""
        self._shadows.inc(1, {"release": release, "shadow": shadow, "outcome": outcome})
