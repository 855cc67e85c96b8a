"""Trainings whose workers die: begun again as long as they come further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from tests.conftest import lora
from translora_ray.cluster import Cluster
from translora_ray.config import Task, Training
from translora_ray.errors import RunFailed
from translora_ray.storage import RunStore
from translora_ray.training.again import as_long_as_it_moves
from translora_ray.training.checkpoints import METRICS, Checkpoints
from translora_ray.training.trainer import Job, Result

DEATHS = {
    "of a place that stays": RayActorError(),
    "by Ray's monitor of memory": OutOfMemoryError(""),
    "of one of two": WorkerGroupError("", {0: RuntimeError("connection closed by peer"), 1: WorkerHealthCheckFailedError("", RayActorError())}),
    "before there was one": ControllerError(WorkerGroupStartupTimeoutError(2)),
}


def job(**cluster: object) -> Job:
    task = Task(name="a", prompt="{input}", train="not kept")
    return Job(task, "base", lora(), Training(batch_size=8), 0, Cluster.model_validate(cluster), None, frozenset())


def never() -> None:
    return None


def reach(tokens: int, store: RunStore, scratch: Path) -> Checkpoints:
    """Checkpoints, the last one after so many tokens."""
    made, checkpoints = scratch / "made", Checkpoints(store, "target0")
    made.mkdir(exist_ok=True)
    (made / METRICS).write_text(json.dumps({"tokens": tokens}))
    checkpoints.add(made)
    return checkpoints


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_ten_deaths_with_a_checkpoint_between_them_end_nothing(death: Exception, tmp_path: Path) -> None:
    store, tries = RunStore(str(tmp_path / "run")), []

    def fit(_job: Job, name: str) -> Result:
        tries.append(name)
        checkpoints = reach(len(tries), store, tmp_path)
        if len(tries) > 10:
            return Result(None, checkpoints)
        raise death

    assert as_long_as_it_moves(fit, job(), "target0", store, never).failure is None
    assert tries == ["target0"] * 11


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_a_training_that_comes_no_further_says_what_may_help(death: Exception, tmp_path: Path) -> None:
    store, tries = RunStore(str(tmp_path / "run")), []
    reach(7, store, tmp_path)  # of another attempt

    def fit(_job: Job, name: str) -> Result:
        tries.append(name)
        reach(7, store, tmp_path)  # the same work again
        raise death

    with pytest.raises(RunFailed, match=r"set cluster\.rows_at_once to 4, or set cluster\.recompute; where machines"):
        as_long_as_it_moves(fit, job(), "target0", store, never)
    with pytest.raises(RunFailed, match=r"set cluster\.rows_at_once to 1; where machines"):
        as_long_as_it_moves(fit, job(workers=4, rows_at_once=6, recompute=True), "target0", store, never)
    with pytest.raises(RunFailed, match="spread the base over workers"):
        as_long_as_it_moves(fit, job(workers=8), "target0", store, never)
    assert len(tries) == 3


@pytest.mark.parametrize(("failure", "ended"), [(WorkerGroupError("", {0: RuntimeError("a defect")}), False), (RayActorError(), True)])
def test_a_defect_or_a_training_that_is_to_end_is_not_tried_again(failure: Exception, ended: bool, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "run"))

    def fit(_job: Job, _name: str) -> Result:
        reach(1, store, tmp_path)
        raise failure

    with pytest.raises(type(failure)) as raised:
        as_long_as_it_moves(fit, job(), "target0", store, lambda: ended)
    assert raised.value is failure
