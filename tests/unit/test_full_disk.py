"""A disk that is full in the middle of a run: one sentence, nothing half-written, and the same rows when there is room again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import BALLAST, fill, save_run, small_disk
from tests.unit.conftest import rows, stream
from translora_ray.cli import main
from translora_ray.disk import commit_folder
from translora_ray.errors import UsageError
from translora_ray.registry import Registry
from translora_ray.storage import RunStore
from translora_ray.stream.plan import Plan


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "256k") as place:
        yield place


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_shard_is_whole_or_not_there_and_the_run_goes_on(plan: Plan, disk: Path, tmp_path: Path) -> None:
    stream(plan, RunStore(str(tmp_path / "calm")), 0)
    store = RunStore(str(disk / "run"))
    stream(plan, store, 1, stop_after=5)
    there = files(disk / "run")
    assert there.keys() >= {"shards/000000-000000.parquet"}
    fill(disk)
    for _ in range(2):  # the command is given again before there is room
        with pytest.raises(UsageError, match=r"There is no room for .*\.parquet on .*: make some, and give the same command again; it goes on") as error:
            stream(plan, store, 2)
        assert "\n" not in str(error.value)
        assert files(disk / "run") == there
    (disk / BALLAST).unlink()
    stream(plan, store, 3)
    assert rows(store) == rows(RunStore(str(tmp_path / "calm")))


def test_folders_and_claims_are_whole_or_not_there(disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(bytes(100_000))
    commit_folder(source, disk / "folder")
    fill(disk)
    there = files(disk)
    (source / "weights").write_bytes(bytes(100_001))
    with pytest.raises(UsageError, match=r"There is no room for .*/folder on .*: make some"):
        commit_folder(source, disk / "folder")
    assert files(disk) == there and sorted(path.name for path in disk.iterdir()) == [BALLAST, "folder"]


def test_the_command_says_so_and_publishes_when_there_is_room(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, registry = save_run(tmp_path / "run"), str(disk / "registry")
    first = Registry(registry).publish(run)
    fill(disk)
    assert main(["publish", save_run(tmp_path / "other", 1), registry]) == 2
    error = capsys.readouterr().err
    assert error.startswith("translora: There is no room for ") and error.count("\n") == 1
    assert Registry(registry).releases() == [first]
    (disk / BALLAST).unlink()
    assert main(["publish", str(tmp_path / "other"), registry]) == 0
    assert len(Registry(registry).releases()) == 2
