"""Transfers on Ray's real autoscaler, with a head without CPUs: nodes come for the work, go after it, and are lost in the middle of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import yaml

from tests.ray.conftest import arguments, has_checkpoint, same_weights
from tests.ray.growing import Growing, growing_cluster, wait
from tests.ray.test_fleet import RECIPE
from translora_ray import kit
from translora_ray.cluster import Cluster
from translora_ray.placement import Resources, place, ray_session
from translora_ray.recipe import Recipe, Synthesis
from translora_ray.records import Pack, pack_to_table, packs_from_table
from translora_ray.registry import Registry
from translora_ray.stream import pipeline
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import open_desk

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SECONDS = 900
"""Longest wait for a transfer; on an idle machine of two cores it takes one to two minutes."""


@pytest.fixture(scope="module")
def growing() -> Iterator[Growing]:
    """Up to three nodes of one CPU."""
    folder = Path(tempfile.mkdtemp(prefix="tl", dir="/tmp"))  # short, as it becomes part of the names of sockets
    with growing_cluster(folder, nodes=3, cpus=1) as cluster:
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)


def transfer(growing: Growing, kit: Path, target: str, run: Path, *more: str) -> subprocess.Popen[bytes]:
    """A transfer that knows what the cluster can grow to, with its output beside its run."""
    settings = (f"cluster.address={growing.address}", "cluster.expect={nodes: 3, CPU: 1}", *more)
    command = [sys.executable, "-m", "translora_ray.cli", *arguments(kit, target, run, *settings)]
    with run.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=growing.environment, stdout=log, stderr=log)


def test_a_cluster_without_nodes_is_refused_unless_told_what_it_can_grow_to(growing: Growing, tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    wait(lambda: not growing.raylets(), 120, "no nodes")
    command = arguments(tiny_kit, tiny_gemma, tmp_path / "run", f"cluster.address={growing.address}")
    refused = subprocess.run(
        [sys.executable, "-m", "translora_ray.cli", *command], env=growing.environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert refused.returncode == 2
    assert "The engines ask for 1 CPU, the cluster has 0" in refused.stderr and "cluster.expect" in refused.stderr
    assert not (tmp_path / "run").exists()


class Slow:
    """A stage actor without an engine: a pack takes a second, and is told who computed it."""

    def __init__(self, _plans: list[Plan], _pool: Any, _desk: Any) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(1)
        (pack,) = packs_from_table(table)
        pack.tokens = {"actor": os.getpid()}
        return pack_to_table(pack)


class Heavy(Slow):
    """One whose packs are too large to travel with the message that they are there: they wait in the object store of its node, named by its raylet."""

    def __call__(self, table: pa.Table) -> pa.Table:
        (pack,) = packs_from_table(table)
        pack.candidates[0].input = "x" * 1_000_000
        pack.tokens = {"raylet": os.getppid(), "actor": os.getpid()}
        return pack_to_table(pack)


@contextlib.contextmanager
def streaming(actor: type[Slow], most: int, address: str, kit_path: str, target: str) -> Iterator[tuple[Any, Generator[Pack]]]:
    """(desk, packs) of a stream by one to `most` actors of that kind, in a driver of its own."""
    pipeline.StageActor = actor  # type: ignore[misc,assignment]
    cluster = Cluster(address=address, engines=(1, most))
    plan = Plan(kit.load(kit_path), target, Recipe(synthesis=Synthesis(pack_size=2)), cluster, "transformers", 1.0, 0.0)
    with ray_session(cluster):
        desk = open_desk([0], 2 * most)  # what run_stream lets through for so many actors
        packs = pipeline.open_stream([plan], desk)
        yield desk, packs
        packs.close()


def stream_from_a_node_that_is_lost(address: str, kit_path: str, target: str) -> None:
    """Runs as a driver of its own: loses the node of an actor while packs wait there that were not fetched; prints the numbers of those that came."""
    numbers = []
    with streaming(Heavy, 1, address, kit_path, target) as (desk, packs):
        for pack in packs:
            numbers.append(pack.number)
            ray.get(desk.arrived.remote(0, pack.number))
            if len(numbers) == 2:
                time.sleep(5)  # both are computed
                kill(pack.tokens["raylet"], pack.tokens["actor"])
            if len(numbers) == 8:
                break
    print("packs:", sorted(numbers))


def kill(*processes: int) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


def lose_own_node_once(mark: str) -> str:
    if not Path(mark).exists():
        Path(mark).touch()
        kill(os.getppid(), os.getpid())
    return "done"


def call_on_a_node_that_is_lost(address: str, kit_path: str, _target: str) -> None:
    """Runs as a driver of its own: what trains in a fleet, and holds the gate's engine, is on a node that is lost."""
    with ray_session(Cluster(address=address)), place(Resources(1.0, 0.0)) as run:
        print("call:", run(lose_own_node_once, f"{kit_path}.mark"))


