"""What is known of a fleet's transfers: `fleet.json`, written anew with each change, or, in a large fleet, some changes later.

It shows; what decides is in the run directories.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from translora_ray.errors import RunFailed, UsageError
from translora_ray.fleet.manifest import Wanted
from translora_ray.storage import REPORT, RunStore

FILE = "fleet.json"
SHARE = 0.1
"""Most of the time that may go into writing: the file grows with the fleet, and so does the number of changes."""
WAITING, STREAMING, TRAINING, GATE = "waiting", "streaming", "training", "gate"
SHIPPED, REVIEW, REFUSED, FAILED = "shipped", "review", "refused", "failed"
ENDS = (SHIPPED, REVIEW, REFUSED, FAILED)
STATES = (WAITING, STREAMING, TRAINING, GATE, *ENDS)
BY_VERDICT = {"ship": SHIPPED, "review": REVIEW, "refuse": REFUSED}


@dataclass
class Record:
    """A transfer. `release` is its id in the registry, `seconds` what engines and training took for it, `reason` why it is where it is."""

    name: str
    kit: str
    target: str
    state: str = WAITING
    reason: str = ""
    release: str | None = None
    seconds: float | None = None
    changed: float = 0.0
    """When, in seconds since 1970."""
    report: bool = False
    """Whether the run has a report; asked of the storage once, when the transfer ends."""


class State:
    """The records in the order of FLEET.yaml; may be changed from several threads. `show` is called whenever they are written.

    A change that comes soon after a writing waits for the next one; `keep` sees to it that this comes, `catch_up` makes it come now.
    """

    def __init__(self, store: RunStore, wanted: Sequence[Wanted], show: Callable[[State], None] = lambda state: None) -> None:
        self.store, self.show = store, show
        self.records = {each.name: Record(each.name, each.kit, each.target) for each in wanted}
        self.loads: dict[str, list[str]] = {}
        """Bases that each finished stream loaded into engines, by when it ended; of all attempts."""
        self._lock = threading.Lock()
        self._late = False
        self._next = 0.0
        if store.exists(FILE):
            self.loads = store.read_json(FILE)["engine_loads"]
            for record in read(store):  # what an attempt before this one knew of releases and verdicts
                mine = self.records.get(record.name)
                if mine and (mine.kit, mine.target) == (record.kit, record.target) and (record.state in ENDS or record.release):
                    self.records[record.name] = record

    def change(self, name: str, state: str, reason: str = "", **facts: Any) -> None:
        with self._lock:
            record = self.records[name]
            record.state, record.reason, record.changed = state, reason, time.time()
            for key, value in facts.items():
                setattr(record, key, value)
            with contextlib.suppress(OSError):  # without it the page has no link
                record.report = record.report or (state in ENDS and self.store.exists(f"runs/{name}/{REPORT}"))
            self._write()

    def loaded(self, loads: list[str]) -> None:
        with self._lock:
            self.loads[f"{len(self.loads) + 1} at {time.time():.0f}"] = loads
            self._write()

    @property
    def counts(self) -> dict[str, int]:
        """Transfers in each state, those without any left out."""
        found = Counter(record.state for record in self.records.values())
        return {state: found[state] for state in STATES if found[state]}

    def keep(self, done: threading.Event) -> None:
        """Write changes that wait as soon as they may be, until `done`. A disk that is full now fails the next change, too."""
        while not done.wait(1.0):
            with self._lock, contextlib.suppress(UsageError):
                if self._late:
                    self._write()

    def begin(self) -> None:
        """Write that the fleet is there, before there is anything else of it."""
        self._late = True
        self.catch_up()

    def catch_up(self) -> None:
        """Write the changes that wait. Raises `RunFailed` where the storage fails."""
        with self._lock:
            if self._late:
                self._next = 0.0
                self._write()
            if self._late:
                raise RunFailed(f"{self.store.uri}/{FILE} can not be written now: the same command with --resume goes on, and writes it.")

    def _write(self) -> None:
        """Unless it is too soon. What only shows does not end what it shows: where the storage fails, the changes wait."""
        self._late = True
        if (began := time.monotonic()) < self._next:
            return
        transfers = [asdict(record) for record in self.records.values()]
        with contextlib.suppress(OSError):
            self.store.write_json(FILE, {"transfers": transfers, "counts": self.counts, "engine_loads": self.loads})
            self.show(self)
            self._late = False
        ended = time.monotonic()
        self._next = ended + (ended - began) * (1 / SHARE - 1)


def read(store: RunStore) -> list[Record]:
    """The records as they were last written; none while the kits of a new fleet are checked."""
    if not store.exists(FILE):
        return []
    known = {each.name for each in fields(Record)}
    return [Record(**{key: value for key, value in row.items() if key in known}) for row in store.read_json(FILE)["transfers"]]
