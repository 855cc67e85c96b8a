"""What the least of a run needs against what a cluster can grow to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from translora_ray import kit
from translora_ray.config import Cluster, Recipe
from translora_ray.errors import UsageError
from translora_ray.placement import Resources, check_resources, nodes_of, ray_failures
from translora_ray.reading import load_config
from translora_ray.stream.plan import Plan


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


def test_what_overlaps_needs_its_sum(tiny_kit: Path, tiny_gemma: str) -> None:
    plan = Plan(kit.load(tiny_kit), tiny_gemma, Recipe(overlap=True), expecting("{nodes: 2, CPU: 1}"), "transformers", 1, 0)
    check_resources(plan, Resources(1, 0))
    with pytest.raises(UsageError, match="together more than the 1 that the cluster can grow to"):
        check_resources(replace(plan, cluster=expecting("{CPU: 1}")), Resources(1, 0))


def test_what_a_task_raised_is_said_without_where() -> None:
    from ray.exceptions import RayTaskError

    raised = RayTaskError("call", "Traceback: many lines\nof it", UsageError("There is no room.")).as_instanceof_cause()
    assert "\n" in str(raised)
    with pytest.raises(UsageError, match=r"^There is no room\.$"), ray_failures():
        raise raised
