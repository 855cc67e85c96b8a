"""Trainings whose workers die: begun again as long as each try leaves a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from tests.conftest import lora
from translora_ray.config import Cluster, Task, Training
from translora_ray.errors import RunFailed
from translora_ray.storage import TRAIN, RunStore
from translora_ray.training.again import as_long_as_it_moves
from translora_ray.training.trainer import Job, Result

DEATHS = {
    "alone": RayActorError(),
    "of one of two": WorkerGroupError("", {0: RuntimeError("connection closed by peer"), 1: WorkerHealthCheckFailedError("", RayActorError())}),
}
JOB = Job(Task(name="a", prompt="{input}", train="not kept"), "base", lora(), Training(batch_size=8), 0, Cluster(), None, frozenset())


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
@pytest.mark.parametrize("folder", ["target0", "target0-alone"])
def test_ten_deaths_with_a_checkpoint_between_them_end_nothing(death: Exception, folder: str, tmp_path: Path) -> None:
    store, tries = RunStore(str(tmp_path)), []

    def fit(_job: Job, name: str) -> Result:
        tries.append(name)
        if len(tries) > 10:
            return Result(None, {}, lambda scratch: scratch)
        store.write_json(f"{TRAIN}/{folder}/{len(tries)}/metrics.json", {})
        raise death

    assert as_long_as_it_moves(fit, JOB, "target0", store).failure is None
    assert tries == ["target0"] * 11


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_deaths_without_a_checkpoint_say_what_may_help(death: Exception, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.write_json(f"{TRAIN}/target0/1/metrics.json", {})  # of another attempt

    def fit(_job: Job, _name: str) -> Result:
        raise death

    with pytest.raises(RunFailed, match=r"set cluster\.rows_at_once to less than 8, or cluster\.recompute"):
        as_long_as_it_moves(fit, JOB, "target0", store)


def test_what_training_itself_raises_is_not_tried_again(tmp_path: Path) -> None:
    failure = WorkerGroupError("", {0: RuntimeError("a defect")})

    def fit(_job: Job, _name: str) -> Result:
        raise failure

    with pytest.raises(WorkerGroupError) as raised:
        as_long_as_it_moves(fit, JOB, "target0", RunStore(str(tmp_path)))
    assert raised.value is failure
