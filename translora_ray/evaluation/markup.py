"""The few pieces of HTML that the report is made of, and its style. What is not `Html` is escaped when it is put on the page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from translora_ray.evaluation.plots import Plot

CSS = """
:root { --ink: #1b1f24; --soft: #565d67; --line: #dfe2e6; --ship: #0b6b3a; --review: #8a5a00; --refuse: #a3161f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.5rem 4rem; background: #fff; color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header p { margin: 0; color: var(--soft); }
h1 { margin: 0 0 .2rem; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .6rem; padding-top: 1.1rem; border-top: 1px solid var(--line); font-size: 1.2rem; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 48rem; }
.soft, figcaption, caption { color: var(--soft); }
.banner { margin: 1.4rem 0 1.2rem; padding: 1rem 1.3rem; border-left: .5rem solid var(--soft); border-radius: .3rem; background: #f4f5f6; }
.banner h2 { margin: 0; padding: 0; border: 0; font-size: 1.5rem; }
.banner p, .banner ul { margin: .3rem 0 0; }
.ship { color: var(--ship); } .review { color: var(--review); } .refuse { color: var(--refuse); }
.banner.ship { border-color: var(--ship); background: #e8f5ed; }
.banner.review { border-color: #d08a00; background: #fdf3de; }
.banner.refuse { border-color: var(--refuse); background: #fcebec; }
.banner p, .banner li { color: var(--ink); }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 0; padding: 0; list-style: none; }
.tiles li { flex: 1 1 11rem; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: .3rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { display: block; font-size: .875rem; color: var(--soft); }
.wide { overflow-x: auto; }
table { width: 100%; margin: .8rem 0; border-collapse: collapse; font-size: .9375rem; }
caption { padding-bottom: .3rem; text-align: left; font-size: .875rem; }
th, td { padding: .38rem 1.4rem .38rem .3rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #aab0b8; font-size: .875rem; overflow-wrap: normal; }
td span { white-space: nowrap; }
th:last-child, td:last-child { padding-right: .3rem; }
tbody th { font-weight: normal; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.marked th, .marked td { font-weight: 600; background: #eef5fb; }
.text { min-width: 9rem; white-space: pre-wrap; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .875rem; }
pre { padding: .8rem; overflow-x: auto; background: #f4f5f6; font-size: .8125rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  .banner, .marked th, .marked td { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .banner, .tiles li { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing that is not in it."""
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "\ufffd")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def put(value: object) -> Html:
    """Markup as it is; anything else escaped, and without characters that HTML can not hold."""
    return value if isinstance(value, Html) else Html(html.escape(str(value).translate(_CONTROLS)))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """An element; an attribute whose name Python keeps for itself is given with a `_` after it."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{given}>{''.join(map(put, content))}</{name}>")


def section(title: str, *content: object) -> Html:
    return tag("section", tag("h2", title), *content)


def soft(text: str) -> Html:
    """A remark; also what stands where a part is missing."""
    return tag("p", text, class_="soft")


def listed(items: Iterable[object], class_: str = "") -> Html:
    return tag("ul", *(tag("li", item) for item in items), class_=class_)


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = (), texts: Sequence[int] = (), marked: str = ""
) -> Html:
    """Rows under heads; the first cell of each names its row. `numbers`, `texts`: columns of figures and of prompts; `marked`: a row that stands out."""

    def kind(column: int) -> str:
        return "number" if column in numbers else "text" if column in texts else ""

    def cell(column: int, content: object) -> Html:
        direction = {"dir": "auto"} if column in texts else {}
        return tag("td" if column else "th", content, class_=kind(column), **({} if column else {"scope": "row"}), **direction)

    head = tag("tr", *(tag("th", name, scope="col", class_="number" if column in numbers else "") for column, name in enumerate(heads)))
    body = [tag("tr", *(cell(column, content) for column, content in enumerate(row)), class_="marked" if marked and row[0] == marked else "") for row in rows]
    return tag("div", tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body)), class_="wide")


def figure(plot: Plot, caption: str) -> Html:
    """A plot as a picture of its own inside the page, so that no two plots share names."""
    source = "data:image/svg+xml;base64," + base64.b64encode(plot.svg.encode()).decode()
    image = Html(f'<img src="{source}" alt="{put(plot.alt)}">')
    return tag("figure", image, tag("figcaption", caption))


def document(title: str, *content: object) -> str:
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(CSS)),
    ]
    return "<!DOCTYPE html>\n" + tag("html", tag("head", *head), tag("body", *(Html(f"{put(part)}\n") for part in content)), lang="en") + "\n"
