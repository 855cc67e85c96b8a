"""The target adapter: a worker's life, on Ray Train or alone in a process that stays (`alone.py`). The mathematics is in `loop.py`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer

from translora_ray import adapters, adapting, models
from translora_ray.cluster import Cluster
from translora_ray.config import Adapter, Task, Training
from translora_ray.errors import Diverged, RunFailed, StreamEnded
from translora_ray.records import TaskRow
from translora_ray.storage import ADAPTER, IDENTITY, SHARDS, TRAIN, RunStore
from translora_ray.training import task as task_training
from translora_ray.training.checkpoints import METRICS, SHARED, Checkpoints
from translora_ray.training.loop import OTHER_ORDER, Loop, add_point

STATE = "state.pt"
MAX_FAILURES = 3
POLL_SECONDS = 1.0
FACTS = (
    "loss",
    "rows",
    "tokens",
    "seconds",
    "epoch_losses",
    "started_at_steps",
    "rows_at_once",
    "learning_rate",
    "best_epoch",
    "held_out_losses",
    "loss_curve",
)


@dataclass(frozen=True)
class Job:
    """What a worker needs to know. `adapter` is fully set; `steps` is the handle of a `Desk`, which receives `Step`s and says when no rows will come.

    `rows` are the indices of those that are trained on, or (run, number of rows) where training begins while the stream still commits them there.
    """

    task: Task
    target: str
    adapter: Adapter
    training: Training
    seed: int
    cluster: Cluster
    steps: Any
    rows: frozenset[int] | tuple[RunStore, int]
    fingerprint: str = ""
    """The target's; "" where it is not compared."""

    @property
    def arriving(self) -> tuple[RunStore, int] | None:
        return self.rows if isinstance(self.rows, tuple) else None


@dataclass(frozen=True)
class Result:
    """What a run of training came to. `failure` says why it was in vain, if it was."""

    failure: str | None
    checkpoints: Checkpoints

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Those of the last checkpoint."""
        return self.checkpoints.metrics()


Fit = Callable[[Job, str], Result]
"""Trains a job under a name, going on from the last checkpoint that is stored under it."""


class Post(Protocol):
    """Where a worker works. `agreed` is what the worker of rank 0 says, which all wait for."""

    rank: int
    world: int
    device: str

    def rows(self) -> Iterator[dict[str, Any]]: ...

    def agreed(self, value: str | None) -> str | None: ...


def train_target(job: Job, store: RunStore, fit: Fit) -> dict[str, Any]:
    """Train on the committed shards, going on from the last checkpoint, and commit `adapter/`; returns facts.

    With several learning rates to try, each is a run of its own, and the one with the least held-out loss is committed.
    """
    results = []
    for number, trial in enumerate(job.training.trials):
        results.append(fit(replace(job, training=trial), f"target{number}"))
        if results[-1].failure and (reason := ray.get(job.steps.why_ended.remote())):
            raise StreamEnded(reason)  # it was stopped, which says nothing of its learning rate
        if results[-1].failure == OTHER_ORDER:  # nor does this
            raise RunFailed(OTHER_ORDER)
    if not (sound := [result for result in results if not result.failure]):
        kept = f" The last good checkpoint is in {store.path(TRAIN)}." if results[0].metrics else ""
        raise RunFailed(f"{results[0].failure}{kept}")
    best = min(sound, key=lambda result: min(result.metrics["held_out_losses"], default=0.0))
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / ADAPTER
        with best.checkpoints.open(best.checkpoints.last()) as checkpoint:
            assert checkpoint
            shutil.copytree(checkpoint, adapter, ignore=shutil.ignore_patterns(STATE, METRICS))
        store.write_folder(ADAPTER, adapter, marker=adapters.CONFIG)
    facts = {key: best.metrics[key] for key in FACTS}
    if len(results) > 1:
        rates = [trial.learning_rate for trial in job.training.trials]
        facts["trials"] = [{"learning_rate": rate, **_outcome(result)} for rate, result in zip(rates, results, strict=True)]
    return facts


def _outcome(result: Result) -> dict[str, Any]:
    return {"failed": result.failure} if result.failure else {"held_out_losses": result.metrics["held_out_losses"]}


def fit_on_ray_train(job: Job, name: str, store: RunStore, cpus: float, gpus: float) -> Result:
    """One run of Ray Train, with as many workers as the job's cluster section says, each of so many CPUs and GPUs."""
    cluster = job.cluster
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)
    datasets = {} if isinstance(job.rows, tuple) else {"train": _dataset(store, job.rows)}
    least, most = cluster.workers
    trainer = TorchTrainer(
        _on_ray_train,
        train_loop_config={"job": job, "checkpoints": (checkpoints := Checkpoints(store, name))},
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=TorchConfig(timeout_s=1800),
        datasets=datasets,
        dataset_config=DataConfig(datasets_to_split=[]),  # an equal split would drop the remainder; workers slice by rank instead
        run_config=RunConfig(
            name=name,
            storage_path=store.path(f"{TRAIN}/ray"),
            storage_filesystem=store.fs,
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
        ),
    )
    result = Result(trainer.fit().return_value, checkpoints)
    if not (result.failure or result.metrics):
        raise RunFailed(f"Training ended, and {store.uri} has no checkpoint of it: {SHARED}")
    return result


