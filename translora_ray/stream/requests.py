"""Where packs come from: a Ray Data source that asks the desk for each, and the desk that says which is next, when to wait and when to stop.

The desk remembers what it handed out, so a source that Ray restarts repeats itself exactly, and hands out again what does not come back: Ray Data keeps
the packs of a lost engine for its successor, for which there may be no node. Without the desk the source would run far ahead of the quotas: Ray Data's
backpressure counts bytes, and requests are tiny.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from translora_ray.records import Step, pack_to_table, request_pack

AT_ONCE = 16
"""Transfers of a stream that get packs at the same time; the others wait until one of these is full. So the first adapters train while the last ones have not
begun, and an engine needs the adapters of these alone in its memory. More of them at once would not fill its batches any better (`make bench-sharing`)."""
LATE = 4
"""A pack is late when this many times as many packs as may be on their way have come back since it went out."""


def by_share(shares: Sequence[float]) -> list[int]:
    """The transfers in the order in which they take their places: those with the largest shares first."""
    return sorted(range(len(shares)), key=lambda i: -shares[i])


@ray.remote(num_cpus=0)
class Desk:
    """Hands out the packs of the transfers that share a stream, in turn, counts model loads, and passes training steps on to whoever shows
    them."""

    def __init__(self, first: Sequence[int], cap: int, shares: Sequence[float] = ()) -> None:
        """`first` is the number of each transfer's first pack; at most `cap` packs are on their way at once. Packs are handed out in proportion to `shares`,
        equally without them, to `AT_ONCE` transfers at a time, those with the largest shares first."""
        self.next = list(first)
        self.shares = list(shares) or [1.0] * len(self.next)
        self.wanted = by_share(self.shares)
        self.leased = [0.0] * len(self.next)
        self.handed_out: list[tuple[int, int]] = []
        self.cap = cap
        self.under_way: dict[tuple[int, int], int] = {}
        """In the order in which they went out, with how many had come back by then."""
        self.came = 0
        self.changed = asyncio.Event()
        self.loads: list[str] = []
        self.latest: Step | None = None
        self.ended: str | None = None

    async def lease(self, turn: int) -> tuple[int, int] | None:
        """The pack of this turn, 0, 1, 2, ..., as (transfer, number): of the transfer that had the fewest for its share so far. Waits until one may go out;
        None when no transfer wants more."""
        while turn >= len(self.handed_out):
            if not self.wanted:
                return None
            if (pack := self._late()) or (pack := self._fresh()):
                self.under_way.pop(pack, None)
                self.under_way[pack] = self.came
                self.handed_out.append(pack)
            else:
                self.changed.clear()
                await self.changed.wait()
        return self.handed_out[turn]

    def _late(self) -> tuple[int, int] | None:
        """The pack that is under way for longest, if it is late."""
        pack = next(iter(self.under_way), None)
        return pack if pack and self.came - self.under_way[pack] >= LATE * self.cap else None

    def _fresh(self) -> tuple[int, int] | None:
        if len(self.under_way) >= self.cap:
            return None
        transfer = min(self.wanted[:AT_ONCE], key=lambda i: self.leased[i] / self.shares[i])
        self.next[transfer] += 1
        self.leased[transfer] += 1
        return transfer, self.next[transfer] - 1

    async def arrived(self, transfer: int, number: int) -> None:
        """This pack came back, so another may go out."""
        if self.under_way.pop((transfer, number), None) is not None:  # else it was handed out twice, and came before
            self.came += 1
            self.changed.set()

    async def full(self, *transfers: int) -> None:
        """These transfers want no more packs."""
        before = self.wanted[:AT_ONCE]
        self.wanted = [transfer for transfer in self.wanted if transfer not in transfers]
        now = self.wanted[:AT_ONCE]
        level = min((self.leased[i] / self.shares[i] for i in now if i in before), default=0.0)
        for newcomer in set(now) - set(before):  # it owes the others nothing: it begins where they are
            self.leased[newcomer] = level * self.shares[newcomer]
        self.changed.set()

    async def loaded(self, base: str) -> None:
        self.loads.append(base)

    async def all_loads(self) -> list[str]:
        return self.loads

    async def step(self, step: Step | None) -> None:
        self.latest = step

    async def end(self, reason: str) -> None:
        """No more rows will come for whoever trains on the stream."""
        self.ended = reason

    async def why_ended(self) -> str | None:
        return self.ended

    async def latest_step(self) -> Step | None:
        return self.latest


def beside_driver() -> dict[str, Any]:
    """Options that put a task or an actor on the driver's node. What only waits and coordinates belongs there: on another node it would keep an autoscaler
    from taking that away, and would end with it."""
    return {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}


def open_desk(first: Sequence[int] = (), cap: int = 0, shares: Sequence[float] = ()) -> Any:
    """A `Desk` beside the driver; without arguments one that only passes training steps on."""
    return Desk.options(**beside_driver()).remote(first, cap, shares)  # type: ignore[attr-defined]


class PackSource(Datasource):  # type: ignore[misc]
    """Packs of requests as the desk hands them out, one row each. `packs` holds (run seed, pack size) of each transfer."""

    def __init__(self, desk: Any, packs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.desk, self.packs = desk, packs

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._packs, metadata)]

    def _packs(self) -> Iterable[pa.Table]:
        turn = 0
        while lease := ray.get(self.desk.lease.remote(turn)):
            transfer, number = lease
            run_seed, size = self.packs[transfer]
            yield pack_to_table(request_pack(run_seed, number, size, transfer))
            turn += 1
