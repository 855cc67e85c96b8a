"""The service as users meet it: `translora serve` in a process of its own, tiny models, the official client."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import openai
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.conftest import free_port, processes
from tests.serving import PROMPT, World, chat_base, fetch, finished_run, post, running
from translora_ray.errors import UsageError
from translora_ray.registry import Registry
from translora_ray.serving.auth import add_key

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("serving")
    registry, keys = Registry(str(folder / "registry")), str(folder / "keys.yaml")
    found = World(folder, chat_base(folder / "base"), registry)
    found.keys |= {
        "all": add_key(keys, "all", ("*",), requests_per_minute=100_000),
        "team": add_key(keys, "team", ("colours",), max_tokens=8, requests_per_minute=100_000),
        "slow": add_key(keys, "slow", ("colours",), requests_per_minute=2),
    }
    for name, seed in (("colours", 1), ("colours", 2), ("numbers", 3)):
        found.publish(name, seed)
    registry.promote("colours@1")
    registry.publish(finished_run(folder / "foreign", chat_base(folder / "other", seed=6), "foreign", 4))
    options = ["--port", str(free_port()), "--keys", keys, "--engine", "transformers", "--base", found.base, "--host", "127.0.0.1", "--adapters", "2"]
    with running(str(folder / "registry"), *options) as found.service:
        assert found.url, "it is ready"
        yield found


def test_the_official_client_gets_what_the_adapters_say(world: World) -> None:
    for release in ("colours@1", "colours@2", "numbers@1", "colours@1"):
        assert world.asks(release) == (release, world.says(release)), "and three adapters take turns in the memory of two"
    assert len({world.says(release) for release in world.runs}) == len(world.runs), "adapters that all say the same would prove nothing"
    client = world.client()
    chat = client.chat.completions.create(model="colours:stable", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0)
    assert chat.model == "colours@1" and chat.choices[0].message.content == world.says("colours@1", "hi\nA:", 6)
    assert chat.usage and chat.usage.completion_tokens == 6 and chat.choices[0].finish_reason == "length"


def test_the_curl_line_that_is_printed_works(world: World) -> None:
    (line,) = [line for line in world.service.lines if "curl " in line]
    curl, url, *options = shlex.split(line.replace("KEY", world.keys["all"]))
    headers = dict(value.split(": ", 1) for option, value in pairwise(options) if option == "-H")
    status, _, body = fetch(url, "POST", options[options.index("-d") + 1].encode(), headers)
    assert (curl, status) == ("curl", 200) and json.loads(body)["model"] == "colours@1"
    (line,) = [line for line in world.service.lines if "metrics for Prometheus: " in line]
    assert b"ray_" in fetch(line.split(": ", 1)[1].strip())[2]


def test_streams_add_up_to_the_whole_answer(world: World) -> None:
    client = world.client()
    pieces = list(client.completions.create(model="colours", prompt=PROMPT, max_tokens=8, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == world.says("colours@1") and len(pieces) > 2
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 6, "temperature": 0}
    chunks = list(client.chat.completions.create(model="colours", messages=[{"role": "user", "content": "hi"}], **options))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == world.says("colours@1", "hi\nA:", 6)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == 6
    seeds = [client.completions.create(model="colours", prompt=PROMPT, max_tokens=8, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_without_a_key_there_is_nothing(world: World) -> None:
    answers = [post(f"{world.url}/v1/completions", {"model": "colours", "prompt": "x"}, key) for key in (None, "tl-wrong", world.keys["all"][:-1])]
    assert {answer[0] for answer in answers} == {401} and len({answer[2] for answer in answers}) == 1
    with pytest.raises(openai.AuthenticationError):
        world.client("wrong").models.list()
    for path in ("/health", "/ready"):
        assert fetch(world.url + path)[0] == 200


def test_no_other_origin_is_let_in(world: World) -> None:
    asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST", "Authorization": f"Bearer {world.keys['all']}"}
    for method, path in (("GET", "/v1/models"), ("GET", "/health"), ("OPTIONS", "/v1/completions")):
        status, headers, _ = fetch(world.url + path, method, headers=asked)
        assert not [name for name in headers if name.lower().startswith("access-control-")] and (status == 200) == (method == "GET")


def test_many_clients_of_many_adapters_each_get_their_own(world: World) -> None:
    """Eight adapters take turns in the memory of two, while requests for them wait."""
    releases = [world.publish(f"crowd{number}", 30 + number) for number in range(8)]
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(world.asks, releases * 4))
    assert found == [(release, world.says(release)) for release in releases] * 4


def test_a_key_sees_its_own_adapters_and_can_not_tell_others_from_none(world: World) -> None:
    assert {model.id for model in world.client("team").models.list()} == {"colours@1", "colours@2", "colours:stable", "colours"}
    assert {"numbers@1", "colours"} <= {model.id for model in world.client().models.list()}
    assert world.asks("colours", key="team")[0] == "colours@1"
    bodies = []
    for name in ("numbers", "nothing", "numbers@1", "nothing@1"):
        with pytest.raises(openai.NotFoundError) as refused:
            world.asks(name, key="team")
        bodies.append(json.dumps(refused.value.body).replace(name, "NAME"))
        with pytest.raises(openai.NotFoundError):
            world.client("team").models.retrieve(name)
    assert len(set(bodies)) == 1


def test_limits(world: World) -> None:
    with pytest.raises(openai.BadRequestError, match="at most"):
        world.asks("colours", tokens=9, key="team")
    status, _, body = post(f"{world.url}/v1/completions", {"model": "colours", "prompt": "x" * (1 << 20)}, world.keys["team"])
    assert status == 413 and b"larger" in body
    with pytest.raises(openai.BadRequestError, match="context"):
        world.asks("colours", prompt="x" * 3000)
    for _ in range(2):
        world.asks("colours", key="slow")
    with pytest.raises(openai.RateLimitError) as refused:
        world.asks("colours", key="slow")
    assert 20 < int(refused.value.response.headers["retry-after"]) <= 31


@pytest.mark.parametrize(
    "name", ["../colours@1", "colours@1/../numbers@1", "/etc/passwd", "colours@0", "colours@99", "colours:nothing", "", "a" * 900, "colours@1\n", "%2e%2e"]
)
def test_names_that_are_none_are_not_found(world: World, name: str) -> None:
    status, _, body = post(f"{world.url}/v1/completions", {"model": name, "prompt": "x"}, world.keys["all"])
    assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found"


def test_an_adapter_of_another_base_is_said(world: World) -> None:
    with pytest.raises(openai.NotFoundError, match="this service has"):
        world.asks("foreign@1")
    assert not any(model.id.startswith("foreign") for model in world.client().models.list())


def test_a_new_release_answers_and_a_promotion_moves_new_requests_at_once(world: World) -> None:
    release = world.publish("colours", 10)
    assert world.asks(release) == (release, world.says(release)), "no restart, no waiting"
    running_one = world.client().completions.create(model="colours", prompt=PROMPT, max_tokens=900, temperature=1, seed=1, stream=True)
    first = next(running_one)
    world.registry.promote(release)
    time.sleep(1.5)
    assert world.asks("colours:stable") == (release, world.says(release))
    assert first.model == "colours@1" and {piece.model for piece in running_one} == {"colours@1"}, "what runs ends as it began"
    world.registry.roll_back("colours")
    time.sleep(1.5)
    assert world.asks("colours") == ("colours@1", world.says("colours@1"))
    world.registry.retire(release)
    time.sleep(1.5)
    with pytest.raises(openai.NotFoundError):
        world.asks(release)


def test_damaged_weights_are_their_own_adapters_business(world: World) -> None:
    release = world.publish("numbers", 20)
    weights = world.folder / "registry" / "releases" / release / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[: len(sound) // 2])
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="damaged") as refused:
            world.asks(release)
        assert refused.value.status_code == 503 and "retry-after" in refused.value.response.headers
    assert world.asks("colours")[0] == "colours@1"
    weights.write_bytes(sound)
    time.sleep(10)  # damaged weights are not fetched again at once
    assert world.asks(release) == (release, world.says(release))


def test_a_registry_that_is_gone_leaves_what_is_loaded(world: World) -> None:
    world.asks("colours")
    (world.folder / "registry").rename(world.folder / "away")
    try:
        time.sleep(1.5)
        body = {"model": "colours", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        status, headers, answer = post(f"{world.url}/v1/completions", body, world.keys["all"])
        assert status == 200 and json.loads(answer)["choices"][0]["text"] == world.says("colours@1")
        assert headers["x-translora-registry"].startswith("unreachable")
    finally:
        (world.folder / "away").rename(world.folder / "registry")
    time.sleep(1.5)
    assert "x-translora-registry" not in post(f"{world.url}/v1/completions", body, world.keys["all"])[1]


def test_a_thousand_malformed_requests_and_no_failure(world: World) -> None:
    whole = json.dumps({"model": "colours", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stop": ["x"], "temperature": 0.5}).encode()
    draws = random.Random(1)

    def body() -> bytes:
        noise = bytearray(whole)
        for _ in range(draws.randint(1, 3)):
            noise[draws.randrange(len(noise))] = draws.randrange(256)
        return bytes(noise[: draws.randint(0, len(noise))] if draws.random() < 0.3 else noise)

    routes = ["/v1/chat/completions", "/v1/completions", "/v1/nothing"]
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda work: post(world.url + work[0], work[1], world.keys["all"]), [(draws.choice(routes), body()) for _ in range(1000)]))
    assert {status for status, _, _ in found} <= {200, 400, 404} and sum(status == 400 for status, _, _ in found) > 250
    assert all("error" in json.loads(content) for status, _, content in found if status != 200)


def test_metrics_and_logs_tell_of_releases_and_not_of_texts(world: World) -> None:
    secret = "question 77"
    world.asks("numbers@1", prompt=secret)
    logs = list(world.service.session().glob("logs/serve/*gateway*.log"))
    text = "".join(path.read_text() for path in logs)
    said = [json.loads(line) for line in text.splitlines() if '"release": "numbers@1"' in line]
    assert said and {"key", "status", "seconds", "tokens"} <= said[-1].keys() and said[-1]["key"] == "all"
    everything = "".join(path.read_text(errors="replace") for path in world.service.session().glob("logs/**/*") if path.is_file())
    assert secret not in everything and not any(key in everything for key in world.keys.values())
    wanted = {f"translora_{name}" for name in ("requests", "tokens", "request_seconds", "adapter_loads", "adapter_evictions")}
    missing = wanted
    for _ in range(60):  # Ray exports every few seconds
        mine = [line for line in world.service.metrics() if 'release="numbers@1"' in line]
        missing = {name for name in wanted if not any(name in line for line in mine)}
        if not missing:
            break
        time.sleep(1)
    assert not missing


def test_told_to_end_it_finishes_what_it_began(world: World) -> None:
    """The last test here: it ends the service. Streams of different temperatures are answered one after the other."""
    begun, answers = threading.Event(), set()

    def read(number: int) -> str | None:
        stream = world.client().completions.create(model="colours", prompt=PROMPT, max_tokens=900, temperature=1 + number / 10, seed=number, stream=True)
        pieces = [next(stream)]
        begun.set()
        return [*pieces, *stream][-1].choices[0].finish_reason

    with ThreadPoolExecutor(9) as threads:
        streams = [threads.submit(read, number) for number in range(8)]
        begun.wait(60)
        time.sleep(0.5)  # so that all of them have come
        ending = threads.submit(world.service.end, 180)
        while not all(stream.done() for stream in streams):
            answer = fetch(f"{world.url}/ready")[0]
            if not all(stream.done() for stream in streams):
                answers.add(answer)
        assert 503 in answers <= {200, 503}, "what comes meanwhile is told to come back"
        assert all(stream.result() in ("stop", "length") for stream in streams)
        ending.result()
    assert world.service.process.returncode == 0, world.service.output()
    assert not processes(b"ray::ServeReplica:translora")
    shutil.rmtree(world.folder / "registry")


def test_what_can_not_work_is_said_before_anything_starts(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from translora_ray.cli import main

    nothing, empty = str(tmp_path / "nothing"), str(tmp_path / "empty")
    Registry(empty).publish(world.runs["colours@1"])
    (tmp_path / "keys.yaml").write_text("keys: [1]")
    for arguments, said in (
        ([nothing], "no registry"),
        ([empty, "--host", "0.0.0.0"], "Whoever reaches 0.0.0.0 would be let in"),
        ([empty, "--keys", str(tmp_path / "keys.yaml")], "not a file of keys"),
        ([empty, "--port", "99999"], "--port 99999: give one from 1 to 65535"),
        ([empty, "--host", "::1"], "IPv6 addresses are not served"),
        ([empty, "--replicas", "64", "--port", str(free_port())], "of the 64 engines (1 CPU and 0 GPU each): lower --replicas"),
    ):
        assert main(["serve", *arguments, "--engine", "transformers"]) == 2
        assert said in capsys.readouterr().err


def test_the_example_for_serve_deploy_is_one() -> None:
    from translora_ray.serving import app

    config = ServeDeploySchema.model_validate(yaml.safe_load((Path(__file__).parents[2] / "examples" / "serve.yaml").read_text()))
    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    assert module == app.__name__ and callable(getattr(app, builder))
    found = app.service(application.args)
    assert found.replicas == (1, 8) and found.engine == "transformers" and found.gpus == 1
    for wrong, said in (({"adaptors": 3}, r"args\.adaptors"), ({"replicas": [4, 1]}, "the least must be 1 or more")):
        with pytest.raises(UsageError, match=said):
            app.service(application.args | wrong)
