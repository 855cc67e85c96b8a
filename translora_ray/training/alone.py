"""Training by one worker in a process that stays (`placement.Place`): the same loop and the same checkpoints as on Ray Train, without starting
a group of workers for each run, which costs 11 to 16 s on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from translora_ray.models import release
from translora_ray.placement import Run, has_gpu
from translora_ray.storage import RunStore
from translora_ray.training.checkpoints import Checkpoints
from translora_ray.training.trainer import Job, Result, work


def fit_alone(job: Job, name: str, store: RunStore, run: Run) -> Result:
    """A run of training in the place behind `run`."""
    return Result(run(_train, job, name, store), Checkpoints(store, name))


def _train(job: Job, name: str, store: RunStore) -> str | None:
    try:
        return work(job, AlonePost(store), Checkpoints(store, name))
    finally:
        release()


class AlonePost:
    """The only worker."""

    rank, world = 0, 1

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.device = "cuda" if torch.cuda.is_available() and has_gpu() else "cpu"

    def rows(self) -> Iterator[dict[str, Any]]:
        for _, candidates, _ in self.store.shards():
            yield from map(asdict, candidates)

    def agreed(self, value: str | None) -> str | None:
        return value
