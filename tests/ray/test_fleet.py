"""Whole fleets on a shared Ray with tiny models: undisturbed, with a kit that is none, killed, stopped, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster as ClusterOfNodes
from ray.exceptions import RayActorError

from tests.conftest import BALLAST, fill, one_answer_kit, small_disk, task_rows
from tests.ray.conftest import rows, same_weights
from tests.ray.growing import children
from tests.unreliable import unreliable
from translora_ray import kit
from translora_ray.adapters import digest
from translora_ray.cli import main
from translora_ray.cluster import Cluster
from translora_ray.fleet import driver
from translora_ray.fleet.groups import Transfer
from translora_ray.fleet.lease import holder
from translora_ray.fleet.manifest import load_fleet
from translora_ray.fleet.state import STATES
from translora_ray.fleet.training import Full, Slot
from translora_ray.placement import RESTARTS, Resources, place
from translora_ray.progress import Display
from translora_ray.recipe import Recipe
from translora_ray.registry import Registry
from translora_ray.releases import Release
from translora_ray.storage import RunStore
from translora_ray.stream.collect import Totals
from translora_ray.stream.plan import Plan

pytestmark = pytest.mark.ray
RECIPE = {
    "selection": {"quota": 40, "method": "discriminator", "threshold": -100, "as_asked": False, "near_duplicate": 1.0, "max_candidates": 200},
    "synthesis": {"pack_size": 16, "temperature": 1.0, "min_p": 0.0, "max_tokens": 60},
    "training": {"epochs": 4, "batch_size": 4},
    "gate": {"held_out": 0.1, "ship": 0, "refuse": 0, "acceptance": 0, "likeness": 0},
}


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> Iterator[ClusterOfNodes]:
    """A Ray that this process and the drivers that it starts work on, of one node."""
    cluster = ClusterOfNodes(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    cluster.shutdown()


def write_fleet(folder: Path, kit: Path, target: str) -> Path:
    """Two transfers that differ in their seed, one whose kit is not whole, and one that finds no examples."""
    broken = Path(shutil.copytree(kit, folder / "broken"))
    (broken / "adapter" / "adapter_model.safetensors").write_bytes(b"short")
    kits = [{"kit": str(kit), "name": name, "recipe": {"seed": seed}} for seed, name in enumerate(("one", "two"))]
    starved = {"kit": str(kit), "name": "starved", "recipe": {"selection": {"method": "discriminator", "threshold": 1000, "max_candidates": 1}}}
    fleet = {"out": "fleet", "kits": [kits[0], "broken", kits[1], starved], "target": target, "recipe": RECIPE, "registry": "registry"}
    (folder / "fleet.yaml").write_text(yaml.safe_dump({**fleet, "cluster": {"commit_seconds": 0, "checkpoint_seconds": 0}}))
    return folder / "fleet.yaml"


def fleet_command(path: Path) -> list[str]:
    return ["fleet", str(path), "--engine", "transformers", "--resume"]


def states(folder: Path) -> dict[str, str]:
    found = folder / "fleet" / "fleet.json"
    return {row["name"]: row["state"] for row in json.loads(found.read_text())["transfers"]} if found.exists() else {}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, open_kit: Path, tiny_gemma: str) -> Path:
    folder = tmp_path_factory.mktemp("calm-fleet")
    assert main(fleet_command(write_fleet(folder, open_kit, tiny_gemma))) == 1
    return folder


def test_what_fails_fails_alone_and_the_others_share_one_engine(calm: Path) -> None:
    assert states(calm) == {"one": "shipped", "broken": "failed", "two": "shipped", "starved": "failed"}
    fleet = json.loads((calm / "fleet" / "fleet.json").read_text())
    assert "is corrupt" in fleet["transfers"][1]["reason"]
    assert "Only 0 of 44 examples" in fleet["transfers"][3]["reason"]
    assert [len(loads) for loads in fleet["engine_loads"].values()] == [1]
    releases = Registry(str(calm / "registry")).releases()
    assert {release.id for release in releases} == {"one@1", "two@1"} == {row["release"] for row in fleet["transfers"]} - {None}
    assert [release.digest for release in releases] == [digest(calm / "fleet" / "runs" / name / "adapter") for name in ("one", "two")]
    assert (calm / "fleet" / "index.html").exists()
    assert holder(RunStore(str(calm / "fleet"))) is None


def test_ray_exports_what_drivers_count_under_the_names_that_the_dashboard_asks_for(calm: Path) -> None:
    runs = [RunStore(str(calm / "fleet" / "runs" / name)) for name in ("one", "two", "starved")]
    candidates = sum(len(candidates) for run in runs for _, candidates, _ in run.shards())
    seconds = sum(run.read_json("manifest.json")["seconds"]["training"] for run in runs[:2])
    wanted = {"ray_translora_candidates_total": candidates, "ray_translora_accepted_total": 88}
    wanted |= {f'ray_translora_transfers{{state="{state}"}}': {"shipped": 2, "failed": 2}.get(state, 0) for state in STATES}
    wanted |= {'ray_translora_phase_seconds_total{phase="training"}': pytest.approx(seconds, abs=0.2)}
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    found: dict[str, float] = {}
    for _ in range(60):  # Ray exports every few seconds
        lines = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
        found = {_without_places(name): float(value) for name, _, value in (line.rpartition(" ") for line in lines if line.startswith("ray_translora_"))}
        if {name: found.get(name) for name in wanted} == wanted:
            break
        time.sleep(1)
    assert {name: found.get(name) for name in wanted} == wanted
    phases = {name.split('"')[1] for name in found if name.startswith("ray_translora_phase_tokens_total")}
    assert phases == {"generator", "discriminator", "teacher", "training"}
    assert 'ray_translora_phase_seconds_total{phase="gate"}' in found


def _without_places(metric: str) -> str:
    """Without the labels that Ray adds: node, session, process."""
    name, _, labels = metric.rstrip("}").partition("{")
    mine = [label for label in labels.split(",") if label.startswith(("phase=", "state="))]
    return name + (f"{{{','.join(mine)}}}" if mine else "")


def test_a_finished_fleet_is_left_alone_and_its_failures_are_tried_again(calm: Path, open_kit: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(calm, tmp_path / "copy"))
    path = folder / "fleet.yaml"
    runs = {file: file.stat().st_mtime_ns for file in (folder / "fleet" / "runs").rglob("*")}
    shutil.rmtree(folder / "broken")
    shutil.copytree(open_kit, folder / "broken")
    broken = yaml.safe_load(path.read_text())
    del broken["kits"][3]
    recipe = {"seed": 2, "selection": {"quota": 8}, "training": {"epochs": 1}, "gate": {"acceptance": 1.0}}
    broken["kits"][1] = {"kit": "broken", "name": "broken", "recipe": recipe}
    path.write_text(yaml.safe_dump(broken))
    assert main(fleet_command(path)) == 0
    assert states(folder) == {"one": "shipped", "broken": "review", "two": "shipped"}  # of a pack of 16 nine are wanted
    assert {file: file.stat().st_mtime_ns for file in runs} == runs
    assert {release.id for release in Registry(str(folder / "registry")).releases()} == {"one@1", "two@1"}


def test_the_plan_is_said_and_nothing_is_made(calm: Path, open_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_fleet(tmp_path, open_kit, tiny_gemma)
    there = sorted(tmp_path.rglob("*"))
    assert main([*fleet_command(path), "--dry-run"]) == 1  # one of the kits is not whole
    told = capsys.readouterr().out
    assert "1 to 1 engines of 1 CPU and 0 GPU: transformers with" in told and "(generator, discriminator, teacher)" in told
    assert "trainings beside the stream, 1 at once, each 1 workers of 1 CPU and 0 GPU" in told
    assert "The cluster has 4 CPU and 0 GPU." in told and "is corrupt" in told
    seeds = [json.loads(line) for line in (open_kit / "seeds.jsonl").read_text().splitlines()]
    trained = sum(len(f"Q: {seed['input']}\nA:") + len(f" {seed['target']}") + 1 for seed in seeds)  # a token for each character, one for the end
    assert f"{40 * 4 * trained // len(seeds):,}" in told
    assert "or by that of a run like them (--pace RUN)" in told
    assert main([*fleet_command(path), "--dry-run", "--pace", str(calm / "fleet" / "runs" / "one")]) == 1
    assert "At the pace of 1 finished the others take 0.0 hours of an engine" in capsys.readouterr().out
    assert main([*fleet_command(path), "--dry-run", "--pace", str(tmp_path)]) == 2
    assert main([*fleet_command(path), "--pace", str(calm / "fleet" / "runs" / "one")]) == 2
    assert sorted(tmp_path.rglob("*")) == there


def test_groups_follow_each_other_real_rows_have_a_say_and_what_was_retired_stays_so(open_kit: Path, tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows(120)[80:]))
    kit_here = str(shutil.copytree(open_kit, tmp_path / "kit"))
    small = {**RECIPE, "selection": {**RECIPE["selection"], "quota": 8}, "training": {"epochs": 1, "batch_size": 4}}
    kits: list[dict[str, object]] = [
        {"name": "tested", "evaluate": "rows.jsonl", "recipe": {"gate": {"loss": 1.0}}},
        {
            "name": "bad",
            "evaluate": "rows.jsonl",
            "kit": str(one_answer_kit(tiny_kit, tmp_path / "odd", "never")),
            "recipe": {"gate": {"ship": 0.9, "refuse": 0.5}},
        },
        {"name": "unjudged", "priority": 2, "recipe": {"selection": {"method": "none"}}},
    ]
    fleet = {"out": "fleet", "kits": [{"kit": kit_here, **each} for each in kits], "target": tiny_gemma, "recipe": small, "registry": "registry"}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    assert main(fleet_command(tmp_path / "fleet.yaml")) == 1
    assert states(tmp_path) == {"tested": "shipped", "bad": "refused", "unjudged": "shipped"}
    loads = [*json.loads((tmp_path / "fleet" / "fleet.json").read_text())["engine_loads"].values()]
    assert [len(each) for each in loads] == [1, 1], "a group that asks no discriminator, and one that does"
    for name in ("tested", "bad"):
        assert json.loads((tmp_path / "fleet" / "runs" / name / "evaluation" / "result.json").read_text())["n"] == 40
    registry = Registry(str(tmp_path / "registry"))
    (evaluated,) = [release for release in registry.releases() if release.name == "tested"]
    assert evaluated.evaluation and evaluated.evaluation["n"] == 40
    registry.retire("unjudged@1")
    shutil.rmtree(kit_here)
    assert main(fleet_command(tmp_path / "fleet.yaml")) == 1  # one is refused, as before
    assert states(tmp_path) == {"tested": "shipped", "bad": "refused", "unjudged": "shipped"}, "what has come to a verdict needs its kit no more"
    shutil.copytree(open_kit, kit_here)
    assert main(fleet_command(tmp_path / "fleet.yaml")) == 1
    assert [release.id for release in registry.releases()] == ["tested@1"], "nothing retired is published again"


class Drive:
    """A driver in a process of its own."""

    def __init__(self, path: Path, log: Path | None = None) -> None:
        self.log = log or path.with_suffix(".log")
        with self.log.open("w") as output:
            command = [sys.executable, "-m", "translora_ray.cli", *fleet_command(path)]
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def until(self, ready: Callable[[], bool]) -> Drive:
        deadline = time.monotonic() + 400
        while not ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return self

    def end(self, number: signal.Signals) -> int:
        os.kill(self.process.pid, number)
        return self.process.wait(300)


def test_killed_three_times_and_stopped_once_it_comes_to_the_same(
    calm: Path, open_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_fleet(tmp_path, open_kit, tiny_gemma)
    runs, registry = tmp_path / "fleet" / "runs", tmp_path / "registry"

    def shards(name: str) -> int:
        return len(list(runs.glob(f"{name}/shards/*.parquet")))

    Drive(path).until(lambda: shards("one") >= 1).end(signal.SIGKILL)
    assert states(tmp_path)["one"] == "streaming"
    had = shards("one")
    second = Drive(path).until(lambda: shards("one") > had)
    assert main(fleet_command(path)) == 2
    assert "is being written by another process: wait for it, or stop it" in capsys.readouterr().err
    assert second.end(signal.SIGTERM) == 1
    assert "what was under way is committed" in second.log.read_text()
    assert [states(tmp_path)[name] for name in ("one", "broken", "two")] == ["waiting", "failed", "waiting"]
    assert holder(RunStore(str(tmp_path / "fleet"))) is None
    Drive(path).until(lambda: states(tmp_path)["one"] == "training" and any(runs.glob("*/train/**/state.pt"))).end(signal.SIGKILL)
    assert not registry.exists()
    Drive(path).until(lambda: any(registry.glob("releases/*/release.json"))).end(signal.SIGKILL)
    assert main(fleet_command(path)) == 1
    the_same(tmp_path, calm)


def the_same(folder: Path, calm: Path) -> None:
    assert states(folder) == states(calm)
    releases = [Registry(str(each / "registry")).releases() for each in (folder, calm)]
    assert [_said(release) for release in releases[0]] == [_said(release) for release in releases[1]]
    assert [release.digest for release in releases[0]] == [digest(folder / "fleet" / "runs" / name / "adapter") for name in ("one", "two")]
    for name in ("one", "two"):
        assert rows(folder / "fleet" / "runs" / name) == rows(calm / "fleet" / "runs" / name)
        same_weights(folder / "fleet" / "runs" / name, calm / "fleet" / "runs" / name)


def _said(release: Release) -> tuple[object, ...]:
    """What a release says, but for its digest: weights are equal to what the order of additions leaves."""
    return release.id, release.kit, release.recipe_hash, release.verdict, release.lineage, release.adapter


def test_a_node_lost_under_load_changes_nothing(shared_ray: ClusterOfNodes, calm: Path, open_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    node = shared_ray.add_node(num_cpus=4)
    path = write_fleet(tmp_path, open_kit, tiny_gemma)
    fleet = yaml.safe_load(path.read_text())
    fleet["cluster"] |= {"engines": [2, 2], "engine_cpus": 3, "worker_cpus": 1}  # a node has room for one engine
    path.write_text(yaml.safe_dump(fleet))
    raylet, runs = node.all_processes["raylet"][0].process.pid, tmp_path / "fleet" / "runs"

    def there() -> list[bytes]:
        return [*children(raylet).values()]

    def streams() -> bool:
        return any(name.startswith(b"ray::MapWorker") for name in there()) and any(runs.glob("*/shards/*.parquet"))

    try:
        drive = Drive(path).until(streams)
        lost = there()
    finally:
        shared_ray.remove_node(node, allow_graceful=False)
    accepted = [sum(row.accepted for row in rows(runs / name)) for name in ("one", "two")]
    assert not any(name.startswith((b"ray::Desk", b"ray::ReadPackSource")) for name in lost), "what coordinates is beside the driver"
    assert min(accepted) < 44, "it was lost in the stream"
    assert drive.process.wait(400) == 1, drive.log.read_text()
    the_same(tmp_path, calm)


def test_on_a_disk_that_fills_up_it_ends_and_goes_on_when_there_is_room(calm: Path, open_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder, "64m"):
        path = write_fleet(folder, open_kit, tiny_gemma)
        drive = Drive(path, tmp_path / "fleet.log").until(lambda: any((folder / "fleet" / "runs").glob("one/shards/*.parquet")))
        fill(folder)
        assert drive.process.wait(400) == 2
        said = drive.log.read_text()
        assert "There is no room for" in said and "nobody foresaw" not in said
        assert not (folder / "registry" / "releases").exists()
        (folder / BALLAST).unlink()
        assert main(fleet_command(path)) == 1
        the_same(folder, calm)


def test_on_a_store_that_refuses_one_request_in_twenty_it_comes_to_the_same(
    calm: Path, open_kit: Path, tiny_gemma: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")  # a Ray of its own, whose workers go through that door, too
    path = write_fleet(tmp_path, open_kit, tiny_gemma)
    there = {"out": f"{s3}/refusing-fleet", "registry": f"{s3}/refusing-registry"}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | there))
    with unreliable() as door:
        drive = Drive(path)
        assert drive.process.wait(400) == 1, drive.log.read_text()
        assert door.refused.total() > 20
    found = RunStore(there["out"]).read_json("fleet.json")
    assert {row["name"]: row["state"] for row in found["transfers"]} == states(calm)
    releases = [Registry(registry).releases() for registry in (there["registry"], str(calm / "registry"))]
    assert [release.id for release in releases[0]] == [release.id for release in releases[1]]
    for name in ("one", "two"):
        store = RunStore(f"{there['out']}/runs/{name}")
        assert store.candidates() == rows(calm / "fleet" / "runs" / name)
        store.fetch_folder("adapter", tmp_path / name / "adapter")
        same_weights(tmp_path / name, calm / "fleet" / "runs" / name)


def die_once(mark: str) -> int:
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(1)
    return os.getpid()


def test_a_place_that_dies_is_made_anew_for_what_comes_next(tmp_path: Path) -> None:
    with place(Resources(0.0, 0.0)) as run:
        assert len({run(die_once, str(tmp_path / str(number))) for number in range(RESTARTS + 1)}) == RESTARTS + 1  # each of them has all of the restarts
        with pytest.raises(RayActorError):
            run(os._exit, 1)
        assert run(os.getpid) != os.getpid()


def test_no_more_transfers_train_at_once_than_the_fleet_allows(open_kit: Path, tiny_gemma: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, wanted = load_fleet(str(write_fleet(tmp_path, open_kit, tiny_gemma)))
    plan = Plan(kit.load(open_kit), tiny_gemma, Recipe(), Cluster(workers=(2, 2)), "transformers", 1.0, 0.0)
    group = [Transfer(each, None, plan, Resources(1.0, 0.0)) for each in wanted]  # type: ignore[arg-type]
    busy: list[Slot] = []
    seen: list[int] = []

    def train(_full: Full, slot: Slot, *_more: object) -> None:
        assert not any(other is slot for other in busy)
        busy.append(slot)
        seen.append(len(busy))
        time.sleep(0.2)
        busy.remove(slot)

    monkeypatch.setattr(driver, "bring_to_end", train)
    monkeypatch.setattr(driver.Driver, "_conclude", lambda *_: None)
    with Display() as display:
        two = driver.Driver(fleet.model_copy(update={"trainings": 2}), wanted, RunStore(fleet.out), "transformers", display)
        with two._trainers(group) as submit:
            for transfer in group:
                submit(Full(transfer, Totals(), 0.0, 0.0))
    assert len(seen) == len(group) and max(seen) == 2
