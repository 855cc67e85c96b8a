"""The registry on object stores: real servers on loopback, no locks."""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import channels, save_run
from translora_ray import adapters
from translora_ray.cli import main
from translora_ray.errors import UsageError
from translora_ray.registry import NotFound, Registry, Release, Unreachable, Unsound
from translora_ray.storage import RunStore

Place = Callable[[str], str]


@pytest.fixture(params=["s3", "gs"])
def place(request: pytest.FixtureRequest) -> Place:
    """URIs of what a test has for itself."""
    store, mine = request.getfixturevalue(request.param), uuid.uuid4().hex
    return lambda name: f"{store}/{mine}/{name}" if isinstance(store, str) else store(f"{mine}/{name}")


@pytest.fixture
def registry(place: Place) -> Registry:
    return Registry(place("registry"))


def ids(registry: Registry) -> list[str]:
    return [release.id for release in registry.releases()]


def test_releases_and_channels(registry: Registry, place: Place, tmp_path: Path) -> None:
    assert not registry.exists() and registry.releases() == [] and channels(registry) == {}
    first, second = (registry.publish(save_run(tmp_path / str(seed), seed)) for seed in range(2))
    assert registry.publish(str(tmp_path / "0")) == first
    assert ids(Registry(registry.uri)) == ["colours@1", "colours@2"]
    assert first.uri == place("registry/releases/colours@1")
    for release in (first, second):
        registry.promote(release.id)
    assert channels(Registry(registry.uri)) == {"colours:stable": "colours@2"}
    with pytest.raises(UsageError, match="can not be retired"):
        registry.retire("colours@2")
    assert registry.roll_back("colours") == first == Registry(registry.uri).release("colours")
    registry.retire("colours@2")
    assert ids(registry) == ids(Registry(registry.uri)) == ["colours@1"]
    with pytest.raises(NotFound, match="it is retired"):
        registry.release("colours@2")
    with pytest.raises(NotFound, match="there are colours"):
        registry.release("tones")


