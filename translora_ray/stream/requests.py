"""Where packs come from: a Ray Data source that asks the desk before each pack, and the desk that says when to go on or stop.

The source yields packs `first`, `first + 1`, ... in order, so a source that Ray restarts repeats itself exactly; the desk only opens
the gate. Without the gate the source would run far ahead of the quota: Ray Data's backpressure counts bytes, and requests are tiny.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from translora_ray.records import Step, pack_to_table, request_pack


@ray.remote(num_cpus=0)
class Desk:
    """Keeps the gate of one transfer, counts model loads, and passes training steps on to whoever shows them."""

    def __init__(self, first: int, cap: int) -> None:
        self.allowed = first + cap
        self.changed = asyncio.Event()
        self.loads: list[str] = []
        self.latest: Step | None = None

    async def gate(self, number: int) -> None:
        """Wait until pack `number` may be computed."""
        while number >= self.allowed:
            self.changed.clear()
            await self.changed.wait()

    async def arrived(self) -> None:
        """A pack came back, so another may go out."""
        self.allowed += 1
        self.changed.set()

    async def loaded(self, base: str) -> None:
        self.loads.append(base)

    async def all_loads(self) -> list[str]:
        return self.loads

    async def step(self, step: Step) -> None:
        self.latest = step

    async def latest_step(self) -> Step | None:
        return self.latest


class PackSource(Datasource):  # type: ignore[misc]
    """Packs of requests from `first` on, one row each, as the desk's gate opens; it ends with the stream."""

    def __init__(self, desk: Any, run_seed: int, pack_size: int, first: int) -> None:
        super().__init__()
        self.desk, self.run_seed, self.pack_size, self.first = desk, run_seed, pack_size, first

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._packs, metadata)]

    def _packs(self) -> Iterable[pa.Table]:
        number = self.first
        while True:
            ray.get(self.desk.gate.remote(number))
            yield pack_to_table(request_pack(self.run_seed, number, self.pack_size))
            number += 1
