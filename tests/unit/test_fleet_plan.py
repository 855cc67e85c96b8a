"""What a fleet's kits come to before anything runs: what is refused, which streams there are and in what order, what it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.test_fleet import write
from translora_ray.cli import main
from translora_ray.errors import UsageError
from translora_ray.fleet.forecast import _hours, _there
from translora_ray.fleet.groups import check_all, grouped
from translora_ray.fleet.manifest import load_fleet
from translora_ray.progress import Display
from translora_ray.reading import load_config

EXPECTED = {"expect": {"nodes": 2, "CPU": 4}}


def test_real_rows_that_can_not_be_used_are_found_before_anything_runs(tmp_path: Path, tiny_kit: Path, tiny_gemma: str) -> None:
    (tmp_path / "strange.jsonl").write_text(json.dumps({"input": "red 1 blue", "target": "d"}))
    (tmp_path / "learnt.jsonl").write_text(json.dumps({"input": "red 1 blue", "target": "a"}))
    kits: list[dict[str, str]] = [{"kit": str(tiny_kit), "name": name, "evaluate": f"{name}.jsonl"} for name in ("absent", "strange", "learnt")]
    kits[2] |= {"train": "learnt.jsonl"}
    assert main(["fleet", write(tmp_path, kits=kits, target=tiny_gemma), "--engine", "transformers"]) == 1
    absent, strange, learnt = json.loads((tmp_path / "fleet" / "fleet.json").read_text())["transfers"]
    assert absent["reason"] == f"{tmp_path}/absent.jsonl can not be read: No such file or directory."
    assert "1 rows have a target that is none of the task's labels, 'd' first" in strange["reason"]
    assert "1 of its inputs are among those of train, which adapters learn from" in learnt["reason"]


def test_like_engines_make_a_group_and_the_most_urgent_group_is_first(tmp_path: Path, tiny_kit: Path, tiny_gemma: str) -> None:
    other = {"recipe": {"synthesis": {"generator": "target"}}}
    kits = [{"name": "a"}, {"name": "b", **other, "priority": 2}, {"name": "c", "priority": 1.5}, {"name": "d", **other}]
    _, wanted = load_fleet(write(tmp_path, kits=[{"kit": str(tiny_kit), **each} for each in kits], target=tiny_gemma, cluster=EXPECTED))
    with Display() as display:
        sound, failures = check_all(wanted, "transformers", display)
    groups, unplanned = grouped(sound, local=False)
    assert not failures and not unplanned
    assert [[transfer.name for transfer in group] for group in groups] == [["b", "d"], ["a", "c"]]


def test_a_group_that_the_cluster_has_no_room_for_fails_alone(tmp_path: Path, tiny_kit: Path, tiny_gemma: str) -> None:
    larger = {"recipe": {"synthesis": {"generator": "target"}}}  # two engines in place of one
    kits = [{"kit": str(tiny_kit), "name": "small"}, {"kit": str(tiny_kit), "name": "large", **larger}]
    cluster = {"expect": {"nodes": 1, "CPU": 1}}
    _, wanted = load_fleet(write(tmp_path, kits=kits, target=tiny_gemma, cluster=cluster))
    with Display() as display:
        sound, failures = check_all(wanted, "transformers", display)
    assert not failures
    groups, unplanned = grouped(sound, local=False)
    assert [[transfer.name for transfer in group] for group in groups] == [["small"]]
    assert "The engines ask for 2 CPU, the cluster can grow to 1" in unplanned["large"]
    with pytest.raises(UsageError, match="The engines ask for 2 CPU"):
        grouped([each for each in sound if each[0].name == "large"], local=False)


def test_the_names_of_several_targets_are_apart_in_the_registry_too(tmp_path: Path) -> None:
    _, wanted = load_fleet(write(tmp_path, kits=[{"kit": "one", "name": "a"}], target=["packaged:x", "packaged:y"]))
    assert [(each.name, each.release) for each in wanted] == [("a-x", "a-x"), ("a-y", "a-y")]


@pytest.mark.parametrize(
    ("cluster", "local", "told"),
    [
        ("{CPU: 64, GPU: 8}", False, "The cluster can grow to 64 CPU and 8 GPU."),
        (None, False, "The cluster has 3 CPU and 1 GPU."),
        (None, True, "This machine has 2 CPU and 1 GPU."),  # a local Ray says one more
    ],
)
def test_the_plan_says_what_there_is(cluster: str | None, local: bool, told: str) -> None:
    found = load_config(None, [f"cluster.expect={cluster}"] if cluster else []).cluster
    assert _there([{"CPU": 64, "GPU": 8}] if cluster else [{"CPU": 3, "GPU": 1}, {}], found, local) == told


def test_hours_are_those_of_finished_transfers() -> None:
    assert "of which the fleet has none yet" in _hours([], 100, 90)
    run = {"seconds": {"generator": 1000.0, "teacher": 800.0, "training": 720.0}, "counts": {"accepted": 100, "trained": 90}}
    run["recipe"] = {"training": {"epochs": 6}}
    assert "of 2 finished the others take 2.5 hours of an engine and 1.0 hours of training" in _hours([run, run], 500, 6 * 450)
    assert "0.5 hours of training" in _hours([run, run], 500, 3 * 450)
