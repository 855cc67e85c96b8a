"""A fleet without Ray: its file, its state, and what is shown of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import save_run
from translora_ray.adapters import digest
from translora_ray.background import beside
from translora_ray.cli import main
from translora_ray.errors import NoRoom, UsageError
from translora_ray.evaluation.compare import compared
from translora_ray.fleet import state as states
from translora_ray.fleet import status
from translora_ray.fleet.groups import check_all
from translora_ray.fleet.lease import lease
from translora_ray.fleet.manifest import load_fleet
from translora_ray.fleet.page import write_page
from translora_ray.kit import rows_digest
from translora_ray.progress import Display
from translora_ray.records import read_rows
from translora_ray.registry import Registry
from translora_ray.storage import RESULT, RunStore

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
    assert [(each.target, each.priority, each.release) for each in wanted[1:3]] == [("base", 1.0, None), ("base", 2.0, "special-base")]
    assert (fleet.out, fleet.registry, fleet.trainings) == (str(tmp_path / "fleet"), "s3://bucket/registry", 2)


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"kits": [{"kit": "one", "name": "x" * 90}], "target": ["one/base-model", "one/another"]}, "which is too long or begins with no letter or digit"),
        ({"kits": ["\u65e5\u672c"]}, "which is too long or begins with no letter or digit"),
    ],
)
def test_what_could_not_be_published_or_moved_is_refused_at_once(tmp_path: Path, keys: dict[str, object], wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        load_fleet(write(tmp_path, **keys))


def test_kits_below_a_folder_whose_name_is_like_a_pattern_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "x[1]"
    for name in ("a", "b", "c[2]"):
        (folder / "kits" / name).mkdir(parents=True)
    assert [each.kit for each in load_fleet(write(folder, kits=["kits/*"]))[1]] == [str(folder / "kits" / name) for name in ("a", "b", "c[2]")]
    assert [each.name for each in load_fleet(write(folder, kits=["kits/c[2]"]))[1]] == ["c-2-"]


def test_in_a_job_a_base_beside_the_fleet_must_be_named_as_one_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    (tmp_path / "base").mkdir()
    keys = {"out": "/runs/fleet", "kits": ["/kits/one"]}
    with pytest.raises(UsageError, match="target base would lie in the job's temporary working directory"):
        load_fleet(write(tmp_path, **keys))
    assert load_fleet(write(tmp_path, **keys, target="org/base"))[1][0].target == "org/base"


def test_a_registry_that_could_not_be_written_is_refused_before_anything_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "other").touch()
    assert main(["fleet", write(tmp_path, registry="registry"), "--engine", "transformers"]) == 2
    assert "is not empty and not a registry" in capsys.readouterr().err and not (tmp_path / "fleet").exists()


def test_what_overlaps_is_no_new_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, recipe={"overlap": True})
    assert main(["fleet", path, "--engine", "transformers"]) == 2
    assert "overlap is for single transfers" in capsys.readouterr().err and not (tmp_path / "fleet").exists()
    states.State(RunStore(str(tmp_path / "fleet")), load_fleet(path)[1]).begin()  # as an older version did
    assert main(["fleet", path, "--engine", "transformers", "--resume"]) == 1


def test_a_full_disk_in_the_checks_is_no_kits_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise NoRoom("There is no room.")

    monkeypatch.setattr("translora_ray.fleet.groups.check", full)
    with pytest.raises(NoRoom), Display() as display:
        check_all(load_fleet(write(tmp_path))[1], "transformers", display)


def test_an_evaluation_is_one_of_its_rows(tmp_path: Path) -> None:
    store, rows = RunStore(str(tmp_path / "run")), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input": "1", "target": "a"}) + "\n")
    assert not compared(store, str(rows))
    store.write_json(RESULT, {"rows_digest": rows_digest(read_rows(rows))})
    assert compared(store, str(rows))
    rows.write_text(json.dumps({"input": "2", "target": "a"}) + "\n")
    assert not compared(store, str(rows))
    rows.unlink()
    assert compared(store, str(rows)), "they may be gone by now"
    store.write_json(RESULT, {})
    assert compared(store, "rows of which an older version said nothing")


def test_a_registry_leads_to_the_newest_release_of_each_name_for_a_base(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    for seed, (name, base) in enumerate((("routing", "old"), ("routing", "old"), ("dates", "old"), ("dates", "new"))):
        registry.publish(save_run(tmp_path / str(seed), seed, target_base=base), name)
    _, wanted = load_fleet(write(tmp_path, kits=[{"releases": "registry", "base": "old"}]))
    assert [(each.name, each.kit, each.release) for each in wanted] == [
        ("dates", f"{registry.uri}/releases/dates@1", "dates"),
        ("routing", f"{registry.uri}/releases/routing@2", "routing"),
    ]
    registry.promote("routing@1")  # as after a roll-back: what is served is what moves on
    _, wanted = load_fleet(write(tmp_path, kits=[{"releases": "registry", "base": "old"}]))
    assert [each.kit for each in wanted] == [f"{registry.uri}/releases/{release}" for release in ("dates@1", "routing@1")]
    with pytest.raises(UsageError, match="registry has no release for the base older"):
        load_fleet(write(tmp_path, kits=[{"releases": "registry", "base": "older"}]))


def test_a_damaged_release_is_no_other_names_nor_bases_business_and_no_older_one_takes_its_place(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    for seed, (name, base) in enumerate((("routing", "old"), ("routing", "old"), ("dates", "old"), ("dates", "new"), ("tones", "new"))):
        made = save_run(tmp_path / str(seed), seed, target_base=base)
        config = Path(made, "adapter", "adapter_config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        manifest = json.loads(Path(made, "manifest.json").read_text()) | {"adapter_digest": digest(Path(made, "adapter"))}
        Path(made, "manifest.json").write_text(json.dumps(manifest))
        registry.publish(made, name)
    sound, seen = {each: (tmp_path / "registry" / "releases" / each / "release.json").read_text() for each in ("dates@1", "routing@2")}, []
    for damaged, content in (("routing@1", "{"), ("dates@2", "{"), ("tones@1", "{"), ("routing@2", sound["dates@1"])):
        (tmp_path / "registry" / "releases" / damaged / "release.json").write_text(content)
        _, wanted = load_fleet(write(tmp_path, kits=[{"releases": "registry", "base": "old"}]))
        assert [each.kit for each in wanted] == [f"{registry.uri}/releases/{release}" for release in ("dates@1", "routing@2")]
        seen.append([bool(each.obstacle) for each in wanted])
    assert seen == [[False, False]] * 3 + [[False, True]]
    with Display() as display:
        _, failures = check_all(wanted[1:], "transformers", display)
    assert "releases/routing@2/release.json is damaged" in failures["routing"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kit": ["one"]}, "unknown key kit;"),
        ({"kits": [{"releases": "registry"}]}, "kits.0: give kit, or releases and base"),
        ({"kits": [{"kit": "one", "releases": "registry", "base": "b"}]}, "kits.0: give kit, or releases and base"),
        ({"kits": []}, "kits: List should have at least 1 item"),
        ({"kits": [{"kit": "one", "prio": 1}]}, "unknown key kits.0.prio"),
        ({"kits": [{"name": "x"}]}, "kits.0: give kit, or releases and base"),
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
    (path,) = (ROOT / "jobs").glob("*.yaml")
    fleet, wanted = load_fleet(str(path))
    assert [each.name for each in wanted] == ["support_routing"]
    assert fleet.out == f"{tmp_path}/translora/fleet"


def test_state_page_and_status_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    fleet, wanted = load_fleet(write(tmp_path, kits=["one", "two", "three"]))
    store = RunStore(fleet.out)
    state = states.State(store, wanted, write_page)
    store.write("runs/one/report.html", b"")
    state.change("one", states.SHIPPED, release="task@1", seconds=12.0)
    state.change("two", states.FAILED, "<no kit>")
    state.loaded(["base"])
    state.catch_up()
    assert state.counts == {"waiting": 1, "shipped": 1, "failed": 1}
    assert [record.state for record in states.read(store)] == ["shipped", "failed", "waiting"]
    again = states.State(store, wanted)
    assert [*again.loads.values()] == [["base"]]
    assert [(again.records[name].state, again.records[name].release) for name in ("one", "three")] == [("shipped", "task@1"), ("waiting", None)]
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


def test_a_storage_that_goes_away_ends_the_watch_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def away(_: object) -> None:
        raise OSError("no route to host")

    store = RunStore(str(tmp_path / "fleet"))
    monkeypatch.setattr(status, "read", away)
    with lease(store, print):
        for watch in ([], ["--watch"]):
            assert main(["status", store.uri, *watch]) == 1
            assert "can not be reached (no route to host)" in capsys.readouterr().err


def test_a_fleet_whose_kits_are_checked_has_a_status_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(str(tmp_path / "fleet"))
    with lease(store, print):
        assert main(["status", store.uri]) == 0
    assert f"0 failed; driven by process {os.getpid()} on" in capsys.readouterr().out


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
    assert [f"{tmp_path / name}, its bases or its run can not be read (" in row["reason"] for name, row in zip(("run", "odd"), transfers[2:], strict=True)] == [
        True,
        True,
    ]
    assert main(["fleet", path]) == 2
    assert "holds a fleet already: give --resume" in capsys.readouterr().err
    assert main(["fleet", path, "--resume"]) == 1
