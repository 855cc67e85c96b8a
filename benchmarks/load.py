"""Clients of a service that speaks OpenAI's protocol: connections that stay open, requests in a closed loop, seconds and tokens of each."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlsplit

TOKENS = 16
PROMPT = "Customer: my order {} has not arrived yet, and nobody answers the phone. What should I do?\nAgent:"


class Round(NamedTuple):
    """What a round measured: its seconds, its tokens, the median seconds of a request."""

    seconds: float
    tokens: int
    latency: float

    @property
    def throughput(self) -> float:
        return self.tokens / self.seconds


def round_of(url: str, models: Sequence[str], requests: int, clients: int, turn: int) -> Round:
    """`requests` greedy completions of `TOKENS` tokens by so many clients at once, going round the models; other prompts in every turn."""
    parts = [range(number, requests, clients) for number in range(min(clients, requests))]

    def client(numbers: range) -> list[tuple[float, int]]:
        connection = _connect(url)
        found = []
        for number in numbers:
            began = time.perf_counter()
            answer = _ask(connection, models[number % len(models)], PROMPT.format(f"{turn}-{number}"))
            found.append((time.perf_counter() - began, answer["usage"]["completion_tokens"]))
            if found[-1][1] != TOKENS:
                raise SystemExit(f"{models[number % len(models)]} ended after {found[-1][1]} of {TOKENS} tokens: rounds would not be alike")
        connection.close()
        return found

    began = time.perf_counter()
    with ThreadPoolExecutor(len(parts)) as threads:
        measured = [each for part in threads.map(client, parts) for each in part]
    seconds = time.perf_counter() - began
    return Round(seconds, sum(tokens for _, tokens in measured), statistics.median(each for each, _ in measured))


def first_token(url: str, model: str) -> float:
    """Seconds to the first event of a streamed answer."""
    connection = _connect(url)
    began = time.perf_counter()
    response = _post(connection, model, PROMPT.format(0), stream=True)
    response.readline()
    seconds = time.perf_counter() - began
    response.read()
    connection.close()
    return seconds


def listing(url: str) -> tuple[float, int]:
    """Seconds of /v1/models, and how many there are."""
    connection = _connect(url)
    began = time.perf_counter()
    connection.request("GET", "/v1/models")
    found = json.loads(connection.getresponse().read())
    return time.perf_counter() - began, len(found["data"])


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=600)


def _post(connection: http.client.HTTPConnection, model: str, prompt: str, **more: object) -> http.client.HTTPResponse:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{model}: {response.status} {response.read().decode(errors='replace')}")
    return response


def _ask(connection: http.client.HTTPConnection, model: str, prompt: str) -> dict[str, dict[str, int]]:
    return dict(json.loads(_post(connection, model, prompt).read()))
