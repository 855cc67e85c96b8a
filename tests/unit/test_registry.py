"""The registry on local disk: releases never change, writers never mix, channels go forth and back."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from tests.conftest import channels, save_run
from translora_ray import adapters
from translora_ray.cli import main
from translora_ray.errors import UsageError
from translora_ray.registry import NotFound, Registry, Release, Unsound


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"))


@pytest.fixture
def filled(registry: Registry, tmp_path: Path) -> Registry:
    """colours@1 to colours@3 and tones@1."""
    for seed in (1, 2, 3):
        registry.publish(save_run(tmp_path / f"run{seed}", seed))
    registry.publish(str(tmp_path / "run1"), name="tones")
    return registry


NESTED = "[" * 100_000
"""JSON that Python does not read."""


def ids(registry: Registry) -> list[str]:
    return [release.id for release in registry.releases()]


def damage(registry: Registry, release: str, file: str, content: bytes) -> None:
    (Path(registry.uri) / "releases" / release / file).write_bytes(content)


def test_a_release_says_what_its_run_was(registry: Registry, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", on_rows="ship", target_base="new base")
    release = registry.publish(run)
    assert (release.id, release.name, release.version) == ("colours@1", "colours", 1)
    assert release.digest == adapters.digest(Path(run) / "adapter")
    assert (release.target_base, release.base_fingerprint, release.source_base) == ("new base", "fingerprint", "source")
    assert (release.kit, release.lineage, release.recipe_hash) == ("kit", ("before",), "recipe")
    assert (release.verdict, release.gate["verdict"], release.reviewed) == ("ship", "ship", False)
    assert release.evaluation == {"n": 30, "metric": "exact_match", "gate": {"verdict": "ship", "reasons": [], "checks": []}}
    assert release.adapter == {"type": "lora", "rank": 2, "modules": ["q_proj"]}
    assert release.created.endswith("+00:00")
    assert sorted(path.name for path in Path(release.uri).iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "release.json"]
    assert Registry(registry.uri).release("colours@1") == release
    assert len({release, Registry(registry.uri).release("colours@1")}) == 1


def test_the_same_run_is_the_same_release(filled: Registry, tmp_path: Path) -> None:
    assert filled.publish(str(tmp_path / "run2")).id == "colours@2"
    assert Registry(filled.uri).publish(str(tmp_path / "run1")).id == "colours@1"
    assert filled.publish(save_run(tmp_path / "again", 2, recipe_hash="another")).id == "colours@4"
    assert ids(filled) == ["colours@1", "colours@2", "colours@3", "colours@4", "tones@1"]
    filled.retire("colours@4")
    assert filled.publish(str(tmp_path / "again")).id == "colours@5"


def test_versions_are_in_the_order_of_numbers(registry: Registry, tmp_path: Path) -> None:
    for seed in range(11):
        registry.publish(save_run(tmp_path / str(seed), seed))
    assert ids(registry) == [f"colours@{version}" for version in range(1, 12)]


def test_releases_of_a_base(filled: Registry, tmp_path: Path) -> None:
    filled.publish(save_run(tmp_path / "other", 9, target_base="other", target="print"), name="other")
    assert [release.id for release in filled.releases("other")] == [release.id for release in filled.releases("print")] == ["other@1"]
    assert filled.releases("absent") == []


@pytest.mark.parametrize(
    ("gate", "on_rows", "needs"),
    [
        ("ship", None, "nothing"),
        ("ship", "ship", "nothing"),
        ("review", "ship", "nothing"),
        ("review", None, "a look"),
        (None, None, "a look"),
        ("ship", "review", "a look"),
        ("refuse", None, "another run"),
        ("refuse", "ship", "another run"),
        ("ship", "refuse", "another run"),
    ],
)
def test_what_may_be_published(registry: Registry, tmp_path: Path, gate: str | None, on_rows: str | None, needs: str) -> None:
    run = save_run(tmp_path / "run", verdict=gate, on_rows=on_rows)
    if needs == "another run":
        for reviewed in (False, True):
            with pytest.raises(UsageError, match="may not ship, its verdict is refuse"):
                registry.publish(run, reviewed=reviewed)
        assert not Path(registry.uri).exists()
        return
    if needs == "a look":
        with pytest.raises(UsageError, match="add --reviewed"):
            registry.publish(run)
        assert not Path(registry.uri).exists()
    assert registry.publish(run, reviewed=True).reviewed == (needs == "a look")


def test_what_is_no_finished_run_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a finished run"):
        registry.publish(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="is not the one its manifest describes"):
        registry.publish(save_run(tmp_path / "changed", adapter_digest="0"))
    shutil.rmtree(Path(save_run(tmp_path / "moved")) / "adapter")
    with pytest.raises(UsageError, match="moved/adapter"):
        registry.publish(str(tmp_path / "moved"))
    old = Path(save_run(tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "lineage"}))
    with pytest.raises(UsageError, match="has no lineage"):
        registry.publish(str(old))
    assert not Path(registry.uri).exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x", "a b", "a@1", "a:b", "a\n", "é", "x" * 101])
def test_names_that_are_none(registry: Registry, tmp_path: Path, name: str) -> None:
    run = save_run(tmp_path / "run")
    if name:
        with pytest.raises(UsageError, match="is no name of a release"):
            registry.publish(run, name=name)
    for use in (lambda: registry.release(name), lambda: registry.release(f"{name}@1"), lambda: registry.release(f"{name}:stable")):
        with pytest.raises(NotFound, match="has no release"):
            use()
    assert not Path(registry.uri).exists()
    registry.publish(run)
    with pytest.raises(UsageError, match="is no channel"):
        registry.promote("colours@1", channel=name)
    with pytest.raises(UsageError):
        registry.roll_back(name)
    with pytest.raises(NotFound):
        registry.retire(f"../releases/{name}@1")
    assert channels(registry) == {}


def test_a_reference_that_leads_nowhere_names_what_there_is(filled: Registry) -> None:
    filled.promote("colours@2")
    for reference in ("colours@9", "colours:canary", "colours@02", "colours@1 "):
        with pytest.raises(NotFound, match="has no release"):
            filled.release(reference)
    with pytest.raises(NotFound, match="there are colours:stable, colours@1, colours@2, colours@3"):
        filled.release("colours@9")
    with pytest.raises(NotFound, match="there are colours, tones"):
        filled.release("shapes")
    with pytest.raises(NotFound, match="it has none"):
        Registry(filled.uri + "-absent").release("colours")


def test_channels_go_forth_and_back(filled: Registry) -> None:
    for reference in ("colours@1", "colours@2", "colours@2", "colours@3"):
        assert filled.promote(reference).id == reference
    filled.promote("colours:stable", channel="canary")
    filled.promote("tones@1")
    assert channels(filled) == {"colours:canary": "colours@3", "colours:stable": "colours@3", "tones:stable": "tones@1"}
    assert filled.release("colours").id == filled.release("colours:stable").id == "colours@3"
    assert filled.roll_back("colours").id == "colours@2"
    assert Registry(filled.uri).release("colours").id == "colours@2"
    assert filled.roll_back("colours").id == "colours@1"
    with pytest.raises(UsageError, match="it named nothing before colours@1"):
        filled.roll_back("colours")
    filled.promote("colours@3")
    assert filled.roll_back("colours").id == "colours@1"
    assert [(change["change"], change["release"]) for change in filled.history("colours")] == [
        ("promote", "colours@1"),
        ("promote", "colours@2"),
        ("promote", "colours@3"),
        ("roll back", "colours@2"),
        ("roll back", "colours@1"),
        ("promote", "colours@3"),
        ("roll back", "colours@1"),
    ]
    assert filled.release("colours:canary").id == "colours@3"
    with pytest.raises(UsageError, match="there is no such channel"):
        filled.roll_back("colours", "beta")


def test_retired_releases_are_gone_but_their_files(filled: Registry) -> None:
    filled.promote("colours@1")
    filled.promote("colours@2")
    with pytest.raises(UsageError, match="can not be retired while colours:stable names it"):
        filled.retire("colours@2")
    filled.retire("colours@1")
    assert ids(filled) == ids(Registry(filled.uri)) == ["colours@2", "colours@3", "tones@1"]
    with pytest.raises(NotFound, match="it is retired"):
        filled.release("colours@1")
    with pytest.raises(NotFound, match="it is retired"):
        filled.promote("colours@1")
    with pytest.raises(UsageError, match="colours@1, which it named before, is retired"):
        filled.roll_back("colours")
    with pytest.raises(NotFound, match="to retire: it is retired"):
        filled.retire("colours@1")
    assert channels(filled) == {"colours:stable": "colours@2"}
    assert (Path(filled.uri) / "releases" / "colours@1" / adapters.WEIGHTS).exists()


def test_fetched_adapters_are_what_was_published(filled: Registry, tmp_path: Path) -> None:
    release = filled.release("colours@2")
    folder = filled.fetch(release, tmp_path / "cache")
    assert adapters.inspect(folder).digest == release.digest
    assert sorted(path.name for path in folder.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
    first = (folder / adapters.WEIGHTS).stat().st_ino
    assert filled.fetch(release, tmp_path / "cache") == folder and (folder / adapters.WEIGHTS).stat().st_ino == first
    (folder / adapters.WEIGHTS).write_bytes(b"spoilt here")
    assert adapters.digest(filled.fetch(release, tmp_path / "cache")) == release.digest
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["colours@2"]


@pytest.mark.parametrize("spoil", [lambda content: content[:-5], lambda content: content[:-1] + bytes([content[-1] ^ 1]), None])
def test_corrupt_weights_are_not_given_out(filled: Registry, tmp_path: Path, spoil: Callable[[bytes], bytes] | None) -> None:
    release = filled.release("colours@2")
    weights = Path(release.uri) / adapters.WEIGHTS
    if spoil:
        weights.write_bytes(spoil(weights.read_bytes()))
        message = f"its digest is {adapters.digest(release.uri)}, expected {release.digest}"
    else:
        weights.unlink()
        message = f"a file is missing, expected {release.digest}"
    with pytest.raises(Unsound, match=message):
        filled.fetch(release, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert filled.fetch(filled.release("colours@1"), tmp_path / "cache").name == "colours@1"


def test_what_is_half_published_is_not_seen_and_the_next_one_takes_its_version(filled: Registry, tmp_path: Path) -> None:
    releases = Path(filled.uri) / "releases"
    shutil.copytree(releases / "colours@3", releases / "colours@4")
    (releases / "colours@4" / "release.json").rename(releases / "colours@4" / ".release.json.1")
    (Path(filled.uri) / "claims" / "releases" / "colours@4").touch()
    assert ids(filled) == ["colours@1", "colours@2", "colours@3", "tones@1"]
    with pytest.raises(NotFound):
        filled.release("colours@4")
    with pytest.raises(NotFound):
        filled.promote("colours@4")
    assert filled.publish(save_run(tmp_path / "next", 4)).id == "colours@4"
    assert filled.publish(save_run(tmp_path / "another", 5)).id == "colours@5"


def test_a_publish_that_is_interrupted_leaves_nothing_to_see(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run")
    write = registry._store.write

    def full(name: str, content: bytes) -> None:
        if name.endswith(adapters.WEIGHTS):
            raise OSError(28, "No space left on device")
        write(name, content)

    monkeypatch.setattr(registry._store, "write", full)
    with pytest.raises(Exception, match="No space left"):
        registry.publish(run)
    assert registry.releases() == []
    assert Registry(registry.uri).publish(run).id == "colours@1"  # as if nobody had been interrupted


def test_threads_that_publish_at_once_get_a_version_each(registry: Registry, tmp_path: Path) -> None:
    runs = [save_run(tmp_path / str(seed), seed) for seed in range(8)]
    ready = threading.Barrier(8)

    def publish(run: str) -> Release:
        ready.wait()
        return Registry(registry.uri).publish(run)

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(publish, runs))
    assert sorted(release.version for release in made) == list(range(1, 9))
    for run, release in zip(runs, made, strict=True):
        assert adapters.digest(Path(run) / "adapter") == release.digest == adapters.digest(registry.fetch(release, tmp_path / "cache"))


def test_threads_that_publish_the_same_run_at_once_get_one_release(registry: Registry, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    with ThreadPoolExecutor(8) as threads:
        assert {release.id for release in threads.map(lambda _: Registry(registry.uri).publish(run), range(8))} == {"colours@1"}


def _publish_and_promote(uri: str, runs: list[str], ready: Barrier) -> None:
    registry = Registry(uri)
    ready.wait()
    for run in runs:
        registry.promote(registry.publish(run).id)


def test_processes_that_write_at_once_lose_nothing(registry: Registry, tmp_path: Path) -> None:
    runs = [[save_run(tmp_path / f"{writer}-{number}", 10 * writer + number) for number in range(5)] for writer in range(2)]
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(2)
    writers = [spawn.Process(target=_publish_and_promote, args=(registry.uri, part, ready)) for part in runs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert ids(registry) == [f"colours@{version}" for version in range(1, 11)]
    assert {release.digest for release in registry.releases()} == {adapters.digest(Path(run) / "adapter") for part in runs for run in part}
    changes = registry.history("colours")
    assert {change["release"] for change in changes} == {f"colours@{version}" for version in range(1, 11)}
    assert [change["earlier"] for change in changes] == [[before["release"] for before in changes[:number]] for number in range(10)]


def test_claims_are_given_once(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(lambda _: registry._store.claim("claims/x"), range(8))) == 1


def test_places_that_are_something_else(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and not a registry"):
        Registry(str(tmp_path)).publish(run)
    with pytest.raises(UsageError, match="can not be used"):
        Registry(str(tmp_path / "file")).publish(run)
    for use in (lambda registry: registry.promote("colours@1"), lambda registry: registry.retire("colours@1"), lambda registry: registry.check()):
        with pytest.raises(UsageError, match="There is no registry at"):
            use(Registry(str(tmp_path / "absent")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_registry_that_can_not_be_written_is_told(filled: Registry, tmp_path: Path) -> None:
    (Path(filled.uri) / ".lock").chmod(0o400)
    with pytest.raises(UsageError, match=r"can not be used .*Permission denied"):
        filled.publish(save_run(tmp_path / "more", 7))


def test_a_damaged_release_is_named_left_out_and_can_be_retired(filled: Registry) -> None:
    sound = (Path(filled.uri) / "releases" / "colours@2" / "release.json").read_bytes()
    damage(filled, "colours@1", "release.json", b"{")
    damage(filled, "colours@2", "release.json", b'{"name": "colours"}')
    fresh, left_out = Registry(filled.uri), []
    assert [release.id for release in fresh.releases(skip=left_out.append)] == ["colours@3", "tones@1"] and len(left_out) == 2
    for release in ("colours@1", "colours@2"):
        with pytest.raises(Unsound, match=rf"releases/{release}/release.json is damaged"):
            fresh.release(release)
        with pytest.raises(Unsound, match="is damaged"):
            fresh.releases()
    damage(filled, "colours@2", "release.json", sound)
    assert fresh.release("colours@2").version == 2, "what was brought back is read again"
    fresh.retire("colours@1")
    assert ids(Registry(filled.uri)) == ["colours@2", "colours@3", "tones@1"]


def test_a_damaged_channel_keeps_no_other_names_release_from_being_retired(filled: Registry) -> None:
    filled.promote("tones@1")
    damage(filled, "../channels/tones/stable", "000001.json", b"{")
    fresh = Registry(filled.uri)
    with pytest.raises(Unsound, match="is damaged"):
        fresh.retire("tones@1")
    fresh.retire("colours@1")
    assert ids(fresh) == ["colours@2", "colours@3", "tones@1"]


@pytest.mark.parametrize(
    "facts",
    [
        {"name": "tones"},
        {"version": 2},
        {"name": "../tones"},
        {"adapter": {}},
        {"gate": {}},
        {"created": "today"},
        {"created": "0001-01-01T00:00:00"},
        {"adapter": {"type": "lora", "rank": "16", "modules": []}},
        {"base_fingerprint": ["x"]},
        {"digest": None},
    ],
)
def test_a_release_is_what_its_folder_says(filled: Registry, facts: dict[str, object]) -> None:
    """Else who may write one folder could speak in the name of another, or make the list of all fail."""
    stored = json.loads((Path(filled.uri) / "releases" / "colours@1" / "release.json").read_text())
    damage(filled, "colours@1", "release.json", json.dumps(stored | facts).encode())
    fresh = Registry(filled.uri)
    assert [release.id for release in fresh.releases(skip=lambda _: None)] == ["colours@2", "colours@3", "tones@1"]
    with pytest.raises(Unsound, match="is damaged"):
        fresh.release("colours@1")


@pytest.mark.parametrize(
    "change", [{}, {"release": "tones@1", "earlier": []}, {"release": "colours@1", "earlier": [], "trial": {"release": "tones@1"}}, NESTED]
)
def test_a_change_names_releases_of_its_channels_name(filled: Registry, change: dict[str, object] | str) -> None:
    filled.promote("colours@1")
    filled.promote("tones@1")
    (Path(filled.uri) / "channels" / "colours" / "stable" / "000002.json").write_text(change if isinstance(change, str) else json.dumps(change))
    fresh, left_out = Registry(filled.uri), []
    assert list(fresh.changes(left_out.append)) == ["tones:stable"] and "colours/stable/000002.json is damaged" in str(left_out[0])
    with pytest.raises(Unsound, match="is damaged"):
        fresh.release("colours")
    assert fresh.release("tones").id == "tones@1"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    runs = [save_run(tmp_path / "first", 1), save_run(tmp_path / "second", 2, verdict="review")]
    registry = str(tmp_path / "registry")

    def says(*arguments: str, code: int = 0) -> str:
        assert main(list(arguments)) == code
        told = capsys.readouterr()
        assert code == 0 or (told.err.startswith("translora: ") and told.err.count("\n") == 1)
        return told.err if code else told.out

    assert says("publish", runs[0], registry, "--channel", "stable") == "colours@1\n"
    assert "add --reviewed" in says("publish", runs[1], registry, code=2)
    assert says("publish", runs[1], registry, "--reviewed") == "colours@2\n"
    assert "'../x' is no name" in says("publish", runs[0], registry, "--name", "../x", code=2)
    assert "'a/b' is no channel" in says("publish", runs[0], registry, "--name", "new", "--channel", "a/b", code=2)
    assert "may not ship" in says("publish", save_run(tmp_path / "bad", 3, verdict="refuse"), registry, "--reviewed", code=2)
    assert says("promote", registry, "colours@2") == "colours:stable colours@2\n"
    assert "has no release 'colours@7'" in says("promote", registry, "colours@7", code=2)
    assert "can not be retired" in says("retire", registry, "colours@2", code=2)
    table = says("inspect", registry)
    assert table.count("yes") == 2 and "stable" in table and "review, reviewed" in table
    assert says("roll-back", registry, "colours") == "colours:stable colours@1\n"
    assert "named nothing before" in says("roll-back", registry, "colours", code=2)
    assert says("retire", registry, "colours@2") == "colours@2 retired\n"
    assert says("promote", registry, "colours@1", "--channel", "canary") == "colours:canary colours@1\n"
    (tmp_path / "registry" / "releases" / "colours@1" / adapters.WEIGHTS).write_bytes(b"short")
    damage(Registry(registry), "../channels/colours/canary", "000001.json", b"{")
    assert main(["inspect", registry]) == 2
    told = capsys.readouterr()
    assert "2 releases or channels are not sound; the first: " in told.err and "canary/000001.json is damaged" in told.err
    assert "colours@1" in told.out and "no" in told.out


def test_five_hundred_releases_are_listed_in_a_second(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish(save_run(tmp_path / "run"))
    facts = json.loads((Path(first.uri) / "release.json").read_text())
    for number in range(500):
        folder = Path(registry.uri) / "releases" / f"task{number:03d}@1"
        folder.mkdir()
        (folder / "release.json").write_text(json.dumps(facts | {"name": f"task{number:03d}", "version": 1}))
    began = time.process_time()
    assert len(Registry(registry.uri).releases()) == 501
    assert time.process_time() - began < 1
