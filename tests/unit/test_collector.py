"""Packs in any order, with interruptions anywhere: the same rows come out."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from translora_ray import adapters, kit
from translora_ray.config import Cluster, Gate, Recipe, Selection, Synthesis
from translora_ray.errors import RunFailed
from translora_ray.records import Candidate, Pack, request_pack
from translora_ray.storage import RunStore
from translora_ray.stream.collect import Collector
from translora_ray.stream.plan import Plan


@pytest.fixture
def plan(tiny_kit: Path, tiny_gemma: str) -> Plan:
    recipe = Recipe(gate=Gate(held_out=0), selection=Selection(quota=25, near_duplicate=1.0, max_candidates=10), synthesis=Synthesis(pack_size=4))
    return Plan(kit.load(tiny_kit), tiny_gemma, recipe, Cluster(commit_seconds=0), "transformers", 1.0, 0.0)


@pytest.mark.parametrize(("kind", "pools"), [("lora", [("generator", "discriminator", "teacher")]), ("ia3", [("generator", "discriminator"), ("teacher",)])])
def test_an_ia3_teacher_has_a_pool_beside_the_discriminators_lora(plan: Plan, monkeypatch: pytest.MonkeyPatch, kind: str, pools: list[tuple[str, ...]]) -> None:
    found = adapters.inspect(plan.kit.adapter.path)
    monkeypatch.setattr(adapters, "inspect", lambda path: replace(found, type=kind))
    assert [pool.roles for pool in plan.pools()] == pools


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
    """Packs arrive shuffled within a window; the process may end after some of them."""
    collector = Collector(plan, store)
    window = [collector.next + i for i in range(3)]
    draw = random.Random(order_seed)
    taken = 0
    while not collector.full and taken != stop_after:
        number = window.pop(draw.randrange(len(window)))
        window.append(max([*window, number]) + 1)
        collector.take(scripted_pack(number), [])
        taken += 1


def rows(store: RunStore) -> list[Candidate]:
    return [candidate for _, candidates, _ in store.shards() for candidate in candidates]


def test_order_and_interruptions_do_not_change_the_rows(plan: Plan, tmp_path: Path) -> None:
    calm = RunStore(str(tmp_path / "calm"))
    stream(plan, calm, 0)
    accepted = [candidate for candidate in rows(calm) if candidate.accepted]
    assert len(accepted) == 25
    assert len({candidate.input for candidate in accepted}) == 25
    for seed in range(1, 6):
        wild = RunStore(str(tmp_path / f"wild{seed}"))
        for attempt in range(3):
            stream(plan, wild, seed + attempt, stop_after=3)
        stream(plan, wild, seed)
        assert rows(wild) == rows(calm)


def test_totals_are_those_of_all_attempts(plan: Plan, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    stream(plan, store, 1, stop_after=4)
    stream(plan, store, 2)
    totals = Collector(plan, store).totals
    assert totals.accepted == 25
    assert totals.candidates == 4 * totals.packs == totals.accepted + sum(totals.rejects.values())
    assert totals.tokens["teacher"] == 4 * totals.packs
    assert len(totals.loads) == 2


def test_a_stream_that_accepts_too_little_ends_with_the_reasons(plan: Plan, tmp_path: Path) -> None:
    collector = Collector(plan, RunStore(str(tmp_path / "run")))
    for number in range(62):
        collector.take(scripted_pack(number, off_task=1.0), [])
    with pytest.raises(RunFailed, match=r"Only 0 of 25 examples after 252 candidates \(252 off task\)"):
        collector.take(scripted_pack(62, off_task=1.0), [])
