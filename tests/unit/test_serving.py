"""What the service decides without Ray: requests, names, pieces of text, batches."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from starlette.requests import Request

from tests.conftest import save_run
from tests.serving import TEMPLATE, finished_run
from tests.unit.test_fleet import until
from translora_ray.engines.base import AdapterRef, Generate, Sampling
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import UsageError
from translora_ray.models import fingerprint
from translora_ray.prompts import Prompt
from translora_ray.registry import Registry
from translora_ray.serving import health, loading
from translora_ray.serving.app import Service, application, build, plan
from translora_ray.serving.auth import OPEN, add_key
from translora_ray.serving.batches import FAILURES, Batches, settled
from translora_ray.serving.gateway import Gateway, _Frame, _Seen, _Stream
from translora_ray.serving.index import Index
from translora_ray.serving.loading import Loader
from translora_ray.serving.local import TransformersBackend
from translora_ray.serving.measures import EngineMeasures
from translora_ray.serving.prompting import Prompter
from translora_ray.serving.protocol import ChatRequest, CompletionRequest, Piece, ServiceError, asked, parse
from translora_ray.serving.reading import read_body, read_pieces
from translora_ray.serving.routing import Router, Serves
from translora_ray.serving.run import _model, lacking
from translora_ray.serving.trials import Shadows

CHAT = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "a", "prompt": "x"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"\xff\xfe", "body"),
        (b'{"model": "\\ud800", "prompt": "x"}', "body"),
        ({"prompt": "x"}, "model"),
        (COMPLETION | {"model": 7}, "model"),
        (COMPLETION | {"prompt": ""}, "prompt"),
        (COMPLETION | {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETION | {"prompt": [1, 2]}, "prompt"),
        (COMPLETION | {"max_tokens": 0}, "max_tokens"),
        (COMPLETION | {"max_tokens": "5"}, "max_tokens"),
        (COMPLETION | {"max_tokens": 65}, "max_tokens"),
        (COMPLETION | {"temperature": -1}, "temperature"),
        (b'{"model": "a", "prompt": "x", "temperature": NaN}', "temperature"),
        (COMPLETION | {"seed": 1 << 70}, "seed"),
        (COMPLETION | {"stop": ["a"] * 5}, "stop"),
        (COMPLETION | {"n": 2}, "n"),
        (COMPLETION | {"presence_penalty": 0.5}, "presence_penalty"),
        (COMPLETION | {"logit_bias": {"5": 1}}, "logit_bias"),
        (COMPLETION | {"logprobs": 3}, "logprobs"),
        (COMPLETION | {"logprobs": 0}, "logprobs"),
        (COMPLETION | {"logprobs": True}, "logprobs"),
        (COMPLETION | {"tools": []}, "tools"),
        (COMPLETION | {"echo": True}, "echo"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(body: bytes | dict[str, object], field: str) -> None:
    with pytest.raises(ServiceError) as refused:
        parse(CompletionRequest, body if isinstance(body, bytes) else json.dumps(body).encode(), most=64)
    assert refused.value.status == 400 and refused.value.message.startswith(field)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "x",
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": "x", "name": "bob"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_messages_are_checked(messages: object) -> None:
    with pytest.raises(ServiceError) as refused:
        parse(ChatRequest, json.dumps(CHAT | {"messages": messages}).encode(), most=64)
    assert refused.value.status == 400 and refused.value.message.startswith("messages")


def test_what_changes_nothing_is_taken() -> None:
    neutral = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "top_p": 1,
        "stop": None,
        "stream": False,
        "user": "u",
        "seed": None,
        "temperature": None,
        "logprobs": None,
        "top_logprobs": None,
        "logit_bias": {},
        "tools": None,
    }
    chat = parse(ChatRequest, json.dumps(CHAT | neutral | {"max_completion_tokens": 5, "response_format": {"type": "text"}}).encode(), most=64)
    found = asked(chat, "a@1", 64)
    assert (found.chat, found.max_tokens, found.temperature, found.messages) == (True, 5, 1.0, (("user", "x"),))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert asked(parse(ChatRequest, json.dumps(CHAT | {"messages": [{"role": "user", "content": parts}]}).encode(), 64), "a@1", 64).messages == (
        ("user", "ab"),
    )
    history = [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "name": None}, *CHAT["messages"]]
    streamed = CHAT | {"messages": history, "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": None}}
    assert asked(parse(ChatRequest, json.dumps(streamed).encode(), 64), "a@1", 64).messages == (("assistant", "x"), ("user", "x"))
    assert asked(parse(CompletionRequest, json.dumps(COMPLETION).encode(), most=8), "a@1", 8).max_tokens == 8, "nobody asked for sixteen"
    completion = asked(parse(CompletionRequest, json.dumps(COMPLETION | neutral | {"prompt": ["x"], "stop": "\n"}).encode(), most=64), "a@1", 64)
    assert (completion.chat, completion.max_tokens, completion.messages, completion.stop) == (False, 16, (("", "x"),), ("\n",))


def test_noise_is_never_more_than_a_refusal() -> None:
    """Requests with bytes exchanged at random: each is taken or refused with 400."""
    whole, random_ = json.dumps(CHAT | {"stop": ["\n"], "max_tokens": 3, "temperature": 0.5, "stream": True}).encode(), random.Random(0)
    refused = []
    for _ in range(3000):
        body = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            body[random_.randrange(len(body))] = random_.randrange(256)
        try:
            parse(ChatRequest, bytes(body[: random_.randint(1, len(body))] if random_.random() < 0.3 else body), most=64)
        except ServiceError as error:
            refused.append((error.status, json.dumps(error.body())))
    assert {status for status, _ in refused} == {400} and 1000 < len(refused) < 3000


@pytest.mark.parametrize(
    ("text", "stops", "end"),
    [("abc", (), 3), ("abc", ("x",), 3), ("ab\n", ("\n\n",), 2), ("abEN", ("END",), 2), ("abE", ("END", "bEx"), 1), ("ab\ufffd", (), 2), ("\ufffd", ("a",), 0)],
)
def test_only_what_is_certain_is_sent(text: str, stops: tuple[str, ...], end: int) -> None:
    assert settled(text, stops) == end


async def collect(batches: Batches, request: Generate, stream: bool) -> list[Piece]:
    return [piece async for piece in batches.run(request, stream)]


def test_batches_answer_as_the_engine_does_and_pieces_add_up(tiny_llama: str, tmp_path: Path) -> None:
    paths = [f"{finished_run(tmp_path / str(seed), tiny_llama, 'x', seed)}/adapter" for seed in (1, 2)]
    plain = TransformersEngine(tiny_llama, device="cpu")
    requests = [
        Generate(Prompt(f"question {i}"), Sampling(12, temperature, stop=("a",) if i % 3 == 0 else ()), AdapterRef(str(i % 2), paths[i % 2]), seed=i)
        for i in range(6)
        for temperature in (0.0, 1.0)
    ]
    alone = [plain.generate([request])[0] for request in requests]
    batches = Batches(TransformersEngine(tiny_llama, device="cpu"), batch_size=4)

    async def everything() -> list[list[Piece]]:
        return await asyncio.gather(*(collect(batches, request, stream) for stream in (False, True) for request in requests))

    answers = asyncio.run(everything())
    for answer, wanted in zip(answers, alone * 2, strict=True):
        last = answer[-1]
        assert "".join(piece.text for piece in answer) == wanted.text
        assert (last.tokens, last.prompt_tokens, last.finish) == (wanted.tokens, wanted.prompt_tokens, "stop" if wanted.finished else "length")
        assert all(piece.finish is None for piece in answer[:-1])
    assert all(len(answer) == 1 for answer in answers[: len(requests)]) and max(len(answer) for answer in answers) > 3


def test_an_answer_ends_when_nobody_listens_and_an_adapter_can_leave(tiny_llama: str, tmp_path: Path) -> None:
    path = f"{finished_run(tmp_path / 'run', tiny_llama, 'x', 1)}/adapter"
    engine = TransformersEngine(tiny_llama, device="cpu")
    batches = Batches(engine, batch_size=4)
    request = Generate(Prompt("question"), Sampling(8), AdapterRef("x", path))
    before = asyncio.run(collect(batches, request, False))

    async def leave() -> int:
        stream = batches.run(Generate(Prompt("question"), Sampling(1500, 1.0), AdapterRef("x", path), seed=3), True)
        await anext(stream)
        await stream.aclose()
        began = asyncio.get_running_loop().time()
        await collect(batches, request, False)  # waits for the batch before it
        return round(asyncio.get_running_loop().time() - began)

    assert asyncio.run(leave()) < 5
    batches.drop(path)
    assert asyncio.run(collect(batches, request, False)) == before, "read again, it answers as before"
    asyncio.run(collect(batches, Generate(Prompt("x"), Sampling(1)), False))
    assert engine._names == {}, "for that batch alone"
    batches.hold(path)
    assert asyncio.run(collect(batches, request, False)) == before and engine._names == {path: "adapter2"}
    batches.drop(path)
    until(lambda: not engine._names)  # though nobody asks for anything


def test_adapters_that_leave_while_requests_wait_with_them_do_not_stay_in_memory(tiny_llama: str, tmp_path: Path) -> None:
    """Eight adapters where two are held: whoever is third makes the first one leave, whose requests may still wait."""
    paths = [f"{finished_run(tmp_path / str(seed), tiny_llama, 'x', seed)}/adapter" for seed in range(8)]
    engine, plain = TransformersEngine(tiny_llama, device="cpu"), TransformersEngine(tiny_llama, device="cpu")
    batches, held, most = Batches(engine, batch_size=4), deque[str](), 0
    requests = [Generate(Prompt(f"question {number}"), Sampling(4), AdapterRef(str(number % 8), paths[number % 8])) for number in range(24)]

    async def ask(request: Generate) -> str:
        nonlocal most
        path = request.adapter.path  # type: ignore[union-attr]
        if path not in held:
            if len(held) == 2:
                batches.drop(held.popleft())
            batches.hold(path)
            held.append(path)
        (piece,) = await collect(batches, request, False)
        most = max(most, len(engine._names))
        return piece.text

    async def everything() -> list[str]:
        return await asyncio.gather(*map(ask, requests))

    assert asyncio.run(everything()) == [plain.generate([request])[0].text for request in requests]
    asyncio.run(collect(batches, Generate(Prompt("x"), Sampling(1)), False))
    assert set(engine._names) <= set(held) and most <= 3


def test_names_lead_to_releases_and_a_failure_keeps_them(tiny_llama: str, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    for seed in (1, 2):
        registry.publish(finished_run(tmp_path / f"run{seed}", tiny_llama, "colours", seed))
    index = Index(registry)
    assert not index.loaded and index.find("colours@1") is None and index.age() is not None
    index.refresh()
    assert index.loaded and index.age() is None and [model["id"] for model in index.models(lambda _: True)] == ["colours@1", "colours@2"]
    assert index.find("colours") is None, "no channel yet"
    registry.promote("colours@1")
    registry.promote("colours@2", "next")
    index.refresh()
    found = {name: index.find(name) for name in ("colours", "colours:stable", "colours:next", "colours@2", "colours:x", "../colours@1", "")}
    assert [release and release.id for release in found.values()] == ["colours@1", "colours@1", "colours@2", "colours@2", None, None, None]
    (tmp_path / "registry").rename(tmp_path / "away")
    index.refresh()
    assert index.age() is not None and index.find("colours:stable") == found["colours"]
    (tmp_path / "away").rename(tmp_path / "registry")
    registry.promote("colours@2")
    index.refresh()
    stable = index.find("colours")
    assert index.age() is None and stable and stable.id == "colours@2"


def test_a_damaged_file_is_its_own_names_business(tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(str(tmp_path / "registry"))
    run = finished_run(tmp_path / "run", tiny_llama, "colours", 1)
    for name in ("colours", "numbers", "tones"):
        registry.promote(registry.publish(run, name).id)
    index = Index(Registry(registry.uri))
    index.refresh()
    broken = [tmp_path / "registry" / place for place in ("releases/tones@2/release.json", "channels/colours/stable/000002.json")]
    for file in broken:
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"release": 3}')
    registry.publish(finished_run(tmp_path / "next", tiny_llama, "numbers", 2))
    registry.promote("numbers@2")
    for reader in (index, Index(Registry(registry.uri))):
        for _ in range(2):
            reader.refresh()
        found = {name: reader.find(name) for name in ("numbers", "tones", "tones@2", "colours")}
        stable = "colours@1" if reader is index else None
        assert [release and release.id for release in found.values()] == ["numbers@2", "tones@1", None, stable] and reader.age() is None
    assert [record.message.count(str(file)) for record in caplog.records for file in broken] == [0, 1, 1, 0] * 2, "each is said once"
    assert plan(Service(registry=registry.uri))[1] == (tiny_llama,), "and a service starts"


def test_an_error_nobody_foresaw_ends_one_reading_of_the_registry_and_not_all() -> None:
    index = Index(SimpleNamespace(check=lambda: {}["x"]))  # type: ignore[arg-type]
    index.refresh()
    assert index.error == "KeyError: 'x'" and not index.loaded and index.age() is not None


def test_damaged_weights_are_said_without_a_path_and_mended_ones_load(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(str(tmp_path / "registry"))
    run = finished_run(tmp_path / "run", tiny_llama, "colours", 1)
    for name in ("colours", "numbers"):
        registry.publish(run, name)
    weights = next((tmp_path / "registry").rglob("colours@1/adapter_model.safetensors"))
    sound = weights.read_bytes()
    loader = Loader(str(tmp_path / "registry"), tiny_llama, fingerprint(tiny_llama), EngineMeasures())

    def load(release: str) -> Path:
        return asyncio.run(loader.load(release))

    for damaged in (sound[:-10], sound[:-4] + b"\0\1\2\3", b""):
        weights.write_bytes(damaged)
        with pytest.raises(ServiceError) as refused:
            load("colours@1")
        assert refused.value.status == 503 and refused.value.retry_after and str(tmp_path) not in refused.value.message
    weights.write_bytes(sound)
    with pytest.raises(ServiceError, match="damaged"):
        load("colours@1")  # it is not fetched again with each request
    monkeypatch.setattr(loading, "DAMAGED_SECONDS", 0.0)
    path = load("colours@1")
    assert loader.registry.release("numbers@1"), "its release.json is known, its weights were not fetched"
    with pytest.raises(ServiceError) as refused:
        load("colours@2")
    assert refused.value.status == 404
    (tmp_path / "registry").rename(tmp_path / "away")
    assert load("colours@1") == path, "what was fetched needs no registry"
    for release in ("colours@2", "numbers@1"):
        with pytest.raises(ServiceError) as refused:
            load(release)
        assert (refused.value.status, refused.value.code) == (503, "registry_unreachable") and refused.value.retry_after
    monkeypatch.setattr(loading, "DAMAGED_SECONDS", 0.2)
    assert loader.give_up("colours@1").status == 503
    with pytest.raises(ServiceError, match="damaged"):
        load("colours@1")  # an engine that could not use it is not asked to with each request, either
    time.sleep(0.3)
    assert load("colours@1") == path


def test_an_adapter_that_does_not_fit_its_base_is_not_loaded(tiny_llama: str, tiny_gemma: str, tmp_path: Path) -> None:
    """Whatever its release says of its base."""
    run = finished_run(tmp_path / "run", tiny_gemma, "colours", 1)
    manifest = json.loads(Path(run, "manifest.json").read_text())
    Path(run, "manifest.json").write_text(json.dumps(manifest | {"target": fingerprint(tiny_llama), "target_base": tiny_llama}))
    registry = Registry(str(tmp_path / "registry"))
    registry.publish(run)
    with pytest.raises(ServiceError, match="do not fit the base"):
        asyncio.run(Loader(registry.uri, tiny_llama, fingerprint(tiny_llama), EngineMeasures()).load("colours@1"))


def test_who_waits_for_an_adapter_waits_for_that_one_alone(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, fetched, slow = Loader(Registry(str(tmp_path)).uri, tiny_llama, fingerprint(tiny_llama), EngineMeasures()), list[str](), threading.Event()

    def fetch(release: str) -> Path:
        fetched.append(release)
        if release == "slow@1":
            slow.wait(20)
        path = Path(loader._scratch.name) / release
        path.mkdir(exist_ok=True)
        return path

    monkeypatch.setattr(loader, "_fetch", fetch)
    monkeypatch.setattr(loading, "KEPT", 2)

    async def ask() -> None:
        waiting = [asyncio.create_task(loader.load("slow@1")) for _ in range(40)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()  # a client that has gone takes nothing from the others
        first, second = await loader.load("a@1"), await loader.load("b@1")
        assert await loader.load("a@1") == first and second.exists()
        assert fetched == ["slow@1", "a@1", "b@1"] and not any(task.done() for task in waiting[1:])
        slow.set()
        assert len(set(await asyncio.gather(*waiting[1:]))) == 1
        assert not second.exists(), "the one that nobody asked for longest makes room on the disk"
        shutil.rmtree(first)
        assert await loader.load("a@1") == first and first.exists(), "what somebody removed is fetched again"

    asyncio.run(ask())
    assert fetched == ["slow@1", "a@1", "b@1", "a@1"]
    place = Path(loader._scratch.name)
    loader.close()
    assert not place.exists()


def test_another_version_of_the_base_is_not_served(tiny_llama: str, tiny_gemma: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the one this service began with"):
        Loader(Registry(str(tmp_path)).uri, tiny_llama, fingerprint(tiny_gemma), EngineMeasures())


def test_one_base_by_two_names_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    registry.publish(finished_run(tmp_path / "run", tiny_llama, "colours", 1))
    shutil.copytree(tiny_llama, tmp_path / "copy")
    with pytest.raises(UsageError, match=r"The bases .*llama and .*copy are the same"):
        application(Service(registry=registry.uri, bases=(tiny_llama, str(tmp_path / "copy"))))


def test_more_engines_than_there_is_room_for_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}, {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert lacking(Service(registry="r", replicas=2), 2) == ""
    assert lacking(Service(registry="r", replicas=(1, 9)), 4) == "", "more come as there is room"
    assert lacking(Service(registry="r", replicas=4, cpus=2), 1) == "Ray has room for 1 of the 4 engines (2 CPU and 0 GPU each)"
    assert lacking(Service(registry="r", engine="vllm", cpus=32, gpus=2), 1) == "", "vLLM asks for CPUs of its own beside whole GPUs"
    assert "room for 0 of the 1 engines (0 CPU and 4 GPU each)" in lacking(Service(registry="r", engine="vllm", gpus=4), 1)


def test_an_engine_that_fails_whatever_it_is_asked_is_replaced(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(TransformersEngine(tiny_llama, device="cpu"), batch_size=1)
    error: Exception = UsageError("an adapter of somebody")

    def broken(_requests: object) -> list[Any]:
        raise error

    async def ask(times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(UsageError, RuntimeError):
                async for _piece in batches.run(Generate(Prompt("Q"), Sampling(1)), False):
                    pass

    monkeypatch.setattr(batches.engine, "generate", broken)
    asyncio.run(ask(FAILURES + 1))
    assert batches.alive()
    error = RuntimeError("CUDA error: an illegal memory access")
    asyncio.run(ask(FAILURES - 1))
    assert batches.alive()
    asyncio.run(ask(1))
    assert not batches.alive()


def test_what_a_service_left_that_was_killed_is_removed(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = [tmp_path / f"{loading.PREFIX}{name}" for name in (f"{gone.pid}-abc", f"{os.getppid()}-abc", "abc")]
    for place in left:
        place.mkdir()
    Loader(Registry(str(tmp_path)).uri, tiny_llama, fingerprint(tiny_llama), EngineMeasures())
    assert [place.exists() for place in left] == [False, True, True]


def test_while_the_registry_is_away_no_name_is_said_to_be_unknown(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    registry.publish(save_run(tmp_path / "run"))
    router = Router(registry, [Serves("base", "fingerprint", ("lora",))])

    async def look() -> list[tuple[int, str]]:
        await router.refresh()
        found = []
        for place in ("registry", "away"):
            assert (await router.resolve("colours@1", OPEN)).id == "colours@1"
            with pytest.raises(ServiceError) as refused:
                await router.resolve("colours@2", OPEN)
            found.append((refused.value.status, refused.value.code))
            (tmp_path / place).rename(tmp_path / "away")
        return found

    assert asyncio.run(look()) == [(404, "model_not_found"), (503, "registry_unreachable")]


def test_tokens_that_may_follow_are_those_that_the_context_has_room_for(tiny_llama: str) -> None:
    prompter = Prompter(tiny_llama, context=100)

    def room(prompt: str, max_tokens: int | None, virtual_tokens: int = 0) -> int:
        wanted = asked(parse(CompletionRequest, json.dumps(COMPLETION | {"prompt": prompt, "max_tokens": max_tokens}).encode(), 1024), "a@1", 1024)
        return asyncio.run(prompter.read(wanted, virtual_tokens))[1]

    assert [room("x" * 80, 20), room("x" * 80, None), room("x" * 80, None, 5)] == [20, 20, 15]
    for prompt, max_tokens, virtual_tokens in (("x" * 80, 21, 0), ("x" * 80, 20, 1), ("x" * 100, None, 0)):
        with pytest.raises(ServiceError, match="the context has 100") as refused:
            room(prompt, max_tokens, virtual_tokens)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    with pytest.raises(ServiceError, match="no chat template"):
        asyncio.run(prompter.read(asked(parse(ChatRequest, json.dumps(CHAT).encode(), 64), "a@1", 64)))


def test_the_chat_template_gets_all_messages(tiny_llama: str) -> None:
    from translora_ray.models import load_tokenizer
    from translora_ray.prompts import prompt_ids

    tokenizer = copy.deepcopy(load_tokenizer(tiny_llama))  # it is shared
    tokenizer.chat_template = TEMPLATE
    prompt = Prompt("you", "chat", (("system", "be"), ("user", "hi"), ("assistant", "yes")))
    assert tokenizer.decode(prompt_ids(tokenizer, prompt)) == "be\nhi\nyes\nyou\nA:"


@pytest.mark.parametrize(("events", "status", "compared"), [(1, 499, []), (2, 200, ["ab"]), (3, 200, ["ab"])])
def test_a_client_that_leaves_with_the_whole_answer_had_an_answer(events: int, status: int, compared: list[str]) -> None:
    """Some clients close at the finish, or at [DONE]: Serve cancels the request there."""
    seen, found = _Seen(0.0), []

    async def rest() -> AsyncIterator[Piece]:
        yield Piece("b", "stop", 3, 2)

    async def listen() -> None:
        said = Gateway._events(None, seen, _Frame("cmpl-1", 0, "a@1", False), Piece("a"), rest(), False, found.append)  # type: ignore[arg-type]
        for _ in range(events):
            await anext(said)
        await said.aclose()

    asyncio.run(listen())
    assert (seen.status, found) == (status, compared) and (seen.tokens == 2) == bool(compared)


@pytest.mark.parametrize(("failure", "status"), [(ServiceError(503, "engine_failed", "It failed.", 1), 503), (RuntimeError("nobody foresaw this"), 500)])
def test_a_stream_that_fails_on_the_way_ends_with_the_error_and_counts_as_one(failure: Exception, status: int) -> None:
    seen = _Seen(0.0)

    async def rest() -> AsyncIterator[Piece]:
        yield Piece("b")
        raise failure

    async def listen() -> list[str]:
        return [event async for event in Gateway._events(None, seen, _Frame("cmpl-1", 0, "a@1", False), Piece("a"), rest(), False, None)]  # type: ignore[arg-type]

    *pieces, last = asyncio.run(listen())
    assert len(pieces) == 2 and seen.status == status
    said = json.loads(last.removeprefix("data: "))["error"]
    assert said["type"] == "server_error" and "nobody" not in said["message"]


def request(*parts: bytes) -> Request:
    """One whose body comes in parts, without a word on its length."""
    messages = [{"type": "http.request", "body": part, "more_body": number < len(parts)} for number, part in enumerate(parts, 1)]
    coming = iter(messages)

    async def receive() -> dict[str, object]:
        return next(coming)

    return Request({"type": "http", "headers": []}, receive)


@pytest.mark.parametrize(("failure", "status"), [(asyncio.CancelledError, 499), (RuntimeError, 500)])
def test_a_client_that_does_not_wait_for_its_answer_is_no_failure_of_the_service(failure: type[BaseException], status: int) -> None:
    """Serve cancels the request of a client that has gone."""
    said: list[_Seen] = []

    async def resolve(*_: object) -> object:
        return SimpleNamespace(id="a@1", base_fingerprint="base")

    async def begin(*_: object) -> object:
        raise failure

    router = SimpleNamespace(resolve=resolve, trial=lambda *_: None)
    engine: Any = None
    engines = health.Health({"base": engine})
    engines.running.add("base")
    gateway = SimpleNamespace(_admit=lambda _: OPEN, router=router, _begin=begin, _end=said.append, _running=0, health=engines)
    with pytest.raises(failure):
        asyncio.run(Gateway._answer(gateway, request(json.dumps(COMPLETION).encode()), CompletionRequest))  # type: ignore[arg-type]
    assert [(seen.release, seen.status) for seen in said] == [("a@1", status)]


def test_a_request_waits_for_an_engine_that_is_gone_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SECONDS", 0.05)
    engine: Any = None

    async def never() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def late() -> str:
        await asyncio.sleep(0.3)
        return "late"

    for patience in (0.0, 0.2):
        engines, began = health.Health({"base": engine}), time.monotonic()
        with pytest.raises(ServiceError) as refused:
            asyncio.run(engines.while_running("base", never(), patience))
        assert refused.value.status == 503 and refused.value.retry_after and patience <= time.monotonic() - began < patience + 2
    with pytest.raises(ServiceError):
        asyncio.run(engines.while_running("base", late(), 0.1))  # it has been gone for longer: who comes now does not wait at all
    assert asyncio.run(engines.while_running("base", late(), 20)) == "late"  # a replica came meanwhile
    engines.running.add("base")
    assert asyncio.run(engines.while_running("base", late())) == "late"


@pytest.mark.parametrize("failure", [BackPressureError(1, 1), RayActorError(), ReplicaUnavailableError("engine")])
def test_an_engine_that_is_full_or_gone_is_told_so_that_clients_come_back(failure: Exception) -> None:
    async def answer() -> AsyncIterator[Piece]:
        raise failure
        yield

    with pytest.raises(ServiceError) as refused:
        asyncio.run(anext(read_pieces(answer())))
    assert (refused.value.status, refused.value.code) == (503, "engine_unavailable") and refused.value.retry_after


@pytest.mark.parametrize(("gone_at", "status"), [("http.response.start", 499), ("http.response.body", 499), ("", 200)])
def test_a_stream_is_over_when_its_client_is_gone_whenever_that_is(gone_at: str, status: int) -> None:
    """Also before the first event, when nothing of the answer ran yet."""
    seen, ended = _Seen(0.0, status=499), []

    async def rest() -> AsyncIterator[Piece]:
        yield Piece("b", "stop", 3, 2)

    async def send(message: Any) -> None:
        if message["type"] == gone_at:
            raise asyncio.CancelledError

    async def answer() -> None:
        events = Gateway._events(None, seen, _Frame("cmpl-1", 0, "a@1", False), Piece("a"), rest(), False, None)  # type: ignore[arg-type]
        with contextlib.suppress(asyncio.CancelledError):
            await _Stream(events, lambda: ended.append(seen.status), {})({"type": "http", "asgi": {"spec_version": "2.4"}}, None, send)  # type: ignore[arg-type]

    asyncio.run(answer())
    assert ended == [status]


def test_a_gateway_that_is_to_end_refuses_what_comes_and_waits_for_what_runs() -> None:
    gateway: Any = SimpleNamespace(_running=1, _ending=False, _say=lambda _: None, shadows=Shadows(lambda *_: None))
    for name in ("_admit", "_end", "_require_open"):
        setattr(gateway, name, partial(getattr(Gateway, name), gateway))

    async def end() -> float:
        began = time.monotonic()
        asyncio.get_running_loop().call_later(0.3, gateway._end, _Seen(0.0))
        await Gateway.drain(gateway, 20)
        return time.monotonic() - began

    assert 0.2 < asyncio.run(end()) < 10
    with pytest.raises(ServiceError, match="is ending") as refused:
        asyncio.run(Gateway._answer(gateway, request(b"{}"), CompletionRequest))
    assert refused.value.status == 503 and refused.value.retry_after and gateway._running == 0
    gateway._running = 1
    asyncio.run(Gateway.drain(gateway, 0.1))


def test_a_body_that_does_not_say_its_length_is_measured() -> None:
    assert asyncio.run(read_body(request(b"ab", b"c"), 3)) == b"abc"
    with pytest.raises(ServiceError) as refused:
        asyncio.run(read_body(request(b"ab", b"cd", b"ef"), 3))
    assert refused.value.status == 413


def test_the_application_of_serve_deploy_is_built_from_the_example(tiny_llama: str, tmp_path: Path) -> None:
    example = yaml.safe_load((Path(__file__).parents[2] / "examples" / "serve.yaml").read_text())["applications"][0]["args"]
    registry = Registry(str(tmp_path / "registry"))
    registry.publish(finished_run(tmp_path / "run", tiny_llama, "colours", 1))
    add_key(tmp_path / "keys.yaml", "a", ("*",))
    mine = {"registry": registry.uri, "keys": str(tmp_path / "keys.yaml"), "engine": "auto", "bases": []}
    gateway = build(example | mine)._bound_deployment
    where, keys, serves, engine = gateway.init_args
    assert (gateway.name, where, keys, [each.base for each in serves]) == ("gateway", registry.uri, mine["keys"], [tiny_llama])
    assert gateway.num_replicas == example["ingresses"]
    assert engine._bound_deployment.func_or_class is TransformersBackend, "auto is transformers"
    with pytest.raises(UsageError, match="no registry"):
        build(example | mine | {"registry": str(tmp_path / "absent")})
    with pytest.raises(UsageError, match="whoever reaches the port would be let in"):
        build(example | mine | {"keys": None})
    assert build(example | mine | {"keys": None, "open": True})


def test_the_model_that_is_shown_to_ask_for_is_one_that_is_served(tiny_llama: str, tiny_gemma: str, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    registry.publish(finished_run(tmp_path / "old", tiny_gemma, "animals", 1))
    registry.promote("animals@1")
    registry.publish(finished_run(tmp_path / "run", tiny_llama, "colours", 1))
    service = Service(registry=registry.uri, bases=(tiny_llama,))
    assert _model(service)[0] == "colours@1"
    registry.promote("colours@1")
    assert _model(service)[0] == "colours:stable"
    assert _model(service.model_copy(update={"bases": (tiny_llama, tiny_gemma)}))[0] == "animals:stable"


def test_a_release_that_can_not_be_had_is_known_before_another_makes_room(tiny_llama: str, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    registry.publish(finished_run(tmp_path / "run", tiny_llama, "colours", 1))
    backend = object.__new__(TransformersBackend)
    backend.loader, looked_for = Loader(registry.uri, tiny_llama, fingerprint(tiny_llama), EngineMeasures()), list[str]()

    async def load(release: str) -> None:
        looked_for.append(release)
        raise InterruptedError

    backend._load = load  # Serve's, which makes room first

    async def answer(release: str) -> None:
        async for _ in TransformersBackend.answer(backend, asked(parse(CompletionRequest, json.dumps(COMPLETION).encode(), 64), release, 64)):
            raise AssertionError

    with pytest.raises(ServiceError) as refused:
        asyncio.run(answer("colours@2"))
    assert refused.value.status == 404 and not looked_for
    with pytest.raises(InterruptedError):
        asyncio.run(answer("colours@1"))
    assert looked_for == ["colours@1"]
