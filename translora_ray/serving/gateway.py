"""The ingress: OpenAI's routes in front of the engines. It knows keys, names and limits; it computes nothing and logs no text of a request.

A FastAPI app of our own rather than `ray.serve.llm`'s ingress: that one needs vLLM to be imported, lets every origin in, and reads adapters
from the storage's listing, so it could neither front the transformers engine nor keep tenants apart.

`serve.ingress` copies the routes when it decorates the class: a function that they call must be imported, or stand above it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from translora_ray.registry import Registry, Release
from translora_ray.serving import protocol
from translora_ray.serving.auth import Key, Keyring, Limiter
from translora_ray.serving.index import Index, card
from translora_ray.serving.measures import RequestMeasures
from translora_ray.serving.protocol import ChatRequest, CompletionRequest, Piece, ServiceError
from translora_ray.serving.reading import read_body, read_pieces

logger = logging.getLogger("ray.serve")
app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
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


@dataclass
class _Seen:
    """What is said of a request in log and metrics."""

    began: float
    key: str = "-"
    release: str = "none"
    status: int = 500
    first: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0


@app.exception_handler(ServiceError)
async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return JSONResponse(error.body(), error.status, error.headers())


@app.exception_handler(HTTPException)
async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return await _refused(request, ServiceError(error.status_code, "no_such_route", "There is no such route: see /v1/models, /v1/chat/completions."))


@app.exception_handler(Exception)
async def _unforeseen(request: Request, error: Exception) -> Response:
    logger.error(f"unforeseen: {type(error).__name__}: {error}", exc_info=error)
    return await _refused(request, ServiceError(500, "internal_error", "The service failed: its log says why."))


@serve.ingress(app)
class Gateway:
    """One replica of the ingress: `engines` answer for the bases they serve, in the same order as `serves`."""

    def __init__(self, registry: str, keys: str | None, serves: list[Serves], *engines: DeploymentHandle) -> None:
        self.keyring, self.limiter = Keyring(keys, logger.error), Limiter()
        self.index = Index(Registry(registry))
        self.engines = {each.fingerprint: (each, engine.options(stream=True)) for each, engine in zip(serves, engines, strict=True)}
        self.measures = RequestMeasures()
        self._handles: dict[str, Any] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    @app.get("/health")
    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready(self) -> Response:
        """Whether requests would be answered: the registry was read and every engine answers."""
        if not self.index.loaded:
            raise ServiceError(503, "registry_unreachable", "The registry has not been read yet: try again.", 1)
        try:
            async with asyncio.timeout(5):
                for _, engine in self.engines.values():
                    await engine.options(stream=False).ready.remote()
        except (TimeoutError, RayError, RayServeException):
            raise ServiceError(503, "engine_unavailable", "An engine does not answer yet: try again.", 5) from None
        return JSONResponse({"status": "ready"}, headers=self._staleness())

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        key = self._admit(request)
        self._require_index()
        return JSONResponse({"object": "list", "data": self.index.models(lambda release: self._listed(release, key))}, headers=self._staleness())

    @app.get("/v1/models/{model:path}")
    async def model(self, model: str, request: Request) -> Response:
        return JSONResponse(card(model, await self._resolve(model, self._admit(request))), headers=self._staleness())

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest)

    async def _answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        seen = _Seen(time.monotonic())
        try:
            key = self._admit(request)
            seen.key = key.name
            asked = protocol.parse(kind, await read_body(request, key.max_body_bytes), key.max_tokens)
            release = await self._resolve(asked.model, key)
            seen.release = release.id
            pieces = read_pieces(self._engine(release).answer.remote(protocol.asked(asked, release.id, key.max_tokens)))
            first = await anext(pieces)
        except ServiceError as error:
            seen.status = error.status
            self._say(seen)
            raise
        except BaseException:
            self._say(seen)
            raise
        seen.status, seen.first = 200, time.monotonic() - seen.began
        chat, headers = kind is ChatRequest, {"x-translora-release": release.id, **self._staleness()}
        identity, created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        if not asked.stream:
            seen.prompt_tokens, seen.tokens = first.prompt_tokens, first.tokens
            self._say(seen)
            return JSONResponse(protocol.answer(identity, created, release.id, chat, first), headers=headers)
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = self._events(seen, (identity, created, release.id, chat), first, pieces, with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers | {"cache-control": "no-cache"})

    async def _events(self, seen: _Seen, frame: tuple[str, int, str, bool], piece: Piece, pieces: AsyncIterator[Piece], with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. An engine that fails on the way ends it with an error's event: nothing else can be said by then."""
        try:
            yield protocol.event(*frame, piece, True)
            while not piece.finish:
                piece = await anext(pieces)
                yield protocol.event(*frame, piece, False)
            seen.prompt_tokens, seen.tokens = piece.prompt_tokens, piece.tokens
            if with_usage:
                yield protocol.usage_event(*frame, piece)
            yield protocol.DONE
        except ServiceError as error:
            seen.status = error.status
            yield protocol.sent(error.body())
        except (asyncio.CancelledError, GeneratorExit):
            seen.status = 499  # the client has gone
            raise
        finally:
            self._say(seen)

    def _admit(self, request: Request) -> Key:
        """The request's key, if it has one that is known and has requests left."""
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        key = self.keyring.find(presented.strip() if scheme.lower() == "bearer" and presented.strip() else None)
        if key is None:
            raise ServiceError(401, "invalid_api_key", "This service wants a key that it knows: send `Authorization: Bearer KEY`.")
        if wait := self.limiter.wait(key):
            raise ServiceError(429, "rate_limit_exceeded", f"This key may ask {key.requests_per_minute} times a minute: try again later.", wait)
        return key

    async def _resolve(self, model: str, key: Key) -> Release:
        """The release that a name stands for now. What the key may not use is answered before the registry is looked at: not even time may tell."""
        if not key.may_use(model.partition("@")[0].partition(":")[0]):
            raise protocol.unknown(model)
        self._require_index()
        release = self.index.find(model)
        asked = self.index.clock()
        while release is None and self.index.began < asked:  # it may have been published since that reading began
            await asyncio.sleep(max(0.0, self.index.began + ASKED_AGAIN_SECONDS - self.index.clock()))
            await self._refresh()
            release = self.index.find(model)
        if release is None:
            raise protocol.unknown(model)
        if release.base_fingerprint not in self.engines:
            bases = ", ".join(each.base for each, _ in self.engines.values())
            raise ServiceError(404, "other_base", f"{release.id} is an adapter of {release.target_base}, this service has {bases}.")
        if obstacle := self.engines[release.base_fingerprint][0].obstacle(release):
            raise ServiceError(404, "not_served", f"{release.id} can not be served here: {obstacle}.")
        return release

    def _listed(self, release: Release, key: Key) -> bool:
        engine = self.engines.get(release.base_fingerprint)
        return key.may_use(release.name) and engine is not None and engine[0].obstacle(release) is None

    def _engine(self, release: Release) -> Any:
        """A handle that prefers replicas with the release. Kept, because each handle costs Serve's controller something."""
        if release.id not in self._handles:
            self._handles[release.id] = self.engines[release.base_fingerprint][1].options(multiplexed_model_id=release.id)
        return self._handles[release.id]

    def _require_index(self) -> None:
        if not self.index.loaded:
            raise ServiceError(503, "registry_unreachable", "The registry can not be read at the moment: try again.", 5)

    async def _refresh(self) -> None:
        """Read the registry, once for all who want it at the same time."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(asyncio.to_thread(self.index.refresh))
        await asyncio.shield(self._refreshing)

    async def _watch(self) -> None:
        said: str | None = None
        while True:
            await self._refresh()
            if self.index.error != said:
                said = self.index.error
                logger.warning(f"the registry does not answer, what is known is served: {said}" if said else "the registry answers")
            await asyncio.sleep(REFRESH_SECONDS)

    def _staleness(self) -> dict[str, str]:
        age = self.index.age()
        return {} if age is None else {"x-translora-registry": f"unreachable; read {age:.0f} s ago"}

    def _say(self, seen: _Seen) -> None:
        seconds = time.monotonic() - seen.began
        facts = {"key": seen.key, "release": seen.release, "status": seen.status, "prompt_tokens": seen.prompt_tokens, "tokens": seen.tokens}
        logger.info("request", extra={"ray_serve_extra_fields": facts | {"seconds": round(seconds, 4)}})
        self.measures.request(seen.release, seen.status, seconds, seen.first, seen.prompt_tokens, seen.tokens)
