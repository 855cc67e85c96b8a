"""Checkpoints of one run of training, on Ray Train or by a worker alone. Ray Train keeps a list of its own in a file that it writes in place: a kill in the
middle of that leaves a run which nothing can go on from."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from translora_ray.errors import RunFailed
from translora_ray.storage import TRAIN, RunStore

METRICS = "metrics.json"
"""Of a checkpoint: what training has come to; its marker, which arrives last."""
SHARED = "give --out a place that all nodes share."
"""What to do where nodes see different things."""


class Checkpoints:
    """Numbered folders under TRAIN/`name`/checkpoints, which appear whole. The last one counts; those before it are removed once it is there."""

    def __init__(self, store: RunStore, name: str) -> None:
        self.store, self.place = store, f"{TRAIN}/{name}/checkpoints"

    def add(self, folder: Path) -> None:
        """Commit a directory, in which `METRICS` lie."""
        before = self._numbers()
        number = int(before[-1]) + 1 if before else 0
        self.store.write_folder(f"{self.place}/{number:06d}", folder, marker=METRICS)
        for old in before:
            self.store.remove(f"{self.place}/{old}")

    def last(self) -> str | None:
        """Number of the last one, None before there is one."""
        numbers = self._numbers()
        return numbers[-1] if numbers else None

    @contextlib.contextmanager
    def open(self, number: str | None) -> Iterator[Path | None]:
        """That one as a directory: itself on local disk, else a copy. Raises `RunFailed` where it is not there."""
        if number is None:
            yield None
            return
        if not self.store.exists(f"{self.place}/{number}/{METRICS}"):
            raise RunFailed(f"A training worker does not see {self.store.path(self.place)}/{number}, which another one does: {SHARED}")
        with tempfile.TemporaryDirectory() as scratch:
            yield self.store.fetch_folder(f"{self.place}/{number}", Path(scratch) / "checkpoint")

    def metrics(self) -> dict[str, Any]:
        """Those of the last one, none before there is one."""
        last = self.last()
        return self.store.read_json(f"{self.place}/{last}/{METRICS}") if last else {}

    def _numbers(self) -> list[str]:
        return [number for number in self.store.names(self.place) if self.store.exists(f"{self.place}/{number}/{METRICS}")]
