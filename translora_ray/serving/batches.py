"""Requests on their way through the transformers engine: whoever waits with the same adapter and sampling is answered in one batch.

The engine computes one batch at a time, in a thread of its own, and nobody joins a batch that has begun: that is what vLLM is for. No Ray here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace

from translora_ray.engines.base import Generate, Generation
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import TransLoraError
from translora_ray.serving.protocol import Piece

logger = logging.getLogger("ray.serve")
FAILURES = 5


class Batches:
    """The engine and those who wait for it, first come first served. `run` belongs to an event loop, `hold` and `drop` to any thread."""

    def __init__(self, engine: TransformersEngine, batch_size: int) -> None:
        self.engine, self.batch_size = engine, batch_size
        self._jobs: deque[_Job] = deque()
        self._dropped: set[str] = set()
        self._leaving = False
        """Whether one was dropped since the engine's thread looked."""
        self._work = threading.Condition()
        self._failures = 0
        """Batches that ended in errors of torch's and its like since the last answer."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        """Whether the engine answers: not one whose thread ended, nor one of which nothing came back for `FAILURES` batches."""
        return self._thread.is_alive() and self._failures < FAILURES

    def hold(self, path: str) -> None:
        """An adapter may stay in the engine's memory again."""
        with self._work:
            self._dropped.discard(path)

    def drop(self, path: str) -> None:
        """An adapter leaves the engine's memory after the batch that runs. Requests that still wait with it have it read again, for their batch alone."""
        with self._work:
            self._dropped.add(path)
            self._leaving = True
            self._work.notify()

    async def run(self, request: Generate, stream: bool) -> AsyncIterator[Piece]:
        """The answer in pieces, one if not streamed. Closing the iterator ends the answer at its next token."""
        job = _Job(request, stream)
        with self._work:
            self._jobs.append(job)
            self._work.notify()
        try:
            while True:
                piece = await job.pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            job.gone = True

    def _loop(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._jobs or self._leaving)
                batch = self._next()
            self._free()
            if batch:
                self._answer(batch)
                self._free()

    def _free(self) -> None:
        with self._work:
            dropped, self._leaving = list(self._dropped), False
        for path in dropped:
            self.engine.drop(path)

    def _next(self) -> list[_Job]:
        """The one that waits longest and those who go with it."""
        waiting = [job for job in self._jobs if not job.gone]
        batch = [job for job in waiting if job.key == waiting[0].key][: self.batch_size]
        self._jobs = deque(job for job in waiting if job not in batch)
        return batch

    def _answer(self, batch: list[_Job]) -> None:
        try:
            results = self.engine.generate([job.request for job in batch])
            self._failures = 0
        except Exception as error:
            self._failures += not isinstance(error, TransLoraError)  # which tell of a request or its adapter
            logger.error(f"the engine could not answer: {type(error).__name__}: {error}")
            for job in batch:
                job.put(error)
            return
        for job, result in zip(batch, results, strict=True):
            job.end(result)


class _Job:
    """A request and the queue of its pieces, which the engine's thread fills."""

    def __init__(self, request: Generate, stream: bool) -> None:
        self.request = replace(request, watch=self._watch)
        self.key = (request.adapter, request.sampling)
        self.stream, self.stops = stream, request.sampling.stop
        self.gone = self.stopped = False
        self.sent = ""
        self.pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, piece: Piece | BaseException) -> None:
        self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def end(self, result: Generation) -> None:
        finish = "stop" if result.finished or self.stopped else "length"
        self.put(Piece(result.text[len(self.sent) :], finish, result.prompt_tokens, result.tokens))  # type: ignore[arg-type]

    def _watch(self, text: str) -> bool:
        """Sends on what is certain; False ends the answer."""
        self.stopped = any(stop in text for stop in self.stops)
        if self.stream and not self.stopped and (end := settled(text, self.stops)) > len(self.sent):
            self.put(Piece(text[len(self.sent) : end]))
            self.sent = text[:end]
        return not (self.gone or self.stopped)


def settled(text: str, stops: tuple[str, ...]) -> int:
    """How much of a growing text is certain: not the beginning of a stop string at its end, nor a character whose bytes are not all there."""
    end = len(text.rstrip("\ufffd"))
    for stop in stops:
        longest = next((size for size in range(min(len(stop) - 1, end), 0, -1) if text[:end].endswith(stop[:size])), 0)
        end = min(end, end - longest)
    return end
