"""A migration as it is rolled out: the registry on an object store, old and new base side by side, canary, shadow, and engines that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.conftest import free_port, processes
from tests.serving import Running, chat_base, eventually, expected, finished_run, post, running
from tests.unreliable import Unreliable, unreliable
from translora_ray import adapters
from translora_ray.registry import Registry, Trial
from translora_ray.serving.trials import takes_part
from translora_ray.storage import RunStore

pytestmark = pytest.mark.ray
PROMPT = "question 1"
NEVER = 1 << 60
ENGINE = b"ray::ServeReplica:translora:engine-"


@dataclass
class World:
    folder: Path
    bases: dict[str, str]
    registry: Registry
    runs: dict[str, tuple[str, str]] = field(default_factory=dict)
    service: Running = None  # type: ignore[assignment]
    url: str = ""
    store: Unreliable = None  # type: ignore[assignment]

    def publish(self, name: str, seed: int, base: str = "new", **facts: object) -> str:
        """A release of a random adapter; the same seed is the same adapter."""
        run = finished_run(self.folder / uuid.uuid4().hex, self.bases[base], name, seed)
        manifest = RunStore(run).read_json("manifest.json")
        RunStore(run).write_json("manifest.json", manifest | facts)
        release = self.registry.publish(run).id
        self.runs[release] = (self.bases[base], run)
        return release

    def rollout(self, share: float, shadow: bool = False, stable: tuple[int, str] = (1, "old"), tried: tuple[int, str] = (2, "new")) -> tuple[str, str]:
        """Two releases of a name of their own, the first one stable, the second one on trial; (seed, base) each."""
        name = f"r{uuid.uuid4().hex[:8]}"
        first, second = self.publish(name, *stable), self.publish(name, *tried, recipe_hash="another")
        self.registry.promote(first)
        self.registry.try_out(Trial(second, share, shadow))
        self.settle(name, first, {"release": second, "share": share, "shadow": shadow})
        return first, second

    def settle(self, name: str, release: str, trial: dict[str, object] | None = None) -> None:
        """Wait until the service says so of a name's channel: it reads the registry every second."""

        def known() -> bool:
            found = [model.model_extra or {} for model in self.client().models.list() if model.id == name]
            return [(each["release"], each.get("trial")) for each in found] == [(release, trial)]

        assert eventually(known)

    def says(self, release: str, prompt: str = PROMPT, tokens: int = 6) -> str:
        return expected(*self.runs[release], prompt, tokens)

    def damage(self, release: str) -> None:
        store = RunStore(self.registry.uri)
        weights = f"releases/{release}/{adapters.WEIGHTS}"
        store.write(weights, store.read(weights)[:-10])

    def client(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=retries, timeout=120)

    def asks(self, model: str, **more: Any) -> tuple[str, str]:
        """(release, text)."""
        more = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0} | more
        answer = self.client().completions.create(model=model, **more)
        return answer.model, answer.choices[0].text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("rollout")
    bases = {"old": chat_base(folder / "old", seed=5), "new": chat_base(folder / "new", seed=6)}
    found = World(folder, bases, Registry(f"{s3}/{uuid.uuid4().hex}/registry"))
    found.publish("colours", 1, "old")
    options = [part for base in bases.values() for part in ("--base", base)]
    with unreliable(NEVER) as found.store, running(found.registry.uri, "--engine", "transformers", "--port", str(free_port()), *options) as service:
        found.service, found.url = service, service.url()
        yield found


def test_a_registry_on_an_object_store_is_served(world: World) -> None:
    assert world.asks("colours@1") == ("colours@1", world.says("colours@1"))
    release = world.publish("colours", 7)
    assert world.asks(release) == (release, world.says(release)), "on the other base, without a restart"
    world.damage(broken := world.publish("broken", 8))
    with pytest.raises(openai.InternalServerError, match="damaged"):
        world.asks(broken)


