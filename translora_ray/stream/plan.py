"""What a transfer's stream has to do, and which pools of engines do it. No Ray: actors get a plan, tests and benchmarks make their own."""

from __future__ import annotations

from dataclasses import dataclass

from translora_ray import adapters
from translora_ray.config import Cluster, EngineKind, Recipe
from translora_ray.engines.base import AdapterRef
from translora_ray.engines.select import engine_for
from translora_ray.kit import Kit
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

    @property
    def quota(self) -> int:
        return self.recipe.selection.quota or self.kit.rows

    def packs_at_once(self, pool: Pool) -> int:
        """Packs that one engine of the pool computes at the same time."""
        return self.cluster.vllm.packs if pool.engine == "vllm" else 1

    def adapters(self, pool: Pool) -> list[AdapterRef]:
        """The adapters that the pool's roles name."""
        named = {discriminate.ROLE: self.kit.discriminator_adapter, teach.ROLE: self.kit.adapter}
        return [named[role] for role in pool.roles if role in named]

    def pools(self) -> list[Pool]:
        """One pool when the source base generates, else two; one more where the teacher is on another base, vLLM can not serve its adapter, or peft
        can not put it beside the discriminator's LoRA (IA3)."""
        kit = self.kit
        writer = self.target if self.recipe.synthesis.generator == "target" else kit.base
        places = [(self.engine, writer, synthesize.ROLE)]
        if kit.discriminator is not None:
            places.append((self.engine, kit.base, discriminate.ROLE))
        places.append((engine_for(self.engine, [kit.adapter], lambda message: None), kit.teacher_base, teach.ROLE))
        alone = kit.discriminator is not None and adapters.inspect(kit.adapter.path).type == "ia3"
        pools: list[Pool] = []
        for engine, base, role in places:
            if pools and (pools[-1].engine, pools[-1].base) == (engine, base) and not (alone and role == teach.ROLE):
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
