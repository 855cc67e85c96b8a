"""The stream on Ray Data: source -> generators -> source-model actors -> collector. The stages themselves know nothing of Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from translora_ray import adapters
from translora_ray.engines.base import Engine
from translora_ray.engines.select import open_engine
from translora_ray.errors import EngineDied
from translora_ray.models import context_of, linear_shapes, load_tokenizer, skeleton
from translora_ray.progress import Display, Phase
from translora_ray.prompts import Prompt, answer_ids, prompt_ids
from translora_ray.records import Pack, pack_to_table, packs_from_table
from translora_ray.storage import RunStore
from translora_ray.stream import discriminate, synthesize, teach
from translora_ray.stream.collect import Collector, Totals
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.plan import Plan, Pool
from translora_ray.stream.requests import Desk, PackSource

ENGINE_DEATHS = 3


class Stage(Protocol):
    def process(self, pack: Pack) -> Pack: ...


class StageActor:
    """What Ray Data keeps in an actor: one engine and the stages that use it. Called from as many threads as packs go at once."""

    def __init__(self, plan: Plan, pool: Pool, desk: Any) -> None:
        self.plan, self.pool, self.desk = plan, pool, desk
        self._replacing = threading.Lock()
        self._deaths = 0
        self._open()

    def _open(self) -> None:
        plan, pool = self.plan, self.pool
        named = {discriminate.ROLE: plan.kit.discriminator_adapter, teach.ROLE: plan.kit.adapter}
        used = [named[role] for role in pool.roles if role in named]
        self.engine = open_engine(pool.engine, pool.base, used, plan.cluster.vllm, plan.engine_gpus)
        self.stages = [stage for role in pool.roles for stage in STAGES[role](plan, self.engine)]
        ray.get(self.desk.loaded.remote(pool.base))

    def __call__(self, table: pa.Table) -> pa.Table:
        while True:
            stages = self.stages
            (pack,) = packs_from_table(table)
            try:
                for stage in stages:
                    pack = stage.process(pack)
                return pack_to_table(pack)
            except EngineDied as death:
                self._replace(stages, death)

    def _replace(self, dead: list[Stage], death: EngineDied) -> None:
        """A new engine in place of the one behind the stages `dead`, unless another thread brought one already."""
        with self._replacing:
            if self.stages is not dead:
                return
            self._deaths += 1
            if self._deaths > ENGINE_DEATHS:
                raise death
            self.engine.close()
            self._open()


def _writing(plan: Plan, engine: Engine) -> list[Stage]:
    seeds = plan.kit.seed_inputs
    return [synthesize.Synthesizer(engine, plan.recipe.synthesis, seeds), SeedFilter(seeds, plan.recipe.selection.near_duplicate)]


def _judging(plan: Plan, engine: Engine) -> list[Stage]:
    kit = plan.kit
    return [discriminate.Discriminator(engine, kit.task.name, kit.discriminator_adapter, plan.recipe.selection.threshold)]


def _teaching(plan: Plan, engine: Engine) -> list[Stage]:
    kit = plan.kit
    wanted = adapters.inherit(adapters.inspect(kit.adapter.path), plan.recipe.adapter, linear_shapes(plan.target))
    tokenizer, context = load_tokenizer(plan.target), context_of(skeleton(plan.target)) - (wanted.virtual_tokens or 0)

    def learnable(prompt: Prompt, answer: str) -> bool:
        return len(prompt_ids(tokenizer, prompt)) + len(answer_ids(tokenizer, prompt, answer)) <= context

    return [teach.Teacher(engine, kit.task, kit.adapter, learnable)]


STAGES: dict[str, Callable[[Plan, Engine], list[Stage]]] = {synthesize.ROLE: _writing, discriminate.ROLE: _judging, teach.ROLE: _teaching}


def run_stream(plan: Plan, store: RunStore, display: Display) -> Totals:
    """Stream until the quota is full and committed; returns the totals. Goes on from the shards that are there."""
    collector = Collector(plan, store)
    if collector.full:
        return collector.totals
    phase = display.phase("examples")
    started = collector.accepted
    phase.update(started, plan.quota, "loading engines")
    cap = sum((plan.packs_at_once(pool) + 1) * plan.cluster.engines[1] for pool in plan.pools())
    desk = Desk.remote(collector.next, cap)  # type: ignore[attr-defined]
    began = time.monotonic()
    tokens = 0
    packs = open_stream(plan, desk, collector.next)
    try:
        for pack in packs:
            tokens += sum(pack.tokens.values())
            collector.take(pack, ray.get(desk.all_loads.remote()))
            _show(phase, collector, tokens / (time.monotonic() - began))
            if collector.full:
                break  # what is under way is not needed
            ray.get(desk.arrived.remote())
    finally:
        packs.close()
        ray.kill(desk)
    return collector.totals


def open_stream(plan: Plan, desk: Any, first: int) -> Generator[Pack]:
    """Finished packs from number `first` on in the order of their completion, as many as the desk lets through."""
    context = DataContext.get_current()
    block_size, crowded = context.target_max_block_size, context.autoscaling_config.actor_pool_util_upscaling_threshold
    context.target_max_block_size = 1  # a pack leaves the source at once; with the default it waits for the source's end
    context.autoscaling_config.actor_pool_util_upscaling_threshold = (
        1.01  # a pool grows when packs wait; the default asks for more than (at_once + 1) / at_once
    )
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.wait_for_min_actors_s = plan.cluster.start_timeout_s
    source = PackSource(desk, plan.recipe.seed, plan.recipe.synthesis.pack_size, first)
    packs = ray.data.read_datasource(source, override_num_blocks=1, concurrency=1, num_cpus=0)
    low, high = plan.cluster.engines
    for pool in plan.pools():
        at_once = plan.packs_at_once(pool)
        packs = packs.map_batches(
            StageActor,
            fn_constructor_args=(plan, pool, desk),
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
            max_task_retries=ENGINE_DEATHS,
        )
    try:
        for table in packs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from packs_from_table(table)
    finally:
        context.target_max_block_size = block_size  # training reads with the usual one
        context.autoscaling_config.actor_pool_util_upscaling_threshold = crowded


def _show(phase: Phase, collector: Collector, rate: float) -> None:
    looked_at = max(1, collector.next * collector.plan.recipe.synthesis.pack_size)
    phase.update(min(collector.accepted, collector.plan.quota), collector.plan.quota, f"{collector.accepted / looked_at:.0%} accepted, {rate:.0f} tokens/s")