def _dataset(store: RunStore, wanted: frozenset[int]) -> ray.data.Dataset:
    """The wanted rows in Ray's object store: its reader of Parquet files starts 32 actors, and `from_arrow` waits for a CPU, of which there may be none yet."""
    found = [candidate for candidate in store.candidates() if candidate.index in wanted]
    rows = [{"index": each.index, "input": each.input, "target": each.target, "char_excess": each.char_excess} for each in found]
    return ray.data.from_items(rows, override_num_blocks=1)


class TrainPost:
    """A worker of Ray Train."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world, self.device = context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read through Ray Data once per worker start, not per epoch: rows are short texts, and each pass of a dataset takes time."""
        for batch in ray.train.get_dataset_shard("train").iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()

    def agreed(self, value: str | None) -> str | None:
        said: str | None = broadcast_from_rank_zero(value)
        return said


def _rows(post: Post, wanted: frozenset[int]) -> list[TaskRow]:
    """The wanted rows of all shards in the order of their index: the same on every worker and after every restart."""
    found = {row["index"]: TaskRow(row["input"], row["target"], tuple(row["char_excess"] or ())) for row in post.rows() if row["index"] in wanted}
    if len(found) < len(wanted):
        raise RunFailed(f"A training worker sees {len(found)} of {len(wanted)} examples: {SHARED}")
    return [found[index] for index in sorted(found)]


class Arriving(Sequence[task_training.Pair]):
    """The accepted rows of a stream that still commits them, by index: asking for one that is not there waits for it, or raises `StreamEnded`.

    Read from the run itself: Ray Data knows a dataset's files when it begins.
    """

    def __init__(self, job: Job) -> None:
        assert job.arriving
        self.store, self.total = job.arriving
        self.job, self.shards = job, 0
        self.pairs: list[task_training.Pair] = []

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < self.total:
            raise IndexError(row)
        while row >= len(self.pairs):
            reason = ray.get(self.job.steps.why_ended.remote())  # asked first: all that was committed before is there for every worker to see
            if not self._look() and reason:
                raise StreamEnded(reason)
        return self.pairs[row]

    def _look(self) -> bool:
        """Whether there is something new, for which it waits a while."""
        if len(self.store.names(SHARDS)) == self.shards:
            time.sleep(POLL_SECONDS)
            return False
        shards = [candidates for _, candidates, _ in self.store.shards(self.shards)]
        accepted = [candidate for candidates in shards for candidate in candidates if candidate.accepted]
        self.shards += len(shards)
        self.pairs += task_training.task_pairs(self.job.task, [candidate.row for candidate in accepted])
        return True


