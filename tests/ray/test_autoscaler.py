"""Transfers on Ray's real autoscaler, with a head without CPUs: nodes come for the work and go after it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from tests.ray.conftest import arguments, rows
from tests.ray.growing import Growing, growing_cluster, wait
from translora_ray import kit
from translora_ray.config import Cluster, Recipe, Synthesis
from translora_ray.placement import ray_session
from translora_ray.records import pack_to_table, packs_from_table
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


def stream_slowly(address: str, kit_path: str, target: str) -> None:
    """Runs as a driver of its own: streams until three actors have computed packs, or for 300 packs; prints the number of actors."""
    pipeline.StageActor = Slow  # type: ignore[misc,assignment]
    cluster = Cluster(address=address, engines=(1, 3))
    plan = Plan(kit.load(kit_path), target, Recipe(synthesis=Synthesis(pack_size=2)), cluster, "transformers", 1.0, 0.0)
    with ray_session(cluster):
        desk = open_desk([0], 6)  # what run_stream lets through for three actors
        packs, actors = pipeline.open_stream([plan], desk), set()
        for pack in packs:
            actors.add(pack.tokens["actor"])
            if len(actors) == 3 or pack.number > 300:
                break
            ray.get(desk.arrived.remote(0, pack.number))
        packs.close()
    print("actors:", len(actors))


def test_a_pool_that_has_packs_waiting_brings_nodes_up_to_its_most_actors(growing: Growing, tiny_kit: Path, tiny_gemma: str) -> None:
    wait(lambda: not growing.raylets(), 120, "no nodes")
    code = f"from tests.ray.test_autoscaler import stream_slowly; stream_slowly({growing.address!r}, {str(tiny_kit)!r}, {tiny_gemma!r})"
    done = subprocess.run([sys.executable, "-c", code], env=growing.environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert "actors: 3\n" in done.stdout, "among what Ray says of its nodes"
    wait(lambda: not growing.raylets(), 120, "back to no nodes")


def test_nodes_come_for_a_transfer_and_all_go_after_it(growing: Growing, tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wait(lambda: not growing.raylets(), 120, "no nodes")
    settings = ("synthesis.pack_size=4", "selection.quota=80", "training.epochs=2", "cluster.engines=[2, 2]")
    driver = transfer(growing, tiny_kit, tiny_gemma, run, *settings)
    seen = [0]

    def look() -> bool:
        seen.append(len(growing.raylets()))
        return driver.poll() is not None

    wait(look, SECONDS, "the transfer")
    assert driver.returncode == 0, run.with_suffix(".log").read_text()
    wait(lambda: not growing.raylets(), 120, "back to no nodes")
    assert 2 <= max(seen) <= 3, seen
    assert sum(row.accepted for row in rows(run)) == 80
