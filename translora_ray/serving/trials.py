"""A release that is tried on a channel: which requests it gets, and whether a shadow agrees. No Ray and no HTTP here.

Which requests those are is computed from the request, not drawn: the same request, or the same `user` where the client names one, gets the same
release every time and from every replica of the gateway; and whoever got the new release still gets it when the share grows.

A shadow is asked when the client's answer is complete, a few at a time, and what it does is counted and never seen. Its answer agrees where it is the same
but for white space around it. Answers that were drawn (a temperature over 0) say nothing of agreement: their requests go to no shadow.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
from collections.abc import Awaitable, Callable

SHADOWS_AT_ONCE = 4
"""In each replica of the gateway; what comes on top goes to no shadow, so that a slow one costs little."""
SHADOW_SECONDS = 120
AGREE, DIFFER, FAILED, SKIPPED, DRAWN = "agree", "differ", "failed", "skipped", "drawn"
Count = Callable[[str, str, str], None]
"""(release, shadow, outcome)."""


def takes_part(release: str, who: bytes, share: float) -> bool:
    """Whether a request, or a user, is among the share that the trial of a release gets."""
    place = int.from_bytes(hashlib.sha256(release.encode() + b"\0" + who).digest()[:8])
    return place < share * 2**64


class Shadows:
    """The requests to shadows that are under way."""

    def __init__(self, count: Count, at_once: int = SHADOWS_AT_ONCE, seconds: float = SHADOW_SECONDS) -> None:
        self.count, self.at_once, self.seconds = count, at_once, seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    def begin(self, release: str, shadow: str, answer: str, ask: Callable[[], Awaitable[str]]) -> None:
        """Have `ask` get the shadow's answer and count whether it is the `answer` that the client got. Returns at once and never raises."""
        if self._ended or len(self._tasks) >= self.at_once:
            self.count(release, shadow, SKIPPED)
            return
        alone = contextvars.Context()  # what is asked within a request's own context ends with it, as soon as its client has gone
        task = asyncio.get_running_loop().create_task(self._compare(release, shadow, answer, ask), context=alone)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end(self) -> None:
        """Ask no more, and give up those that are under way."""
        self._ended = True
        for task in self._tasks:
            task.cancel()

    async def _compare(self, release: str, shadow: str, answer: str, ask: Callable[[], Awaitable[str]]) -> None:
        outcome = FAILED
        try:
            async with asyncio.timeout(self.seconds):
                other = await ask()
            outcome = AGREE if other.strip() == answer.strip() else DIFFER
        except Exception:  # whatever happens to a shadow is its own business, and `ask` has said what it was
            pass
        finally:
            self.count(release, shadow, outcome)
