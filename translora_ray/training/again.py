"""Trying again. On spot machines workers may die any number of times in a night; what counts is that training comes further between two deaths."""

from __future__ import annotations

from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import TrainingFailedError

from translora_ray.errors import RunFailed
from translora_ray.storage import TRAIN, RunStore
from translora_ray.training.trainer import Fit, Job, Result


def as_long_as_it_moves(fit: Fit, job: Job, name: str, store: RunStore) -> Result:
    """What `fit` returns; begun again, from the last checkpoint, whenever workers died more often than Ray replaces them and there is a new checkpoint.

    Raises `RunFailed` where there is none: the same would happen again.
    """
    while True:
        before = _checkpoints(store, name)
        try:
            return fit(job, name)
        except (RayActorError, TrainingFailedError) as failure:
            if not _died(failure):
                raise
            if not _checkpoints(store, name) - before:
                raise RunFailed(
                    "Training workers died one after the other before they came to a checkpoint. Where memory ran out (`ray status`, the machine's log), set "
                    f"cluster.rows_at_once to less than {job.cluster.rows_at_once or job.training.batch_size}, or cluster.recompute; where machines were lost, "
                    "give the same command again, with a lower cluster.checkpoint_seconds."
                ) from failure


def _checkpoints(store: RunStore, name: str) -> set[str]:
    """Of Ray Train, and of a single worker in a place that stays (`alone.py`)."""
    return {*store.names(f"{TRAIN}/{name}"), *store.names(f"{TRAIN}/{name}-alone")}


def _died(failure: Exception) -> bool:
    """Whether a worker's process ended; another one's error may only say that it heard no more of it."""
    found = [failure, *getattr(failure, "worker_failures", {}).values()]
    return any(isinstance(getattr(each, "health_check_failure", each), RayActorError) for each in found)