def stream_slowly(address: str, kit_path: str, target: str) -> None:
    """Runs as a driver of its own: streams until three actors have computed packs, or for 300 packs; prints the number of actors."""
    actors = set()
    with streaming(Slow, 3, address, kit_path, target) as (desk, packs):
        for pack in packs:
            actors.add(pack.tokens["actor"])
            if len(actors) == 3 or pack.number > 300:
                break
            ray.get(desk.arrived.remote(0, pack.number))
    print("actors:", len(actors))


def drive(driver: Callable[[str, str, str], None], growing: Growing, kit: Path, target: str) -> subprocess.CompletedProcess[str]:
    """Run a function of this file as a driver of its own."""
    code = f"from {__name__} import {driver.__name__} as driver; driver({growing.address!r}, {str(kit)!r}, {target!r})"
    return subprocess.run([sys.executable, "-c", code], env=growing.environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_a_pool_that_has_packs_waiting_brings_nodes_up_to_its_most_actors(growing: Growing, tiny_kit: Path, tiny_gemma: str) -> None:
    wait(lambda: not growing.raylets(), 120, "no nodes")
    done = drive(stream_slowly, growing, tiny_kit, tiny_gemma)
    assert done.returncode == 0, done.stderr
    assert "actors: 3\n" in done.stdout, "among what Ray says of its nodes"
    wait(lambda: not growing.raylets(), 120, "back to no nodes")


def test_nodes_come_for_a_fleet_one_is_lost_in_a_training_and_all_go_after_it(growing: Growing, open_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    wait(lambda: not growing.raylets(), 120, "no nodes")
    kits = [{"kit": str(open_kit), "name": name, "recipe": {"seed": seed}} for seed, name in enumerate(("one", "two"))]
    cluster = {"address": growing.address, "expect": {"nodes": 3, "CPU": 1}, "engines": [2, 2], "commit_seconds": 0, "checkpoint_seconds": 0}
    fleet = {"out": "fleet", "kits": kits, "target": tiny_gemma, "recipe": RECIPE, "registry": "registry", "cluster": cluster}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    command = [sys.executable, "-m", "translora_ray.cli", "fleet", str(tmp_path / "fleet.yaml"), "--engine", "transformers"]
    with (tmp_path / "fleet.log").open("wb") as log:
        driver = subprocess.Popen(command, env=growing.environment, stdout=log, stderr=log)
    nodes = []

    def look(ready: Callable[[], bool]) -> bool:
        nodes.append(len(growing.raylets()))
        return driver.poll() is not None or ready()

    wait(lambda: look(lambda: any(tmp_path.glob("fleet/runs/*/train/**/state.pt"))), SECONDS, "a checkpoint", 0.1)
    assert any(name.startswith(b"ray::Place") for name in growing.lose(b"ray::Place"))
    wait(lambda: look(lambda: False), SECONDS, "the fleet")
    assert driver.returncode == 0, (tmp_path / "fleet.log").read_text()
    assert 2 <= max(nodes) <= 3, nodes
    assert {release.id for release in Registry(str(tmp_path / "registry")).releases()} == {"one@1", "two@1"}
    (loads,) = json.loads((tmp_path / "fleet" / "fleet.json").read_text())["engine_loads"].values()
    assert len(loads) == 2, "an engine on each of two nodes, for both transfers"
    wait(lambda: not growing.raylets(), 120, "back to no nodes")


@pytest.mark.parametrize(
    ("driver", "wanted"), [(stream_from_a_node_that_is_lost, "packs: [0, 1, 2, 3, 4, 5, 6, 7]"), (call_on_a_node_that_is_lost, "call: done")]
)
def test_what_was_on_a_node_that_is_lost_is_computed_again(
    driver: Callable[[str, str, str], None], wanted: str, growing: Growing, tiny_kit: Path, tiny_gemma: str
) -> None:
    done = drive(driver, growing, tiny_kit, tiny_gemma)
    assert done.returncode == 0, done.stderr
    assert f"{wanted}\n" in done.stdout


def test_a_node_is_lost_in_training_which_goes_on_from_its_checkpoint(growing: Growing, calm: Path, tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(calm / "shards", run / "shards")  # the same rows, trained again
    shutil.copy(calm / "run.json", run)
    driver = transfer(growing, tiny_kit, tiny_gemma, run, "cluster.workers=[1, 2]")  # with two of them, or with one while there is no other node
    wait(lambda: driver.poll() is not None or has_checkpoint(run), SECONDS, "a checkpoint", 0.02)
    lost = growing.lose(b"ray::RayTrainWorker")
    assert not any(b"Controller" in name for name in lost), "what coordinates is beside the driver"
    wait(lambda: driver.poll() is not None, SECONDS, "the transfer")
    assert driver.returncode == 0, run.with_suffix(".log").read_text()
    ours, theirs = (json.loads((place / "manifest.json").read_text())["training"] for place in (run, calm))
    (first, again) = ours["started_at_steps"]
    assert first == 0 < again
    assert ours["tokens"] == theirs["tokens"]  # no row twice, none left out
    assert ours["epoch_losses"] == pytest.approx(theirs["epoch_losses"], rel=1e-3)
    same_weights(run, calm)
