"""`index.html` of a fleet: its verdicts, and where each transfer's report lies. One file without scripts or other files."""

from __future__ import annotations

import html
from datetime import UTC, datetime

from translora_ray.fleet.state import FAILED, REFUSED, REVIEW, SHIPPED, Record, State

FILE = "index.html"
REPORT = "report.html"
COLOURS = {SHIPPED: "#1a7f37", REVIEW: "#9a6700", REFUSED: "#cf222e", FAILED: "#cf222e"}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Fleet: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1f2328 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border-bottom: 1px solid #d1d9e0; padding: .4rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }}
.number {{ text-align: right; white-space: nowrap }}
.counts span {{ margin-right: 1.5rem; font-weight: 600 }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="counts">{counts}</p>
<table>
<thead><tr><th>transfer</th><th>state</th><th>release</th><th>target</th><th>compute seconds</th><th>why</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p>{loads} engine loads. As of {now}.</p>
</body>
</html>
"""


def write_page(state: State) -> None:
    """Write the page of a fleet beside its `fleet.json`."""
    counts = "".join(f"<span>{count} {_coloured(name)}</span>" for name, count in state.counts.items())
    rows = "\n".join(_row(record, state.store.exists(f"runs/{record.name}/{REPORT}")) for record in state.records.values())
    loads = sum(map(len, state.loads.values()))
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    state.store.write(FILE, PAGE.format(title=html.escape(state.store.uri), counts=counts, rows=rows, loads=loads, now=now).encode())


def _row(record: Record, reported: bool) -> str:
    name = html.escape(record.name)
    link = f'<a href="runs/{name}/{REPORT}">{name}</a>' if reported else name
    seconds = "" if record.seconds is None else f"{record.seconds:,.0f}"
    cells = [link, _coloured(record.state), html.escape(record.release or ""), html.escape(record.target)]
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr>{row}<td class="number">{seconds}</td><td>{html.escape(record.reason)}</td></tr>'


def _coloured(state: str) -> str:
    return f'<span style="color:{COLOURS[state]}">{state}</span>' if state in COLOURS else state
