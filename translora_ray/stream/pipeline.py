"""The stream on Ray Data: source -> generators -> source-model actors -> collector. The stages themselves know nothing of Ray.

The collector puts packs back in order before it decides anything, so the accepted rows are the same for any number of actors, any
timing and any number of interruptions; what was computed ahead of the quota and not needed is thrown away.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from translora_ray.config import Cluster, EngineKind, Recipe
from translora_ray.engines.base import Engine
from translora_ray.engines.select import engine_for, open_engine
from translora_ray.errors import EngineDied, RunFailed
from translora_ray.kit import Kit
from translora_ray.models import context_of, load_tokenizer, skeleton
from translora_ray.progress import Display, Phase
from translora_ray.prompts import Prompt, answer_ids, prompt_ids
from translora_ray.records import Candidate, Pack, pack_to_table, packs_from_table
from translora_ray.storage import RunStore
from translora_ray.stream import discriminate, synthesize, teach
from translora_ray.stream.dedup import SeedFilter, Seen
from translora_ray.stream.requests import Desk, PackSource

ENGINE_DEATHS = 3
NOT_NEEDED = "quota was full"


class Stage(Protocol):
    def process(self, pack: Pack) -> Pack: ...


@dataclass(frozen=True)
class Plan:
    """All that a stream needs to know, as it is sent to actors."""

    kit: Kit
    target: str
    recipe: Recipe
    cluster: Cluster
    engine: EngineKind
    engine_cpus: float
    engine_gpus: float

    @property
    def quota(self) -> int:
        return self.recipe.selection.quota or self.kit.rows

    def packs_at_once(self, pool: Pool) -> int:
        """Packs that one engine of the pool computes at the same time."""
        return self.cluster.vllm.packs if pool.engine == "vllm" else 1

    def pools(self) -> list[Pool]:
        """One pool when the source base generates, else two; one more where the teacher is on another base, or vLLM can not serve its adapter."""
        kit = self.kit
        writer = self.target if self.recipe.synthesis.generator == "target" else kit.base
        places = [(self.engine, writer, synthesize.ROLE)]
        if kit.discriminator is not None:
            places.append((self.engine, kit.base, discriminate.ROLE))
        places.append((engine_for(self.engine, [kit.adapter], lambda message: None), kit.teacher_base, teach.ROLE))
        pools: list[Pool] = []
        for engine, base, role in places:
            if pools and (pools[-1].engine, pools[-1].base) == (engine, base):
                pools[-1] = Pool(engine, base, (*pools[-1].roles, role))
            else:
                pools.append(Pool(engine, base, (role,)))
        return pools


@dataclass(frozen=True)
class Pool:
    """Actors that are alike: each holds one engine, which plays the roles in their order."""

    engine: EngineKind
    base: str
    roles: tuple[str, ...]


class StageActor:
    """What Ray Data keeps in an actor: one engine and the stages that use it. Called from as many threads as packs go at once."""

    def __init__(self, plan: Plan, pool: Pool, desk: Any) -> None:
        self.plan, self.pool, self.desk = plan, pool, desk
        self._replacing = threading.Lock()
        self._deaths = 0
        self._open()

    def _open(self) -> None:
        plan, pool = self.plan, self.pool
        adapters = {discriminate.ROLE: plan.kit.discriminator_adapter, teach.ROLE: plan.kit.adapter}
        used = [adapters[role] for role in pool.roles if role in adapters]
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
    tokenizer, context = load_tokenizer(plan.target), context_of(skeleton(plan.target))

    def learnable(prompt: Prompt, answer: str) -> bool:
        return len(prompt_ids(tokenizer, prompt)) + len(answer_ids(tokenizer, prompt, answer)) <= context

    return [teach.Teacher(engine, kit.task, kit.adapter, learnable)]


STAGES: dict[str, Callable[[Plan, Engine], list[Stage]]] = {synthesize.ROLE: _writing, discriminate.ROLE: _judging, teach.ROLE: _teaching}


@dataclass
class Totals:
    """What the stream came to, over all attempts: the manifest's counts."""

    packs: int = 0
    candidates: int = 0
    accepted: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    loads: dict[str, list[str]] = field(default_factory=dict)

    def add(self, last_pack: int, candidates: list[Candidate], facts: dict[str, Any]) -> None:
        self.packs = last_pack + 1
        self.candidates += len(candidates)
        self.accepted += sum(candidate.accepted for candidate in candidates)
        self.rejects.update(candidate.reason for candidate in candidates if candidate.reason)
        self.tokens.update(facts["tokens"])
        self.seconds.update(facts["seconds"])
        self.loads[facts["attempt"]] = facts["loads"]


