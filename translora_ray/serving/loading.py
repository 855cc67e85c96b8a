"""From a release to a directory that an engine can load: fetched, its digest checked, and compared with the base."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from translora_ray import adapters, models
from translora_ray.disk import room
from translora_ray.errors import NoRoom, RunFailed, UsageError
from translora_ray.registry import NotFound, Registry, Unreachable
from translora_ray.serving.measures import EngineMeasures
from translora_ray.serving.protocol import ServiceError, unknown

logger = logging.getLogger("ray.serve")
PREFIX = f"translora-serve-{socket.gethostname()}-"
"""Containers may share the folder, and not know of each other's processes."""
KEPT = 256
"""Adapters on an engine's disk: more than any engine has in its memory."""
FETCHES = 4
"""Adapters that are fetched at once."""
DAMAGED_SECONDS = 10.0
UNUSABLE = "adapter_unusable"


@dataclass
class Held:
    """An adapter that a replica holds. Serve calls `__del__` when another takes its place, and Python does once more."""

    evict: Callable[[], None] | None

    def __del__(self) -> None:
        evict, self.evict = self.evict, None
        if evict:
            evict()


class Loader:
    """Fetches releases for one engine. The last `KEPT` that were asked for stay on its disk: an adapter that left its memory comes back without the registry.

    Whoever waits for a release waits for that one alone, and what is damaged is looked at again after `DAMAGED_SECONDS`, so that no tenant's adapter holds up
    another's.
    """

    def __init__(self, registry: str, base: str, fingerprint: str, measures: EngineMeasures) -> None:
        models.require_same(base, fingerprint, "this service began with")
        self.registry, self.base, self.measures = Registry(registry), base, measures
        self.shapes, self.width = models.linear_shapes(base), models.width(base)
        _sweep()
        self._scratch = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True)
        self._threads = ThreadPoolExecutor(FETCHES, "adapters")
        self._here: dict[str, Path] = {}
        """Releases on this disk, the one asked for last at the end."""
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        self._damaged: dict[str, tuple[float, ServiceError]] = {}

    async def load(self, release: str) -> Path:
        """The directory of a release's adapter. Raises `ServiceError` that a client may read: what is wrong in full is in the log."""
        since, error = self._damaged.get(release, (0.0, None))
        if error and time.monotonic() - since < DAMAGED_SECONDS:
            raise ServiceError(*error.args)
        if (path := self._here.pop(release, None)) and path.exists():
            self._here[release] = path
            return path
        if release not in self._fetching:
            self._fetching[release] = asyncio.get_running_loop().create_task(self._bring(release))
            self._fetching[release].add_done_callback(lambda task: task.cancelled() or task.exception())  # also where nobody waits any longer
        return await asyncio.shield(self._fetching[release])

    def give_up(self, release: str) -> ServiceError:
        """The engine could not use what was fetched: it is not asked to again for `DAMAGED_SECONDS`, as for what is damaged. The answer for its client."""
        error = unusable(release)
        self._damaged[release] = (time.monotonic(), error)
        return error

    def close(self) -> None:
        """Remove what was fetched."""
        self._scratch.cleanup()

    async def _bring(self, release: str) -> Path:
        try:
            with self.measures.fetch(release):
                path = await asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, release)
        except ServiceError as error:
            if error.code == UNUSABLE:
                self._damaged[release] = (time.monotonic(), error)
            raise
        finally:
            del self._fetching[release]
        self._here[release] = path
        for old in list(self._here)[:-KEPT]:
            shutil.rmtree(self._here.pop(old), ignore_errors=True)
        return path

    def _fetch(self, release: str) -> Path:
        try:
            found = self.registry.release(release)
            with room(folder := Path(self._scratch.name)):
                path = self.registry.fetch(found, folder)
            adapters.check_fits(adapters.inspect(path), self.base, self.shapes, self.width)
        except (UsageError, RunFailed, OSError) as error:
            logger.error(f"loading {release}: {error}")
            if isinstance(error, NoRoom):
                raise ServiceError(503, "no_room", f"{release} is not loaded and the engine's disk is full: try again later.", DAMAGED_SECONDS) from None
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


def _sweep() -> None:
    """Remove what services left that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        with contextlib.suppress(ValueError, PermissionError):  # another user's
            try:
                os.kill(int(left.name.removeprefix(PREFIX).partition("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)


def unusable(release: str) -> ServiceError:
    """The answer for an adapter that an engine can not use."""
    message = f"The weights of {release} are damaged or do not fit the base, so it can not answer: try again later; other models are not affected."
    return ServiceError(503, UNUSABLE, message, DAMAGED_SECONDS)
