"""Training by one worker in a process that stays (`placement.Place`): the same loop and the same checkpoints as on Ray Train, without starting
a group of workers for each run, which costs 11 to 16 s on two cores.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from translora_ray.models import release
from translora_ray.placement import Run, has_gpu
from translora_ray.storage import TRAIN, RunStore
from translora_ray.training.trainer import METRICS, Job, Result, work


def fit_alone(job: Job, name: str, store: RunStore, run: Run) -> Result:
    """A run of training in the place behind `run`."""
    failure, metrics = run(_train, job, name, store)
    return Result(failure, metrics, lambda folder: AlonePost(store, name).fetch(Path(folder)))


def _train(job: Job, name: str, store: RunStore) -> tuple[str | None, dict[str, Any]]:
    post = AlonePost(store, name)
    try:
        return work(job, post), post.metrics
    finally:
        release()


def folder(name: str) -> str:
    """Where the checkpoints of the run of that name lie, beside those of Ray Train."""
    return f"{TRAIN}/{name}-alone"


class AlonePost:
    """The only worker. A checkpoint is a numbered folder under TRAIN/`name`; the one with the highest number and its metrics in it counts."""

    rank, world = 0, 1

    def __init__(self, store: RunStore, name: str) -> None:
        self.store, self.place = store, folder(name)
        self.device = "cuda" if torch.cuda.is_available() and has_gpu() else "cpu"
        self.metrics: dict[str, Any] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        for _, candidates, _ in self.store.shards():
            yield from map(asdict, candidates)

    def fetch(self, scratch: Path) -> Path:
        """The last checkpoint as a directory."""
        return self.store.fetch_folder(f"{self.place}/{self._numbers()[-1]}", scratch)

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        with tempfile.TemporaryDirectory() as scratch:
            yield self.fetch(Path(scratch) / "checkpoint") if self._numbers() else None

    def report(self, metrics: dict[str, Any], folder: Path | None) -> None:
        assert folder
        before = self._numbers()
        number = int(before[-1]) + 1 if before else 0
        self.store.write_folder(f"{self.place}/{number:06d}", folder, marker=METRICS)
        self.metrics = metrics
        for old in before:
            self.store.remove(f"{self.place}/{old}")

    def _numbers(self) -> list[str]:
        """Names of the checkpoints that are whole."""
        return [number for number in self.store.names(self.place) if self.store.exists(f"{self.place}/{number}/{METRICS}")]
