"""The deployment on the transformers engine: one base, adapters by request, wherever torch runs. The default."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from ray import serve

from translora_ray import adapters
from translora_ray.engines.base import KEPT, AdapterRef, Generate, Sampling
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import RunFailed, UsageError
from translora_ray.serving.batches import Batches
from translora_ray.serving.loading import Held, Loader
from translora_ray.serving.measures import EngineMeasures
from translora_ray.serving.prompting import Prompter
from translora_ray.serving.protocol import Asked, Piece, ServiceError


class TransformersBackend:
    """Answers `Asked` in `Piece`s. Serve sends requests of one release to replicas that hold it already (`multiplexed_model_id`)."""

    def __init__(self, base: str, fingerprint: str, registry: str, adapters_at_once: int, batch_size: int, gpus: float) -> None:
        self.measures = EngineMeasures()
        self.loader = Loader(registry, base, fingerprint, self.measures)
        self.engine = TransformersEngine(base, batch_size, None if gpus else "cpu", max(KEPT, adapters_at_once))
        self.batches = Batches(self.engine, batch_size)
        self.prompter = Prompter(base, self.engine.context)  # with the engine's tokenizer, which nothing here changes

        async def load(release: str) -> _Loaded:
            path = await self.loader.load(release)
            virtual_tokens = adapters.inspect(path).virtual_tokens
            self.batches.hold(str(path))
            self.measures.loaded(release)
            return _Loaded(lambda: self._evict(release, path), path, virtual_tokens)

        self._load = serve.multiplexed(max_num_models_per_replica=adapters_at_once)(load)

    async def answer(self, asked: Asked) -> AsyncIterator[Piece]:
        if asked.top_p not in (None, 1.0):
            raise ServiceError(400, "invalid_request", "top_p: the transformers engine takes temperature and min_p.")
        await self.loader.load(asked.release)  # one that can not be had must not make another leave memory
        loaded: _Loaded = await self._load(asked.release)
        prompt, max_tokens = await self.prompter.read(asked, loaded.virtual_tokens)
        sampling = Sampling(max_tokens, asked.temperature, asked.min_p, asked.stop)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        try:
            async for piece in self.batches.run(Generate(prompt, sampling, AdapterRef(asked.release, str(loaded.path)), seed), asked.stream):
                yield piece
        except (UsageError, RunFailed):  # what could be said of the request was said before: it is the adapter
            raise self.loader.give_up(asked.release) from None

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine is gone, or fails whatever it is asked."""
        if not self.batches.alive():
            raise RunFailed("The engine answers no more: the replica is replaced.")

    def __del__(self) -> None:
        """Serve calls it when the replica ends."""
        if loader := getattr(self, "loader", None):  # none where it could not be made
            loader.close()

    def _evict(self, release: str, path: Path) -> None:
        self.measures.evicted(release)
        self.batches.drop(str(path))


@dataclass
class _Loaded(Held):
    """As the engine asks for it."""

    path: Path
    virtual_tokens: int
