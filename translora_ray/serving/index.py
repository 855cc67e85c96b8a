"""What the registry holds, as it was a moment ago: requests are resolved here, and never wait for its storage. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from translora_ray.errors import TransLoraError
from translora_ray.registry import Registry, Release
from translora_ray.releases import STABLE


class Index:
    """Names to releases. `refresh` blocks and reads the registry; a failure leaves everything as it was and shows in `error`.

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

    def refresh(self) -> None:
        """Read the registry."""
        began = self.clock()
        try:
            self.registry.check()
            releases = {release.id: release for release in self.registry.releases()}
            channels = self.registry.channels()
        except (TransLoraError, OSError) as error:
            self.error, self.began = str(error), began
            return
        names = dict(releases)
        for channel, identity in channels.items():
            if release := releases.get(identity):
                names[channel] = release
                if channel == f"{release.name}:{STABLE}":
                    names[release.name] = release
        self._names, self._read, self.error, self.loaded, self.began = names, self.clock(), None, True, began

    def find(self, model: str) -> Release | None:
        """The release that `name@version`, `name:channel` or `name` (its stable channel) stands for now."""
        return self._names.get(model)

    def age(self) -> float | None:
        """Seconds since the registry was last read, None where it answered the last time."""
        return None if self.error is None else self.clock() - self._read

    def models(self, visible: Callable[[Release], bool]) -> list[dict[str, Any]]:
        """Models as OpenAI lists them; `release` is what a channel stands for."""
        return [card(name, release) for name, release in self._names.items() if visible(release)]


def card(name: str, release: Release) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created(release), "owned_by": "translora", "release": release.id, "base": release.target_base}


def created(release: Release) -> int:
    """Seconds since 1970."""
    return int(datetime.fromisoformat(release.created).timestamp())
