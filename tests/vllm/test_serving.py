"""`translora serve --engine vllm`: the official client's answers from a tiny model in float32 are those of plain transformers and peft."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.conftest import free_port, own, processes
from tests.serving import PROMPT, World, chat_base, post, running
from translora_ray.references import resolve
from translora_ray.registry import Registry

pytestmark = [pytest.mark.vllm, pytest.mark.ray]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("serving")
    found = World(folder, chat_base(folder / "base"), Registry(str(folder / "registry")), exact=True)
    for name, seed in (("colours", 1), ("colours", 2), ("numbers", 3)):
        found.publish(name, seed)
    found.registry.promote("colours@1")
    settings = ["--set", "cluster.vllm.dtype=float32", "--set", "cluster.vllm.cpu_cache_gib=0.1"]
    with running(str(folder / "registry"), "--engine", "vllm", "--adapters", "2", "--port", str(free_port()), *settings) as found.service:
        assert found.url, "it is ready"
        yield found


def test_answers_are_those_of_transformers_and_peft(world: World) -> None:
    for release in ("colours@1", "colours@2", "numbers@1", "colours@1"):
        assert world.asks(release) == (release, world.says(release)), "and three adapters take turns in the memory of two"
    assert len({world.says(release) for release in world.runs}) == len(world.runs), "adapters that all say the same would prove nothing"
    chat = world.client().chat.completions.create(model="colours", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0)
    assert chat.model == "colours@1" and chat.choices[0].message.content == world.says("colours@1", "hi\nA:", 6)
    assert chat.usage and chat.usage.completion_tokens == 6 and chat.choices[0].finish_reason == "length"


def test_streams_add_up_to_the_whole_answer(world: World) -> None:
    pieces = list(world.client().completions.create(model="colours", prompt=PROMPT, max_tokens=8, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == world.says("colours@1") and len(pieces) > 2
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 6, "temperature": 0}
    chunks = list(world.client().chat.completions.create(model="numbers@1", messages=[{"role": "user", "content": "hi"}], **options))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == world.says("numbers@1", "hi\nA:", 6)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == 6


def test_adapters_that_meet_in_a_batch_answer_as_alone(world: World) -> None:
    releases = ["colours@1", "colours@2"] * 8
    with ThreadPoolExecutor(len(releases)) as clients:
        found = list(clients.map(lambda release: world.asks(release, tokens=24), releases))
    assert found == [(release, world.says(release, tokens=24)) for release in releases]


def test_more_new_adapters_at_once_than_are_held_all_answer(world: World) -> None:
    releases = [world.publish(f"crowd{number}", 30 + number) for number in range(6)]
    with ThreadPoolExecutor(len(releases)) as clients:
        found = list(clients.map(world.asks, releases))
    assert found == [(release, world.says(release)) for release in releases]


def test_sampling_is_what_the_request_says(world: World) -> None:
    whole = world.says("colours@1", tokens=12)
    stop = whole[3:5]
    answer = world.client().completions.create(model="colours", prompt=PROMPT, max_tokens=12, temperature=0, stop=[stop]).choices[0]
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    drawn = [world.client().completions.create(model="colours", prompt=PROMPT, max_tokens=8, top_p=0.9, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_new_release_answers_and_one_that_can_not_is_said(world: World) -> None:
    release = world.publish("colours", 10)
    assert world.asks(release) == (release, world.says(release))
    large = world.publish("large", 11, rank=32)
    with pytest.raises(openai.NotFoundError, match="rank 32"):
        world.asks(large)
    damaged = world.publish("numbers", 20)
    weights = world.folder / "registry" / "releases" / damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(openai.InternalServerError, match="damaged") as refused:
        world.asks(damaged)
    assert refused.value.status_code == 503


def test_what_can_not_be_answered_is_the_clients_error(world: World) -> None:
    url = f"{world.url}/v1/"
    long = {"model": "colours", "prompt": "a" * 3000, "max_tokens": 8}
    chat = {"model": "colours", "messages": [{"role": "user", "content": "a" * 3000}]}
    both = {"model": "colours", "prompt": "a" * 1500, "max_tokens": 700}
    for route, body in (
        ("completions", long), ("completions", both), ("chat/completions", chat), ("completions", b"{"), ("completions", long | {"logit_bias": {"5": 1}})
    ):  # fmt: skip
        status, _, answer = post(f"{url}{route}", body)  # type: ignore[arg-type]
        assert status == 400 and ("context has 2048" in json.loads(answer)["error"]["message"]) == (body in (long, both, chat)), (route, answer)
    rest = world.client().chat.completions.create(model="colours", messages=[{"role": "user", "content": "a" * 2000}], temperature=1, seed=1)
    assert rest.usage and rest.usage.completion_tokens <= 2048 - rest.usage.prompt_tokens, "without max_tokens, what the context has room for"


def test_an_engine_that_dies_under_load_loses_no_request_and_is_replaced(world: World) -> None:
    (core,) = own(processes(b"VLLM::EngineCore"))
    body = {"model": "colours@1", "prompt": PROMPT, "max_tokens": 100, "temperature": 1}
    failed = threading.Event()

    def ask(_: int) -> set[int]:
        found = set()
        while not failed.is_set():
            status, headers, content = post(f"{world.url}/v1/completions", body)
            assert status == 200 or (status == 503 and "retry-after" in headers and "error" in json.loads(content)), (status, content)
            found.add(status)
            if status != 200:
                failed.set()
        return found

    with ThreadPoolExecutor(16) as clients:
        asked = [clients.submit(ask, number) for number in range(16)]
        time.sleep(0.5)
        os.kill(core, signal.SIGKILL)
        found = set().union(*[each.result() for each in asked])
    assert 503 in found
    patient = world.client(retries=120)  # of five seconds each: vLLM takes long to start beside other tests
    answer = patient.completions.create(model="colours@1", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == world.says("colours@1") and core not in processes(b"VLLM::EngineCore")


def test_told_to_end_it_leaves_nothing_behind(world: World) -> None:
    """The last test here: it ends the service."""
    names = (b"ray::ServeReplica:translora", b"VLLM::EngineCore")
    ours = [set(own(processes(name))) for name in names]
    assert all(ours) and world.service.end() == 0, world.service.output()
    assert not any(found & set(processes(name)) for found, name in zip(ours, names, strict=True))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_a_packaged_model_is_served(name: str, tmp_path: Path) -> None:
    base = resolve(f"packaged:{name}")
    found = World(tmp_path, base, Registry(str(tmp_path / "registry")), exact=True)
    for seed in (1, 2):
        found.registry.promote(found.publish("support", seed))
    settings = ["--set", "cluster.vllm.dtype=float32", "--set", "cluster.vllm.cpu_cache_gib=0.5"]
    with running(found.registry.uri, "--engine", "vllm", "--port", str(free_port()), *settings) as found.service:
        prompt = "Customer: my order has not arrived.\nAgent:"
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda model: found.asks(model, prompt), ["support@1", "support@2", "support@1", "support"]))
        wanted = {release: found.says(release, prompt) for release in ("support@1", "support@2")}
        whole = [(release, text.rstrip("\ufffd")) for release, text in answers]  # a character may lack its last bytes
        assert whole == [(release, wanted[release].rstrip("\ufffd")) for release in ("support@1", "support@2", "support@1", "support@2")]
        pieces = list(found.client().completions.create(model="support@1", prompt=prompt, max_tokens=8, temperature=0, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces).rstrip("\ufffd") == whole[0][1] and len(pieces) > 2
        if name.endswith("instruct"):
            chat = found.client().chat.completions.create(model="support", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0)
            assert chat.usage and chat.usage.completion_tokens <= 8 and chat.model == "support@2"
