"""Trying again. On spot machines workers may die any number of times in a night; what counts is that training comes further between two deaths."""

from __future__ import annotations

from collections.abc import Callable

from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import TrainingFailedError

from translora_ray.errors import RunFailed, first_line
from translora_ray.placement import DEATHS
from translora_ray.storage import RunStore
from translora_ray.training.checkpoints import Checkpoints
from translora_ray.training.loop import fewer
from translora_ray.training.trainer import Fit, Job, Result

NO_WORKER = (*DEATHS, WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)


def as_long_as_it_moves(fit: Fit, job: Job, name: str, store: RunStore, is_to_end: Callable[[], object]) -> Result:
    """What `fit` returns; begun again, from the last checkpoint, whenever workers died more often than Ray replaces them and training has come further.

    Raises `RunFailed` where it has not: the same would happen again. What is no death is raised as it is, and so is a death when training is to end anyway.
    """
    before = _trained(store, name)
    while True:
        try:
            return fit(job, name)
        except (*DEATHS, TrainingFailedError) as failure:
            if (death := _death(failure)) is None or is_to_end():
                raise
            if (reached := _trained(store, name)) <= before:
                raise RunFailed(
                    f"Training workers died one after the other, and training came no further. Where memory ran out, {_less_memory(job)}; where machines were "
                    f"lost, give the same command again, with a lower cluster.checkpoint_seconds. What was seen last: {first_line(death)}"
                ) from failure
            before = reached


def _trained(store: RunStore, name: str) -> int:
    """Tokens that the last checkpoint stands for."""
    return int(Checkpoints(store, name).metrics().get("tokens", 0))


def _death(failure: Exception) -> Exception | None:
    """A worker's that ended, or that none came, among what Ray Train gathered: another worker's error may only say that it heard no more of it."""
    found = [failure, getattr(failure, "controller_failure", None), *getattr(failure, "worker_failures", {}).values()]
    causes = [getattr(each, "health_check_failure", each) for each in found]
    return next((cause for cause in causes if isinstance(cause, NO_WORKER)), None)


def _less_memory(job: Job) -> str:
    cluster, batch = job.cluster, job.training.batch_size
    held = min(cluster.rows_at_once or batch, -(-batch // cluster.workers[0]))
    return fewer(held) + ("" if cluster.recompute else ", or set cluster.recompute")
