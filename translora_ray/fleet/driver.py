"""The driver of a fleet: groups stream one after the other, finished streams train, pass the gate and are published, and each change is written down.

What decides is in the run directories, as for single transfers; a driver that begins again asks them, so nothing is made twice.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from translora_ray.background import beside
from translora_ray.config import EngineKind
from translora_ray.engines.select import opener
from translora_ray.errors import Stopped, TransLoraError, UsageError, first_line
from translora_ray.evaluation.compare import evaluate
from translora_ray.finishing import finish
from translora_ray.fleet import lease as leases
from translora_ray.fleet import state as states
from translora_ray.fleet.groups import Failures, Transfer, check_all, grouped
from translora_ray.fleet.lease import lease
from translora_ray.fleet.manifest import Fleet, Wanted
from translora_ray.fleet.page import write_page
from translora_ray.fleet.state import State
from translora_ray.measures import EVALUATION, FleetMeasures, PhaseMeasures
from translora_ray.placement import Run, fit_beside, place, place_for_both, ray_failures, ray_session, run_once
from translora_ray.progress import Display
from translora_ray.registry import Registry
from translora_ray.releases import UNGATED, verdict
from translora_ray.storage import RESULT, RunStore
from translora_ray.stream.collect import Totals
from translora_ray.stream.pipeline import run_stream
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import open_desk
from translora_ray.workflow import Checked, begin, check_answers, train

STOPPED = "The fleet was stopped: what was under way is committed; the same command with --resume goes on."
LOST = "Another driver has taken over this fleet."


def run_fleet(fleet: Fleet, wanted: Sequence[Wanted], resume: bool, engine: EngineKind, display: Display) -> State:
    """Bring every transfer to its end: shipped, review, refused or failed. Returns the final state.

    Raises `Stopped` after SIGTERM, or where another driver took over; `UsageError` where nothing could begin.
    """
    store = RunStore(fleet.out)
    store.check_writable()
    new = not store.exists()
    if store.exists(states.FILE) and not resume:
        raise UsageError(f"{store.uri} holds a fleet already: give --resume to go on with it, or choose another out.")
    if not store.exists(states.FILE) and set(store.names("")) - {leases.FILE}:
        raise UsageError(f"{store.uri} is not empty and not a fleet: choose another out.")
    stop, lost = threading.Event(), threading.Event()

    def taken() -> None:
        lost.set()
        stop.set()

    try:
        with lease(store, taken):
            return Driver(fleet, wanted, store, engine, display, stop).run()
    except UsageError:
        if new and store.local and not store.names(""):  # a usage error leaves nothing behind
            (Path(store.root) / ".lock").unlink(missing_ok=True)
            Path(store.root).rmdir()
        raise
    except Stopped:
        if lost.is_set():
            raise Stopped(LOST) from None
        raise


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


class Driver:
    """One attempt at a fleet."""

    def __init__(self, fleet: Fleet, wanted: Sequence[Wanted], store: RunStore, engine: EngineKind, display: Display, stop: threading.Event) -> None:
        self.fleet, self.wanted, self.store, self.engine, self.display, self.stop = fleet, wanted, store, engine, display, stop
        self.registry = Registry(fleet.registry) if fleet.registry else None
        self.state = State(store, wanted, self._show)
        self.measures: FleetMeasures | None = None
        self.steps: list[Any] = []
        """Desks that trainings report to."""

    def run(self) -> State:
        with beside(self.state.keep):
            try:
                self._run()
            finally:
                self.state.catch_up()
        return self.state

    def _run(self) -> None:
        sound, failures = check_all(self.wanted, self.engine, self.display)
        left: list[tuple[Wanted, Checked]] = []
        settled: list[tuple[Wanted, Checked]] = []
        for wanted, checked in sound:
            (settled if self._settled(wanted, checked) else left).append((wanted, checked))
        if not left:
            self._begin(failures, settled)
            return
        with ray_session(self.fleet.cluster) as local:
            self.measures = FleetMeasures(states.STATES)
            groups, unplanned = grouped(left, local)
            self._begin({**failures, **unplanned}, settled)
            with self._stopping(), ray_failures():
                for group in groups:
                    self._move(group)

    def _show(self, state: State) -> None:
        write_page(state)
        if self.measures and ray.is_initialized():
            self.measures.transfers(state.counts)

    def _settled(self, wanted: Wanted, checked: Checked) -> bool:
        return checked.finished and (wanted.data is None or checked.store.exists(RESULT))

    def _begin(self, failures: Failures, settled: Sequence[tuple[Wanted, Checked]]) -> None:
        for name, reason in failures.items():
            self.display.say(f"{name}: {reason}")
            self.state.change(name, states.FAILED, reason)
        for wanted, checked in settled:
            with self._own_failure(wanted.name):
                self._conclude(wanted, checked)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """SIGTERM ends the fleet at the next point where all that was computed is committed; a second one at once."""
        done = threading.Event()

        def tell_trainings() -> None:
            self.stop.wait()
            if not done.is_set():
                self.display.say("Stopping: what is under way is committed first.")
                for steps in list(self.steps):
                    steps.end.remote(STOPPED)

        def terminate(_number: int, _frame: Any) -> None:
            if self.stop.is_set():
                raise SystemExit(1)
            self.stop.set()

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, terminate) if main else None  # Ray's own ends the process in the middle of whatever it does
        threading.Thread(target=tell_trainings, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            if main:
                signal.signal(signal.SIGTERM, before)

    def _move(self, group: Sequence[Transfer]) -> None:
        """Stream the group; train what is full, beside the stream where the cluster holds both, else after it."""
        group = [transfer for transfer in group if self._begun(transfer)]
        if not group:
            return
        if fit_beside(group[0].plan, group[0].worker, self.fleet.trainings):
            with self._trainers(group) as submit:
                self._stream(group, submit)
        else:
            waiting: list[Full] = []
            self._stream(group, waiting.append)
            with self._trainers(group) as submit:
                for full in waiting:
                    submit(full)
        if self.stop.is_set():
            raise Stopped(STOPPED)

    @contextlib.contextmanager
    def _trainers(self, group: Sequence[Transfer]) -> Iterator[Callable[[Full], None]]:
        """Takes transfers to their ends, as many at once as the fleet allows, in processes that stay where a training has one worker; waits for them."""
        futures: list[Future[None]] = []
        slots: queue.Queue[Slot] = queue.Queue()
        both = place_for_both(group[0].plan, group[0].worker)
        with contextlib.ExitStack() as stack:
            for _ in range(min(self.fleet.trainings, len(group))):
                slots.put(Slot(open_desk(), stack.enter_context(place(both)) if both else None))
                self.steps.append(slots.queue[-1].steps)
                stack.callback(ray.kill, self.steps[-1])
            pool = stack.enter_context(ThreadPoolExecutor(slots.qsize()))
            try:
                yield lambda full: futures.append(pool.submit(self._complete, full, slots))
                for future in futures:
                    future.result()
            except BaseException:
                self.stop.set()  # what trains leaves a checkpoint and ends
                for future in futures:
                    future.cancel()
                raise

    def _begun(self, transfer: Transfer) -> bool:
        with self._own_failure(transfer.name):
            begin(transfer.checked)
            self.state.change(transfer.name, states.STREAMING)
            return True
        return False

    def _stream(self, group: Sequence[Transfer], full: Callable[[Full], None]) -> None:
        """Stream the group until each of its transfers is full or failed; `full` is given the former as they come."""
        began = time.monotonic()
        over: set[int] = set()

        def ended(number: int, outcome: Totals | TransLoraError) -> None:
            over.add(number)
            if isinstance(outcome, TransLoraError):
                self._fail(group[number].name, outcome)
            else:
                self.state.change(group[number].name, states.WAITING, "waits for its training")
                full(Full(group[number], outcome, time.monotonic() - began, began))

        plans, stores = [transfer.plan for transfer in group], [transfer.checked.store for transfer in group]
        try:
            with ray_failures():
                totals = run_stream(plans, stores, self.display, ended, self.stop, [transfer.wanted.priority for transfer in group])
        except Stopped:
            for number in {*range(len(group))} - over:
                self.state.change(group[number].name, states.WAITING, "stopped in its stream")
            raise Stopped(STOPPED) from None
        except TransLoraError as failure:
            for number in {*range(len(group))} - over:
                ended(number, failure)
        else:
            loads = max((list(total.loads.values())[-1] for total in totals if total.loads), key=len, default=[])
            self.state.loaded(f"{time.time():.0f}", loads)

    def _complete(self, full: Full, slots: queue.Queue[Slot]) -> None:
        """From a full quota to the end, in a thread."""
        slot = slots.get()
        try:
            with self._own_failure(full.transfer.name), ray_failures():
                self._train(full, slot)
                self._conclude(full.transfer.wanted, full.transfer.checked)
        finally:
            slots.put(slot)

    def _train(self, full: Full, slot: Slot) -> None:
        """Training, gate and evaluation, as far as they are not done."""
        transfer, checked, plan = full.transfer, full.transfer.checked, full.transfer.plan
        if self.stop.is_set():
            raise Stopped(STOPPED)
        if not checked.finished:
            display = self.display.named(transfer.name)
            check_answers(plan, checked.store)
            self.state.change(transfer.name, states.TRAINING)
            ray.get(slot.steps.step.remote(None))  # not the last one of the training before
            training = train(plan, checked.store, transfer.worker, slot.steps, display, slot.run)
            self.state.change(transfer.name, states.GATE)
            times = {"stream": full.streamed, "began": full.began}
            finish(plan, checked.store, checked.identity, full.totals, training, times, display, slot.run)
        if transfer.wanted.data and not checked.store.exists(RESULT):
            run = slot.run or run_once(plan)
            with PhaseMeasures().timed(EVALUATION):
                run(_evaluate, plan, checked.store.uri, transfer.wanted.data)

    def _conclude(self, wanted: Wanted, checked: Checked) -> None:
        """The verdict on a finished run, and its release where it ships."""
        manifest = checked.manifest()
        evaluation = checked.store.read_json(RESULT) if checked.store.exists(RESULT) else None
        gate = manifest["gate"] or UNGATED
        found = states.BY_VERDICT[verdict(gate, evaluation)]
        reasons = [*gate["reasons"], *((evaluation or {}).get("gate") or {}).get("reasons", [])]
        release = self.registry.publish(checked.store.uri, wanted.release).id if self.registry and found == states.SHIPPED else None
        self.state.change(wanted.name, found, "; ".join(reasons), release=release, seconds=round(sum(manifest["seconds"].values()), 1))
        self.display.say(f"{wanted.name}: {found}" + (f" as {release}" if release else ""))

    @contextlib.contextmanager
    def _own_failure(self, name: str) -> Iterator[None]:
        """What goes wrong with a transfer ends that transfer alone."""
        try:
            yield
        except Stopped:
            self.state.change(name, states.WAITING, "stopped in its training")
        except Exception as failure:
            if self.stop.is_set():
                self.state.change(name, states.WAITING, "stopped")
            else:
                self._fail(name, failure)

    def _fail(self, name: str, failure: Exception) -> None:
        reason = str(failure) if isinstance(failure, TransLoraError) else f"{type(failure).__name__}: {first_line(failure)}"
        self.display.say(f"{name}: {reason}")
        self.state.change(name, states.FAILED, reason)


def _evaluate(plan: Plan, run: str, data: str) -> None:
    """`translora evaluate` where an engine has room."""
    with Display() as display:
        evaluate(run, data, None, [], opener(plan.engine, plan.cluster.vllm, plan.engine_gpus, display.say), display)
