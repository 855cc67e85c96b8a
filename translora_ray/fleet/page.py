"""`index.html` of a fleet: its verdicts, and where each transfer's report lies. One file without scripts or other files, in the style of the reports."""

from __future__ import annotations

from datetime import UTC, datetime

from translora_ray.evaluation.markup import Html, document, put, table, tag
from translora_ray.fleet.state import BY_VERDICT, FAILED, Record, State
from translora_ray.storage import REPORT

FILE = "index.html"
HEADS = ("transfer", "state", "release", "target", "compute seconds", "why")
CLASSES = {FAILED: "refuse", **{state: verdict for verdict, state in BY_VERDICT.items()}}
"""A state's class in the style of the reports."""


def write_page(state: State) -> None:
    """Write the page of a fleet beside its `fleet.json`."""
    uri = state.store.uri
    counts = [Html(f"{count} {_coloured(name)}") for name, count in state.counts.items()]
    rows = [_row(record) for record in state.records.values()]
    loads = sum(map(len, state.loads.values()))
    caption = f"{loads} engine loads. As of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    head = tag("header", tag("h1", uri), tag("p", Html(", ".join(counts))))
    state.store.write(FILE, document(f"Fleet: {uri}", head, tag("main", table(caption, HEADS, rows, numbers=(4,)))).encode())


def _row(record: Record) -> list[object]:
    name = tag("a", record.name, href=f"runs/{record.name}/{REPORT}") if record.report else record.name
    seconds = "" if record.seconds is None else f"{record.seconds:,.0f}"
    return [name, _coloured(record.state), tag("span", record.release or ""), record.target, seconds, record.reason]


def _coloured(state: str) -> Html:
    return tag("span", state, class_=CLASSES[state]) if state in CLASSES else put(state)