class Collector:
    """Takes packs in any order, decides in pack order, commits shards. Knows from the store what was decided before."""

    def __init__(self, plan: Plan, store: RunStore) -> None:
        self.plan, self.store = plan, store
        self.totals = Totals()
        self.seen = Seen(plan.recipe.selection.near_duplicate)
        for last, candidates, facts in store.shards():
            self.totals.add(last, candidates, facts)
            for candidate in candidates:
                if candidate.accepted:
                    self.seen.add(candidate.input)
        self.attempt = uuid.uuid4().hex[:8]
        self.next = self.totals.packs
        self.accepted = self.totals.accepted
        self._waiting: dict[int, Pack] = {}
        self._decided: list[Pack] = []
        self._committed_at = time.monotonic()

    @property
    def full(self) -> bool:
        return self.accepted >= self.plan.quota

    def take(self, pack: Pack, loads: list[str]) -> None:
        self._waiting[pack.number] = pack
        while not self.full and self.next in self._waiting:
            self._decide(self._waiting.pop(self.next))
            self.next += 1
        if self._decided and (self.full or time.monotonic() - self._committed_at >= self.plan.cluster.commit_seconds):
            self.commit(loads)
        limit = self.plan.quota * self.plan.recipe.selection.max_candidates
        if not self.full and self.next * self.plan.recipe.synthesis.pack_size >= limit:
            self.commit(loads)
            raise RunFailed(
                f"Only {self.accepted} of {self.plan.quota} examples after {self.totals.candidates} candidates "
                f"({_reasons(self.totals)}): lower selection.quota or selection.threshold, or prepare the kit with more seeds."
            )

    def _decide(self, pack: Pack) -> None:
        for candidate in pack.open():
            if self.full:
                candidate.reason = NOT_NEEDED
            elif repeat := self.seen.repeats(candidate.input):
                candidate.reason = repeat
            else:
                self.seen.add(candidate.input)
                self.accepted += 1
        self._decided.append(pack)

    def commit(self, loads: list[str]) -> None:
        if not self._decided:
            return
        first, last = self._decided[0].number, self._decided[-1].number
        candidates = [candidate for pack in self._decided for candidate in pack.candidates]
        tokens: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for pack in self._decided:
            tokens.update(pack.tokens)
            seconds.update(pack.seconds)
        facts = {"attempt": self.attempt, "loads": loads, "tokens": dict(tokens), "seconds": dict(seconds)}
        self.store.write_shard(first, last, candidates, facts)
        self.totals.add(last, candidates, facts)
        self._decided = []
        self._committed_at = time.monotonic()


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
    block_size = context.target_max_block_size
    context.target_max_block_size = 1  # a pack leaves the source at once; with the default it waits for the source's end
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
            compute=ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=at_once + 1, max_concurrent_calls_per_actor=at_once),
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


def _show(phase: Phase, collector: Collector, rate: float) -> None:
    looked_at = max(1, collector.next * collector.plan.recipe.synthesis.pack_size)
    phase.update(min(collector.accepted, collector.plan.quota), collector.plan.quota, f"{collector.accepted / looked_at:.0%} accepted, {rate:.0f} tokens/s")


def _reasons(totals: Totals) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in totals.rejects.most_common())
