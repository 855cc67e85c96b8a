"""One driver at a time, and how it ends: its lease, its stop, a storage that fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.test_fleet import until, write
from translora_ray.background import beside
from translora_ray.cli import main
from translora_ray.errors import NoRoom, RunFailed, Stopped, UsageError
from translora_ray.fleet import lease as leases
from translora_ray.fleet import state as states
from translora_ray.fleet.lease import holder, lease
from translora_ray.fleet.manifest import load_fleet
from translora_ray.fleet.page import write_page
from translora_ray.progress import Display
from translora_ray.storage import RunStore


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


def test_who_resumes_waits_for_a_lease_to_run_out_and_for_none_that_is_renewed(tmp_path: Path) -> None:
    store, said = RunStore(str(tmp_path / "fleet")), list[str]()
    gone = {"owner": "x", "host": "far", "machine": "far", "pid": 7, "expires": time.time() + 1.5}
    store.write_json(leases.FILE, gone)
    with lease(store, print, wait=said.append):
        assert time.time() > gone["expires"] and store.read_json(leases.FILE)["owner"] != "x"
    assert said == ["process 7 on far drove this fleet last: waiting up to 1 s for a sign of it"]
    store.write_json(leases.FILE, {**gone, "expires": time.time() + 30})
    renewing = threading.Timer(0.5, lambda: store.write_json(leases.FILE, {**gone, "expires": time.time() + 60}))
    renewing.start()
    with pytest.raises(UsageError, match=r"is driven by process 7 on far"), lease(store, print, wait=said.append):
        pass
    renewing.join()


def test_a_lease_is_renewed_and_its_loss_is_told(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "fleet"))
    lost: queue.Queue[str] = queue.Queue()
    with lease(store, lost.put, seconds=2.0):
        first = store.read_json(leases.FILE)["expires"]
        until(lambda: time.time() > first + 0.2 and holder(store) is not None)  # between two renewals, which write the same file
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


def test_a_disk_that_stays_full_is_named_when_the_lease_is_lost(tmp_path: Path) -> None:
    class Full(RunStore):
        full = False

        def write(self, name: str, content: bytes) -> None:
            if self.full:
                raise NoRoom("There is no room.")
            super().write(name, content)

    store, lost = Full(str(tmp_path / "fleet")), queue.Queue[str]()
    with lease(store, lost.put, seconds=0.4):
        store.full = True
        assert lost.get(timeout=10) == "There is no room."
        store.full = False


def test_a_storage_that_keeps_one_waiting_does_not_make_a_lease_longer(tmp_path: Path) -> None:
    class Slow(RunStore):
        waits = threading.Event()

        def write(self, name: str, content: bytes) -> None:
            super().write(name, content)
            self.waits.wait()

    store, lost = Slow(str(tmp_path / "fleet")), queue.Queue[str]()
    store.waits.set()
    with lease(store, lost.put, seconds=1.0):
        store.waits.clear()
        assert lost.get(timeout=10) == leases.SILENT
        found = RunStore(store.uri).read_json(leases.FILE)["expires"]
        assert time.time() < found + 0.5, "whoever waits for the lease may have it only now"
        store.waits.set()


def test_a_lease_that_is_odd_is_lost_and_not_held_for_ever(tmp_path: Path) -> None:
    store, lost = RunStore(str(tmp_path / "fleet")), queue.Queue[str]()
    with lease(store, lost.put, seconds=0.5):
        store.write(leases.FILE, b"[]")
        assert lost.get(timeout=10) == leases.SILENT


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
            Path(path).with_suffix(".begun").touch()
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
        until((tmp_path / "fleet.begun").exists)
        assert states.read(store)[0].state == states.FAILED
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


def test_a_driver_that_is_refused_leaves_nothing_but_what_another_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from translora_ray.fleet import driver

    (tmp_path / "one").mkdir()
    fleet, wanted = load_fleet(write(tmp_path))
    store = RunStore(fleet.out)

    def refused(*_: object, **__: object) -> None:
        with store.lock():
            pass
        raise UsageError("It is driven.")

    def meanwhile(*_: object, **__: object) -> None:
        another.enter_context(store.lock())
        raise UsageError("It is driven.")

    with contextlib.ExitStack() as another:
        for by, there in ((refused, False), (meanwhile, True)):
            monkeypatch.setattr(driver, "lease", by)
            with pytest.raises(UsageError, match="It is driven"):
                driver.run_fleet(fleet, wanted, False, "transformers", Display())
            assert (tmp_path / "fleet" / ".lock").exists() == there


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


@pytest.mark.parametrize("state", [states.SHIPPED, states.WAITING])
def test_a_stop_that_comes_after_the_last_transfer_has_ended_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    from translora_ray.fleet import driver

    (tmp_path / "one").mkdir()
    fleet, wanted = load_fleet(write(tmp_path))
    found = driver.Driver(fleet, wanted, RunStore(fleet.out), "transformers", Display())
    monkeypatch.setattr(driver, "check_all", lambda *_: ([(wanted[0], None)], {}))
    monkeypatch.setattr(driver, "ray_session", lambda _: contextlib.nullcontext(True))
    monkeypatch.setattr(driver, "FleetMeasures", lambda _: None)
    monkeypatch.setattr(driver, "grouped", lambda *_: ([[]], {}))
    monkeypatch.setattr(found, "_settled", lambda *_: False)

    def move(_: object) -> None:
        found.state.change(wanted[0].name, state)
        found.stop.set()

    monkeypatch.setattr(found, "_move", move)
    with pytest.raises(Stopped) if state == states.WAITING else contextlib.nullcontext():
        assert found.run().counts == {state: 1}


def test_what_a_full_disk_stopped_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from translora_ray.fleet import driver

    (tmp_path / "one").mkdir()
    fleet, wanted = load_fleet(write(tmp_path))
    found = driver.Driver(fleet, wanted, RunStore(fleet.out), "transformers", Display())

    def full(*_: object) -> None:
        assert found.state.records[wanted[0].name].state == states.STREAMING
        raise NoRoom("There is no room.")

    monkeypatch.setattr(driver, "run_stream", full)
    transfer: Any = SimpleNamespace(wanted=wanted[0], name=wanted[0].name, plan=None, checked=SimpleNamespace(store=None))
    with pytest.raises(NoRoom):
        found._stream([transfer], print)
    assert found.state.records[wanted[0].name].state == states.WAITING
