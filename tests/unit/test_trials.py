"""Releases on trial: what the registry keeps of them, which requests they get, how a shadow is counted. The service itself is in tests/ray."""

from __future__ import annotations

import asyncio
import contextvars
import json
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import channels, save_run
from translora_ray import adapters, kit, releases
from translora_ray.cli import main
from translora_ray.errors import UsageError
from translora_ray.registry import Registry, Trial, trial_in
from translora_ray.serving.auth import OPEN
from translora_ray.serving.protocol import Piece, ServiceError
from translora_ray.serving.reading import read_pieces
from translora_ray.serving.routing import Router, Serves
from translora_ray.serving.trials import Shadows, takes_part


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """colours@1 to colours@3, the first one stable."""
    found = Registry(str(tmp_path / "registry"))
    for seed in (1, 2, 3):
        found.publish(save_run(tmp_path / f"run{seed}", seed, target="old" if seed == 1 else "new"))
    found.promote("colours@1")
    return found


def trials(registry: Registry) -> dict[str, str]:
    return {channel: str(trial) for channel, change in Registry(registry.uri).changes().items() if (trial := trial_in(change))}


def test_a_trial_leaves_what_the_channel_names(registry: Registry) -> None:
    assert registry.try_out(Trial("colours@2", 0.1, False)).id == "colours@2"
    assert trials(registry) == {"colours:stable": "canary colours@2 0.1"}
    assert channels(registry) == {"colours:stable": "colours@1"} and registry.release("colours").id == "colours@1"
    registry.try_out(Trial("colours@2", 0.1, False))
    assert len(registry.history("colours")) == 2, "what is so already is no change"
    registry.try_out(Trial("colours@3", 1.0, True))
    assert trials(registry) == {"colours:stable": "shadow colours@3 1"}, "one trial at a time"
    with pytest.raises(UsageError, match="can not be retired while colours:stable names it"):
        registry.retire("colours@3")
    registry.retire("colours@2")


def test_promoting_and_rolling_back_end_a_trial(registry: Registry) -> None:
    registry.try_out(Trial("colours@2", 0.1, False))
    assert registry.roll_back("colours").id == "colours@1" and trials(registry) == {}
    with pytest.raises(UsageError, match="named nothing before"):
        registry.roll_back("colours")
    registry.try_out(Trial("colours@2", 0.5, False))
    assert registry.promote("colours@1").id == "colours@1" and trials(registry) == {}
    registry.try_out(Trial("colours@2", 0.5, False))
    assert registry.promote("colours@2").id == "colours@2" and trials(registry) == {}
    assert registry.roll_back("colours").id == "colours@1"
    changes = ["promote", "try", "roll back", "try", "promote", "try", "promote", "roll back"]
    assert [change["change"] for change in registry.history("colours")] == changes


