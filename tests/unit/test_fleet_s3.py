"""A fleet on an object store, which knows no locks: a real server on loopback."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.unreliable import unreliable
from translora_ray.cli import main
from translora_ray.errors import UsageError
from translora_ray.fleet import lease as leases
from translora_ray.fleet import state as states
from translora_ray.fleet.lease import holder, lease
from translora_ray.fleet.manifest import load_fleet
from translora_ray.fleet.page import write_page
from translora_ray.storage import RunStore


def test_a_lease_is_refused_while_it_lasts_even_on_the_same_machine(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE", 0.1)
    store = RunStore(f"{s3}/leased")
    with lease(store, print):
        with pytest.raises(UsageError, match=r"is driven by process \d+ on .* is given up \d+ s after"), lease(RunStore(store.uri), print):
            pass
        assert holder(store) is not None
    assert holder(store) is None
    store.write_json(leases.FILE, {"owner": "x", "host": "far", "machine": "far", "pid": 7, "expires": time.time() - 1})
    with lease(store, print):
        pass


def test_of_two_that_begin_at_once_the_later_writer_has_it(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(f"{s3}/contested")

    def other_writes(_seconds: float) -> None:
        store.write_json(leases.FILE, {"owner": "x", "host": "far", "machine": "far", "pid": 7, "expires": time.time() + 30})

    monkeypatch.setattr(leases.time, "sleep", other_writes)
    with pytest.raises(UsageError, match="was taken by another driver at the same moment"), lease(store, print):
        pass
    assert store.read_json(leases.FILE)["owner"] == "x"


def test_a_fleet_keeps_its_state_and_page_there(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(leases, "SETTLE", 0.1)
    path, out = tmp_path / "fleet.yaml", f"{s3}/fleet"
    path.write_text(yaml.safe_dump({"out": out, "kits": ["absent"], "target": "base"}))
    assert main(["fleet", str(path), "--engine", "transformers"]) == 1
    store = RunStore(out)
    assert store.names("") == ["fleet.json", "index.html"]
    assert json.loads(store.read("fleet.json"))["counts"] == {"failed": 1}
    capsys.readouterr()
    assert main(["fleet", str(path)]) == 2
    assert f"{out} holds a fleet already: give --resume" in capsys.readouterr().err
    assert main(["status", out]) == 0
    assert "0 shipped, 0 review, 0 refused, 1 failed; no driver" in capsys.readouterr().out


def test_a_change_takes_as_many_requests_in_a_large_fleet_as_in_a_small_one(s3: str, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / "kits" / f"kit{number}").mkdir(parents=True)
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump({"out": f"{s3}/large", "kits": ["kits/*"], "target": "base"}))
    with unreliable(every=1 << 60) as door:
        fleet, wanted = load_fleet(str(path))
        store = RunStore(fleet.out)
        state = states.State(store, wanted, write_page)
        asked = []
        for each in wanted:
            store.write(f"runs/{each.name}/report.html", b"")
            before = door.asked.total()
            state.change(each.name, states.SHIPPED)
            state.catch_up()
            asked.append(door.asked.total() - before)
        page = store.read("index.html").decode()
    assert len(set(asked)) == 1
    assert all(f'href="runs/{each.name}/report.html"' in page for each in wanted)
