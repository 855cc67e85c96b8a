"""One driver at a time writes a fleet: a lease with an expiry, renewed while its driver lives.

On local disk a lock, which ends with its process, says at once whether a driver on this machine lives. Between machines, and on object stores,
which know no locks, `lease.json` says it: a driver that does not renew it in time has lost the fleet, and must write no more when it finds out. Where
two drivers begin in the same moments on an object store, the later writer has it. The machines' clocks may differ by much less than `SECONDS`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from translora_ray.background import beside
from translora_ray.errors import NoRoom, UsageError
from translora_ray.storage import RunStore

FILE = "lease.json"
SECONDS = 60.0
SETTLE = 8.0
"""Seconds after which a lease on an object store is read again: who wrote last has it. More than the six for which pyarrow tries a writing."""
TAKEN = "Another driver has taken over this fleet."
SILENT = "The fleet's storage did not answer until the lease on it expired, so another driver may have it: the same command with --resume goes on."


def holder(store: RunStore) -> dict[str, Any] | None:
    """The lease on a fleet that has not expired, None where there is none."""
    lease = _read(store)
    return lease if lease and lease["expires"] > time.time() else None


@contextlib.contextmanager
def lease(store: RunStore, lost: Callable[[str], None], seconds: float = SECONDS, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the fleet. Raises `UsageError` where another driver does; calls `lost` with the reason, in a thread, where it can be held no longer.

    With `wait`, which is told of it, a lease may run out, as that of a driver whose machine is gone does; it is another's when it is renewed meanwhile.
    """
    mine: dict[str, Any] = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
    with store.lock():
        if other := _other(store, mine["machine"], seconds, wait):
            left = other["expires"] - time.time()
            raise UsageError(
                f"{store.uri} is driven by process {other['pid']} on {other['host']}: wait for it, or stop it; it is given up {left:.0f} s after its last sign."
            )
        until = _renew(store, mine, seconds)
        if not store.local:
            time.sleep(SETTLE)
            if not _holds(store, mine):
                raise UsageError(f"{store.uri} was taken by another driver at the same moment: wait for it, or stop it.")
        try:
            with beside(lambda done: _keep(store, mine, seconds, until, done, lost)):
                yield
        finally:
            with contextlib.suppress(Exception):  # whatever it is, the lease runs out by itself
                if _holds(store, mine):
                    store.fs.delete_file(store.path(FILE))


def _other(store: RunStore, machine: str, seconds: float, wait: Callable[[str], None] | None) -> dict[str, Any] | None:
    """The lease of another driver, who may live."""
    first = found = holder(store)
    if found and store.local and found["machine"] == machine:  # the lock shows that its process is gone
        return None
    if found and wait:
        left = found["expires"] - time.time()
        wait(f"process {found['pid']} on {found['host']} drove this fleet last: waiting up to {left:.0f} s for a sign of it")
        while found == first:
            time.sleep(min(1.0, seconds / 20))
            found = holder(store)
    return found


def _keep(store: RunStore, mine: dict[str, Any], seconds: float, until: float, done: threading.Event, lost: Callable[[str], None]) -> None:
    """Renew the lease until `done`. A storage that does not answer now, or is full, may be better before the lease expires; while it keeps this thread
    waiting, another one looks at the clock."""
    expires, why = [until], [SILENT]

    def watch(over: threading.Event) -> None:
        while not over.wait(max(0.0, min(seconds / 4, expires[0] - time.monotonic()))):
            if time.monotonic() >= expires[0]:
                lost(why[0])
                return

    with beside(watch):
        while not done.wait(seconds / 4):
            try:
                if not _holds(store, mine):
                    lost(TAKEN)
                    return
                expires[0], why[0] = _renew(store, mine, seconds), SILENT
            except Exception as failure:  # whatever it is, `watch` ends what can not be held
                why[0] = str(failure) if isinstance(failure, NoRoom) else SILENT


def _read(store: RunStore) -> dict[str, Any] | None:
    try:
        return store.read_json(FILE)
    except FileNotFoundError:
        return None


def _holds(store: RunStore, mine: dict[str, Any]) -> bool:
    lease = _read(store)
    return lease is not None and bool(lease["owner"] == mine["owner"])


def _renew(store: RunStore, mine: dict[str, Any], seconds: float) -> float:
    """When it expires, by this process's clock: so long after the writing began, however long that took."""
    until = time.monotonic() + seconds
    store.write_json(FILE, {**mine, "expires": time.time() + seconds})
    return until


def _machine() -> str:
    """This machine since it was started; containers have a name of their own."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{socket.gethostname()}"
