"""The ingress: OpenAI's routes in front of the engines. It knows keys, names and limits; it computes nothing and logs no text of a request.

A FastAPI app of our own rather than `ray.serve.llm`'s ingress: that one needs vLLM to be imported, lets every origin in, and reads adapters
from the storage's listing, so it could neither front the transformers engine nor keep tenants apart.

`serve.ingress` copies the routes when it decorates the class: a function that they call must be imported, or stand above it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from translora_ray.registry import Registry, Release
from translora_ray.serving import protocol
from translora_ray.serving.auth import Key, Keyring, Limiter
from translora_ray.serving.health import Health
from translora_ray.serving.measures import RequestMeasures
from translora_ray.serving.protocol import Asked, ChatRequest, CompletionRequest, Piece, ServiceError
from translora_ray.serving.reading import read_body, read_pieces
from translora_ray.serving.routing import Router, Serves
from translora_ray.serving.trials import DRAWN, Shadows

logger = logging.getLogger("ray.serve")
app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
CLIENT_GONE = 499
START_SECONDS = 20
"""How long a new gateway waits for the registry."""
PATIENCE = 20.0
"""Seconds that a request waits for an engine of which no replica runs: a small one that died is back by then, and no client has to wait for a large one."""
UNFORESEEN = ServiceError(500, "internal_error", "The service failed: its log says why.")


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


class _Frame(NamedTuple):
    """What every part of an answer says of it."""

    identity: str
    created: int
    release: str
    chat: bool


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
    return await _refused(request, UNFORESEEN)


class _Stream(StreamingResponse):
    """Server-sent events. `ended` is called when they are, however: also where the client has gone before the first of them, when nothing of `events` ran."""

    def __init__(self, events: AsyncGenerator[str], ended: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.events, self.ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self.events.aclose()
            finally:
                self.ended()


@serve.ingress(app)
class Gateway:
    """One replica of the ingress: `engines` answer for the bases they serve, in the same order as `serves`."""

    async def __init__(self, registry: str, keys: str | None, serves: list[Serves], *engines: DeploymentHandle) -> None:  # type: ignore[misc]
        """Serve sends it requests afterwards: once the registry was read, or can not be read for a while."""
        self.keyring, self.limiter = Keyring(keys, logger.error), Limiter()
        self.router = Router(Registry(registry), serves)
        self.engines = {each.fingerprint: engine.options(stream=True) for each, engine in zip(serves, engines, strict=True)}
        self.measures = RequestMeasures()
        self.shadows = Shadows(self.measures.shadow)
        self._handles: dict[str, Any] = {}
        self._running, self._ending = 0, False
        self.health = Health(self.engines)
        self._watching = [asyncio.create_task(self.router.watch()), asyncio.create_task(self.health.watch())]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while not self.router.index.loaded:
                    await asyncio.sleep(0.05)

    @app.get("/health")
    async def lives(self) -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready(self) -> Response:
        """Whether requests would be answered: the registry was read and every engine has a replica that runs."""
        self._require_open()
        self.router.require_index()
        if not self.health.all_run():
            raise ServiceError(503, "engine_unavailable", "An engine does not run yet: try again.", 5)
        return JSONResponse({"status": "ready"}, headers=self.router.staleness())

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        with self._told(request) as (key, _):
            self.router.require_index()
            found = self.router.index.models(lambda release: self.router.listed(release, key))
            return JSONResponse({"object": "list", "data": found}, headers=self.router.staleness())

    @app.get("/v1/models/{model:path}")
    async def model(self, model: str, request: Request) -> Response:
        with self._told(request) as (key, seen):
            release = await self.router.resolve(model, key)
            seen.release = release.id
            return JSONResponse(self.router.index.card(model, release), headers=self.router.staleness())

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest)

    async def drain(self, seconds: float) -> None:
        """Refuse what comes from now on, and give up shadows; returns when what runs has ended, or after so many seconds."""
        self._ending = True
        self.shadows.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._running:
                    await asyncio.sleep(0.1)

    async def _answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        seen = _Seen(time.monotonic())
        self._running += 1
        try:
            key = self._admit(request)
            seen.key = key.name
            body = await read_body(request, key.max_body_bytes)
            wanted = protocol.parse(kind, body, key.max_tokens)
            release = await self.router.resolve(wanted.model, key)
            asked = protocol.asked(wanted, release.id, key.max_tokens)
            trial = self.router.trial(wanted.model, (wanted.user or asked.opening()).encode())
            begun = await self._canary(asked, trial.release, seen) if trial and not trial.shadow else None
            if begun is None:
                seen.release = release.id
                begun = await self.health.while_running(release.base_fingerprint, self._begin(asked, release), PATIENCE)
            first, pieces = begun
        except ServiceError as error:
            seen.status = error.status
            self._end(seen)
            raise
        except BaseException as error:
            seen.status = CLIENT_GONE if isinstance(error, asyncio.CancelledError) else UNFORESEEN.status
            self._end(seen)
            raise
        seen.first = time.monotonic() - seen.began
        compare = partial(self._shadow, asked, trial.release) if trial and trial.shadow else None
        headers = {"x-translora-release": seen.release, **self.router.staleness()}
        frame = _Frame(f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), seen.release, asked.chat)
        if not asked.stream:
            seen.status, seen.prompt_tokens, seen.tokens = 200, first.prompt_tokens, first.tokens
            self._end(seen)
            if compare:
                compare(first.text)
            return JSONResponse(protocol.answer(*frame, first), headers=headers)
        with_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        seen.status = CLIENT_GONE  # until its events begin
        events = self._events(seen, frame, first, pieces, with_usage, compare)
        return _Stream(events, partial(self._end, seen), headers | {"cache-control": "no-cache"})

    async def _begin(self, asked: Asked, release: Release) -> tuple[Piece, AsyncIterator[Piece]]:
        """The first piece of a release's answer, and the others."""
        pieces = read_pieces(self._engine(release).answer.remote(replace(asked, release=release.id)))
        return await anext(pieces), pieces

    async def _canary(self, asked: Asked, release: Release, seen: _Seen) -> tuple[Piece, AsyncIterator[Piece]] | None:
        """The answer of a release on trial. None where it can not give one, which counts against it: the release that the channel names answers then."""
        seen.release = release.id
        try:
            return await self.health.while_running(release.base_fingerprint, self._begin(asked, release))
        except ServiceError as error:
            logger.warning(f"the canary {release.id} could not answer: {error}")
            self._say(replace(seen, status=error.status))
            return None

    def _shadow(self, asked: Asked, release: Release, answer: str) -> None:
        """Have the shadow asked what the client has the answer to. Not after the response is sent: Serve cancels a request whose client has gone."""
        if asked.temperature:
            self.measures.shadow(asked.release, release.id, DRAWN)
        else:
            self.shadows.begin(asked.release, release.id, answer, partial(self._whole, asked, release))

    async def _whole(self, asked: Asked, release: Release) -> str:
        try:
            first, _ = await self.health.while_running(release.base_fingerprint, self._begin(replace(asked, stream=False), release))
        except ServiceError as error:
            logger.warning(f"the shadow {release.id} could not answer: {error}")
            raise
        return first.text

    async def _events(
        self, seen: _Seen, frame: _Frame, piece: Piece, pieces: AsyncIterator[Piece], with_usage: bool, compare: Callable[[str], None] | None
    ) -> AsyncGenerator[str]:
        """The answer as server-sent events. An engine that fails on the way ends it with an error's event: nothing else can be said by then."""
        said = [piece.text]
        seen.status = 200
        try:
            yield protocol.event(*frame, piece, True)
            while not piece.finish:
                piece = await anext(pieces)
                said.append(piece.text)
                yield protocol.event(*frame, piece, False)
            if with_usage:
                yield protocol.usage_event(*frame, piece)
            yield protocol.DONE
        except ServiceError as error:
            seen.status = error.status
            yield protocol.sent(error.body())
        except (asyncio.CancelledError, GeneratorExit):
            if not piece.finish:
                seen.status = CLIENT_GONE  # before it had the answer
            raise
        except Exception as error:
            logger.error(f"unforeseen in a stream: {type(error).__name__}: {error}", exc_info=error)
            seen.status = UNFORESEEN.status
            yield protocol.sent(UNFORESEEN.body())
        finally:
            seen.prompt_tokens, seen.tokens = piece.prompt_tokens, piece.tokens or len(said)  # of a client that left: no piece is less than a token
            if piece.finish and compare:
                compare("".join(said))

    def _admit(self, request: Request) -> Key:
        """The request's key, if it has one that is known and has requests left."""
        self._require_open()
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        key = self.keyring.find(presented.strip() if scheme.lower() == "bearer" and presented.strip() else None)
        if key is None:
            raise ServiceError(401, "invalid_api_key", "This service wants a key that it knows: send `Authorization: Bearer KEY`.")
        if wait := self.limiter.wait(key):
            raise ServiceError(429, "rate_limit_exceeded", f"This key may ask {key.requests_per_minute} times a minute: try again later.", wait)
        return key

    def _engine(self, release: Release) -> Any:
        """A handle that prefers replicas with the release. Kept, because each handle costs Serve's controller something."""
        if release.id not in self._handles:
            self._handles[release.id] = self.engines[release.base_fingerprint].options(multiplexed_model_id=release.id)
        return self._handles[release.id]

    def _require_open(self) -> None:
        if self._ending:
            raise ServiceError(503, "service_ending", "This service is ending: try again.", 5)

    @contextlib.contextmanager
    def _told(self, request: Request) -> Iterator[tuple[Key, _Seen]]:
        """A request that no engine answers, in log and metrics."""
        seen = _Seen(time.monotonic())
        try:
            key = self._admit(request)
            seen.key = key.name
            yield key, seen
            seen.status = 200
        except ServiceError as error:
            seen.status = error.status
            raise
        finally:
            self._say(seen)

    def _end(self, seen: _Seen) -> None:
        self._running -= 1
        self._say(seen)

    def _say(self, seen: _Seen) -> None:
        seconds = time.monotonic() - seen.began
        facts = {"key": seen.key, "release": seen.release, "status": seen.status, "prompt_tokens": seen.prompt_tokens, "tokens": seen.tokens}
        logger.info("request", extra={"ray_serve_extra_fields": facts | {"seconds": round(seconds, 4)}})
        self.measures.request(seen.release, seen.status, seconds, seen.first, seen.prompt_tokens, seen.tokens)
