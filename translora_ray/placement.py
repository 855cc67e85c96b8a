"""Where things run: the Ray that a command works on, what one engine and one worker take of it, and whether it has that much."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError
from ray.train.v2.api.exceptions import TrainingFailedError

from translora_ray.cluster import Cluster
from translora_ray.errors import NoRoom, RunFailed, TransLoraError, UsageError
from translora_ray.stream.plan import Plan

RESTARTS = 3
DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)
"""What Ray says of an actor whose process ended; its monitor of memory ends those that take the most."""
SLOW_START = "timed out during startup"
Run = Callable[..., Any]
"""Calls a function with its arguments in another process that has the resources for it, and waits for what it returns."""


@ray.remote(max_restarts=RESTARTS, max_task_retries=-1)  # until Ray sees that a node is lost, each try fails at once: restarts are the limit
class Place:
    """A process that stays, with its resources, and does what it is given: importing torch and its like costs seconds. What it was doing when it died is
    begun again."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, bool]:
        """What the function returns, and whether this process stands for one that died."""
        return function(*arguments), bool(ray.get_runtime_context().was_current_actor_reconstructed)


@contextlib.contextmanager
def ray_session(cluster: Cluster) -> Iterator[bool]:
    """A Ray to work on, True if it is a local one of our own, which ends with the context."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    own = address is None and not ray.is_initialized()
    if own:
        # One CPU more than there are: Ray Data must have some to read with while engines or workers hold all the real ones.
        try:
            ray.init(address="local", num_cpus=cpus() + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray's own has no class of its own
            if SLOW_START not in str(error):
                raise
            raise RunFailed("Ray did not start within the 30 seconds that it takes at most: give the same command again when less else runs here.") from None
    elif not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError):
            raise UsageError(f"There is no Ray at {address}: start it, or leave cluster.address out for a local one.") from None
    try:
        yield own
    finally:
        if own:
            ray.shutdown()


@contextlib.contextmanager
def ray_failures() -> Iterator[None]:
    """Errors of actors and workers as one sentence. Ray wraps them in its own, which keep the original, or its text."""
    try:
        yield
    except TransLoraError as error:
        raise getattr(error, "cause", error) from None  # what a task or an actor raised is of both classes, and says where
    except (RayError, TrainingFailedError, RuntimeError) as error:
        ours = re.findall(r"translora_ray\.errors\.(\w+): (.+)", str(error))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        logs = "what is committed stays; Ray's logs are in /tmp/ray/session_latest/logs"
        kind, said = ours[-1] if ours else ("", f"{type(error).__name__}: {lines[-1]} ({logs})")
        raise (NoRoom if kind == NoRoom.__name__ else RunFailed)(said) from error


def has_gpu() -> bool:
    """Whether this task or actor has been given a GPU, or a share of one: Ray hides none from those that asked for none."""
    return bool(ray.get_gpu_ids())


def cpus() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Resources:
    """What one engine or one worker takes."""

    cpus: float
    gpus: float

    def places(self, node: dict[str, float]) -> int:
        """How many of them a node has room for."""
        gpus = node.get("GPU", 0)
        rooms = [node.get("CPU", 0) / self.cpus] if self.cpus else []
        if self.gpus:  # a share of a GPU is a share of one and the same
            rooms.append(int(gpus) * int(1 / self.gpus + 1e-9) if self.gpus < 1 else gpus / self.gpus)
        return int(min(rooms, default=1 << 20) + 1e-9)


def share(resource: str, local: bool, parts: int) -> float:
    """What one of `parts` gets by default: an even share of this machine on a local Ray, else 1 CPU and no GPU."""
    if resource == "CPU":
        return max(1.0, cpus() // parts) if local else 1.0
    gpus = int(ray.cluster_resources().get("GPU", 0)) if local else 0
    return 1 / -(-parts // gpus) if gpus else 0.0


def given(wanted: float | None, default: float) -> float:
    return default if wanted is None else wanted


def of_engine(plan: Plan) -> Resources:
    """What one engine of the plan takes."""
    return Resources(plan.engine_cpus, plan.engine_gpus)


def run_once(plan: Plan) -> Run:
    """Runs each function as a task of its own, which takes what an engine does."""
    engine = of_engine(plan)
    return lambda function, *arguments: ray.get(ray.remote(function).options(num_cpus=engine.cpus, num_gpus=engine.gpus).remote(*arguments))


@contextlib.contextmanager
def place(resources: Resources) -> Iterator[Run]:
    """Runs functions in one place, which is there from the first of them to the end of the context. After one during which it died the next has a new one, so
    that each has all of the restarts."""
    actors: list[Any] = []

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        if not actors:
            actors.append(Place.options(num_cpus=resources.cpus, num_gpus=resources.gpus).remote())  # type: ignore[attr-defined]
        try:
            result, restarted = ray.get(actors[0].call.remote(function, *arguments))
        except DEATHS:
            ray.kill(actors.pop())
            raise
        if restarted:
            ray.kill(actors.pop())
        return result

    try:
        yield run
    finally:
        for actor in actors:
            ray.kill(actor)


def _either(plan: Plan, worker: Resources) -> Resources:
    return Resources(max(worker.cpus, plan.engine_cpus), max(worker.gpus, plan.engine_gpus))


def place_for_both(plan: Plan, worker: Resources) -> Resources | None:
    """What a place takes that trains as a single worker and holds an engine in turn; None where there are several workers, or no node has room for it."""
    both = _either(plan, worker)
    nodes = nodes_of(plan.cluster)
    return both if plan.cluster.workers == (1, 1) and any(both.places(node) for node in nodes) else None


def trainings_at_once(plan: Plan, worker: Resources, wanted: int) -> int:
    """How many of so many trainings, each with its gate, the nodes hold when nothing streams; where `check_resources` is content, one at least."""
    alone = place_for_both(plan, worker)
    each, workers = (alone, 1) if alone else (worker, plan.cluster.workers[0])
    return min(wanted, max(1, sum(each.places(node) for node in nodes_of(plan.cluster)) // workers))


def fit_beside(plan: Plan, worker: Resources, trainings: int) -> bool:
    """Whether the nodes hold the most engines that the stream may have and the workers of so many trainings, or their gates, at once."""
    workers = trainings * plan.cluster.workers[0]
    needs = [of_engine(plan)] * (plan.cluster.engines[1] * len(plan.pools())) + [_either(plan, worker)] * workers
    rooms = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes_of(plan.cluster)]
    next((room for room in rooms if room[0]), rooms[0])[0] -= 1  # Ray Data must have some CPU to read with
    for need in sorted(needs, key=lambda each: (each.gpus, each.cpus), reverse=True):
        room = next((room for room in rooms if room[0] >= need.cpus and room[1] >= need.gpus), None)
        if room is None:
            return False
        room[0], room[1] = room[0] - need.cpus, room[1] - need.gpus
    return True


def nodes_of(cluster: Cluster) -> list[dict[str, float]]:
    """Resources of each node that may be planned on: those to expect where the configuration names them, else those that there are.

    An autoscaler does not tell what it could add: `ray.autoscaler.v2.sdk.get_cluster_status` knows nodes and demands but no limits, and what Ray Train looks
    at (`get_max_resources_from_cluster_config`) is reported neither by KubeRay nor by the cluster launcher.
    """
    if cluster.expect:
        return [node for group in cluster.expect for node in group.each]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_resources(plan: Plan, worker: Resources) -> None:
    """Raise `UsageError` when the least that the stream or the training, or both where they overlap, ask for is more than the cluster's nodes have."""
    needs = [
        ("engines", plan.cluster.engines[0] * len(plan.pools()), of_engine(plan)),
        ("training workers", plan.cluster.workers[0], worker),
    ]
    nodes = nodes_of(plan.cluster)
    has = "can grow to" if plan.cluster.expect else "has"
    remedy = "ask for less, or add nodes." if plan.cluster.expect else "ask for less, or add nodes (cluster.expect names those that an autoscaler can add)."
    if plan.recipe.overlap:
        for name, amounts in (("CPU", [each.cpus * count for _, count, each in needs]), ("GPU", [each.gpus * count for _, count, each in needs])):
            if sum(amounts) > (there := sum(node.get(name, 0) for node in nodes)):
                wanted = f"{amounts[0]:g} and {amounts[1]:g} {name}, together more than the {there:g} that the cluster {has}"
                raise UsageError(f"Engines and training workers overlap and ask for {wanted}: ask for less, or leave overlap out.")
    for who, count, each in needs:
        for name, amount in (("CPU", each.cpus), ("GPU", each.gpus)):
            there, most = sum(node.get(name, 0) for node in nodes), max(node.get(name, 0) for node in nodes)
            if count * amount > there:
                raise UsageError(f"The {who} ask for {count * amount:g} {name}, the cluster {has} {there:g}: {remedy}")
            if amount > most:
                raise UsageError(f"One of the {who} asks for {amount:g} {name}, no node has more than {most:g}: ask for less, or add larger nodes.")
        places = sum(each.places(node) for node in nodes)
        if places < count:
            wanted = f"{each.cpus:g} CPU and {each.gpus:g} GPU each"
            raise UsageError(f"The nodes have room for {places} of the {count} {who} ({wanted} on one node): {remedy}")
