"""What a transfer's stream has to do, and which pools of engines do it. No Ray: actors get a plan, tests and benchmarks make their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from translora_ray.cluster import Cluster
from translora_ray.config import EngineKind
from translora_ray.engines.base import AdapterRef
from translora_ray.engines.select import engine_for
from translora_ray.errors import UsageError
from translora_ray.kit import Kit
from translora_ray.recipe import BY_EXCESS, CHOOSING, CUTTING, JUDGING, GeneratorKind, Method, Recipe, Selection, Synthesis
from translora_ray.stream import discriminate, synthesize, teach


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
    target_fingerprint: str = ""
    """What the target must be on every machine; "" where that is not compared."""

    @property
    def bases(self) -> dict[str, str]:
        """Each base that engines may need, and its fingerprint."""
        return {self.target: self.target_fingerprint, **self.kit.bases}

    @property
    def quota(self) -> int:
        """Examples to train on."""
        return self.recipe.selection.quota or self.kit.rows

    @property
    def held_out(self) -> int:
        """Examples that the gate wants beside them."""
        return math.ceil(self.recipe.gate.held_out * self.quota)

    @property
    def wanted(self) -> int:
        """Candidates to answer: the stream's quota."""
        return math.ceil((self.quota + self.held_out) * (self.recipe.selection.surplus if self.chooses else 1))

    def synthesis(self, generator: GeneratorKind) -> Synthesis:
        """How it writes candidates, everything decided."""
        return self.recipe.synthesis.settled(self.kit.task.classes, generator, self.kit.copies)

    @cached_property
    def _writers(self) -> dict[GeneratorKind, Synthesis]:
        """How each generator writes: once, as it is asked for each candidate."""
        return {generator: self.synthesis(generator) for generator in self.recipe.synthesis.generator}

    def warmer(self, index: int) -> bool:
        """Whether the candidate of that index is of a pack that is written at a higher temperature than others."""
        pack, settings = self._written(index)
        return settings.warmer(pack)

    def fills(self, index: int) -> bool:
        """Whether the candidate of that index is a seed with other values."""
        pack, settings = self._written(index)
        return settings.fills(pack)

    def _written(self, index: int) -> tuple[int, Synthesis]:
        """The candidate's pack, and how that is written."""
        pack = index // self.recipe.synthesis.pack_size
        return pack, self._writers[self.recipe.synthesis.writer(pack)]

    def writes(self, generator: GeneratorKind, base: str) -> bool:
        """Whether the generator is one of the recipe's, and on that base."""
        return generator in self.recipe.synthesis.generator and base == (self.target if generator == "target" else self.kit.base)

    @property
    def by_label(self) -> bool:
        """Whether each candidate is written for a label."""
        return self.recipe.synthesis.asks_all(self.kit.task.classes)

    @property
    def as_asked(self) -> bool:
        """Whether the teacher must answer with the label that a candidate was written for."""
        return bool(self.selection.as_asked)

    @cached_property
    def selection(self) -> Selection:
        """Which candidates become examples, and which of the teacher's answers are trusted, everything decided: once, as it is asked for each candidate."""
        return self.recipe.selects(self.kit.task.classes, self.kit.discriminator)

    @property
    def method(self) -> Method:
        """How candidates are selected."""
        return self.selection.method

    @property
    def judges(self) -> bool:
        """Whether the discriminator is asked."""
        return self.method in JUDGING

    @property
    def cuts(self) -> bool:
        """Whether verdicts must be above a threshold."""
        return self.method in CUTTING

    @property
    def threshold(self) -> float:
        """The verdict that a candidate must be above."""
        return self.recipe.selection.threshold if self.cuts else -math.inf

    @property
    def by_excess(self) -> bool:
        """Whether examples are chosen by what the adapter adds to their answers."""
        return self.method in BY_EXCESS

    @property
    def chooses(self) -> bool:
        """Whether more candidates are answered than become examples."""
        return self.method in CHOOSING

    @property
    def calibration(self) -> tuple[float, float]:
        """(a, b): a * verdict + b is the log-odds that a prompt is a real one."""
        a, b = (self.kit.discriminator or {})["calibration"]
        return a, b

    def most_of_a_label(self, examples: int) -> int | None:
        """Most of so many examples that may have one label, None where any number may."""
        balance, labels = self.recipe.selection.balance, self.kit.task.classes
        return math.ceil(balance * examples / len(labels)) if balance and labels else None

    def check(self) -> None:
        """Raise `UsageError` where the kit has not what the recipe asks for."""
        kit, method = self.kit, self.method
        if self.judges and kit.discriminator is None:
            raise UsageError(f"The kit {kit.path} has no discriminator, which selection.method {method} asks: use excess or none, or prepare a kit with one.")
        if method == "importance" and "calibration" not in (kit.discriminator or {}):
            raise UsageError(f"The kit {kit.path} was made before discriminators were calibrated, which importance needs: prepare it again.")
        if "adapter" in self.recipe.synthesis.generator and kit.generator is None:
            raise UsageError(f"The kit {kit.path} has no generator adapter, which synthesis.generator asks: prepare a kit with one, or leave adapter out.")
        selection = self.recipe.selection
        asked = {"selection.balance": selection.balance, "synthesis.by_label": self.recipe.synthesis.by_label, "selection.as_asked": selection.as_asked}
        if by := next((key for key, value in asked.items() if value and not kit.task.classes), None):
            raise UsageError(f"{by} needs a task with labels, and this one's answers are open: leave it out, or prepare the kit with labels.")
        if self.by_label and self.recipe.synthesis.fewest(kit.task.classes) < self.recipe.synthesis.shots:
            raise UsageError("synthesis.fewest_shots is for lists, and prompts of this task are written by label: leave it out, or set by_label to false.")
        for settings in self._writers.values():
            if (settings.high_temperature or 0) < (settings.temperature or 0):
                raise UsageError(f"synthesis.high_temperature must not be below synthesis.temperature, {settings.temperature:g}: raise it, or leave it out.")
        if self.recipe.synthesis.fill and (self.by_label or not kit.copies):
            raise UsageError(
                "synthesis.fill exchanges what answers copy from their inputs: this kit's answers are no copies, or its prompts are by label; leave it out."
            )
        if selection.as_asked and not self.by_label:
            raise UsageError("selection.as_asked compares with the label that was asked for, and a list asks for none: leave it out, or set by_label.")
        if self.recipe.overlap and self.chooses:
            raise UsageError(f"{method} chooses among all examples, before training begins: leave overlap out, or set selection.method to none.")

    def packs_at_once(self, pool: Pool, transfers: int) -> int:
        """Packs that one engine of the pool computes at the same time, of all transfers of the stream together."""
        return self.cluster.vllm.at_once(transfers, self.recipe.synthesis.pack_size) if pool.engine == "vllm" else 1

    def adapters(self, pool: Pool) -> list[AdapterRef]:
        """The adapters that the pool's roles name."""
        named = {discriminate.ROLE: self.kit.discriminator_adapter, teach.ROLE: self.kit.adapter}
        if self.writes("adapter", pool.base):
            named[synthesize.ROLE] = self.kit.generator_adapter
        return [named[role] for role in pool.roles if role in named]

    def pools(self) -> list[Pool]:
        """One pool when the source base generates, with an adapter or without; one more where the target does; one more where the teacher is on another base,
        or vLLM can not serve its adapter."""
        kit, generators = self.kit, self.recipe.synthesis.generator
        bases = [base for base in dict.fromkeys((self.target, kit.base)) if any(self.writes(generator, base) for generator in generators)]
        places = [(self.engine, base, synthesize.ROLE) for base in bases]
        if self.judges:
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
