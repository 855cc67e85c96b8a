"""An object store that refuses one request in twenty: a run and its release come to what they come to undisturbed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pyarrow.fs as pafs

from tests.conftest import save_run
from tests.unit.conftest import rows, stream
from tests.unreliable import unreliable
from translora_ray import adapters
from translora_ray.adapters import WEIGHTS
from translora_ray.registry import Registry
from translora_ray.storage import ADAPTER, IDENTITY, MANIFEST, TRAIN, RunStore
from translora_ray.stream.collect import Collector
from translora_ray.stream.plan import Plan
from translora_ray.training.checkpoints import METRICS, Checkpoints

OWN = ("created", "time", "run")
"""What differs from place to place: times, and where a release was published from."""


def move(plan: Plan, place: str, folder: Path) -> None:
    """All that a transfer of three attempts and its release write and read, in the order of workflow and registry, under `place`."""
    store = RunStore(f"{place}/run")
    for attempt in range(3):
        store.write_json(IDENTITY, {"kit": "kit"})
        stream(plan, store, attempt, stop_after=9 if attempt < 2 else None)
    assert Collector(plan, store).full
    source = Path(save_run(folder / "run"))
    for number in range(3):
        checkpoints = Checkpoints(store, "target0")
        with checkpoints.open(checkpoints.last()) as last:
            assert (last is not None) == (number > 0)
        made = Path(shutil.copytree(source / ADAPTER, folder / f"checkpoint{number}"))
        (made / METRICS).write_text(json.dumps({"epoch": number}))
        checkpoints.add(made)
    assert checkpoints.metrics() == {"epoch": 2}
    with checkpoints.open(checkpoints.last()) as last:
        assert last
        fetched = Path(shutil.copytree(last, folder / "fetched"))
    (fetched / METRICS).unlink()
    store.write_folder(ADAPTER, fetched, marker=adapters.CONFIG)
    store.write_json(MANIFEST, json.loads((source / MANIFEST).read_text()))
    store.remove(TRAIN)
    registry = Registry(f"{place}/registry")
    for name in ("one", "two"):
        assert registry.publish(store.uri, name=name) == registry.publish(store.uri, name=name)
        registry.promote(f"{name}@1")
        registry.promote(f"{name}@1", "live")
    other = save_run(folder / "other", 1)
    registry.publish(other, name="one")
    registry.promote("one@2")
    registry.roll_back("one")
    registry.retire("one@2")
    reader = Registry(registry.uri)
    assert [release.id for release in reader.releases()] == ["one@1", "two@1"]
    for release in reader.releases():
        assert adapters.digest(reader.fetch(release, folder / "cache")) == release.digest


def content(place: str) -> dict[str, object]:
    """Every file under `place` by its name, without what differs; without claims, whose names are drawn, locks, and shards, which name attempts."""
    store = RunStore(place)
    found: dict[str, object] = {}
    for info in store.fs.get_file_info(pafs.FileSelector(store.root, recursive=True)):
        name = info.path.removeprefix(f"{store.root}/")
        if not info.is_file or name.startswith(("registry/claims/", "run/shards/")) or info.base_name == ".lock":
            continue
        if name.endswith(".json") or name.startswith("registry/retired/"):
            found[name] = {key: value for key, value in store.read_json(name).items() if key not in OWN}
        else:
            found[name] = store.read(name)
    return found


def test_a_run_and_its_release_are_what_they_are_on_a_disk(s3: str, plan: Plan, tmp_path: Path) -> None:
    move(plan, str(tmp_path / "disk"), tmp_path / "one")
    with unreliable() as door:
        move(plan, f"{s3}/unreliable", tmp_path / "other")
    assert all(door.refused[method] > 0 for method in ("GET", "PUT", "HEAD", "POST"))
    assert content(f"{s3}/unreliable") == content(str(tmp_path / "disk"))
    assert rows(RunStore(f"{s3}/unreliable/run")) == rows(RunStore(str(tmp_path / "disk" / "run")))
    assert f"registry/releases/one@1/{WEIGHTS}" in content(f"{s3}/unreliable")


def test_a_store_that_is_sent_to_a_worker_tries_as_often(s3: str) -> None:
    with unreliable(every=2) as door:
        store = pickle.loads(pickle.dumps(RunStore(f"{s3}/sent")))
        for number in range(3):
            store.write(f"file{number}", b"content")
            assert store.read(f"file{number}") == b"content"
        assert store.names("") == [f"file{number}" for number in range(3)]
    assert door.refused.total() > 5
