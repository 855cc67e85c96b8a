"""Which release answers a request, and on which base's engine: names, keys and trials come together here. No Ray and no HTTP server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from translora_ray.registry import Registry, Release
from translora_ray.serving import protocol
from translora_ray.serving.auth import Key
from translora_ray.serving.index import Index, Tried
from translora_ray.serving.protocol import ServiceError
from translora_ray.serving.trials import takes_part

logger = logging.getLogger("ray.serve")
REFRESH_SECONDS = 1.0
ASKED_AGAIN_SECONDS = 0.2
"""How soon after a reading of the registry an unknown name has it read again."""


@dataclass(frozen=True)
class Serves:
    """What an engine serves: a base by its fingerprint, and the kinds and ranks of adapters that it takes."""

    base: str
    fingerprint: str
    types: tuple[str, ...]
    rank: int | None = None

    def obstacle(self, release: Release) -> str | None:
        """Why the engine can not serve a release of its base, in a few words."""
        if release.adapter["type"] not in self.types:
            return f"vLLM does not take {release.adapter['type']} adapters: serve it with --engine transformers"
        if self.rank and release.adapter["rank"] > self.rank:
            return f"it has rank {release.adapter['rank']} and the engine was started for {self.rank} at most: start the service again"
        return None


class Router:
    """The registry as it was a moment ago, seen by keys and engines."""

    def __init__(self, registry: Registry, serves: Sequence[Serves]) -> None:
        self.index = Index(registry)
        self.serves = {each.fingerprint: each for each in serves}
        self._refreshing: asyncio.Task[None] | None = None
        self._warned: set[str] = set()

    async def resolve(self, model: str, key: Key) -> Release:
        """The release that a name stands for now. What the key may not use is answered before the registry is looked at: not even time may tell."""
        if not key.may_use(model.partition("@")[0].partition(":")[0]):
            raise protocol.unknown(model)
        self.require_index()
        release = self.index.find(model)
        asked = self.index.clock()
        while release is None and self.index.began < asked:  # it may have been published since that reading began
            await asyncio.sleep(max(0.0, self.index.began + ASKED_AGAIN_SECONDS - self.index.clock()))
            await self.refresh()
            release = self.index.find(model)
        if release is None:
            raise self._unreachable() if self.index.error else protocol.unknown(model)
        if refusal := self._refusal(release):
            self._warn(f"{model} names {release.id}, which is not served: {refusal}")
            raise refusal
        return release

    def trial(self, model: str, who: bytes) -> Tried | None:
        """What is tried on the channel, where this request takes part and an engine has the base."""
        trial = self.index.trial(model)
        if trial is None or not takes_part(trial.release.id, who, trial.share):
            return None
        if refusal := self._refusal(trial.release):
            self._warn(f"{model} is to try {trial.release.id}, which does not happen: {refusal}")
            return None
        return trial

    def _warn(self, message: str) -> None:
        """Once."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def listed(self, release: Release, key: Key) -> bool:
        return key.may_use(release.name) and self._refusal(release) is None

    def require_index(self) -> None:
        if not self.index.loaded:
            raise self._unreachable()

    def _unreachable(self) -> ServiceError:
        return ServiceError(503, "registry_unreachable", "The registry can not be read at the moment: try again.", 5)

    def staleness(self) -> dict[str, str]:
        """The header that says that the registry does not answer."""
        age = self.index.age()
        return {} if age is None else {"x-translora-registry": f"unreachable; read {age:.0f} s ago"}

    async def refresh(self) -> None:
        """Read the registry, once for all who want it at the same time."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(asyncio.to_thread(self.index.refresh))
        await asyncio.shield(self._refreshing)

    async def watch(self) -> None:
        """Read the registry every second, for ever."""
        said: str | None = None
        while True:
            await self.refresh()
            if self.index.error != said:
                said = self.index.error
                logger.warning(f"the registry does not answer, what is known is served: {said}" if said else "the registry answers")
            await asyncio.sleep(REFRESH_SECONDS)

    def _refusal(self, release: Release) -> ServiceError | None:
        """Why no engine here answers for the release."""
        if release.base_fingerprint not in self.serves:
            bases = ", ".join(each.base for each in self.serves.values())
            return ServiceError(404, "other_base", f"{release.id} is an adapter of {release.target_base}, this service has {bases}.")
        if obstacle := self.serves[release.base_fingerprint].obstacle(release):
            return ServiceError(404, "not_served", f"{release.id} can not be served here: {obstacle}.")
        return None
