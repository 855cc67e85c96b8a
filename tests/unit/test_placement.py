"""What the least of a run needs against what a cluster can grow to."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import lora
from translora_ray import kit
from translora_ray.cluster import Cluster, Config, Vllm
from translora_ray.errors import NoRoom, RunFailed, UsageError
from translora_ray.placement import Resources, check_resources, fit_beside, nodes_of, ray_failures, trainings_at_once
from translora_ray.reading import load_config
from translora_ray.recipe import Gate, Recipe, Synthesis
from translora_ray.storage import RunStore
from translora_ray.stream.plan import Plan
from translora_ray.workflow import Checked, _check_limits, planned


def expecting(value: str) -> Cluster:
    return load_config(None, [f"cluster.expect={value}"]).cluster


def test_groups_are_nodes_and_one_may_stand_alone() -> None:
    assert nodes_of(expecting("{CPU: 64, GPU: 8}")) == [{"CPU": 64, "GPU": 8}]
    assert nodes_of(expecting("[{nodes: 2, CPU: 8}, {CPU: 4, GPU: 1}]")) == [{"CPU": 8, "GPU": 0}] * 2 + [{"CPU": 4, "GPU": 1}]


@pytest.mark.parametrize(
    ("expected", "engine", "worker", "problem"),
    [
        ("{nodes: 2, CPU: 2, GPU: 1}", Resources(1, 1), Resources(2, 0), None),
        ("[{nodes: 2, CPU: 1}, {CPU: 1, GPU: 1}]", Resources(1, 1), Resources(1, 0), None),
        ("{nodes: 2, CPU: 1}", Resources(3, 0), Resources(1, 0), "The engines ask for 3 CPU, the cluster can grow to 2"),
        ("{nodes: 2, CPU: 1}", Resources(2, 0), Resources(1, 0), "One of the engines asks for 2 CPU, no node has more than 1"),
        ("{nodes: 2, CPU: 2}", Resources(1, 0), Resources(1, 1), "The training workers ask for 1 GPU, the cluster can grow to 0"),
        ("[{nodes: 2, CPU: 4}, {CPU: 1, GPU: 1}]", Resources(2, 1), Resources(1, 0), "The nodes have room for 0 of the 1 engines"),
    ],
)
def test_what_no_node_to_come_could_hold_is_refused(
    tiny_kit: Path, tiny_gemma: str, expected: str, engine: Resources, worker: Resources, problem: str | None
) -> None:
    plan = Plan(kit.load(tiny_kit), tiny_gemma, Recipe(), expecting(expected), "transformers", engine.cpus, engine.gpus)
    if problem is None:
        check_resources(plan, worker)
    else:
        with pytest.raises(UsageError, match=re.escape(problem)):
            check_resources(plan, worker)


@pytest.mark.parametrize(
    ("expected", "workers", "worker", "at_once"),
    [
        ("{CPU: 3}", 1, Resources(2, 0), 1),  # a machine of two cores, on which Ray counts one more
        ("{nodes: 4, CPU: 8, GPU: 1}", 1, Resources(1, 1), 4),
        ("{nodes: 2, CPU: 4}", 2, Resources(1, 0), 4),
        ("{nodes: 2, CPU: 2}", 2, Resources(2, 0), 1),
    ],
)
def test_no_more_trainings_are_begun_than_there_is_room_for(
    tiny_kit: Path, tiny_gemma: str, expected: str, workers: int, worker: Resources, at_once: int
) -> None:
    cluster = expecting(expected).model_copy(update={"workers": (workers, workers)})
    assert trainings_at_once(Plan(kit.load(tiny_kit), tiny_gemma, Recipe(), cluster, "transformers", 1, 0), worker, 9) == at_once


def test_what_reads_has_a_cpu_beside_engines_and_trainings(tiny_kit: Path, tiny_gemma: str) -> None:
    plan = Plan(kit.load(tiny_kit), tiny_gemma, Recipe(), expecting("[{CPU: 0}, {CPU: 2}]"), "transformers", 1, 0)
    assert not fit_beside(plan, Resources(1, 0), 1)
    assert fit_beside(replace(plan, cluster=expecting("[{CPU: 0}, {CPU: 3}]")), Resources(1, 0), 1)


def test_what_overlaps_needs_its_sum(tiny_kit: Path, tiny_gemma: str) -> None:
    plan = Plan(kit.load(tiny_kit), tiny_gemma, Recipe(overlap=True), expecting("{nodes: 2, CPU: 1}"), "transformers", 1, 0)
    check_resources(plan, Resources(1, 0))
    with pytest.raises(UsageError, match="together more than the 1 that the cluster can grow to"):
        check_resources(replace(plan, cluster=expecting("{CPU: 1}")), Resources(1, 0))


@pytest.mark.parametrize("gpus", [0.5, 1.0])
def test_several_workers_are_not_put_on_one_gpu(tiny_kit: Path, tiny_gemma: str, tmp_path: Path, gpus: float) -> None:
    config = Config(cluster=Cluster(workers=(1, 2), worker_gpus=gpus))
    checked = Checked(kit.load(tiny_kit), tiny_gemma, config, "transformers", RunStore(str(tmp_path / "run")), {"target": ""})
    if gpus == 1.0:
        assert planned(checked, local=False)[1] == Resources(1.0, 1.0)
    else:
        with pytest.raises(UsageError, match="Several training workers can not share a GPU"):
            planned(checked, local=False)


@pytest.mark.parametrize(
    ("config", "target", "problem"),
    [
        (Config(), 512, None),
        (Config(), 513, "The target's adapter has rank 513, and vLLM is to take 512 at most: take a lower one, or use --engine transformers"),
        (Config(recipe=Recipe(gate=Gate(held_out=0))), 513, None),
        (Config(cluster=Cluster(vllm=Vllm(rank=8))), 4, "The discriminator's adapter has rank 16, and vLLM is to take 8 at most: raise cluster.vllm.rank"),
        (Config(recipe=Recipe(synthesis=Synthesis(temperature=2.5))), 4, "synthesis.temperature is 2.5, and vLLM takes 2 at most: lower it"),
    ],
)
def test_what_vllm_would_refuse_later_is_refused_before_anything_is_made(
    tiny_kit: Path, tiny_gemma: str, config: Config, target: int, problem: str | None
) -> None:
    plan = Plan(kit.load(tiny_kit), tiny_gemma, config.recipe, config.cluster, "vllm", 1.0, 0.0)
    with pytest.raises(UsageError, match=re.escape(problem)) if problem else contextlib.nullcontext():
        _check_limits(plan, lora(target))


def test_a_full_disk_is_one_whatever_it_came_through() -> None:
    with pytest.raises(NoRoom, match=r"^There is no room for x: make some\.$"), ray_failures():
        raise RuntimeError("Training failed:\nTraceback\ntranslora_ray.errors.NoRoom: There is no room for x: make some.\n")
    with pytest.raises(RunFailed, match=r"^It died\.$"), ray_failures():
        raise RuntimeError("translora_ray.errors.EngineDied: It died.")


def test_what_a_task_raised_is_said_without_where() -> None:
    from ray.exceptions import RayTaskError

    raised = RayTaskError("call", "Traceback: many lines\nof it", UsageError("There is no room.")).as_instanceof_cause()
    assert "\n" in str(raised)
    with pytest.raises(UsageError, match=r"^There is no room\.$"), ray_failures():
        raise raised
