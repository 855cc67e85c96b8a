"""The driver of a fleet: groups stream one after the other, finished streams train, pass the gate and are published, and each change is written down.

What decides is in the run directories, as for single transfers; a driver that begins again asks them, so nothing is made twice.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import ray

from translora_ray.background import beside
from translora_ray.config import EngineKind
from translora_ray.errors import NoRoom, Stopped, TransLoraError, UsageError, reason
from translora_ray.evaluation.compare import compared
from translora_ray.fleet import lease as leases
from translora_ray.fleet import state as states
from translora_ray.fleet.groups import Failures, Transfer, check_all, grouped, lacks_its_kit_alone
from translora_ray.fleet.lease import lease
from translora_ray.fleet.manifest import Fleet, Wanted
from translora_ray.fleet.page import write_page
from translora_ray.fleet.state import State
from translora_ray.fleet.training import Full, Slot, bring_to_end
from translora_ray.measures import FleetMeasures
from translora_ray.placement import fit_beside, place, place_for_both, ray_failures, ray_session, trainings_at_once
from translora_ray.progress import Display
from translora_ray.registry import Registry
from translora_ray.releases import UNGATED, verdict
from translora_ray.storage import RESULT, RunStore
from translora_ray.stream.collect import Totals
from translora_ray.stream.pipeline import run_stream
from translora_ray.stream.requests import AT_ONCE, by_share, open_desk
from translora_ray.workflow import Checked, begin

STOPPED = "The fleet was stopped: what was under way is committed; the same command with --resume goes on."


def run_fleet(fleet: Fleet, wanted: Sequence[Wanted], resume: bool, engine: EngineKind, display: Display) -> State:
    """Bring every transfer to its end: shipped, review, refused or failed. Returns the final state.

    Raises `Stopped` after SIGTERM, `UsageError` where nothing could begin. Ends the process where the lease is lost: two drivers must not write one run.
    """
    store = RunStore(fleet.out)
    store.check_writable()
    if fleet.registry:
        Registry(fleet.registry).check_writable()
    new = not store.exists()
    if store.exists(states.FILE) and not resume:
        raise UsageError(f"{store.uri} holds a fleet already: give --resume to go on with it, or choose another out.")
    if not store.exists(states.FILE) and any(each.config.recipe.overlap for each in wanted):
        raise UsageError("overlap is for single transfers, a fleet trains beside its stream anyway: leave it out.")
    if not store.exists(states.FILE) and set(store.names("")) - {leases.FILE}:
        raise UsageError(f"{store.uri} is not empty and not a fleet: choose another out.")
    try:
        with lease(store, _end, wait=display.say if resume else None):
            return Driver(fleet, wanted, store, engine, display).run()
    except UsageError:
        if new and store.local:
            with contextlib.suppress(UsageError, OSError), store.lock():  # which another driver may hold by now
                if not store.names(""):  # a usage error leaves nothing behind
                    (Path(store.root) / ".lock").unlink()
                    Path(store.root).rmdir()
        raise


def _end(why: str) -> NoReturn:
    """End this process as SIGKILL would: whatever its threads are doing, nothing more is written."""
    os.write(2, f"translora: {why}\n".encode())  # which a handler of signals may do
    os._exit(1)


class Driver:
    """One attempt at a fleet."""

    def __init__(self, fleet: Fleet, wanted: Sequence[Wanted], store: RunStore, engine: EngineKind, display: Display) -> None:
        self.fleet, self.wanted, self.store, self.engine, self.display = fleet, wanted, store, engine, display
        self.stop = threading.Event()
        self.registry = Registry(fleet.registry) if fleet.registry else None
        self.state = State(store, wanted, self._show)
        self.measures: FleetMeasures | None = None
        self.steps: list[Any] = []
        """Desks that trainings report to."""
        self.no_room: NoRoom | None = None
        """A training's, which ends the fleet."""

    def run(self) -> State:
        with beside(self.state.keep), self._stopping() as listen:
            try:
                self._run(listen)
            except Stopped:
                if self.no_room:
                    raise self.no_room from None
                raise
            finally:
                self.state.catch_up()
        return self.state

    def _run(self, listen: Callable[[], None]) -> None:
        sound, failures = check_all(self.wanted, self.engine, self.display, self._go_on)
        left: list[tuple[Wanted, Checked]] = []
        settled: list[tuple[Wanted, Checked]] = []
        for wanted, checked in sound:
            (settled if self._settled(wanted, checked) else left).append((wanted, checked))
        if not left:
            self._begin(failures, settled)
            return
        with ray_session(self.fleet.cluster) as local:
            listen()  # Ray's own handler ends the process in the middle of whatever it does
            self.measures = FleetMeasures(states.STATES)
            groups, unplanned = grouped(left, local)
            self._begin({**failures, **unplanned}, settled)
            with ray_failures():
                for group in groups:
                    self._move(group)
            if self.state.counts.keys() - states.ENDS:
                self._go_on()

    def _show(self, state: State) -> None:
        write_page(state)
        if self.measures and ray.is_initialized():
            self.measures.transfers(state.counts)

    def _settled(self, wanted: Wanted, checked: Checked) -> bool:
        return checked.finished and (wanted.data is None or compared(checked.store, wanted.data))

    def _begin(self, failures: Failures, settled: Sequence[tuple[Wanted, Checked]]) -> None:
        """From here on there is a fleet."""
        self.state.begin()
        others = {wanted.name: wanted for wanted in self.wanted}
        for name, why in failures.items():
            self.display.say(f"{name}: {why}")
            if not (self.state.records[name].state in states.BY_VERDICT.values() and lacks_its_kit_alone(others[name])):
                self.state.change(name, states.FAILED, why)
            del others[name]
        for name in others.keys() - {wanted.name for wanted, _ in settled}:
            if self.state.records[name].state != states.WAITING:  # it had ended, and there is something to do again
                self.state.change(name, states.WAITING)
        for wanted, checked in settled:
            self._go_on()
            with self._own_failure(wanted.name):
                self._conclude(wanted, checked)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[Callable[[], None]]:
        """SIGTERM ends the fleet at the next point where all that was computed is committed; a second one at once. Gives what listens to it anew."""

        def terminate(_number: int, _frame: Any) -> None:
            if self.stop.is_set():
                _end("Stopped for the second time: the same command with --resume goes on from what is committed.")
            self.stop.set()

        def listen() -> None:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminate)

        before = signal.getsignal(signal.SIGTERM)
        listen()
        try:
            with beside(self._tell_trainings):
                yield listen
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)

    def _tell_trainings(self, done: threading.Event) -> None:
        while not done.wait(0.2):
            if self.stop.is_set():
                self.display.say("Stopping: what is under way is committed first.")
                for steps in list(self.steps):
                    steps.end.remote(STOPPED)
                return

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise Stopped(STOPPED)

    def _move(self, group: Sequence[Transfer]) -> None:
        """Stream the group; train what is full, beside the stream where the cluster holds both, else after it."""
        self._go_on()
        group = [transfer for transfer in group if self._begun(transfer)]
        if not group:
            return
        if fit_beside(group[0].plan, group[0].worker, min(self.fleet.trainings, len(group))):
            with self._trainers(group) as submit:
                self._stream(group, submit)
        else:
            waiting: list[Full] = []
            self._stream(group, waiting.append)
            with self._trainers(group) as submit:
                for full in waiting:
                    submit(full)

    @contextlib.contextmanager
    def _trainers(self, group: Sequence[Transfer]) -> Iterator[Callable[[Full], None]]:
        """Takes transfers to their ends, as many at once as the fleet allows, in processes that stay where a training has one worker; waits for them."""
        futures: list[Future[None]] = []
        slots: queue.Queue[Slot] = queue.Queue()
        plan, worker = group[0].plan, group[0].worker
        both, wanted = place_for_both(plan, worker), min(self.fleet.trainings, len(group))
        at_once = trainings_at_once(plan, worker, wanted)
        if at_once < wanted:
            self.display.say(f"trainings: {at_once} at once, as the nodes hold no more")
        with contextlib.ExitStack() as stack:
            for _ in range(at_once):
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
            return True
        return False

    def _stream(self, group: Sequence[Transfer], full: Callable[[Full], None]) -> None:
        """Stream the group until each of its transfers is full or failed; `full` is given the former as they come."""
        began, priorities = time.monotonic(), [transfer.wanted.priority for transfer in group]
        over: set[int] = set()

        def show() -> None:
            for number in [number for number in by_share(priorities) if number not in over][:AT_ONCE]:
                if self.state.records[group[number].name].state != states.STREAMING:
                    self.state.change(group[number].name, states.STREAMING)

        def ended(number: int, outcome: Totals | TransLoraError) -> None:
            over.add(number)
            show()
            if isinstance(outcome, TransLoraError):
                self._fail(group[number].name, outcome)
            else:
                self.state.change(group[number].name, states.WAITING, "waits for its training")
                full(Full(group[number], outcome, time.monotonic() - began, began))

        plans, stores = [transfer.plan for transfer in group], [transfer.checked.store for transfer in group]
        show()
        try:
            with ray_failures():
                totals = run_stream(plans, stores, self.display, ended, self.stop, priorities)
        except (Stopped, NoRoom) as failure:
            with contextlib.suppress(NoRoom):
                for number in {*range(len(group))} - over:
                    self.state.change(group[number].name, states.WAITING, "stopped in its stream")
            if isinstance(failure, NoRoom):
                raise
            raise Stopped(STOPPED) from None
        except TransLoraError as failure:
            for number in {*range(len(group))} - over:
                ended(number, failure)
        else:
            if loads := max((total.loaded for total in totals), key=len):  # none where all was streamed before
                self.state.loaded(loads)

    def _complete(self, full: Full, slots: queue.Queue[Slot]) -> None:
        """From a full quota to the end, in a thread."""
        slot = slots.get()
        try:
            with self._own_failure(full.transfer.name), ray_failures():
                bring_to_end(full, slot, self.state, self.display, self._go_on)
                self._conclude(full.transfer.wanted, full.transfer.checked)
        finally:
            slots.put(slot)

    def _conclude(self, wanted: Wanted, checked: Checked) -> None:
        """The verdict on a finished run, and its release where it ships."""
        manifest = checked.manifest()
        evaluation = checked.store.read_json(RESULT) if checked.store.exists(RESULT) else None
        gate = manifest["gate"] or UNGATED
        found = states.BY_VERDICT[verdict(gate, evaluation)]
        reasons = [*gate["reasons"], *((evaluation or {}).get("gate") or {}).get("reasons", [])]
        release = self._published(self.registry, wanted, checked, manifest["adapter_digest"]) if self.registry and found == states.SHIPPED else None
        self.state.change(wanted.name, found, "; ".join(reasons), release=release, seconds=round(sum(manifest["seconds"].values()), 1))
        self.display.say(f"{wanted.name}: {found}" + (f" as {release}" if release else ""))

    def _published(self, registry: Registry, wanted: Wanted, checked: Checked, digest: str) -> str:
        """The id of the run's release. One that an attempt before published stays what it is: somebody may have retired it since."""
        before = self.state.records[wanted.name].release
        if before and registry.holds(before, digest):
            return before
        return registry.publish(checked.store.uri, wanted.release).id

    @contextlib.contextmanager
    def _own_failure(self, name: str) -> Iterator[None]:
        """What goes wrong with a transfer ends that transfer alone, but for a disk that is full."""
        try:
            yield
        except NoRoom as failure:
            self.no_room = failure
            self.stop.set()
            with contextlib.suppress(NoRoom):
                self.state.change(name, states.WAITING, "stopped")
            raise
        except Stopped:
            self.state.change(name, states.WAITING, "stopped in its training")
        except Exception as failure:
            if self.stop.is_set():
                self.state.change(name, states.WAITING, f"stopped: {reason(failure)}")
            else:
                self._fail(name, failure)

    def _fail(self, name: str, failure: Exception) -> None:
        self.display.say(f"{name}: {reason(failure)}")
        self.state.change(name, states.FAILED, reason(failure))
