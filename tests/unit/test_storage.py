"""The run directory: whole or not at all."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.test_registry_stores import elsewhere
from translora_ray.cli import main
from translora_ray.disk import commit_folder
from translora_ray.errors import UsageError
from translora_ray.records import Candidate
from translora_ray.storage import RunStore

FACTS = {"attempt": "x", "loads": [], "tokens": {}, "seconds": {}}


def test_nothing_is_made_before_something_is_committed(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    assert not store.exists()
    assert not store.names("shards")
    assert not list(tmp_path.iterdir())


def test_shards_come_back_in_order_with_their_facts(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    second = [Candidate(2, 12, "c", None, None, "empty prompt")]
    first = [Candidate(0, 10, "a", 1.5, "x"), Candidate(1, 11, "b", -1.0, None, "off task")]
    store.write_shard(2, 2, second, FACTS)
    store.write_shard(0, 1, first, FACTS)
    assert list(store.shards()) == [(1, first, FACTS), (2, second, FACTS)]


def test_a_gap_between_shards_is_an_error(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    store.write_shard(3, 4, [], FACTS)
    with pytest.raises(UsageError, match="does not follow"):
        list(store.shards())


def test_unfinished_files_are_not_seen(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    store.write("shards/000000-000000.parquet", b"")
    (tmp_path / "run" / "shards" / ".000001-000001.parquet.123").write_bytes(b"half")
    assert store.names("shards") == ["000000-000000.parquet"]


def test_a_folder_replaces_what_was_there(tmp_path: Path) -> None:
    for content in ("old", "new"):
        source = tmp_path / content
        source.mkdir()
        (source / content).write_text(content)
        commit_folder(source, tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "new", "old"]


def test_a_lock_that_is_removed_meanwhile_is_not_held_twice(tmp_path: Path) -> None:
    store, lock = RunStore(str(tmp_path)), tmp_path / ".lock"
    entered = threading.Event()

    def second() -> None:
        with store.lock(wait=True):
            entered.set()
            assert lock.exists()

    with ThreadPoolExecutor(1) as pool:
        with store.lock():
            waits = pool.submit(second)
            while len([link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(lock)]) < 2:
                time.sleep(0.01)  # until the second has opened it
            lock.unlink()
        waits.result(timeout=10)
    assert entered.is_set()


def test_a_place_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="no place to store a run"):
        RunStore("nowhere://bucket/run")


def test_a_bucket_that_is_not_there_is_told_before_anything_is_computed(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    RunStore(f"{s3}/new/run").check_writable()
    with pytest.raises(UsageError, match="There is no bucket absent: make it, or correct s3://absent/run"):
        RunStore("s3://absent/run").check_writable()
    with elsewhere("http://127.0.0.1:9"):
        for command in (["status", f"{s3}/it"], ["evaluate", f"{s3}/it", "--data", "x"], ["transfer", f"{s3}/it", "--target", "x", "--out", "x"]):
            assert main([*command]) == 1
            error = capsys.readouterr().err.strip().split("\n")[-1]
            assert f"{s3}/it can not be reached" in error and "check the network" in error