def test_while_the_object_store_is_away_what_is_loaded_answers_and_the_rest_is_told_to_come_back(world: World) -> None:
    name = f"r{uuid.uuid4().hex[:8]}"
    new = world.publish(name, 9)
    world.registry.promote(new)
    world.settle(name, new)

    def ask(model: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        status, headers, content = post(f"{world.url}/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0})
        return status, headers, json.loads(content)

    assert ask("colours@1")[0] == 200
    world.store.every = 1  # refuses whatever is asked
    try:
        assert eventually(lambda: "x-translora-registry" in ask("colours@1")[1])
        status, _, answer = ask("colours@1")
        assert status == 200 and answer["choices"][0]["text"] == world.says("colours@1")
        for model in (new, name, "colours@99"):
            status, headers, answer = ask(model)
            assert (status, answer["error"]["code"]) == (503, "registry_unreachable") and "retry-after" in headers, model
    finally:
        world.store.every = NEVER
    assert eventually(lambda: "x-translora-registry" not in ask("colours@1")[1])
    assert world.asks(name) == (new, world.says(new)) and ask("colours@99")[0] == 404


def test_a_canary_answers_its_share_and_the_same_requests_every_time(world: World) -> None:
    old, new = world.rollout(0.4)
    name = old.partition("@")[0]
    users = [f"user {number}" for number in range(30)]

    def ask(user: str) -> tuple[str, str]:
        return world.asks(name, user=user)

    with ThreadPoolExecutor(8) as clients:
        found = [list(clients.map(ask, users)) for _ in range(2)]
    wanted = [new if takes_part(new, user.encode(), 0.4) else old for user in users]
    said = {release: world.says(release) for release in (old, new)}
    assert found == [[(release, said[release]) for release in wanted]] * 2 and set(wanted) == {old, new} and said[old] != said[new]
    counts = Counter(wanted)
    assert eventually(lambda: all(world.service.counted("translora_requests", release=release, status="200") == 2 * counts[release] for release in counts))
    world.registry.roll_back(name)
    world.settle(name, old)
    assert {ask(user)[0] for user in users[:8]} == {old}
    world.registry.promote(new)
    world.settle(name, new)
    assert {ask(user)[0] for user in users[:8]} == {new}


def test_a_canary_that_can_not_answer_costs_nobody_an_answer(world: World) -> None:
    old, new = world.rollout(0.9)
    world.damage(new)
    found = {world.asks(old.partition("@")[0], user=str(number)) for number in range(8)}
    assert found == {(old, world.says(old))}
    assert eventually(lambda: world.service.counted("translora_requests", release=new, status="503") > 0), "and it counts against it"


def test_a_shadow_is_asked_and_its_agreement_counted(world: World) -> None:
    pairs = {"differ": world.rollout(1.0, True), "agree": world.rollout(1.0, True, (3, "new"), (3, "new")), "failed": world.rollout(1.0, True)}
    world.damage(pairs["failed"][1])
    for old, _ in pairs.values():
        name = old.partition("@")[0]
        assert world.asks(name) == (old, world.says(old))
        pieces = list(world.client().completions.create(model=name, prompt=PROMPT, max_tokens=6, temperature=0, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == world.says(old) and {piece.model for piece in pieces} == {old}
        assert world.asks(name, temperature=1.0, seed=1)[0] == old

    def counts(outcome: str, old: str, new: str) -> float:
        return world.service.counted("translora_shadow_requests", release=old, shadow=new, outcome=outcome)

    for outcome, pair in pairs.items():
        assert eventually(lambda outcome=outcome, pair=pair: (counts(outcome, *pair), counts("drawn", *pair)) == (2, 1)), outcome  # type: ignore[misc]
    new = pairs["differ"][1]
    assert world.service.counted("translora_requests", release=new) == 0, "it is nobody's request"


@pytest.mark.parametrize(("victim", "errors"), [(ENGINE + b"0", {503}), (b"ray::ServeReplica:translora:gateway", {500, 503})])
def test_a_replica_that_is_killed_under_load_loses_no_request(world: World, victim: bytes, errors: set[int]) -> None:
    """Each request is answered, or gets an error that the official client tries again after by itself. Of a dead gateway Serve's proxy tells in its own way."""
    said = world.says("colours@1", tokens=40)
    world.asks("colours@1")
    (before,) = processes(victim)
    body = {"model": "colours@1", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}

    def once(_: int) -> tuple[int, str]:
        status, headers, content = post(f"{world.url}/v1/completions", body)
        if status == 200:
            assert json.loads(content)["choices"][0]["text"] == said
        elif 500 not in errors:
            assert "retry-after" in headers and json.loads(content)["error"]["message"], (status, content)
        return status, content.decode()

    def streamed(_: int) -> None:
        """All of it, or an error that the client raises: nothing is cut off in silence."""
        try:
            pieces = list(world.client().completions.create(**body, stream=True))  # type: ignore[call-overload]
        except (openai.APIError, httpx2.RemoteProtocolError):  # the latter where the gateway is gone, which can not say so any more
            return
        assert "".join(piece.choices[0].text for piece in pieces) == said

    def patiently(_: int) -> str:
        return world.client(retries=12).completions.create(**body).choices[0].text  # type: ignore[call-overload,no-any-return]

    with ThreadPoolExecutor(16) as clients:
        streams = [clients.submit(streamed, number) for number in range(8)]
        raw, retried = ([clients.submit(work, number) for number in range(24)] for work in (once, patiently))
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(before, signal.SIGKILL)
        found = [each.result() for each in raw]
        texts = [each.result() for each in retried]
        for each in streams:
            each.result()
    assert {status for status, _ in found} <= {200, *errors}, found
    assert texts == [said] * len(texts)
    assert eventually(lambda: processes(victim) not in ([], [before])) and world.asks("colours@1") == ("colours@1", world.says("colours@1"))


def test_while_a_canarys_engine_is_gone_the_old_release_answers_at_once(world: World) -> None:
    old, new = world.rollout(1.0)
    name = old.partition("@")[0]
    assert world.asks(name) == (new, world.says(new))
    (before,) = processes(ENGINE + b"1")
    os.kill(before, signal.SIGKILL)
    found = []
    while processes(ENGINE + b"1") in ([], [before]):  # its next replica is not there yet, which a request that waits would be answered by
        found.append(world.asks(name))
    assert set(found) == {(old, world.says(old))}
    assert eventually(lambda: world.asks(name) == (new, world.says(new))), "until it is back"


def test_told_to_end_it_leaves_nothing_behind(world: World) -> None:
    """The last test here: it ends the service."""
    assert world.service.end() == 0, world.service.output()
    assert not processes(ENGINE)
