"""The driver of a fleet: groups stream one after the other, finished streams train, pass the gate and are published, and each change is written down.

What decides is in the run directories, as for single transfers; a driver that begins again asks them, so nothing is made twice.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from translora_ray.config import EngineKind
from translora_ray.engines.select import engine_for, open_engine
from translora_ray.errors import Stopped, TransLoraError, UsageError, first_line
from translora_ray.evaluation.compare import evaluate
from translora_ray.fleet import state as states
from translora_ray.fleet.groups import Failures, Transfer, check_all, grouped
from translora_ray.fleet.lease import lease
from translora_ray.fleet.manifest import Fleet, Wanted
from translora_ray.fleet.page import write_page
from translora_ray.fleet.state import State
from translora_ray.placement import fit_beside, ray_failures, ray_session
from translora_ray.progress import Display
from translora_ray.registry import Registry
from translora_ray.releases import UNGATED, verdict
from translora_ray.storage import EVALUATION, RunStore
from translora_ray.stream.collect import Totals
from translora_ray.stream.pipeline import Ended, run_stream
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import Desk
from translora_ray.workflow import Checked, begin, check_answers, finish, train

RESULT = f"{EVALUATION}/result.json"
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
    if not store.exists(states.FILE) and set(store.names("")) - {"lease.json"}:
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


class Driver:
    """One attempt at a fleet."""

    def __init__(self, fleet: Fleet, wanted: Sequence[Wanted], store: RunStore, engine: EngineKind, display: Display, stop: threading.Event) -> None:
        self.fleet, self.wanted, self.store, self.engine, self.display, self.stop = fleet, wanted, store, engine, display, stop
        self.registry = Registry(fleet.registry) if fleet.registry else None
        self.state = State(store, wanted, write_page)
        self.steps: queue.Queue[Any] = queue.Queue()
        """Desks for the steps of the trainings, one for each at once."""

    def run(self) -> State:
        sound, failures = check_all(self.wanted, self.engine, self.display)
        left = [(wanted, checked) for wanted, checked in sound if not self._settled(wanted, checked)]
        settled = [(wanted, checked) for wanted, checked in sound if self._settled(wanted, checked)]
        if not left:
            self._begin(failures, settled)
            return self.state
        with ray_session(self.fleet.cluster) as local:
            groups, unplanned = grouped(left, local)
            self._begin({**failures, **unplanned}, settled)
            with self._stopping(), ray_failures():
                for group in groups:
                    self._move(group)
        return self.state

    def _settled(self, wanted: Wanted, checked: Checked) -> bool:
        return checked.manifest() is not None and (wanted.data is None or checked.store.exists(RESULT))

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
        self.steps = queue.Queue()
        desks = [Desk.remote([], 0) for _ in range(self.fleet.trainings)]  # type: ignore[attr-defined]
        for desk in desks:
            self.steps.put(desk)
        done = threading.Event()

        def tell_trainings() -> None:
            self.stop.wait()
            if not done.is_set():
                self.display.say("Stopping: what is under way is committed first.")
                for desk in desks:
                    desk.end.remote(STOPPED)

        def terminate(_number: int, _frame: Any) -> None:
            if self.stop.is_set():
                raise SystemExit(1)
            self.stop.set()

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, terminate) if main else None  # Ray's own ends the process in the middle of whatever it does
        thread = threading.Thread(target=tell_trainings, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            if main:
                signal.signal(signal.SIGTERM, before)
            for desk in desks:
                ray.kill(desk)

    def _move(self, group: Sequence[Transfer]) -> None:
        """Stream the group; train what is full, beside the stream where the cluster holds both, else after it."""
        group = [transfer for transfer in group if self._begun(transfer)]
        if not group:
            return
        beside = fit_beside(group[0].plan, group[0].worker, self.fleet.trainings)
        began = time.monotonic()
        full: list[tuple[Transfer, Totals, float]] = []
        with ThreadPoolExecutor(self.fleet.trainings) as pool:
            futures: list[Future[None]] = []

            def ended(number: int, outcome: Totals | TransLoraError) -> None:
                transfer = group[number]
                if isinstance(outcome, TransLoraError):
                    self._fail(transfer.name, outcome)
                    return
                self.state.change(transfer.name, states.WAITING, "waits for its training")
                full.append((transfer, outcome, time.monotonic() - began))
                if beside:
                    futures.append(pool.submit(self._complete, *full[-1], began))

            try:
                self._stream(group, ended)
                if not beside:
                    futures += [pool.submit(self._complete, *each, began) for each in full]
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self.stop.set()  # what trains commits and ends
                raise
        if self.stop.is_set():
            raise Stopped(STOPPED)

    def _begun(self, transfer: Transfer) -> bool:
        with self._own_failure(transfer.name):
            begin(transfer.checked)
            self.state.change(transfer.name, states.STREAMING)
            return True
        return False

    def _stream(self, group: Sequence[Transfer], ended: Ended) -> None:
        over: set[int] = set()

        def once(number: int, outcome: Totals | TransLoraError) -> None:
            over.add(number)
            ended(number, outcome)

        plans, stores = [transfer.plan for transfer in group], [transfer.checked.store for transfer in group]
        try:
            with ray_failures():
                totals = run_stream(plans, stores, self.display, once, self.stop, [transfer.wanted.priority for transfer in group])
        except Stopped:
            for number, transfer in enumerate(group):
                if number not in over:
                    self.state.change(transfer.name, states.WAITING, "stopped in its stream")
            raise Stopped(STOPPED) from None
        except TransLoraError as failure:
            for number in {*range(len(group))} - over:
                once(number, failure)
        else:
            loads = max((list(total.loads.values())[-1] for total in totals if total.loads), key=len, default=[])
            self.state.loaded(f"{time.time():.0f}", loads)

    def _complete(self, transfer: Transfer, totals: Totals, streamed: float, began: float) -> None:
        """From a full quota to the end, in a thread."""
        with self._own_failure(transfer.name), ray_failures():
            checked, plan, display = transfer.checked, transfer.plan, self.display.named(transfer.name)
            if checked.manifest() is None:
                check_answers(plan, checked.store)
                training = self._train(transfer, display)
                self.state.change(transfer.name, states.GATE)
                finish(plan, checked.store, checked.identity, totals, training, {"stream": streamed, "began": began}, display)
            if transfer.wanted.data and not checked.store.exists(RESULT):
                needs = {"num_cpus": plan.engine_cpus, "num_gpus": plan.engine_gpus}
                ray.get(ray.remote(_evaluate).options(**needs).remote(plan, checked.store.uri, transfer.wanted.data))
            self._conclude(transfer.wanted, checked)

    def _train(self, transfer: Transfer, display: Display) -> dict[str, Any]:
        steps = self.steps.get()
        try:
            if self.stop.is_set():
                raise Stopped(STOPPED)
            self.state.change(transfer.name, states.TRAINING)
            ray.get(steps.step.remote(None))
            return train(transfer.plan, transfer.checked.store, transfer.worker, steps, display)
        finally:
            self.steps.put(steps)

    def _conclude(self, wanted: Wanted, checked: Checked) -> None:
        """The verdict on a finished run, and its release where it ships."""
        manifest = checked.manifest() or {}
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
        evaluate(
            run,
            data,
            None,
            [],
            lambda base, used: open_engine(engine_for(plan.engine, used, display.say), base, used, plan.cluster.vllm, plan.engine_gpus),
            display,
        )