def test_weights_are_checked(registry: Registry, tmp_path: Path) -> None:
    release = registry.publish(save_run(tmp_path / "run"))
    folder = registry.fetch(release, tmp_path / "cache")
    assert adapters.inspect(folder).digest == release.digest
    store = RunStore(registry.uri)
    weights = f"releases/colours@1/{adapters.WEIGHTS}"
    whole = store.read(weights)
    store.write(weights, whole[:-1])
    assert registry.fetch(release, tmp_path / "cache") == folder  # what was fetched is kept
    with pytest.raises(Unsound, match=f"its digest is [0-9a-f]{{64}}, expected {release.digest}"):
        registry.fetch(release, tmp_path / "other")
    store.fs.delete_file(store.path(weights))
    with pytest.raises(Unsound, match="a file is missing"):
        registry.fetch(release, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_what_is_half_published_is_not_seen(registry: Registry, tmp_path: Path) -> None:
    registry.publish(save_run(tmp_path / "0", 0))
    store = RunStore(registry.uri)
    assert store.claim("claims/releases/colours@2")  # a writer that dies after its weights
    store.write(f"releases/colours@2/{adapters.WEIGHTS}", b"weights")
    assert ids(registry) == ["colours@1"]
    assert registry.publish(save_run(tmp_path / "1", 1)).id == "colours@3"


def test_a_claim_is_nobodys_or_ones(registry: Registry) -> None:
    ready = threading.Barrier(4)

    def claim(name: str) -> bool:
        ready.wait()
        return RunStore(registry.uri).claim(name)

    with ThreadPoolExecutor(4) as threads:
        for number in range(10):
            assert sum(threads.map(claim, [f"claims/{number}"] * 4)) <= 1
            assert not RunStore(registry.uri).claim(f"claims/{number}")
    assert RunStore(registry.uri).claim("claims/alone")


def test_writers_at_once_get_a_version_each_and_never_mix(registry: Registry, tmp_path: Path) -> None:
    runs = [save_run(tmp_path / str(seed), seed) for seed in range(6)]
    ready = threading.Barrier(4)

    def publish(run: str) -> Release:
        ready.wait()
        writer = Registry(registry.uri)
        release = writer.publish(run)
        writer.promote(release.id)
        return release

    command = [sys.executable, "-m", "translora_ray.cli", "publish"]
    others = [subprocess.Popen([*command, run, registry.uri, "--channel", "stable"], stdout=subprocess.PIPE, text=True) for run in runs[4:]]
    with ThreadPoolExecutor(4) as threads:
        made = [release.id for release in threads.map(publish, runs[:4])]
    for other in others:
        made.append(other.communicate(timeout=120)[0].strip())
        assert other.returncode == 0
    assert len(set(made)) == 6
    for run, release in zip(runs, map(Registry(registry.uri).release, made), strict=True):
        assert adapters.digest(Path(run) / "adapter") == release.digest == adapters.digest(registry.fetch(release, tmp_path / "cache"))
    changes = registry.history("colours")
    assert sorted(change["release"] for change in changes) == sorted(made)
    assert registry.release("colours").id == changes[-1]["release"]


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_of_a_promotion_and_a_retirement_at_once_the_channel_wins(registry: Registry, tmp_path: Path, name: str) -> None:
    registry.publish(save_run(tmp_path / "run"), name=name)
    ready = threading.Barrier(2)

    def promote() -> None:
        ready.wait()
        Registry(registry.uri).promote(f"{name}@1", "live")

    def retire() -> None:
        ready.wait()
        Registry(registry.uri).retire(f"{name}@1")

    with ThreadPoolExecutor(2) as threads:
        outcomes = [future.exception() for future in [threads.submit(promote), threads.submit(retire)]]
    assert all(isinstance(outcome, UsageError | None) for outcome in outcomes)
    assert ids(registry) == ([f"{name}@1"] if channels(registry) else [])  # the retirement came first where there is no channel


@pytest.mark.parametrize("move", [lambda registry: registry.roll_back("colours"), lambda registry: registry.promote("colours@1")])
def test_a_retirement_in_the_middle_of_a_change_does_not_take_what_the_channel_names(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: Callable[[Registry], Release]
) -> None:
    for seed in range(2):
        registry.promote(registry.publish(save_run(tmp_path / str(seed), seed)).id)
    write = registry._store.write_json

    def meanwhile(name: str, content: dict[str, Any]) -> None:
        Registry(registry.uri).retire("colours@1")
        write(name, content)

    monkeypatch.setattr(registry._store, "write_json", meanwhile)
    assert move(registry).id == "colours@1" == Registry(registry.uri).release("colours").id


def test_the_commands_and_inspect(registry: Registry, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", save_run(tmp_path / "run"), registry.uri, "--name", "tones", "--channel", "stable"]) == 0
    assert capsys.readouterr().out == "tones@1\n"
    assert main(["inspect", registry.uri]) == 0
    assert "tones@1" in capsys.readouterr().out
    assert main(["inspect", place("absent")]) == 2
    assert main(["promote", place("absent"), "tones@1"]) == 2
    assert "There is no registry at" in capsys.readouterr().err


def test_a_run_on_the_object_store_is_published(registry: Registry, place: Place, tmp_path: Path) -> None:
    local, remote = Path(save_run(tmp_path / "run")), RunStore(place("run"))
    for file in (path for path in local.rglob("*") if path.is_file()):
        remote.write(str(file.relative_to(local)), file.read_bytes())
    release = registry.publish(remote.uri)
    assert release.digest == adapters.digest(local / "adapter")
    assert registry.publish(str(local)) == release


@contextmanager
def elsewhere(endpoint: str) -> Iterator[None]:
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    yield
    os.environ["AWS_ENDPOINT_URL"] = before


def test_a_store_that_does_not_answer_is_told(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, registry = save_run(tmp_path / "run"), Registry(f"{s3}/{uuid.uuid4().hex}/registry")
    registry.publish(run)
    with elsewhere("http://127.0.0.1:9"):
        lost = Registry(registry.uri)
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"can not be reached .*127\.0\.0\.1:9"):
            lost.releases()
        assert time.monotonic() - began < 60
        assert main(["publish", run, registry.uri]) == 1
    error = capsys.readouterr().err
    assert error.startswith("translora: ") and "check the network" in error and error.count("\n") == 1
    with pytest.raises(Unreachable, match="bucket does not exist"):
        Registry("s3://absent/registry").publish(run)
