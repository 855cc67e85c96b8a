"""A kit on an object store, a real server on loopback, which each machine reads from a copy in its cache; and what may stand for a kit."""

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import save_run, task_rows
from translora_ray import adapters, kit
from translora_ray.cli import main
from translora_ray.errors import NoRoom, UsageError
from translora_ray.records import TaskRow
from translora_ray.registry import Registry
from translora_ray.storage import RunStore


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRANSLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kits"


@pytest.fixture
def there(s3: str, tiny_kit: Path) -> RunStore:
    return put(tiny_kit, RunStore(f"{s3}/{uuid.uuid4().hex}"))


def put(folder: Path, store: RunStore) -> RunStore:
    for file in folder.rglob("*"):
        if file.is_file():
            store.write(str(file.relative_to(folder)), file.read_bytes())
    return store


def test_a_kit_is_read_from_a_copy_that_is_made_once(there: RunStore, tiny_kit: Path, cache: Path) -> None:
    found, local = kit.load(f"{there.uri}/"), kit.load(tiny_kit)
    (copy,) = (path for path in cache.iterdir() if path.is_dir())
    assert found.path == there.uri and found.adapter.path == str(copy / "adapter")
    assert (
        replace(found, path=local.path, adapter=local.adapter, discriminator_adapter=local.discriminator_adapter, generator_adapter=local.generator_adapter)
        == local
    )
    before = (copy / "kit.json").stat().st_mtime_ns
    assert found.here() == found and (copy / "kit.json").stat().st_mtime_ns == before
    assert local.here() is local


def test_another_machine_makes_its_own_copy_of_what_lies_elsewhere(there: RunStore, tiny_kit: Path, tmp_path: Path, cache: Path) -> None:
    """Also where a run on a disk that all machines see goes back to a kit that does not lie there."""
    before, run = kit.load(there.uri), tmp_path / "run"
    shutil.copytree(tiny_kit / "adapter", run / "adapter")
    facts = {"kit_path": there.uri, "kit": before.digest, "adapter_digest": adapters.digest(run / "adapter"), "target": "mark", "target_base": "target"}
    (run / "manifest.json").write_text(json.dumps(facts))
    for found in (before, kit.load(run)):
        shutil.rmtree(cache)
        assert found.here() == found and Path(found.discriminator_adapter.path).is_relative_to(cache)
    shutil.rmtree(cache)
    other = json.loads((tiny_kit / "kit.json").read_text()) | {"rows": 7}
    there.write_json("kit.json", other | {"digest": kit.digest_of(other, (tiny_kit / "seeds.jsonl").read_text())})
    with pytest.raises(UsageError, match=f"The kit at {there.uri} is not the one that this transfer began with"):
        before.here()


def test_a_kit_that_is_not_whole_there_is_copied_again_when_it_is(there: RunStore, tiny_kit: Path, cache: Path) -> None:
    name = f"discriminator/{adapters.WEIGHTS}"
    there.write(name, (tiny_kit / "adapter" / adapters.WEIGHTS).read_bytes())
    with pytest.raises(UsageError, match=f"{there.uri}/discriminator is not the adapter that kit.json describes: copy the kit again"):
        kit.load(there.uri)
    there.write(name, (tiny_kit / name).read_bytes())
    assert kit.load(there.uri).discriminator is not None
    assert [path.name for path in cache.iterdir() if path.is_dir()]


