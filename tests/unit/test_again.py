"""Trainings whose workers die: begun again as long as they come further."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from tests.conftest import lora
from translora_ray.cluster import Cluster
from translora_ray.config import Task, Training
from translora_ray.errors import RunFailed
from translora_ray.storage import TRAIN, RunStore
from translora_ray.training.again import as_long_as_it_moves
from translora_ray.training.trainer import METRICS, Job, Result

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


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
@pytest.mark.parametrize("folder", ["target0", "target0-alone"])
def test_ten_deaths_with_a_checkpoint_between_them_end_nothing(death: Exception, folder: str, tmp_path: Path) -> None:
    store, tries = RunStore(str(tmp_path)), []

    def fit(_job: Job, name: str) -> Result:
        tries.append(name)
        if len(tries) > 10:
            return Result(None, {}, lambda scratch: scratch)
        store.write_json(f"{TRAIN}/{folder}/{len(tries)}/{METRICS}", {"tokens": len(tries)})
        raise death

    assert as_long_as_it_moves(fit, job(), "target0", store, never).failure is None
    assert tries == ["target0"] * 11


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_a_training_that_comes_no_further_says_what_may_help(death: Exception, tmp_path: Path) -> None:
    store, tries = RunStore(str(tmp_path)), []
    store.write_json(f"{TRAIN}/target0/old/{METRICS}", {"tokens": 7})  # of another attempt
    (tmp_path / TRAIN / "target0" / "torn").mkdir()
    (tmp_path / TRAIN / "target0" / "torn" / METRICS).write_text('{"tok')

    def fit(_job: Job, name: str) -> Result:
        tries.append(name)
        store.write_json(f"{TRAIN}/target0/{len(tries)}/{METRICS}", {"tokens": 7})  # the same work again
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
    store = RunStore(str(tmp_path))

    def fit(_job: Job, _name: str) -> Result:
        store.write_json(f"{TRAIN}/target0/1/{METRICS}", {"tokens": 1})
        raise failure

    with pytest.raises(type(failure)) as raised:
        as_long_as_it_moves(fit, job(), "target0", store, lambda: ended)
    assert raised.value is failure
