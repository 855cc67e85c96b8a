"""A second door to the object store of the tests: it refuses some of the requests, as busy stores do."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from werkzeug.wsgi import get_input_stream

BUSY = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
Start = Callable[..., Any]


class Unreliable:
    """Answers one in `every` requests, drawn from `seed`, with 503: by halves before anything was done, and after all was done, when the answer gets lost."""

    def __init__(self, store: Callable[[dict[str, Any], Start], Iterable[bytes]], every: int, seed: int) -> None:
        self.store, self.every = store, every
        self.asked, self.refused = Counter[str](), Counter[str]()
        self._draw, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        with self._lock:
            refused, done = self._draw.randrange(self.every) == 0, self._draw.randrange(2) == 0
            self.asked[method] += 1
            self.refused[method] += refused
        if not refused:
            return self.store(environ, start)
        if done:
            b"".join(self.store(environ, lambda *_answer: None))
        else:
            get_input_stream(environ).read()
        start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))])
        return [b"" if method == "HEAD" else BUSY]


@contextmanager
def unreliable(every: int = 20, seed: int = 0) -> Iterator[Unreliable]:
    """All that is opened inside goes through that door. The test must have asked for `s3`, whose store it is."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    door = Unreliable(DomainDispatcherApplication(create_backend_app), every, seed)
    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield door
    server.shutdown()
    thread.join()
