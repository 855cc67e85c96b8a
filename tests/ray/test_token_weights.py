"""A whole transfer with token weights trains on the loss that the same rows give in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ray.conftest import arguments, rows
from translora_ray.cli import main
from translora_ray.config import Adapter, Task, Training
from translora_ray.records import TaskRow
from translora_ray.training.task import start, task_pairs

pytestmark = pytest.mark.ray


def test_weights_travel_from_the_teacher_to_the_loss(tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(tiny_kit, tiny_gemma, run, "training.token_weights=1", "selection.quota=12", "training.epochs=1")) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    accepted = sorted((row for row in rows(run) if row.accepted), key=lambda row: row.index)
    assert all(len(row.char_excess or ()) == len(f" {row.target}") + 1 for row in accepted) and len(accepted) == 12
    assert not any(row.char_excess for row in rows(run) if not row.accepted and row.target is None)
    found = [TaskRow(row.input, row.target or "", tuple(row.char_excess or ())) for row in accepted]
    task, adapter = Task.model_validate(manifest["task"]), Adapter.model_validate(manifest["training"]["adapter"])
    losses = []
    for share in (1.0, 0.0):
        settings = Training.model_validate(manifest["recipe"]["training"] | {"token_weights": share})
        losses.append([step.loss for step in start(tiny_gemma, task_pairs(task, found), adapter, settings, manifest["recipe"]["seed"]).run_epoch()])
    weighed, plain = (sum(each) / len(each) for each in losses)
    assert manifest["training"]["epoch_losses"] == [pytest.approx(weighed, rel=1e-3)]
    assert abs(weighed - plain) > 0.01 * plain
