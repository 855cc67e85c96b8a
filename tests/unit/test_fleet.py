"""A fleet without Ray: its file, its lease, its state, and what is shown of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from translora_ray.background import beside
from translora_ray.cli import main
from translora_ray.errors import RunFailed, UsageError
from translora_ray.fleet import lease as leases
from translora_ray.fleet import state as states
from translora_ray.fleet.lease import holder, lease
from translora_ray.fleet.manifest import load_fleet
from translora_ray.fleet.page import write_page
from translora_ray.storage import RunStore

ROOT = Path(__file__).parents[2]


def write(folder: Path, **keys: object) -> str:
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"out": "fleet", "kits": ["one"], "target": "base", **keys}))
    return str(path)


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_fleet_comes_to_transfers_with_their_own_recipes(tmp_path: Path) -> None:
    for name in ("b-kit", "a-kit"):
        (tmp_path / "kits" / name).mkdir(parents=True)
    own = {"kit": "kits/a-kit", "name": "special", "target": ["base", "org/other"], "priority": 2, "recipe": {"selection": {"quota": 7}}}
    recipe = {"seed": 3, "selection": {"quota": 5, "votes": 3}}
    fleet, wanted = load_fleet(write(tmp_path, kits=["kits/*", own], recipe=recipe, registry="s3://bucket/registry/", trainings=2))
    assert [each.name for each in wanted] == ["a-kit", "b-kit", "special-base", "special-other"]
    assert [each.config.recipe.selection.quota for each in wanted] == [5, 5, 7, 7]
    assert all(each.config.recipe.selection.votes == 3 and each.config.recipe.seed == 3 for each in wanted)
    assert wanted[0].kit == str(tmp_path / "kits" / "a-kit")
    assert wanted[0].out == f"{tmp_path}/fleet/runs/a-kit"
    assert [(each.target, each.priority, each.release) for each in wanted[1:3]] == [("base", 1.0, None), ("base", 2.0, "special")]
    assert (fleet.out, fleet.registry, fleet.trainings) == (str(tmp_path / "fleet"), "s3://bucket/registry", 2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kit": ["one"]}, "unknown key kit;"),
        ({"kits": []}, "kits: List should have at least 1 item"),
        ({"kits": [{"kit": "one", "prio": 1}]}, "unknown key kits.0.prio"),
        ({"kits": [{"name": "x"}]}, "the key kits.0.kit is missing"),
        ({"kits": [{"kit": "one", "priority": 0}]}, "kits.0.priority: Input should be greater than 0"),
        ({"kits": [{"kit": "one", "recipe": {"training": {"epoch": 1}}}]}, "unknown key kits.0.recipe.training.epoch"),
        ({"recipe": {"training": {"epoch": 1}}}, "unknown key recipe.training.epoch"),
        ({"cluster": {"gpus": 1}}, "unknown key cluster.gpus"),
        ({"kits": ["one", "other/one"]}, "2 transfers would be called 'one'"),
        ({"kits": ["none/*"]}, "kits.0.kit: nothing is at"),
        ({"target": []}, "kits.0 has no target"),
        ({"trainings": 0}, "trainings: Input should be greater than or equal to 1"),
    ],
)
def test_bad_fleets_name_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, object], message: str) -> None:
    assert main(["fleet", write(tmp_path, **keys)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["fleet.yaml"]


def test_in_a_job_paths_must_hold_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match="out fleet would lie in the job's temporary"):
        load_fleet(write(tmp_path))
    with pytest.raises(UsageError, match=r"kits\.0\.kit one would lie"):
        load_fleet(write(tmp_path, out="/fleet"))
    assert load_fleet(write(tmp_path, out="~/fleet", kits=["~/one"]))[0].out == str(Path.home() / "fleet")


def test_the_example_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    (tmp_path / "translora" / "kits" / "support_routing").mkdir(parents=True)
    fleet, wanted = load_fleet(str(ROOT / "jobs" / "fleet.example.yaml"))
    assert [each.name for each in wanted] == ["support_routing"]
    assert fleet.out == f"{tmp_path}/translora/fleet"


def test_one_driver_holds_a_fleet_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "fleet"))
    with lease(store, print):
        assert holder(store) is not None
        with pytest.raises(UsageError, match="being written by another process"), lease(RunStore(store.uri), print):
            pass
    assert holder(store) is None
    killed = (
        "import os, sys; from translora_ray.fleet.lease import lease; from translora_ray.storage import RunStore\n"
        "with lease(RunStore(sys.argv[1]), print): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed, store.uri], check=False).returncode == -9
    assert holder(store) is not None  # as far as other machines can see
    with lease(store, print):
        pass


def test_a_lease_of_another_machine_counts_until_it_expires(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "fleet"))
    there = {"owner": "x", "host": "far", "machine": "far", "pid": 7}
    store.write_json(leases.FILE, {**there, "expires": time.time() + 30})
    with pytest.raises(UsageError, match=r"is driven by process 7 on far: wait for it, or stop it; it is given up (29|30) s after"), lease(store, print):
        pass
    store.write_json(leases.FILE, {**there, "expires": time.time() - 1})
    with lease(store, print):
        assert store.read_json(leases.FILE)["owner"] != "x"


def test_a_lease_is_renewed_and_its_loss_is_told(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "fleet"))
    lost: queue.Queue[str] = queue.Queue()
    with lease(store, lost.put, seconds=2.0):
        first = store.read_json(leases.FILE)["expires"]
        until(lambda: time.time() > first and holder(store) is not None)
        assert lost.empty()
        store.write_json(leases.FILE, {"owner": "another", "expires": time.time() + 30})
        assert lost.get(timeout=10) == leases.TAKEN
    assert store.read_json(leases.FILE)["owner"] == "another"


class Failing(RunStore):
    """A storage that answers, until it is `away`."""

    away = False

    def read(self, name: str) -> bytes:
        if self.away:
            raise OSError("no route to host")
        return super().read(name)

    def write(self, name: str, content: bytes) -> None:
        if self.away:
            raise OSError("no route to host")
        super().write(name, content)


def test_a_storage_that_is_away_for_too_long_is_no_other_driver(tmp_path: Path) -> None:
    store, lost = Failing(str(tmp_path / "fleet")), queue.Queue[str]()
    with lease(store, lost.put, seconds=0.4):
        store.away = True
        assert lost.get(timeout=10) == leases.SILENT
        store.away = False


def test_a_lease_that_ends_while_somebody_looks_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunStore, "exists", lambda *_: True)
    assert holder(RunStore(str(tmp_path / "fleet"))) is None


def drive(path: str) -> None:
    """A driver in a process of its own, which takes a minute for what comes after the checks."""
    from translora_ray.fleet import driver

    class Slow(driver.Driver):
        def _begin(self, *arguments: Any) -> None:
            super()._begin(*arguments)
            self.state.catch_up()
            time.sleep(60)

    driver.Driver, driver.lease = Slow, partial(lease, seconds=2.0)  # type: ignore[misc,assignment]
    sys.exit(main(["fleet", path, "--engine", "transformers"]))


@pytest.mark.parametrize("by", ["a lost lease", "a second SIGTERM"])
def test_a_driver_that_must_end_at_once_writes_no_more(tmp_path: Path, by: str, capfd: pytest.CaptureFixture[str]) -> None:
    from translora_ray.fleet import driver  # noqa: F401  # before the fork: it takes long

    store = RunStore(str(tmp_path / "fleet"))

    def there() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(store.root).iterdir() if path.name != leases.FILE}

    process = multiprocessing.get_context("fork").Process(target=drive, args=[write(tmp_path)])
    process.start()
    try:
        until(lambda: [record.state for record in states.read(store)] == [states.FAILED])
        if by == "a lost lease":
            store.write_json(leases.FILE, {"owner": "another", "expires": time.time() + 30})
        else:
            process.terminate()
            process.join(1)
            assert process.is_alive()  # the first one lets what is under way come to its end
            process.terminate()
        before = there()
        process.join(20)
        assert process.exitcode == 1
    finally:
        process.kill()
    assert capfd.readouterr().err.endswith(f"translora: {leases.TAKEN}\n" if by == "a lost lease" else "--resume goes on from what is committed.\n")
    assert there() == before
    assert by != "a lost lease" or store.read_json(leases.FILE)["owner"] == "another"


def test_a_stop_in_the_checks_ends_them_and_leaves_no_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from translora_ray.fleet import groups

    looked: list[str] = []

    def look(kit: str, *_arguments: object) -> None:
        looked.append(kit)
        os.kill(os.getpid(), signal.SIGTERM)
        raise UsageError("no kit")

    monkeypatch.setattr(groups, "check", look)
    before = signal.getsignal(signal.SIGTERM)
    path = write(tmp_path, kits=["one", "two"])
    assert main(["fleet", path, "--engine", "transformers"]) == 1
    assert "The fleet was stopped" in capsys.readouterr().err
    assert len(looked) == 1 and signal.getsignal(signal.SIGTERM) == before
    assert RunStore(str(tmp_path / "fleet")).names("") == []


def test_a_fleet_is_one_before_it_has_a_run(tmp_path: Path) -> None:
    from translora_ray.fleet.driver import Driver
    from translora_ray.progress import Display

    (tmp_path / "one").mkdir()
    fleet, wanted = load_fleet(write(tmp_path))
    with Display() as display:
        Driver(fleet, wanted, RunStore(fleet.out), "transformers", display)._begin({}, [])
    assert [record.state for record in states.read(RunStore(fleet.out))] == ["waiting"]
    (tmp_path / "fleet" / "runs" / "one").mkdir(parents=True)  # and killed there
    assert main(["fleet", str(tmp_path / "fleet.yaml"), "--resume", "--engine", "transformers"]) == 1


def test_state_page_and_status_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    fleet, wanted = load_fleet(write(tmp_path, kits=["one", "two", "three"]))
    store = RunStore(fleet.out)
    state = states.State(store, wanted, write_page)
    store.write("runs/one/report.html", b"")
    state.change("one", states.SHIPPED, release="task@1", seconds=12.0)
    state.change("two", states.FAILED, "<no kit>")
    state.loaded("1", ["base"])
    state.catch_up()
    assert state.counts == {"waiting": 1, "shipped": 1, "failed": 1}
    assert [record.state for record in states.read(store)] == ["shipped", "failed", "waiting"]
    assert states.State(store, wanted).loads == {"1": ["base"]}
    state.change("three", states.TRAINING)
    state.catch_up()
    page = (tmp_path / "fleet" / "index.html").read_text()
    assert '<a href="runs/one/report.html">one</a>' in page and "&lt;no kit&gt;" in page and "runs/two/report.html" not in page
    assert main(["status", fleet.out]) == 0
    shown = capsys.readouterr().out
    assert "task@1" in shown and "<no kit>" in shown
    assert "1 shipped, 0 review, 0 refused, 1 failed, 1 not finished; no driver" in shown
    assert main(["status", fleet.out, "--watch"]) == 0  # ends: nobody drives it
    assert main(["status", str(tmp_path)]) == 2
    assert main(["status", str(tmp_path / "fleet.yaml")]) == 0
    assert "task@1" in capsys.readouterr().out


def test_a_fleet_whose_kits_are_checked_has_a_status_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(str(tmp_path / "fleet"))
    with lease(store, print):
        assert main(["status", store.uri]) == 0
    assert f"0 failed; driven by process {os.getpid()} on" in capsys.readouterr().out


def test_a_state_that_can_not_be_written_now_is_written_later(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    fleet, wanted = load_fleet(write(tmp_path))
    store = Failing(fleet.out)
    state = states.State(store, wanted, write_page)
    state.begin()
    state._next = 0.0
    store.away = True
    state.change("one", states.TRAINING)
    with pytest.raises(RunFailed, match="can not be written now: the same command with --resume goes on"):
        state.catch_up()
    store.away, state._next = False, 0.0
    assert states.read(store)[0].state == states.WAITING
    with beside(state.keep):
        until(lambda: states.read(store)[0].state == states.TRAINING)


def test_a_state_that_takes_long_to_write_is_written_less_often(tmp_path: Path) -> None:
    kits = [f"kit{number}" for number in range(200)]
    for name in kits:
        (tmp_path / name).mkdir()
    fleet, wanted = load_fleet(write(tmp_path, kits=kits))
    store = RunStore(fleet.out)
    written: list[int] = []

    def show(state: states.State) -> None:
        time.sleep(0.05)
        written.append(state.counts["shipped"])

    state = states.State(store, wanted, show)
    with beside(state.keep):
        for name in kits:
            state.change(name, states.SHIPPED)
        assert written == [1]
        deadline = time.monotonic() + 10
        while written[-1] < 200 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert states.read(store)[-1].state == states.SHIPPED and written == [1, 200]
    state.change(kits[0], states.REVIEW)
    state.catch_up()
    state.catch_up()
    assert states.read(store)[0].state == states.REVIEW and written == [1, 200, 199]


def test_fleets_that_can_not_begin_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "mine").write_text("")
    assert main(["fleet", write(tmp_path)]) == 2
    assert "is not empty and not a fleet" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "fleet").iterdir()] == ["mine"]


def test_a_fleet_of_bad_kits_fails_each_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    for name in ("run", "odd"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    (tmp_path / "odd" / "kit.json").mkdir()
    path = write(tmp_path, kits=["one", "absent", "run", "odd"])
    assert main(["fleet", path, "--engine", "transformers"]) == 1
    assert "0 shipped, 0 review, 0 refused, 4 failed" in capsys.readouterr().out
    transfers = json.loads((tmp_path / "fleet" / "fleet.json").read_text())["transfers"]
    assert [row["state"] for row in transfers] == ["failed"] * 4
    assert all("is not a transfer kit" in row["reason"] for row in transfers[:2])
    assert [f"{tmp_path / name} can not be read (" in row["reason"] for name, row in zip(("run", "odd"), transfers[2:], strict=True)] == [True, True]
    assert main(["fleet", path]) == 2
    assert "holds a fleet already: give --resume" in capsys.readouterr().err
    assert main(["fleet", path, "--resume"]) == 1
