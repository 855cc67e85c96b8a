"""The stream on Ray Data: source -> generators -> source-model actors -> collector. The stages themselves know nothing of Ray."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from translora_ray import adapters
from translora_ray.config import GeneratorKind, Synthesis
from translora_ray.engines.base import Engine
from translora_ray.engines.select import open_engine
from translora_ray.errors import EngineDied, RunFailed, Stopped, TransLoraError, reason
from translora_ray.measures import StreamMeasures
from translora_ray.models import context_of, linear_shapes, load_tokenizer, skeleton
from translora_ray.progress import Display, Phase
from translora_ray.prompts import Prompt, answer_ids, prompt_ids
from translora_ray.records import Pack, pack_to_table, packs_from_table
from translora_ray.storage import RunStore
from translora_ray.stream import discriminate, synthesize, teach
from translora_ray.stream.collect import Collector, Totals
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.plan import Plan, Pool
from translora_ray.stream.requests import PackSource, beside_driver, open_desk
from translora_ray.token_weights import answer_spans

ENGINE_DEATHS = 3
"""So many a pack survives before it ends its transfer; so many of its own an actor survives before it ends the stream."""
Ended = Callable[[int, Totals | TransLoraError], None]
"""Is told of a transfer, by its place in the stream, as it ends: its totals, or why it can not go on."""


class Stage(Protocol):
    def process(self, pack: Pack) -> Pack: ...


class StageActor:
    """What Ray Data keeps in an actor: one engine, and each transfer's stages, which use it. Called from as many threads as packs go at once."""

    def __init__(self, plans: Sequence[Plan], pool: Pool, desk: Any) -> None:
        self.asked, self.plans, self.pool, self.desk = plans, [_here(plan) for plan in plans], pool, desk
        self._replacing, self._again = threading.Lock(), threading.Lock()
        self._open()

    def _open(self) -> None:
        pool, first = self.pool, self.asked[0]
        used = {adapter.path: adapter for plan in self.plans if isinstance(plan, Plan) for adapter in plan.adapters(pool)}
        self.engine = open_engine(pool.engine, pool.base, list(used.values()), first.cluster.vllm, first.engine_gpus)
        self.stages = [self._stages(plan) for plan in self.plans]
        ray.get(self.desk.loaded.remote(pool.base))

    def _stages(self, plan: Plan | Exception) -> list[Stage] | Exception:
        if isinstance(plan, Exception):
            return plan
        try:
            return [stage for role in self.pool.roles for stage in STAGES[role](plan, self.pool, self.engine)]
        except EngineDied:
            raise
        except Exception as failure:
            return failure

    def __call__(self, table: pa.Table) -> pa.Table:
        """An engine that dies is replaced. Of the packs that were on it, any of which may have brought it down, one goes on at a time."""
        for deaths in itertools.count(1):
            (pack,) = packs_from_table(table)
            with self._again if deaths > 1 else nullcontext():
                stages = self.stages
                try:
                    return pack_to_table(_through(stages[pack.transfer], pack))
                except EngineDied as death:
                    self._replace(stages)
                    if deaths > ENGINE_DEATHS:
                        pack.failure = str(death)
                        return pack_to_table(pack)
        raise AssertionError

    def _replace(self, dead: list[list[Stage] | Exception]) -> None:
        """A new engine in place of the one behind the stages `dead`, unless another thread brought one already. What ended the old one may end its
        successor, too, or keep it from starting, for a while."""
        with self._replacing:
            for tries in range(1, ENGINE_DEATHS + 1):
                if self.stages is not dead:
                    return
                self.engine.close()
                try:
                    self._open()
                except TransLoraError:
                    if tries == ENGINE_DEATHS:
                        raise


def _here(plan: Plan) -> Plan | Exception:
    """The plan with its kit on this machine, or why that can not be had: the other transfers go on."""
    try:
        return replace(plan, kit=plan.kit.here())
    except Exception as failure:
        return failure


class Turns:
    """Generators that take turns by the number of the pack. The packs of those that are on another engine pass."""

    def __init__(self, synthesis: Synthesis, stages: Mapping[GeneratorKind, Sequence[Stage]]) -> None:
        self.synthesis, self.stages = synthesis, stages

    def process(self, pack: Pack) -> Pack:
        for stage in self.stages.get(self.synthesis.writer(pack.number), ()):
            pack = stage.process(pack)
        return pack


