"""The stream without Ray: what the desk hands out, what an actor makes of a part that fails, which runs can go on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.conftest import scripted_pack, stream
from translora_ray.cluster import Cluster, Vllm
from translora_ray.engines.base import AdapterRef
from translora_ray.errors import EngineDied, NoRoom, RunFailed, TransLoraError, UsageError
from translora_ray.models import fingerprint
from translora_ray.records import Pack, pack_to_table, packs_from_table, request_pack
from translora_ray.storage import RunStore
from translora_ray.stream.actor import ENGINE_DEATHS, Meter, StageActor, _through
from translora_ray.stream.collect import Collector, Totals
from translora_ray.stream.pipeline import _collectors, _commit, _raise
from translora_ray.stream.plan import Plan, Pool
from translora_ray.stream.requests import AT_ONCE, LATE, Desk


class Failing:
    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def process(self, pack: Pack) -> Pack:
        raise self.failure


def test_a_part_that_can_not_work_ends_its_own_transfer_alone() -> None:
    (pack,) = packs_from_table(pack_to_table(_through([Failing(UsageError("The adapter is not live."))], request_pack(0, 0, 2))))
    assert pack.failure == "The adapter is not live."
    assert _through([Failing(UsageError("Another."))], pack) is pack  # what follows leaves it alone
    assert _through(UsageError("No tokenizer."), request_pack(0, 1, 2)).failure == "No tokenizer."
    assert _through([Failing(ValueError("one line\nand more"))], request_pack(0, 1, 2)).failure == "ValueError: one line"


class Actor(StageActor):
    """With an engine that dies of each pack of transfer 1, together with what else is on it, and stages that can not be made for transfer 2. The openings
    whose numbers are in `fail` fail."""

    def __init__(self, *fail: int) -> None:
        self.opened, self.meet, self.fail = 0, threading.Barrier(3), fail
        super().__init__([], None, None)  # type: ignore[arg-type]

    def _open(self) -> None:
        self.opened += 1
        if self.opened in self.fail:
            raise EngineDied("It did not start.")
        self.engine = self
        self.stages = [[Shared(self)], [Shared(self)], self._stages(None)]  # type: ignore[arg-type]

    def close(self) -> None:
        pass


class Shared:
    """On the engine that was there when it was made."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.made = actor, actor.opened

    def process(self, pack: Pack) -> Pack:
        if self.made == 1:
            self.actor.meet.wait(10)
        if self.made == 1 or pack.transfer == 1:
            raise EngineDied("It ran out of memory.")
        return pack


def test_a_kit_that_brings_engines_down_ends_alone() -> None:
    actor = Actor()
    with ThreadPoolExecutor(3) as threads:
        tables = threads.map(actor, [pack_to_table(request_pack(0, number, 2, transfer)) for number, transfer in ((0, 0), (0, 1), (1, 0))])
        packs = [pack for table in tables for pack in packs_from_table(table)]
    assert [pack.failure for pack in packs] == [None, "It ran out of memory.", None]
    assert actor.opened == 1 + 1 + ENGINE_DEATHS  # after the first death one pack at a time
    (odd,) = packs_from_table(actor(pack_to_table(request_pack(0, 0, 2, 2))))
    assert odd.failure is not None and odd.failure.startswith("AttributeError: ")


def test_an_engine_that_dies_while_it_opens_is_tried_again() -> None:
    actor = Actor(2, 3)
    with ThreadPoolExecutor(3) as threads:
        tables = threads.map(actor, [pack_to_table(request_pack(0, number, 2)) for number in range(3)])
        assert [pack.failure for table in tables for pack in packs_from_table(table)] == [None] * 3
    assert actor.opened == 1 + ENGINE_DEATHS
    actor = Actor(*range(2, 2 + ENGINE_DEATHS))
    with ThreadPoolExecutor(3) as threads, pytest.raises(EngineDied, match="It did not start"):
        list(threads.map(actor, [pack_to_table(request_pack(0, number, 2)) for number in range(3)]))


