"""What comes after a transfer's stream: training, gate, evaluation on real rows, in a slot that one transfer after the other has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from translora_ray.engines.select import opener
from translora_ray.evaluation.compare import compared, evaluate
from translora_ray.finishing import finish
from translora_ray.fleet import state as states
from translora_ray.fleet.groups import Transfer
from translora_ray.fleet.state import State
from translora_ray.measures import EVALUATION, PhaseMeasures
from translora_ray.placement import Run, run_once
from translora_ray.progress import Display
from translora_ray.stream.collect import Totals
from translora_ray.stream.plan import Plan
from translora_ray.workflow import check_answers, train


@dataclass(frozen=True)
class Full:
    """A transfer whose examples are there, the seconds of the stream until then, and when that began."""

    transfer: Transfer
    totals: Totals
    streamed: float
    began: float


@dataclass(frozen=True)
class Slot:
    """Where one transfer at a time is trained: the desk that hears of its steps, and a place that stays, or none where there are several workers."""

    steps: Any
    run: Run | None


def bring_to_end(full: Full, slot: Slot, state: State, display: Display, go_on: Callable[[], None]) -> None:
    """Training, gate and evaluation, as far as they are not done. Raises `Stopped` where `go_on` does, or where the slot's desk is told to end."""
    transfer, checked, plan = full.transfer, full.transfer.checked, full.transfer.plan
    go_on()
    if not checked.finished:
        display = display.named(transfer.name)
        check_answers(plan, checked.store)
        state.change(transfer.name, states.TRAINING)
        ray.get(slot.steps.step.remote(None))  # not the last one of the training before
        training = train(plan, checked.store, transfer.worker, slot.steps, display, slot.run)
        state.change(transfer.name, states.GATE)
        times = {"stream": full.streamed, "began": full.began}
        finish(plan, checked.store, checked.identity, full.totals, training, times, display, slot.run)
    if transfer.wanted.data and not compared(checked.store, transfer.wanted.data):
        go_on()
        run = slot.run or run_once(plan)
        with PhaseMeasures().timed(EVALUATION):
            run(_evaluate, plan, checked.store.uri, transfer.wanted.data, transfer.wanted.train)


def _evaluate(plan: Plan, run: str, data: str, train: str | None) -> None:
    """`translora evaluate` where an engine has room."""
    with Display() as display:
        device = None if plan.engine_gpus else "cpu"
        evaluate(run, data, None, [], opener(plan.engine, plan.cluster.vllm, plan.engine_gpus, display.say), display, train, device=device)