def _through(stages: list[Stage] | Exception, pack: Pack) -> Pack:
    """The pack after the stages; with the reason where one of its transfer's own parts can not work, which must not stop the other transfers."""
    if pack.failure:
        return pack
    try:
        if isinstance(stages, Exception):
            raise stages
        for stage in stages:
            pack = stage.process(pack)
    except EngineDied:
        raise
    except Exception as failure:
        if not isinstance(failure, TransLoraError):
            traceback.print_exception(failure)  # into Ray's logs: nobody foresaw it
        pack.failure = reason(failure)
    return pack


def _writing(plan: Plan, pool: Pool, engine: Engine) -> list[Stage]:
    kit, selection = plan.kit, plan.recipe.selection

    copies = SeedFilter(kit.seed_inputs, selection.near_duplicate, selection.seed_overlap)

    def writer(generator: GeneratorKind) -> synthesize.Synthesizer:
        settings = plan.synthesis(generator)
        if generator == "adapter":
            return synthesize.LearntSynthesizer(engine, settings, kit.seeds, kit.task, kit.generator_adapter)
        return synthesize.Synthesizer(engine, settings, kit.seeds, kit.task.classes)

    here = [generator for generator in plan.recipe.synthesis.generator if plan.writes(generator, pool.base)]
    return [Turns(plan.recipe.synthesis, {generator: [writer(generator), copies] for generator in here})]


def _judging(plan: Plan, _pool: Pool, engine: Engine) -> list[Stage]:
    kit = plan.kit
    return [discriminate.Discriminator(engine, kit.task.name, kit.discriminator_adapter, plan.threshold)]


def _teaching(plan: Plan, _pool: Pool, engine: Engine) -> list[Stage]:
    kit = plan.kit
    wanted = adapters.inherit(adapters.inspect(kit.adapter.path), plan.recipe.adapter, linear_shapes(plan.target))
    tokenizer, context = load_tokenizer(plan.target), context_of(skeleton(plan.target)) - (wanted.virtual_tokens or 0)

    def learnable(prompt: Prompt, answer: str) -> bool:
        return len(prompt_ids(tokenizer, prompt)) + len(answer_ids(tokenizer, prompt, answer)) <= context

    spans = partial(answer_spans, load_tokenizer(kit.teacher_base)) if plan.recipe.training.token_weights else None
    return [teach.Teacher(engine, kit.task, kit.adapter, learnable, plan.selection, plan.by_excess, spans)]


STAGES: dict[str, Callable[[Plan, Pool, Engine], list[Stage]]] = {synthesize.ROLE: _writing, discriminate.ROLE: _judging, teach.ROLE: _teaching}


def _raise(_transfer: int, outcome: Totals | TransLoraError) -> None:
    if isinstance(outcome, TransLoraError):
        raise outcome


def run_stream(
    plans: Sequence[Plan],
    stores: Sequence[RunStore],
    display: Display,
    ended: Ended = _raise,
    stop: threading.Event | None = None,
    shares: Sequence[float] = (),
) -> list[Totals]:
    """Stream until the quota of every transfer is full and committed; returns their totals. Goes on from the shards that are there.

    The transfers share engines, in proportion to `shares`, so their plans must agree in engine, bases and cluster (`Plan.pools`). Where `ended` does not
    raise, the others go on after a transfer that can not. After `stop` what is under way is still computed and committed, then `Stopped` is raised.
    """
    running, totals = _collectors(plans, stores, ended)
    if not running:
        return totals
    phases = [display.phase("examples" if len(plans) == 1 else f"examples, {store.uri.rpartition('/')[2]}") for store in stores]
    for phase, plan, total in zip(phases, plans, totals, strict=True):
        phase.update(total.accepted, plan.wanted, "loading engines")
    cap = sum((plans[0].packs_at_once(pool) + 1) * plans[0].cluster.engines[1] for pool in plans[0].pools())
    desk = open_desk([each.packs for each in totals], cap, shares)
    ray.get(desk.full.remote(*{*range(len(plans))} - running.keys()))
    measures = StreamMeasures(totals)
    began = time.monotonic()
    tokens = 0
    packs = open_stream(plans, desk)
    try:
        for pack in packs:
            tokens += sum(pack.tokens.values())
            transfer = pack.transfer
            if collector := running.get(transfer):  # else it was under way when the transfer ended
                outcome = _take(collector, pack, ray.get(desk.all_loads.remote()))
                measures.committed(transfer, collector.totals)
                _show(phases[transfer], collector, tokens / (time.monotonic() - began))
                if outcome:
                    del running[transfer]  # and its prompts
                    ray.get(desk.full.remote(transfer))
                    ended(transfer, outcome)
            if not running:
                break  # what is under way is not needed
            if stop and stop.is_set():
                ray.get(desk.full.remote(*running))
            ray.get(desk.arrived.remote(transfer, pack.number))
        for transfer, collector in list(running.items()):  # there are some after a stop alone
            if failure := _written(collector, partial(collector.commit, ray.get(desk.all_loads.remote()))):
                del running[transfer]
                ended(transfer, failure)
            measures.committed(transfer, collector.totals)
    finally:
        packs.close()
        ray.kill(desk)
    if running:
        raise Stopped("Stopped: what was under way is committed, and the same command goes on from there.")
    return totals