class Opened(StageActor):
    """Whose stages are real, without an engine for them."""

    def _open(self) -> None:
        self.engine = self  # type: ignore[assignment]
        self.stages = [self._stages(plan) for plan in self.plans]


def test_what_can_not_be_had_where_it_is_needed_leaves_the_engine_to_the_others(plan: Plan, tmp_path: Path) -> None:
    other = replace(plan, kit=replace(plan.kit, base_fingerprint="of another version", teacher_fingerprint="of another version"))
    gone = replace(plan, kit=replace(plan.kit, path=str(tmp_path / "gone"), adapter=AdapterRef("teacher", str(tmp_path / "gone"))))

    stages = Opened([gone, other, plan], Pool("transformers", plan.kit.base, ("discriminator",)), None).stages
    assert isinstance(stages[0], UsageError) and str(stages[0]).startswith(f"{tmp_path}/gone is not a transfer kit")
    assert isinstance(stages[1], UsageError) and "is not the one this transfer began with" in str(stages[1])
    assert isinstance(stages[2], list)


def test_a_full_disk_where_engines_are_is_no_transfers_own(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise NoRoom("There is no room.")

    monkeypatch.setattr(type(plan.kit), "here", full)
    with pytest.raises(NoRoom):
        StageActor([plan], Pool("transformers", plan.kit.base, ("discriminator",)), None)


@pytest.mark.parametrize("failure", [NoRoom("There is no room."), UsageError("It can not be read.")])
def test_a_full_disk_on_which_a_stage_is_made_is_not_either(plan: Plan, monkeypatch: pytest.MonkeyPatch, failure: UsageError) -> None:
    def full(*_: object) -> None:
        raise failure

    monkeypatch.setattr("translora_ray.stream.actor.linear_shapes", full)
    pool = Pool("transformers", plan.kit.base, ("teacher",))
    if isinstance(failure, NoRoom):
        with pytest.raises(NoRoom):
            Opened([plan], pool, None)
    else:
        assert Opened([plan], pool, None).stages == [failure]


def test_a_target_of_another_version_on_an_engines_machine_ends_the_transfer(plan: Plan) -> None:
    pool = Pool("transformers", plan.target, ())
    same, other = (replace(plan, target_fingerprint=each) for each in (fingerprint(plan.target), "of another version"))
    stages = Opened([same, other], pool, None).stages
    assert stages[0] == [] and "is not the one this transfer began with" in str(stages[1])


class Taking:
    """A stage that takes a while, or fails after it."""

    def __init__(self, seconds: float, failure: Exception | None = None) -> None:
        self.seconds, self.failure = seconds, failure

    def process(self, pack: Pack) -> Pack:
        time.sleep(self.seconds)
        pack.spend("teacher", 1, self.seconds)
        if self.failure:
            raise self.failure
        return pack


def test_packs_that_an_engine_computes_at_the_same_time_share_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, meter, packs = [100.0], Meter(), [request_pack(0, number, 2) for number in range(3)]
    monkeypatch.setattr("translora_ray.stream.actor.time", SimpleNamespace(perf_counter=lambda: now[0]))
    packs[2].seconds = {"generator": 5.0, "teacher": 1.0}  # on another engine
    charges = [meter.charge(pack) for pack in packs]

    def until(moment: float, begun: Sequence[int] = (), ended: Sequence[int] = ()) -> None:
        now[0] = moment
        for number in begun:
            charges[number].__enter__()
        for number in ended:
            packs[number].spend("teacher", 1, 2.0 if number else 4.0)
            charges[number].__exit__(None, None, None)

    until(110.0, begun=[0])
    until(111.0, begun=[1, 2])
    until(113.0, ended=[1, 2])
    until(114.0, ended=[0])
    assert [pack.seconds["teacher"] for pack in packs] == pytest.approx([1 + 2 / 3 + 1, 2 / 3, 1 + 2 / 3])
    assert packs[2].seconds["generator"] == 5.0, "what it took on another engine stays"


def test_what_a_failed_pack_took_of_its_engine_is_counted() -> None:
    actor = Actor()
    actor.stages = [[Taking(0.1, UsageError("It is not live."))]]
    (pack,) = packs_from_table(actor(pack_to_table(request_pack(0, 0, 2))))
    assert pack.failure == "It is not live." and pack.seconds["teacher"] == pytest.approx(0.1, rel=0.05)


def test_a_storage_that_fails_at_the_last_ends_its_own_transfer(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [RunStore(str(tmp_path / name)) for name in ("away", "there")]
    running, ended = {}, dict[int, Totals | TransLoraError]()
    for transfer, store in enumerate(stores):
        running[transfer] = Collector(replace(plan, cluster=Cluster(commit_seconds=1000)), store)
        running[transfer].take(scripted_pack(0), [])

    def away(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(stores[0], "write_shard", away)
    _commit(running, [], lambda transfer, outcome: ended.update({transfer: outcome}))
    assert list(running) == [1] and stores[1].names("shards")
    assert str(ended[0]) == f"{tmp_path}/away can not be written (OSError: no route to host): the same command goes on from what is committed."


def test_a_full_disk_is_no_transfers_own(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(str(tmp_path / "run"))
    collector = Collector(replace(plan, cluster=Cluster(commit_seconds=1000)), store)
    collector.take(scripted_pack(0), [])

    def full(*_: object) -> None:
        raise NoRoom("There is no room.")

    monkeypatch.setattr(store, "write_shard", full)
    with pytest.raises(NoRoom):
        _commit({0: collector}, [], lambda *_: None)


def test_a_run_that_is_damaged_or_full_leaves_the_stream_to_the_others(plan: Plan, tmp_path: Path) -> None:
    full, damaged, new = (RunStore(str(tmp_path / name)) for name in ("full", "damaged", "new"))
    stream(plan, full, 0)
    damaged.write("shards/000000-000003.parquet", b"short")
    ended: dict[int, Totals | TransLoraError] = {}
    running, totals = _collectors([plan] * 3, [full, damaged, new], lambda transfer, outcome: ended.update({transfer: outcome}))
    assert list(running) == [2] and len(totals) == 3
    assert ended[0] is totals[0] and totals[0].accepted == 25
    assert str(ended[1]).startswith(f"{damaged.uri} can not be read: ArrowInvalid")
    with pytest.raises(RunFailed, match="ArrowInvalid"):  # of a single transfer it is the end
        _collectors([plan], [damaged], _raise)


def test_what_an_attempt_loaded_is_told_once(plan: Plan, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))
    ended: dict[int, Totals | TransLoraError] = {}
    running, (totals,) = _collectors([plan], [store], lambda *_: None)
    pack = request_pack(0, 0, 4)
    for candidate in pack.candidates:
        candidate.input, candidate.target = f"prompt {candidate.index}", "a"
    running[0].take(pack, ["base"])
    assert totals.loaded == ["base"]
    stream(plan, store, 0)
    _collectors([plan], [store], lambda transfer, outcome: ended.update({transfer: outcome}))
    assert isinstance(ended[0], Totals) and ended[0].loaded == [] and ["base"] in ended[0].loads.values()


def desk_of(first: list[int], cap: int, shares: tuple[float, ...] = ()) -> Desk:
    return Desk.__ray_metadata__.modified_class(first, cap, shares)  # type: ignore[attr-defined,no-any-return]


def test_the_desk_hands_out_in_proportion_to_the_shares() -> None:
    async def ask() -> list[Counter[int]]:
        desk, counts = desk_of([0, 0, 7], 1, (1.0, 2.0, 0.5)), []
        for turns in (range(70), range(70, 100)):
            found = Counter[int]()
            for turn in turns:
                pack = await desk.lease(turn)
                assert pack
                await desk.arrived(*pack)
                found[pack[0]] += 1
            counts.append(found)
            await desk.full(1)
        return counts

    assert asyncio.run(ask()) == [{0: 20, 1: 40, 2: 10}, {0: 20, 2: 10}]


def test_of_many_transfers_some_at_a_time_get_packs_and_the_first_ones_are_full_early() -> None:
    async def ask() -> list[set[int]]:
        desk, found = desk_of([0] * (AT_ONCE + 2), 1, (*[1.0] * (AT_ONCE + 1), 2.0)), []
        for full in ([], [AT_ONCE + 1], [0, 1]):
            await desk.full(*full)
            served = set()
            for turn in range(len(desk.handed_out), len(desk.handed_out) + 3 * AT_ONCE):
                pack = await desk.lease(turn)
                assert pack
                await desk.arrived(*pack)
                served.add(pack[0])
            found.append(served)
        return found

    first, second, third = asyncio.run(ask())
    assert first == {*range(AT_ONCE - 1), AT_ONCE + 1}, "the one with the largest share is among the first"
    assert second == {*range(AT_ONCE)} and third == {*range(2, AT_ONCE + 1)}


def test_transfers_end_about_in_their_order_also_where_there_are_many() -> None:
    async def ask() -> list[int]:
        quotas = [20 + 7 * (i % 3) for i in range(3 * AT_ONCE)]
        desk, got, ended, turn = desk_of([0] * len(quotas), 1), Counter[int](), list[int](), 0
        while pack := await desk.lease(turn):
            turn += 1
            got[pack[0]] += 1
            await desk.arrived(*pack)
            if got[pack[0]] == quotas[pack[0]]:
                ended.append(pack[0])
                await desk.full(pack[0])
        return ended

    ended = asyncio.run(ask())
    assert set(ended[:AT_ONCE]) == {*range(AT_ONCE)}, "who takes a free place does not make those wait that came before"
    assert all(abs(place - transfer) <= AT_ONCE for place, transfer in enumerate(ended))


def test_the_desk_hands_out_in_turn_and_repeats_itself_to_a_source_that_starts_again() -> None:
    async def ask() -> list[list[tuple[int, int] | None]]:
        desk = desk_of([3, 0], 4)
        first = [await desk.lease(turn) for turn in range(4)]
        waiting = asyncio.create_task(desk.lease(4))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await desk.full(0)
        await desk.arrived(0, 3)
        again = [await desk.lease(turn) for turn in range(4)]
        after = [await waiting]
        await desk.full(1)
        return [first, again, after, [await desk.lease(5)]]

    first, again, after, last = asyncio.run(ask())
    assert first == again == [(0, 3), (1, 0), (0, 4), (1, 1)]
    assert (after, last) == ([(1, 2)], [None])


def test_the_desk_hands_out_again_what_does_not_come_back() -> None:
    async def ask() -> list[tuple[int, int] | None]:
        desk = desk_of([0], 2)
        found = []
        for turn in range(2 * LATE + 5):
            found.append(await desk.lease(turn))
            if found[-1] != (0, 1):  # which is lost, each time
                await desk.arrived(*found[-1])
        return found

    later = 2 * LATE + 2  # the first that goes out when so many times both that may be under way came after pack 1
    assert asyncio.run(ask()) == [*((0, number) for number in range(later)), (0, 1), (0, later), (0, later + 1)]


def test_transfers_that_share_an_engine_of_vllm_have_packs_each_until_its_batch_is_full() -> None:
    assert [Vllm().at_once(transfers, 8) for transfers in (1, 2, 8, 50)] == [2, 4, 16, 32]
    assert [Vllm(packs=packs).at_once(8, 64) for packs in (1, 2, 6)] == [4, 4, 6]
    assert Vllm().at_once(3, 1000) == 2
