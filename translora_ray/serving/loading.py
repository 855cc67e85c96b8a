"""From a release to a directory that an engine can load: fetched, its digest checked, and compared with the base."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from translora_ray import adapters, models
from translora_ray.errors import RunFailed, UsageError
from translora_ray.registry import NotFound, Registry, Unreachable
from translora_ray.serving.measures import EngineMeasures
from translora_ray.serving.protocol import ServiceError, unknown

logger = logging.getLogger("ray.serve")


@dataclass
class Held:
    """An adapter that a replica holds. Serve calls `__del__` when another takes its place, and Python does once more."""

    evict: Callable[[], None] | None

    def __del__(self) -> None:
        evict, self.evict = self.evict, None
        if evict:
            evict()


class Loader:
    """Fetches releases for one engine. What was fetched stays on its disk until it ends, so an adapter that left its memory comes back without the registry."""

    def __init__(self, registry: str, base: str) -> None:
        self.registry = Registry(registry)
        self.base = base
        self.shapes, self.width = models.linear_shapes(base), models.width(base)
        self._scratch = tempfile.TemporaryDirectory(prefix="translora-serve-")
        self._paths: dict[str, Path] = {}
        self._fetching = threading.Lock()

    async def require(self, release: str, measures: EngineMeasures) -> None:
        """Have the release on this disk, for what comes next makes another adapter leave memory: one that can not be had must not. Raises as `load` does."""
        if release not in self._paths:
            with measures.fetch(release):
                await asyncio.to_thread(self.load, release)

    def load(self, release: str) -> Path:
        """The directory of a release's adapter. Raises `ServiceError` that a client may read: what is wrong in full is in the log."""
        if release not in self._paths:
            with self._fetching:  # one that lies here already does not wait for others
                if release not in self._paths:
                    self._paths[release] = self._fetch(release)
        return self._paths[release]

    def _fetch(self, release: str) -> Path:
        try:
            found = self.registry.release(release)
            path = self.registry.fetch(found, Path(self._scratch.name))
            adapters.check_fits(adapters.inspect(path), self.base, self.shapes, self.width)
        except (UsageError, RunFailed, OSError) as error:
            logger.error(f"loading {release}: {error}")
            if isinstance(error, Unreachable) or self._gone():
                raise ServiceError(503, "registry_unreachable", f"{release} is not loaded and the registry does not answer: try again.", 5) from None
            raise unknown(release) if isinstance(error, NotFound) else unusable(release) from None
        return path

    def _gone(self) -> bool:
        """Whether the registry itself is away: then nothing that is missing says anything of a release."""
        try:
            self.registry.check()
        except (UsageError, RunFailed):
            return True
        return False


def unusable(release: str) -> ServiceError:
    """The answer for an adapter that an engine can not use."""
    message = f"The weights of {release} are damaged or do not fit the base, so it can not answer: try again later; other models are not affected."
    return ServiceError(503, "adapter_unusable", message, 10)