def _collectors(plans: Sequence[Plan], stores: Sequence[RunStore], ended: Ended) -> tuple[dict[int, Collector], list[Totals]]:
    """The collectors of the transfers that have something to do, by their places, and the totals of all of them."""
    running, totals = {}, []
    for transfer, (plan, store) in enumerate(zip(plans, stores, strict=True)):
        try:
            collector = Collector(plan, store)
        except Exception as failure:
            totals.append(Totals())
            ended(transfer, failure if isinstance(failure, TransLoraError) else RunFailed(f"{store.uri} can not be read: {reason(failure)}"))
            continue
        totals.append(collector.totals)
        if collector.full:
            ended(transfer, collector.totals)
        else:
            running[transfer] = collector
    return running, totals


def _take(collector: Collector, pack: Pack, loads: list[str]) -> Totals | TransLoraError | None:
    """Give the pack to its collector; how its transfer ended, if it did."""
    if pack.failure:
        return RunFailed(pack.failure)
    return _written(collector, partial(collector.take, pack, loads)) or (collector.totals if collector.full else None)


def _written(collector: Collector, work: Callable[[], None]) -> TransLoraError | None:
    """Do what may write to the collector's run; why it could not, which is that transfer's own."""
    try:
        work()
    except TransLoraError as failure:
        return failure
    except OSError as failure:
        return RunFailed(f"{collector.store.uri} can not be written ({reason(failure)}): the same command goes on from what is committed.")
    return None


def open_stream(plans: Sequence[Plan], desk: Any) -> Generator[Pack]:
    """Finished packs in the order of their completion, as many as the desk lets through. A dataset copies its context when it is made."""
    plan = plans[0]
    if any((other.pools(), other.cluster) != (plan.pools(), plan.cluster) for other in plans):
        raise ValueError("transfers that share a stream must agree in engine, bases and cluster")
    context = DataContext.get_current()
    block_size, crowded = context.target_max_block_size, context.autoscaling_config.actor_pool_util_upscaling_threshold
    context.target_max_block_size = 1  # a pack leaves the source at once; with the default it waits for the source's end
    context.autoscaling_config.actor_pool_util_upscaling_threshold = (
        1.01  # a pool grows when packs wait; the default asks for more than (at_once + 1) / at_once
    )
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.wait_for_min_actors_s = plan.cluster.start_timeout_s
    source = PackSource(desk, [(one.recipe.seed, one.recipe.synthesis.pack_size) for one in plans])
    packs = ray.data.read_datasource(source, override_num_blocks=1, **beside_driver())
    low, high = plan.cluster.engines
    for pool in plan.pools():
        at_once = plan.packs_at_once(pool)
        packs = packs.map_batches(
            StageActor,
            fn_constructor_args=(plans, pool, desk),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=low,
                max_size=high,
                max_tasks_in_flight_per_actor=at_once + 1,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=at_once > 1,  # else Ray Data overlaps the calls' inputs and outputs alone
            ),
            num_cpus=plan.engine_cpus,
            num_gpus=plan.engine_gpus or None,
            max_restarts=ENGINE_DEATHS,
            max_task_retries=-1,  # until Ray sees that a node is lost, each try fails at once; `max_restarts` is the limit
        )
    context.target_max_block_size = block_size  # training, perhaps beside it, reads with the usual one
    context.autoscaling_config.actor_pool_util_upscaling_threshold = crowded
    for table in packs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from packs_from_table(table)


def _show(phase: Phase, collector: Collector, rate: float) -> None:
    looked_at = max(1, collector.next * collector.plan.recipe.synthesis.pack_size)
    phase.update(min(collector.accepted, collector.plan.wanted), collector.plan.wanted, f"{collector.accepted / looked_at:.0%} accepted, {rate:.0f} tokens/s")
