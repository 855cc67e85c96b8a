"""What `translora status` shows of a fleet: it reads the fleet's directory and nothing else, so it works from any machine and beside any driver."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from translora_ray.errors import UsageError
from translora_ray.fleet.lease import holder
from translora_ray.fleet.state import ENDS, FAILED, FILE, REFUSED, REVIEW, SHIPPED, Record, read
from translora_ray.storage import RunStore, reaching

STYLES = {SHIPPED: "green", REVIEW: "yellow", REFUSED: "red", FAILED: "red"}
SECONDS = 2.0


def show_status(out: str, watch: bool) -> None:
    """A fleet's table; with `watch` shown anew until all transfers have ended or no driver is there."""
    store = RunStore(out)
    with reaching(store.uri):
        there = store.exists(FILE) or holder(store)
    if not there:
        raise UsageError(f"There is no fleet at {store.uri}: give its FLEET.yaml, or the directory that this names as out.")
    if not watch:
        Console().print(_table(*_now(store)))
        return
    with Live(refresh_per_second=4) as live:
        while True:
            records, driver = _now(store)
            live.update(_table(records, driver))
            if driver is None or (records and all(record.state in ENDS for record in records)):
                return
            time.sleep(SECONDS)


def counts_line(records: list[Record]) -> str:
    """How the transfers ended, in one line."""
    found = Counter(record.state for record in records)
    rest = sum(count for state, count in found.items() if state not in ENDS)
    return ", ".join(f"{found[state]} {state}" for state in ENDS) + (f", {rest} not finished" if rest else "")


def _now(store: RunStore) -> tuple[list[Record], str | None]:
    """What is written of the transfers, and who drives them."""
    with reaching(store.uri):
        records, lease = read(store), holder(store)
    return records, f"driven by process {lease['pid']} on {lease['host']}" if lease else None


def _table(records: list[Record], driver: str | None) -> Group:
    table = Table()
    for column in ("transfer", "state", "release", "compute s", "since", "why"):
        table.add_column(column, justify="right" if column in ("compute s", "since") else "left", overflow="fold")
    for record in records:
        seconds = "" if record.seconds is None else f"{record.seconds:,.0f}"
        since = _ago(time.time() - record.changed) if record.changed else ""
        table.add_row(record.name, Text(record.state, STYLES.get(record.state, "")), record.release or "", seconds, since, Text(record.reason))
    return Group(table, Text(f"{counts_line(records)}; {driver or 'no driver'}"))


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
