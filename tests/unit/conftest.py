"""A stream without engines: the plan of a small transfer, the packs that actors would return, and what was committed of them."""

import random
from pathlib import Path

import pytest

from translora_ray import kit
from translora_ray.cluster import Cluster
from translora_ray.recipe import Gate, Recipe, Selection, Synthesis
from translora_ray.records import Candidate, Pack, request_pack
from translora_ray.storage import RunStore
from translora_ray.stream.collect import Collector
from translora_ray.stream.plan import Plan


@pytest.fixture
def plan(tiny_kit: Path, tiny_gemma: str) -> Plan:
    recipe = Recipe(
        gate=Gate(held_out=0), selection=Selection(method="discriminator", quota=25, near_duplicate=1.0, max_candidates=10), synthesis=Synthesis(pack_size=4)
    )
    return Plan(kit.load(tiny_kit), tiny_gemma, recipe, Cluster(commit_seconds=0), "transformers", 1.0, 0.0)


def scripted_pack(number: int, off_task: float = 0.3) -> Pack:
    """What actors would return: some rejects, some repetitions, the same for the same number."""
    pack = request_pack(0, number, 4)
    for candidate in pack.candidates:
        draw = random.Random(candidate.seed)
        candidate.input = f"prompt {draw.randrange(60)}"
        if draw.random() < off_task:
            candidate.reason = "off task"
        else:
            candidate.target = "a"
    pack.spend("teacher", 4, 0.1)
    return pack


def stream(plan: Plan, store: RunStore, order_seed: int, stop_after: int | None = None) -> None:
    """Packs arrive shuffled within a window, some twice; the process may end after some of them."""
    collector = Collector(plan, store)
    window = [collector.next + i for i in range(3)]
    draw = random.Random(order_seed)
    taken = 0
    while not collector.full and taken != stop_after:
        number = window.pop(draw.randrange(len(window)))
        window.append(max([*window, number]) + 1)
        for _ in range(draw.choice((1, 2))):
            if not collector.full:
                collector.take(scripted_pack(number), [])
        taken += 1


def rows(store: RunStore) -> list[Candidate]:
    return store.candidates()