def _on_ray_train(config: dict[str, Any]) -> str | None:
    checkpoints: Checkpoints = config["checkpoints"]
    if not checkpoints.store.exists(IDENTITY):
        raise RunFailed(f"A training worker does not see {checkpoints.store.uri}: {SHARED}")
    return work(config["job"], TrainPost(), checkpoints)


def work(job: Job, post: Post, checkpoints: Checkpoints) -> str | None:
    """One worker's life: load, catch up with the last checkpoint, train what is left. Returns why that would be in vain, if it would."""
    models.require_same(job.target, job.fingerprint, "this transfer began with")
    pairs = Arriving(job) if isinstance(job.rows, tuple) else task_training.task_pairs(job.task, _rows(post, job.rows))
    memory = (job.cluster.rows_at_once, job.cluster.recompute, job.cluster.spread_base)
    place = (post.rank, post.world, post.device)
    loop = task_training.start(job.target, pairs, job.adapter, job.training, job.seed, *place, *memory, coming=bool(job.arriving))
    history: dict[str, Any] = {"losses": [], "epoch_losses": [], "seconds": 0.0, "started_at_steps": [], "loss_curve": []}
    with checkpoints.open(post.agreed(checkpoints.last() if post.rank == 0 else None)) as folder:
        if folder:
            adapting.load_weights(loop.model, folder)
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            if failure := loop.load_state_dict(state["loop"]):
                return failure
            history |= state["history"]
    loop.any_worker(False)  # all have read it before one goes on, and replaces it
    history["started_at_steps"].append(loop.step)
    try:
        while not loop.done:
            _epoch(loop, job, history, checkpoints)
    except (Diverged, StreamEnded) as failure:  # on all workers at once, and after every restart: not raised, so that Ray does not try again
        return str(failure)
    loop.use_best()
    _commit(loop, job, history, checkpoints)
    return None


def _epoch(loop: Loop, job: Job, history: dict[str, Any], checkpoints: Checkpoints) -> None:
    """What is left of an epoch, with a checkpoint whenever one is due, or the training is to end."""
    committed = began = time.monotonic()
    asked = job.steps.why_ended.remote()
    for step in loop.run_epoch():
        history["losses"].append(step.loss)
        add_point(history["loss_curve"], history["losses"], step)
        reason = None
        if loop.rank == 0:
            job.steps.step.remote(step)
            if ray.wait([asked], timeout=0)[0]:
                reason, asked = ray.get(asked), job.steps.why_ended.remote()
        if loop.any_worker(bool(reason) or (loop.rank == 0 and time.monotonic() - committed >= job.cluster.checkpoint_seconds)):
            history["seconds"], began = history["seconds"] + time.monotonic() - began, time.monotonic()
            _commit(loop, job, history, checkpoints)
            committed = time.monotonic()
            if loop.any_worker(bool(reason)):
                raise StreamEnded(reason or "")
    history["seconds"] += time.monotonic() - began
    history["epoch_losses"].append(sum(history["losses"]) / len(history["losses"]))
    history["losses"] = []
    if not loop.done:
        _commit(loop, job, history, checkpoints)


def _commit(loop: Loop, job: Job, history: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Commit a checkpoint, which the first worker does."""
    if loop.rank > 0:
        return
    metrics = {"loss": history["epoch_losses"][-1] if history["epoch_losses"] else None, "rows": len(loop.rows), "tokens": loop.tokens}
    chosen = {"learning_rate": job.training.learning_rate, "best_epoch": loop.best_epoch, "held_out_losses": loop.held_out_losses}
    metrics |= {"rows_at_once": loop.at_once, **chosen, **history}
    with tempfile.TemporaryDirectory() as folder:
        adapting.save(loop.model, folder, job.target)
        torch.save({"loop": loop.state_dict(), "history": history}, Path(folder) / STATE)
        (Path(folder) / METRICS).write_text(json.dumps(metrics))
        checkpoints.add(Path(folder))
