"""What the registry holds, as it was a moment ago: requests are resolved here, and never wait for its storage. No Ray here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from translora_ray.registry import Change, Registry, Release, Unsound, trial_in
from translora_ray.releases import STABLE

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Tried:
    """A release that is tried on a channel: as a canary, or as a shadow, for a share of its requests."""

    release: Release
    share: float
    shadow: bool

    def card(self) -> dict[str, Any]:
        return {"release": self.release.id, "share": self.share, "shadow": self.shadow}


class Index:
    """Names to releases. `refresh` blocks and reads the registry; a failure leaves everything as it was and shows in `error`.

    A file that is damaged is its own release's or channel's business: it is left out and said, a channel stays as it was, and all others go on.
    A name is resolved when its request arrives: a request that runs keeps its release, the next one gets what the channel says then.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry, self.clock = registry, clock
        self.error: str | None = "it was not read yet"
        self.loaded = False
        self.began = float("-inf")
        """When the last refresh began: what was published before is known."""
        self._read = clock()
        self._names: dict[str, Release] = {}
        self._trials: dict[str, Tried] = {}
        self._channels: dict[str, Change] = {}
        self._damaged: set[str] = set()

    def refresh(self) -> None:
        """Read the registry."""
        began = self.clock()
        damaged: list[Unsound] = []
        try:
            self.registry.check()
            releases = {release.id: release for release in self.registry.releases(skip=damaged.append)}
            self._channels |= self.registry.changes(skip=damaged.append)
        except Exception as error:  # whatever it is, it is tried again in a moment
            self.error, self.began = f"{type(error).__name__}: {error}", began
            return
        self._complain(damaged)
        names = dict(releases)
        trials: dict[str, Tried] = {}
        for channel, change in self._channels.items():
            if release := releases.get(change["release"]):
                mine = [channel, release.name] if channel == f"{release.name}:{STABLE}" else [channel]
                names |= dict.fromkeys(mine, release)
                if (trial := trial_in(change)) and (tried := releases.get(trial.release)):
                    trials |= dict.fromkeys(mine, Tried(tried, trial.share, trial.shadow))
        self._names, self._trials, self._read, self.error, self.loaded, self.began = names, trials, self.clock(), None, True, began

    def find(self, model: str) -> Release | None:
        """The release that `name@version`, `name:channel` or `name` (its stable channel) stands for now."""
        return self._names.get(model)

    def trial(self, model: str) -> Tried | None:
        """What is tried on the channel that the name stands for."""
        return self._trials.get(model)

    def age(self) -> float | None:
        """Seconds since the registry was last read, None where it answered the last time."""
        return None if self.error is None else self.clock() - self._read

    def models(self, visible: Callable[[Release], bool]) -> list[dict[str, Any]]:
        """Models as OpenAI lists them; `release` is what a channel stands for."""
        return [self.card(name, release) for name, release in self._names.items() if visible(release)]

    def card(self, name: str, release: Release) -> dict[str, Any]:
        found = {"id": name, "object": "model", "created": created(release), "owned_by": "translora", "release": release.id, "base": release.target_base}
        trial = self.trial(name)
        return found | {"trial": trial.card()} if trial else found

    def _complain(self, damaged: list[Unsound]) -> None:
        """Say what is damaged, once."""
        now = {str(error) for error in damaged}
        for message in sorted(now - self._damaged):
            logger.error(f"left out: {message}")
        self._damaged = now


def created(release: Release) -> int:
    """Seconds since 1970."""
    return int(datetime.fromisoformat(release.created).timestamp())