def test_a_finished_run_there_stands_for_a_kit(s3: str, tiny_kit: Path, tmp_path: Path, cache: Path) -> None:
    store, before = RunStore(f"{s3}/{uuid.uuid4().hex}"), kit.load(tiny_kit)
    manifest = {
        "kit_path": str(tiny_kit),
        "kit": before.digest,
        "adapter_digest": adapters.digest(tiny_kit / "adapter"),
        "target": "mark",
        "target_base": "target",
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    put(tmp_path / "run", store)
    put(tiny_kit / "adapter", RunStore(f"{store.uri}/adapter"))
    found = kit.load(store.uri)
    assert (found.path, found.teacher_base, found.lineage) == (store.uri, "target", (manifest["adapter_digest"],))
    assert Path(found.adapter.path).is_relative_to(cache)
    assert found.discriminator_adapter == before.discriminator_adapter


def test_nothing_moves_on_from_what_was_refused(tiny_kit: Path, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, before = tmp_path / "run", kit.load(tiny_kit)
    shutil.copytree(tiny_kit / "adapter", run / "adapter")
    facts = {"kit_path": str(tiny_kit), "kit": before.digest, "adapter_digest": adapters.digest(run / "adapter"), "target": "mark", "target_base": tiny_llama}
    refused = {"verdict": "refuse", "reasons": ["the adapter gets seeds wrong"]}
    for gate, on_rows in ((refused, None), (None, refused)):
        (run / "manifest.json").write_text(json.dumps(facts | {"gate": gate}))
        RunStore(str(run)).write_json("evaluation/result.json", {"gate": on_rows})
        assert main(["transfer", str(run), "--target", tiny_llama, "--out", str(tmp_path / "next"), "--engine", "transformers"]) == 2
        assert "was refused (the adapter gets seeds wrong), so nothing moves on from it" in capsys.readouterr().err
    assert not (tmp_path / "next").exists()


@pytest.mark.usefixtures("cache")
def test_a_release_stands_for_the_run_or_the_kit_that_it_was_published_from(s3: str, tiny_kit: Path) -> None:
    registry = Registry(f"{s3}/{uuid.uuid4().hex}")
    release = registry.publish(str(tiny_kit), reviewed=True)
    found, local = kit.load(release.uri), kit.load(tiny_kit)
    assert release.run == local.path and found == replace(local, path=release.uri)
    store = RunStore(release.uri)
    facts = store.read_json("release.json")
    for change, message in (
        ({"run": ""}, "does not say which run it was published from"),
        ({"run": "/gone"}, "was published from /gone, whose kit is needed: /gone is not a transfer kit"),
        ({"digest": "0"}, "holds another adapter than"),
    ):
        store.write_json("release.json", facts | change)
        with pytest.raises(UsageError, match=message):
            kit.load(release.uri)


def test_a_full_disk_behind_a_release_is_not_the_releases_own(tiny_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunStore(str(tmp_path / "release")).write_json("release.json", {"run": str(tiny_kit)})

    def full(_: object) -> None:
        raise NoRoom("There is no room.")

    monkeypatch.setattr(kit, "read_rows", full)
    with pytest.raises(NoRoom):
        kit.load(tmp_path / "release")


def test_a_kit_is_gone_where_what_is_behind_it_is(tiny_kit: Path, tmp_path: Path) -> None:
    source = tmp_path / "kit"
    shutil.copytree(tiny_kit, source)
    run = save_run(tmp_path / "run", kit_path=str(source))
    RunStore(str(tmp_path / "release")).write_json("release.json", {"run": run})
    places = [str(source), run, str(tmp_path / "release")]
    assert not any(map(kit.is_gone, places))
    shutil.rmtree(source)
    assert all(map(kit.is_gone, places))


def test_inputs_that_repeat_are_on_one_side_of_the_discriminator(tiny_kit: Path) -> None:
    task, rows = kit.load(tiny_kit).task, [TaskRow(**row) for row in task_rows(40)]
    doubled = [*rows, *(TaskRow(row.input.upper(), row.target) for row in rows)]
    unseen, learnt = kit.order_for_discriminator(task, doubled)
    assert (unseen, learnt) == kit.order_for_discriminator(task, rows) and (len(unseen), len(learnt)) == (4, 36)
    before = kit.order_for_discriminator(task, doubled, distinct=False)
    assert {text.lower() for text in before[0]} & {text.lower() for text in before[1]}


@pytest.mark.usefixtures("cache")
def test_inspect_knows_a_kit_on_an_object_store(s3: str, tiny_kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"{s3}/{uuid.uuid4().hex}"
    put(tiny_kit, RunStore(f"{place}/kit"))
    assert main(["inspect", f"{place}/kit"]) == 0
    assert "transfer kit, sound" in capsys.readouterr().out
    assert main(["inspect", f"{place}/nothing"]) == 2
    assert "There is no kit or run at" in capsys.readouterr().err


def test_what_is_no_kit_there_is_told(s3: str, cache: Path) -> None:
    with pytest.raises(UsageError, match=r"/nothing is not a transfer kit: it has no kit\.json"):
        kit.load(f"{s3}/nothing")
    assert not cache.exists()
