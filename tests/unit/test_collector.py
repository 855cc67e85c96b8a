"""Packs in any order, with interruptions anywhere: the same rows come out."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.conftest import rows, scripted_pack, stream
from translora_ray.errors import RunFailed
from translora_ray.recipe import Method
from translora_ray.storage import RunStore
from translora_ray.stream.collect import Collector
from translora_ray.stream.plan import Plan


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


@pytest.mark.parametrize(("method", "less"), [("discriminator", r"selection\.quota or selection\.threshold"), ("none", r"selection\.quota")])
def test_a_stream_that_accepts_too_little_ends_with_the_reasons(plan: Plan, tmp_path: Path, method: Method, less: str) -> None:
    selection = plan.recipe.selection.model_copy(update={"method": method})
    collector = Collector(replace(plan, recipe=plan.recipe.model_copy(update={"selection": selection})), RunStore(str(tmp_path / "run")))
    for number in range(62):
        collector.take(scripted_pack(number, off_task=1.0), [])
    found = r"Only 0 of 25 examples after 252 candidates \(252 off task\): lower " + less + ", or"
    with pytest.raises(RunFailed, match=found):
        collector.take(scripted_pack(62, off_task=1.0), [])
    with pytest.raises(RunFailed, match=found):
        Collector(collector.plan, collector.store)  # without an engine


def test_a_pack_that_was_handed_out_twice_counts_once_and_is_not_kept(plan: Plan, tmp_path: Path) -> None:
    collector = Collector(plan, RunStore(str(tmp_path / "run")))
    for number in (0, 1, 0, 3, 1, 3, 2):
        collector.take(scripted_pack(number), [])
    assert (collector.next, len(collector._waiting)) == (4, 0)


def test_what_waits_beyond_the_most_candidates_is_not_looked_at(plan: Plan, tmp_path: Path) -> None:
    collector = Collector(plan, RunStore(str(tmp_path / "run")))
    for number in range(1, 63):
        collector.take(scripted_pack(number, off_task=1.0), [])
    for number in range(63, 75):
        collector.take(scripted_pack(number, off_task=0.0), [])
    with pytest.raises(RunFailed, match="Only 0 of 25 examples after 252 candidates"):
        collector.take(scripted_pack(0, off_task=1.0), [])
