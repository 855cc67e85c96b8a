"""The stream on Ray Data: source -> generators -> source-model actors -> collector. The stages themselves know nothing of Ray.

The collector puts packs back in order before it decides anything, so the accepted rows are the same for any number of actors, any
timing and any number of interruptions; what was computed ahead of the quota and not needed is thrown away.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from translora_ray.config import Cluster, EngineKind, Recipe
from translora_ray.engines.base import Engine
from translora_ray.engines.select import open_engine
from translora_ray.errors import RunFailed
from translora_ray.kit import Kit
from translora_ray.models import describe, load_tokenizer
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

    def pools(self) -> list[tuple[str, bool, bool]]:
        """(base, generates, judges and teaches) of each actor pool: one pool when the source base generates, else two."""
        if self.recipe.synthesis.generator == "source":
            return [(self.kit.base, True, True)]
        return [(self.target, True, False), (self.kit.base, False, True)]


class StageActor:
    """What Ray Data keeps in an actor: one engine and the stages that use it."""

    def __init__(self, plan: Plan, base: str, generates: bool, teaches: bool, desk: Any) -> None:
        engine = open_engine(plan.engine, base, None if plan.engine_gpus else "cpu")
        self.stages = [*_writing(plan, engine)] * generates + [*_judging(plan, engine)] * teaches
        ray.get(desk.loaded.remote(base))

    def __call__(self, table: pa.Table) -> pa.Table:
        (pack,) = packs_from_table(table)
        for stage in self.stages:
            pack = stage.process(pack)
        return pack_to_table(pack)


def _writing(plan: Plan, engine: Engine) -> list[Stage]:
    seeds = plan.kit.seed_inputs
    return [synthesize.Synthesizer(engine, plan.recipe.synthesis, seeds), SeedFilter(seeds, plan.recipe.selection.near_duplicate)]


def _judging(plan: Plan, engine: Engine) -> list[Stage]:
    kit = plan.kit
    tokenizer, context = load_tokenizer(plan.target), describe(plan.target).context

    def learnable(prompt: Prompt, answer: str) -> bool:
        return len(prompt_ids(tokenizer, prompt)) + len(answer_ids(tokenizer, prompt, answer)) <= context

    teacher = teach.Teacher(engine, kit.task, kit.adapter, learnable)
    if kit.discriminator is None:
        return [teacher]
    return [discriminate.Discriminator(engine, kit.task.name, kit.discriminator_adapter, plan.recipe.selection.threshold), teacher]


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
    cap = 2 * plan.cluster.engines[1] * len(plan.pools())
    desk = Desk.remote(collector.next, cap)  # type: ignore[attr-defined]
    began = time.monotonic()
    tokens = 0
    packs = open_stream(plan, desk, collector.next)
    context = DataContext.get_current()
    block_size = context.target_max_block_size
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
        context.target_max_block_size = block_size
        ray.kill(desk)
    return collector.totals


def open_stream(plan: Plan, desk: Any, first: int) -> Generator[Pack]:
    """Finished packs from number `first` on in the order of their completion, as many as the desk lets through."""
    context = DataContext.get_current()
    context.target_max_block_size = 1  # a pack leaves the source at once; with the default it waits for the source's end
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.wait_for_min_actors_s = plan.cluster.start_timeout_s
    source = PackSource(desk, plan.recipe.seed, plan.recipe.synthesis.pack_size, first)
    packs = ray.data.read_datasource(source, override_num_blocks=1, concurrency=1, num_cpus=0)
    low, high = plan.cluster.engines
    for base, generates, teaches in plan.pools():
        packs = packs.map_batches(
            StageActor,
            fn_constructor_args=(plan, base, generates, teaches, desk),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
            num_cpus=plan.engine_cpus,
            num_gpus=plan.engine_gpus or None,
            max_restarts=ENGINE_DEATHS,
            max_task_retries=ENGINE_DEATHS,
        )
    for table in packs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from packs_from_table(table)


def _show(phase: Phase, collector: Collector, rate: float) -> None:
    looked_at = max(1, collector.next * collector.plan.recipe.synthesis.pack_size)
    phase.update(min(collector.accepted, collector.plan.quota), collector.plan.quota, f"{collector.accepted / looked_at:.0%} accepted, {rate:.0f} tokens/s")


def _reasons(totals: Totals) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in totals.rejects.most_common())
