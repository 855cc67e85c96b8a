"""How the parts of a transfer end together."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from translora_ray import workflow
from translora_ray.errors import StreamEnded
from translora_ray.placement import Resources
from translora_ray.progress import Display
from translora_ray.storage import RunStore
from translora_ray.stream.collect import Totals
from translora_ray.stream.plan import Plan


def test_ctrl_c_after_the_stream_ends_the_training_beside_it(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def train(*_: object) -> dict[str, Any]:
        time.sleep(0.5)  # the other thread waits for this one by now
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(10), "nobody told it"
        raise StreamEnded("The stream ended.")

    tell: Callable[[str], None] = lambda _: ended.set()  # noqa: E731
    monkeypatch.setattr(workflow, "run_stream", lambda *_, **__: [Totals()])
    monkeypatch.setattr(workflow, "check_answers", lambda *_: None)
    monkeypatch.setattr(workflow, "train", train)
    monkeypatch.setattr(workflow, "open_desk", lambda: SimpleNamespace(end=SimpleNamespace(remote=tell)))
    monkeypatch.setattr(workflow.ray, "get", lambda found: found)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Display() as display, pytest.raises(KeyboardInterrupt):
            workflow._overlapped(plan, RunStore(str(tmp_path / "run")), Resources(1.0, 0.0), display)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.is_set()


def test_what_is_left_of_a_training_is_told_by_its_own_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from translora_ray import progress
    from translora_ray.records import Step

    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Display() as display:
        phase = display.phase("training")
        phase.update(0, 1, "starting workers")
        for at, step in ((130.0, 501), (140.0, 511)):  # it goes on from a checkpoint
            now[0] = at
            phase.step(Step(step, 601, 1.0, 100, 1.0))
    assert "511/601 loss 1.000, 100 tokens/s (10 s, 90 s left)" in capsys.readouterr().err
    with Display() as display:
        phase = display.phase("training")
        for at, step in ((140.0, 1), (740.0, 601), (741.0, 1), (751.0, 11)):  # a second training, with another rate
            now[0] = at
            phase.step(Step(step, 601, 1.0, 100, 1.0))
    assert "11/601 loss 1.000, 100 tokens/s (10 s, 590 s left)" in capsys.readouterr().err
