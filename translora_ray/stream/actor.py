"""What Ray Data keeps in an actor: one engine, and the stages of each transfer that use it. The stages themselves know nothing of Ray."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import ray

from translora_ray import adapters
from translora_ray.engines.base import Engine
from translora_ray.engines.select import open_engine
from translora_ray.errors import EngineDied, NoRoom, TransLoraError, reason
from translora_ray.models import context_of, linear_shapes, load_tokenizer, require_same, skeleton
from translora_ray.prompts import Prompt, answer_ids, prompt_ids
from translora_ray.recipe import GeneratorKind, Synthesis
from translora_ray.records import Pack, pack_to_table, packs_from_table
from translora_ray.stream import discriminate, synthesize, teach
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.fill import FillingSynthesizer
from translora_ray.stream.plan import Plan, Pool
from translora_ray.token_weights import answer_spans

ENGINE_DEATHS = 3
"""So many a pack survives before it ends its transfer; so many of its own an actor survives before it ends the stream."""


class Stage(Protocol):
    def process(self, pack: Pack) -> Pack: ...


class Meter:
    """What packs cost of an engine's time: those that are computed at the same time share it evenly."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy, self._at, self._each = 0, 0.0, 0.0

    @contextmanager
    def charge(self, pack: Pack) -> Iterator[None]:
        """Of the seconds that the block's stages write into the pack, the share that is this pack's own."""
        had, began, before = dict(pack.seconds), time.perf_counter(), self._each_so_far(1)
        try:
            yield
        finally:
            mine = (self._each_so_far(-1) - before) / max(1e-9, time.perf_counter() - began)
            pack.seconds = {role: had.get(role, 0.0) + (seconds - had.get(role, 0.0)) * mine for role, seconds in pack.seconds.items()}

    def _each_so_far(self, more: int) -> float:
        """Seconds that one who had been here all along would have had; there are so many more from now on."""
        with self._lock:
            now = time.perf_counter()
            self._each += (now - self._at) / max(1, self._busy)
            self._at, self._busy = now, self._busy + more
            return self._each


class StageActor:
    """What Ray Data keeps in an actor: one engine, and each transfer's stages, which use it. Called from as many threads as packs go at once."""

    def __init__(self, plans: Sequence[Plan], pool: Pool, desk: Any) -> None:
        self.meter = Meter()
        self.asked, self.plans, self.pool, self.desk = plans, [_here(plan, pool.base) for plan in plans], pool, desk
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
        except (EngineDied, NoRoom):
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
                    with self.meter.charge(pack):
                        pack = _through(stages[pack.transfer], pack)
                    return pack_to_table(pack)
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


def _here(plan: Plan, base: str) -> Plan | Exception:
    """The plan with its kit on this machine, or why that, or its base, can not be had: the other transfers go on, unless this machine's disk is full."""
    try:
        require_same(base, plan.bases.get(base, ""), "this transfer began with")
        return replace(plan, kit=plan.kit.here())
    except NoRoom:
        raise
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
    except (EngineDied, NoRoom):
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
        if settings.fill:
            return FillingSynthesizer(engine, settings, kit.seeds, kit.task)
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
    return [teach.Teacher(engine, kit.task, kit.adapter, learnable, plan.selection, plan.by_excess, spans, kit.answer_stops)]


STAGES: dict[str, Callable[[Plan, Pool, Engine], list[Stage]]] = {synthesize.ROLE: _writing, discriminate.ROLE: _judging, teach.ROLE: _teaching}
