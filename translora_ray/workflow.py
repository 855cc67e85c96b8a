"""A transfer from beginning to end: checks, stream, training, manifest. Every phase looks at what is committed and does the rest."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray

from translora_ray import adapters, adapting, identity, kit, models
from translora_ray.background import beside
from translora_ray.cluster import Config
from translora_ray.config import Adapter, EngineKind
from translora_ray.engines.select import choose_engine, engine_for, require_limits
from translora_ray.errors import RunFailed, UsageError, first_line
from translora_ray.evaluation import gate, page
from translora_ray.finishing import finish
from translora_ray.gating import examples
from translora_ray.measures import TRAINING, PhaseMeasures
from translora_ray.placement import Resources, Run, check_resources, given, ray_failures, ray_session, share
from translora_ray.progress import Display
from translora_ray.reading import differing_field
from translora_ray.recipe import Recipe
from translora_ray.storage import ADAPTER, IDENTITY, MANIFEST, RELEASE, REPORT, RESULT, TRAIN, RunStore
from translora_ray.stream import teach
from translora_ray.stream.collect import Totals
from translora_ray.stream.pipeline import run_stream
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import open_desk
from translora_ray.token_weights import require_offsets
from translora_ray.training.again import as_long_as_it_moves
from translora_ray.training.alone import fit_alone
from translora_ray.training.trainer import Job, Result, fit_on_ray_train, train_target

ENOUGH_ANSWERS = 20
Phases = tuple[Totals, dict[str, Any], float]
"""Counts of the stream, facts of the training, seconds of the stream."""


def transfer(kit_path: str, target: str, out: str, config: Config, engine: EngineKind, display: Display) -> dict[str, Any]:
    """Move the kit's adapter to `target`; the finished PEFT directory is `out`/adapter. Returns the manifest.

    Run again with the same arguments it goes on from what is committed, or returns at once where all is.
    """
    began = time.monotonic()
    checked = check(kit_path, target, out, config, engine, display)
    store = checked.store
    if checked.finished:
        display.say(f"{out} is finished already.")
        return checked.manifest()
    with ray_session(config.cluster) as local:
        plan, worker = planned(checked, local)
        check_resources(plan, worker)
        with store.lock(), ray_failures():
            begin(checked)  # another process may have begun here meanwhile
            totals, training, streamed = (_overlapped if config.recipe.overlap else _in_turn)(plan, store, worker, display)
            return finish(plan, store, checked.identity, totals, training, {"stream": streamed, "began": began}, display)


@dataclass(frozen=True)
class Checked:
    """A transfer whose parts are there and fit together."""

    kit: kit.Kit
    target: str
    config: Config
    engine: EngineKind
    store: RunStore
    identity: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """What the stream has to do, wherever its engines find room."""
        return Plan(self.kit, self.target, self.config.recipe, self.config.cluster, self.engine, 1.0, 0.0, self.identity["target"])

    @property
    def finished(self) -> bool:
        return self.store.exists(MANIFEST) and self.store.exists(f"{ADAPTER}/{adapters.CONFIG}")

    def manifest(self) -> dict[str, Any]:
        """That of the finished run, whose last steps are made up for where they were cut off."""
        self.store.remove(TRAIN)
        manifest = self.store.read_json(MANIFEST)
        if not self.store.exists(REPORT):
            page.write(self.store, manifest, self.kit.seeds)
        return manifest


def check(kit_path: str, target: str, out: str, config: Config, engine: EngineKind, display: Display) -> Checked:
    """Raise `UsageError` where kit, target, recipe and run directory do not go together. Nothing is written; what is finished is not looked at again."""
    loaded = kit.load(kit_path)
    engine = choose_engine(engine)
    engine_for(engine, [loaded.adapter], display.say)
    store = RunStore(out)
    store.check_writable()
    recipe = identity.as_begun(config.recipe, store, loaded).decided(loaded.task.classes, loaded.rows, loaded.discriminator, loaded.copies)
    config = config.model_copy(update={"recipe": recipe})
    checked = Checked(loaded, target, config, engine, store, identity.of(loaded, target, config.recipe))
    identity.check(checked.store, checked.kit, checked.identity)
    if checked.finished:
        return checked
    _require_sound(kit_path)
    models.require_bits(config.recipe.training.base_bits)
    if config.recipe.training.base_bits and config.cluster.spread_base:
        raise UsageError("A base in few bits can not be spread over workers: leave training.base_bits or cluster.spread_base out.")
    _check_models(loaded, target, config.recipe)
    checked.plan.check()
    adapter = _target_adapter(loaded, target, config.recipe)
    _check_limits(checked.plan, adapter)
    display.say(f"target adapter: {adapters.title(adapter)}")
    if adapter.type not in adapters.SERVED_BY_VLLM:
        display.say("vLLM can not serve an adapter of this type; transformers and peft do.")
    return checked


def _require_sound(kit_path: str) -> None:
    """Raise `UsageError` for a finished run that was refused, or a release of it: what it has learnt wrong no gate could find in the next adapter."""
    store = RunStore(kit_path)
    if store.exists(RELEASE):
        store = RunStore(store.read_json(RELEASE).get("run") or kit_path)
    if store.exists(MANIFEST):
        found = [store.read_json(MANIFEST).get("gate"), store.read_json(RESULT).get("gate") if store.exists(RESULT) else None]
        if why := [reason for each in found if each and each["verdict"] == gate.REFUSE for reason in each["reasons"]]:
            raise UsageError(f"{kit_path} was refused ({'; '.join(why)}), so nothing moves on from it: transfer again with another recipe or kit.")


def planned(checked: Checked, local: bool) -> tuple[Plan, Resources]:
    """What the stream has to do, and what a training worker takes."""
    cluster, overlap = checked.config.cluster, checked.config.recipe.overlap
    plan = _placed(checked.plan, local)
    parts = cluster.workers[1] + (_engines(plan) if overlap else 0)
    worker = Resources(cluster.worker_cpus or share("CPU", local, parts), given(cluster.worker_gpus, share("GPU", local, parts)))
    if cluster.workers[1] > 1 and 0 < worker.gpus < 1:
        raise UsageError("Several training workers can not share a GPU: set cluster.workers to no more than there are GPUs, and cluster.worker_gpus to 1.")
    return plan, worker


def begin(checked: Checked) -> None:
    """Write down what the run is. A training that was begun in another way is forgotten."""
    stored = identity.check(checked.store, checked.kit, checked.identity)
    if stored and differing_field(stored["recipe"]["training"], checked.identity["recipe"]["training"]):
        checked.store.remove(TRAIN)
    checked.store.write_json(IDENTITY, checked.identity)


def _check_models(loaded: kit.Kit, target: str, recipe: Recipe) -> None:
    for base, fingerprint in loaded.bases.items():
        models.require_same(base, fingerprint, "the kit was prepared on")
        if obstacle := models.pair_obstacle(models.describe(base), models.describe(target), loaded.task.format):
            raise UsageError(obstacle)
    adapting.inspect_for(loaded.adapter.path, loaded.teacher_base)
    for base in (loaded.teacher_base, target) if recipe.training.token_weights else ():
        require_offsets(models.load_tokenizer(base))


def _target_adapter(loaded: kit.Kit, target: str, recipe: Recipe) -> Adapter:
    adapter = adapters.inherit(adapters.inspect(loaded.adapter.path), recipe.adapter, models.linear_shapes(target))
    adapting.require_family(adapter, models.family(target))
    return adapter


def _check_limits(plan: Plan, target: Adapter) -> None:
    """Raise `UsageError` for what vLLM would refuse in the stream, or at the gate when all is trained."""
    pools, recipe = [pool for pool in plan.pools() if pool.engine == "vllm"], plan.recipe
    ranks = {adapter.name: adapters.inspect(adapter.path).rank for pool in pools for adapter in plan.adapters(pool)}
    if plan.engine == "vllm" and recipe.gate.held_out and target.type in adapters.SERVED_BY_VLLM:
        ranks["target"] = target.rank or 0
    temperatures = {f"synthesis.{key}": getattr(recipe.synthesis, key) or 0.0 for key in ("temperature", "high_temperature") if pools}
    if recipe.selection.votes > 1 and any(teach.ROLE in pool.roles for pool in pools):
        temperatures["selection.vote_temperature"] = recipe.selection.vote_temperature
    require_limits(ranks, temperatures, plan.cluster.vllm)


def _placed(plan: Plan, local: bool) -> Plan:
    """The plan with what one of its engines takes here."""
    cluster, engine = plan.cluster, plan.engine
    parts = _engines(plan) + (cluster.workers[1] if plan.recipe.overlap else 0)
    gpus, spread = cluster.engine_gpus, cluster.vllm.tensor_parallel_size
    if engine == "vllm" and spread > 1 and gpus is None:
        gpus = spread
    if engine == "vllm" and spread > 1 and gpus != spread:
        raise UsageError(f"cluster.vllm.tensor_parallel_size is {spread} and cluster.engine_gpus {gpus:g}: leave the latter out, or make them equal.")
    return replace(
        plan,
        engine_cpus=cluster.engine_cpus or share("CPU", local, parts),
        engine_gpus=given(gpus, share("GPU", local, parts)),
    )


def _engines(plan: Plan) -> int:
    """The least engines of all pools."""
    return len(plan.pools()) * plan.cluster.engines[0]


def _in_turn(plan: Plan, store: RunStore, worker: Resources, display: Display) -> Phases:
    """Stream, then train."""
    began = time.monotonic()
    (totals,) = run_stream([plan], [store], display)
    streamed = time.monotonic() - began
    check_answers(plan, store)
    return totals, train(plan, store, worker, open_desk(), display), streamed


def _overlapped(plan: Plan, store: RunStore, worker: Resources, display: Display) -> Phases:
    """Stream, while a thread trains on what is committed."""
    began = time.monotonic()
    steps, failed = open_desk(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, plan, store, worker, steps, display)
        training.add_done_callback(lambda done: failed.set() if done.exception() else None)
        try:
            (totals,) = run_stream([plan], [store], display, stop=failed)
            streamed = time.monotonic() - began
            check_answers(plan, store)
            return totals, training.result(), streamed
        except BaseException as failure:
            if failed.is_set():
                training.result()  # raises what ended the stream, too: hours of it would be for nothing
            ray.get(steps.end.remote(f"The stream ended: {first_line(failure)}"))
            raise


def train(plan: Plan, store: RunStore, worker: Resources, steps: Any, display: Display, run: Run | None = None) -> dict[str, Any]:
    """Train unless it is done, on Ray Train, or by a single worker through `run`; shows steps as they come in from the worker."""
    if store.exists(f"{TRAIN}.json") and store.exists(f"{ADAPTER}/{adapters.CONFIG}"):
        return store.read_json(f"{TRAIN}.json")
    adapter = _target_adapter(plan.kit, plan.target, plan.recipe)
    rows = (store, plan.quota) if plan.recipe.overlap else frozenset(candidate.index for candidate in examples(plan, store)[0])
    job = Job(plan.kit.task, plan.target, adapter, plan.recipe.training, plan.recipe.seed, plan.cluster, steps, rows, plan.target_fingerprint)

    def fit(trial: Job, name: str) -> Result:
        return fit_alone(trial, name, store, run) if run else fit_on_ray_train(trial, name, store, worker.cpus, worker.gpus)

    with _watching(steps, display, plan.cluster.start_timeout_s):
        facts = train_target(job, store, lambda trial, name: as_long_as_it_moves(fit, trial, name, store, lambda: ray.get(steps.why_ended.remote())))
    if facts["rows_at_once"] < min(plan.cluster.rows_at_once or job.training.batch_size, job.training.batch_size):
        display.say(f"Memory held {facts['rows_at_once']} rows of training at once: set cluster.rows_at_once to that, and no time goes into more.")
    PhaseMeasures().spent(TRAINING, facts["seconds"], facts["tokens"])
    facts["adapter"] = adapter.model_dump()
    store.write_json(f"{TRAIN}.json", facts)
    return facts


def check_answers(plan: Plan, store: RunStore) -> None:
    """Raise `RunFailed` where all examples have one answer and the seeds have several: nothing else could be learnt from them."""
    given = [candidate.target for candidate in examples(plan, store)[0]]
    if len(given) >= ENOUGH_ANSWERS and len(set(given)) == 1 and len({seed.target for seed in plan.kit.seeds}) > 1:
        raise RunFailed(f"The teacher gave each of the {len(given)} examples the same answer, {given[0]!r}: prepare the kit with more seeds or rows.")


@contextlib.contextmanager
def _watching(steps: Any, display: Display, patience: int) -> Iterator[None]:
    """Shows steps as they come, and says so where none does for `patience` seconds."""
    phase = display.phase("training")

    def watch(done: threading.Event) -> None:
        shown, since = None, time.monotonic()
        while not done.wait(1.0):
            step = ray.get(steps.latest_step.remote())
            if step and step != shown:
                phase.step(step)
                shown, since = step, time.monotonic()
            elif time.monotonic() - since > patience:
                display.say(f"No step of training for {patience} s: it waits for workers (`ray status` tells what is missing), or for rows of its stream.")
                since = time.monotonic()

    phase.update(0, 1, "starting workers")
    with beside(watch):
        yield
