"""One training worker against two on Ray Train, on the same rows and cores: tokens per second, and the same losses.

    make bench-workers         (or: python benchmarks/workers.py --base REF)

A round is a whole run on the example's rows: one worker has all cores, two have half of them each. Start-up is not counted. Nothing else
may run on the machine.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import Any

import results
from rounds import CPUS, EXAMPLE, LORA, alternate, run_parts

from translora_ray.cluster import Cluster
from translora_ray.config import Training
from translora_ray.placement import ray_session
from translora_ray.reading import load_task
from translora_ray.records import Candidate, read_rows
from translora_ray.storage import RunStore
from translora_ray.stream.requests import Desk
from translora_ray.training.trainer import Job, fit_on_ray_train, train_target

SETTINGS = Training(epochs=2)


def trained(workers: int, base: str, count: int, turn: int) -> tuple[float, int, dict[str, Any]]:
    """(seconds, tokens, facts) of a run with so many workers."""
    task = load_task(EXAMPLE / "task.yaml")
    cluster = Cluster(workers=(workers, workers))
    with tempfile.TemporaryDirectory() as scratch:
        store = RunStore(scratch)
        rows = [Candidate(index, 0, row.input, None, row.target) for index, row in enumerate(read_rows(task.train)[:count])]
        store.write_shard(0, 0, rows, {})
        steps = Desk.remote([], 0)  # type: ignore[attr-defined]
        job = Job(task, base, LORA, SETTINGS, turn, cluster, steps, frozenset(row.index for row in rows))
        facts = train_target(job, store, lambda trial, name: fit_on_ray_train(trial, name, store, CPUS / workers, 0))
    return facts["seconds"], facts["tokens"], facts


def workers(rounds: int, requests: int, base: str) -> list[str]:
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to a worker's CPUs, unless it is set
    with ray_session(Cluster()):
        sides = {f"{count} worker{'s' * (count > 1)}": partial(trained, count, base, requests) for count in (1, 2)}
        measured: dict[str, list[Any]] = alternate(sides, rounds)
    lines = [f"Rows of {EXAMPLE.name}, {SETTINGS.epochs} epochs, batches of {SETTINGS.batch_size}, LoRA of rank {LORA.rank}.", ""]
    lines += ["| | tokens/s | ratio | final loss | difference of the loss |", "|---|---|---|---|---|"]
    (_, first), *_ = measured.items()
    for name, found in measured.items():
        speeds = [[one[1] / one[0] for one in side] for side in (found, first)]
        losses = [[one[2]["loss"] for one in side] for side in (found, first)]
        ratio = results.spread([a / b for a, b in zip(*speeds, strict=True)], 2)
        apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
        lines.append(f"| {name} | {results.spread(speeds[0], 0)} | {ratio} | {results.spread(losses[0], 4)} | at most {apart:.4f} |")
    return [*lines, ""]


if __name__ == "__main__":
    run_parts(__doc__, {"workers": workers})