def test_what_can_not_be_tried(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*arguments: str) -> str:
        assert main(["promote", registry.uri, *arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith("translora: ") and told.count("\n") == 1
        return told

    for share in ("0", "1", "-0.1", "2", "nan"):
        assert "take a number over 0" in says("colours@2", f"--share={share}")
    assert "up to 1" in says("colours@2", "--shadow", "--share", "1.5")
    assert "names colours@1 already" in says("colours@1", "--share", "0.1")
    assert "names nothing yet" in says("colours@2", "--share", "0.1", "--channel", "beta")
    assert "has no release" in says("colours@9", "--shadow")
    assert "invalid float" in says("colours@2", "--share", "some")
    assert len(registry.history("colours")) == 1


def test_the_commands(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", registry.uri, "colours@2", "--share", "0.25"]) == 0
    assert capsys.readouterr().out == "colours:stable colours@1, canary colours@2 0.25\n"
    assert main(["inspect", registry.uri]) == 0
    assert "canary" in capsys.readouterr().out
    assert main(["promote", registry.uri, "colours@2", "--shadow"]) == 0
    assert capsys.readouterr().out == "colours:stable colours@1, shadow colours@2 1\n"
    assert main(["roll-back", registry.uri, "colours"]) == 0
    assert capsys.readouterr().out == "colours:stable colours@1\n"


@pytest.mark.parametrize("where", ["local", "s3"])
def test_writers_at_once_leave_a_channel_that_one_of_them_wanted(registry: Registry, tmp_path: Path, s3: str, where: str) -> None:
    if where == "s3":
        registry = Registry(f"{s3}/{uuid.uuid4().hex}/registry")
        for seed in (1, 2, 3):
            registry.publish(str(tmp_path / f"run{seed}"))
        registry.promote("colours@1")
    work = [lambda: Registry(registry.uri).try_out(Trial("colours@2", 0.1, False)), lambda: Registry(registry.uri).promote("colours@3")] * 2
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(each) for each in work]:
            done.result()
    changes = registry.history("colours")
    assert changes[0]["release"] == "colours@1" and {change["change"] for change in changes} == {"promote", "try"}
    assert registry.release("colours").id == changes[-1]["release"] and trial_in(changes[-1]) in (None, Trial("colours@2", 0.1, False))
    assert Registry(registry.uri).changes()["colours:stable"] == changes[-1]


def test_the_source_adapter_of_a_kit_can_be_published(tiny_kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(tmp_path / "registry")
    assert main(["publish", str(tiny_kit), where]) == 2
    assert "add --reviewed" in capsys.readouterr().err and not Path(where).exists()
    for _ in range(2):
        assert main(["publish", str(tiny_kit), where, "--reviewed", "--channel", "stable"]) == 0
    assert capsys.readouterr().out == "colours@1\n" * 2
    release, there = Registry(where).release("colours"), kit.load(tiny_kit)
    assert (release.target_base, release.base_fingerprint, release.kit) == (there.base, there.base_fingerprint, there.digest)
    assert (release.verdict, release.reviewed, release.lineage, release.recipe_hash) == ("review", True, (), "")
    assert release.digest == adapters.digest(Registry(where).fetch(release, tmp_path / "cache")) == adapters.digest(tiny_kit / "adapter")
    assert sorted(path.name for path in Path(release.uri).iterdir()) == [adapters.CONFIG, adapters.WEIGHTS, "release.json"], "no row of the kit goes along"


def test_a_damaged_kit_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "kit.json").write_text(json.dumps({"task": {}}))
    with pytest.raises(UsageError, match="damaged"):
        releases.of_kit(str(tmp_path / "kit"), True, tmp_path)


def test_who_takes_part_is_computed() -> None:
    users = [f"user {number}".encode() for number in range(2000)]
    shares = {share: {user for user in users if takes_part("colours@2", user, share)} for share in (0.05, 0.1, 0.5, 1.0)}
    assert all(abs(len(found) - share * len(users)) < 80 for share, found in shares.items()) and len(shares[1.0]) == len(users)
    assert shares[0.05] < shares[0.1] < shares[0.5], "who got the new release keeps it when the share grows"
    assert shares[0.1] != {user for user in users if takes_part("colours@3", user, 0.1)}, "another trial has others"


def test_names_lead_to_trials_that_an_engine_can_serve(registry: Registry) -> None:
    registry.try_out(Trial("colours@2", 0.5, False))

    async def look(*bases: str) -> tuple[Counter[str], dict[str, object]]:
        router = Router(registry, [Serves(base, base, ("lora",)) for base in bases])
        await router.refresh()
        assert (await router.resolve("colours", OPEN)).id == "colours@1"
        assert router.trial("colours@1", b"x") is None is router.trial("colours@2", b"x"), "a release is what it says"
        found = Counter(str(trial and trial.release.id) for trial in (router.trial("colours", f"{number}".encode()) for number in range(400)))
        same = [router.trial(name, b"7") for name in ("colours", "colours:stable")]
        assert same[0] == same[1]
        with pytest.raises(ServiceError):
            await router.resolve("colours:other", OPEN)
        return found, router.index.card("colours", await router.resolve("colours", OPEN))

    found, card = asyncio.run(look("old", "new"))
    assert set(found) == {"None", "colours@2"} and 150 < found["None"] < 250
    assert card["release"] == "colours@1" and card["trial"] == {"release": "colours@2", "share": 0.5, "shadow": False}
    assert set(asyncio.run(look("old"))[0]) == {"None"}, "its base is not served here"


def test_shadows_are_counted_and_cost_nobody_anything() -> None:
    async def work() -> list[tuple[str, str, str]]:
        counted: list[tuple[str, str, str]] = []
        shadows = Shadows(lambda *what: counted.append(what), at_once=2, seconds=0.05)
        held = asyncio.Event()

        async def says(text: str) -> str:
            return text

        async def fails() -> str:
            raise ServiceError(503, "x", "x")

        async def waits() -> str:
            await held.wait()
            return "never"

        for ask in (lambda: says("a \n"), lambda: says("b"), fails):
            shadows.begin("x@1", "x@2", "a", ask)
            await asyncio.sleep(0.01)
        for _ in range(3):
            shadows.begin("x@1", "x@2", "a", waits)
        await asyncio.sleep(0.2)
        assert not shadows._tasks
        return counted

    counted = asyncio.run(work())
    assert {(release, shadow) for release, shadow, _ in counted} == {("x@1", "x@2")}
    assert Counter(outcome for *_, outcome in counted) == {"agree": 1, "differ": 1, "failed": 3, "skipped": 1}


def test_a_shadow_is_not_asked_within_the_request_that_it_belongs_to() -> None:
    """Serve ends what a request has asked as soon as its client has gone, and knows it by the context."""
    inside: contextvars.ContextVar[str] = contextvars.ContextVar("inside", default="no request")
    counted: list[tuple[str, str, str]] = []

    async def ask() -> str:
        return inside.get()

    async def cancelled() -> str:
        raise asyncio.CancelledError

    async def answer() -> None:
        inside.set("a request")
        shadows = Shadows(lambda *what: counted.append(what))
        shadows.begin("x@1", "x@2", "no request", ask)
        shadows.begin("x@1", "x@3", "a", cancelled)
        await asyncio.sleep(0.01)

    asyncio.run(answer())
    assert counted == [("x@1", "x@2", "agree"), ("x@1", "x@3", "failed")]


def test_a_shadow_that_takes_too_long_is_told_to_stop() -> None:
    class Engine:
        cancelled = 0

        def __aiter__(self) -> Engine:
            return self

        async def __anext__(self) -> Piece:
            await asyncio.Event().wait()
            raise AssertionError

        def cancel(self) -> None:
            self.cancelled += 1

    engine, counted = Engine(), list[tuple[str, str, str]]()

    async def ask() -> str:
        return (await anext(read_pieces(engine))).text

    async def work() -> None:
        Shadows(lambda *what: counted.append(what), seconds=0.05).begin("x@1", "x@2", "a", ask)
        await asyncio.sleep(0.2)

    asyncio.run(work())
    assert counted == [("x@1", "x@2", "failed")] and engine.cancelled == 1


def test_a_service_that_ends_waits_for_no_shadow() -> None:
    counted: list[tuple[str, str, str]] = []

    async def never() -> str:
        await asyncio.sleep(60)
        raise AssertionError

    async def run() -> None:
        shadows = Shadows(lambda *what: counted.append(what))
        shadows.begin("x@1", "x@2", "a", never)
        await asyncio.sleep(0)
        shadows.end()
        await asyncio.sleep(0.1)
        shadows.begin("x@1", "x@2", "a", never)

    asyncio.run(run())
    assert [what[2] for what in counted] == ["failed", "skipped"]
