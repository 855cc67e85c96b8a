"""The report's plots: figures in, SVG out, each with a sentence for readers who do not see it. matplotlib is imported here alone, when a plot is drawn."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REAL, ACCEPTED, REJECTED, SEEDS, GREY = "#0072b2", "#009e73", "#d55e00", "#111111", "#8a8f98"
"""Apart for all kinds of colour vision (Okabe and Ito, 2008)."""
REASONS, SPARE = ("#d55e00", "#e69f00", "#cc79a7", "#56b4e9", "#f0e442", "#666c76"), "#d9dce1"
STYLE: Any = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: what is measured here does not depend on the machine
    "text.parse_math": False,  # labels of tasks are plain text, dollars and all
    "svg.fonttype": "none",
    "svg.hashsalt": "translora",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b65",
    "axes.labelcolor": "#2b2f36",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.color": "#2b2f36",
    "ytick.color": "#2b2f36",
}
FONTS = "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MOST_LABELS = 20
MOST_REASONS = len(REASONS)
PARTS, BARS = 40, 30
"""Most bars of a plot over time, and about as many of a spread."""


@dataclass(frozen=True)
class Plot:
    """A drawing and what it says in words."""

    svg: str
    alt: str


def arms(found: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], ours: str = "transferred") -> Plot:
    """Accuracy of each arm with its interval; `ours` stands out."""

    def draw(axes: Axes) -> None:
        for place, (arm, value) in enumerate(found.items()):
            colour, share = (REAL, value["accuracy"]) if arm == ours else (GREY, value["accuracy"])
            axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=3, solid_capstyle="butt", alpha=0.55)
            axes.plot(share, place, "o" if arm == ours else "s", color=colour, markersize=8 if arm == ours else 6)
            axes.annotate(f"{share:.3f}", (share, place), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
        axes.set_yticks(range(len(found)), [_plain(titles[arm], 60) for arm in found])
        axes.set(ylim=(len(found) - 0.4, -0.7), xlim=(-0.05, 1.05), xlabel="accuracy, with its 95 % interval")
        axes.grid(axis="y", visible=False)

    parts = [f"{titles[arm]} {value['accuracy']:.3f} ({value['low']:.3f} to {value['high']:.3f})" for arm, value in found.items()]
    return Plot(_svg(draw, 1.0 + 0.42 * len(found)), "Accuracy with its 95 % interval: " + "; ".join(parts) + ".")


def histogram(groups: Mapping[str, Sequence[float]], label: str, line: tuple[float, str] | None = None) -> Plot:
    """How the values of each group (`real`, `accepted`, `rejected`; `seeds` as ticks, being few) are spread, as shares of it; `line`: a value to mark.

    The ends of the axis hold the two hundredths that lie beyond them.
    """
    sound = {name: [value for value in values if math.isfinite(value)] for name, values in groups.items()}
    sound = {name: values for name, values in sound.items() if values}
    low, high = (float(end) for end in numpy.percentile([value for values in sound.values() for value in values], [1, 99]))
    line = line if line and low <= line[0] <= high else None
    edges = _edges(low, high, all(isinstance(value, int) for values in sound.values() for value in values), line[0] if line else low)

    def draw(axes: Axes) -> None:
        for name, values in sound.items():
            inside = numpy.clip(values, edges[0], edges[-1])
            if name == "seeds":
                axes.plot(inside, [0.0] * len(values), "|", color=SEEDS, markersize=16, markeredgewidth=1.5, label=_counted(name, values), zorder=5)
                continue
            shares = numpy.histogram(inside, edges)[0] / len(values)
            colour, filled = {"real": REAL, "accepted": ACCEPTED, "rejected": REJECTED}[name], name == "accepted"
            axes.stairs(shares, edges, color=colour, fill=filled, alpha=0.45 if filled else 1, linewidth=1.8, label=_counted(name, values))
        if line:
            axes.axvline(line[0], color="#2b2f36", linestyle="--", linewidth=1, label=line[1])
        axes.set(xlabel=label, ylabel="share of the group")
        axes.set_ylim(bottom=0)
        axes.legend()

    told = [f"{_counted(name, values)}, median {float(numpy.median(values)):.1f}" for name, values in sound.items()]
    return Plot(_svg(draw), f"Spread of {label}: " + "; ".join(told) + (f"; {line[1]} at {line[0]:g}" if line else "") + ".")


def _edges(low: float, high: float, whole: bool, mark: float) -> Any:
    """Of `BARS` bars or a few more: one begins at `mark`; those of whole numbers hold as many numbers each."""
    if whole:
        numbers = max(1, math.ceil((high - low) / BARS))
        return numpy.arange(math.floor(low), math.ceil(high) + numbers + 1, numbers) - 0.5
    width = (high - low) / BARS or 1.0
    return mark + width * numpy.arange(math.floor((low - mark) / width), math.ceil((high - mark) / width) + 2)


def over_time(reasons: Sequence[str | None], per_pack: int, spare: str) -> Plot:
    """What became of the candidates in the order in which they were written; None: accepted, `spare`: nobody asked whether it was good enough."""
    packs = -(-len(reasons) // per_pack)
    size = per_pack * -(-packs // PARTS)
    parts = [Counter(reasons[start : start + size]) for start in range(0, len(reasons), size)]
    ranked = [reason for reason, _ in Counter(reason for reason in reasons if reason not in (None, spare)).most_common() if reason]
    shown, other = (ranked, []) if len(ranked) <= MOST_REASONS else (ranked[: MOST_REASONS - 1], ranked[MOST_REASONS - 1 :])

    def draw(axes: Axes) -> None:
        lefts = [number * size for number in range(len(parts))]
        widths = [part.total() for part in parts]
        bottom = numpy.zeros(len(parts))
        layers: list[tuple[str, list[str | None], str]] = [("accepted", [None], ACCEPTED)]
        layers += [(reason, [reason], colour) for reason, colour in zip(shown, REASONS, strict=False)]
        layers += [("other reasons", [*other], REASONS[-1])] if other else []
        layers += [(spare, [spare], SPARE)] if spare in reasons else []
        for name, members, colour in layers:
            shares = numpy.array([sum(part[member] for member in members) / part.total() for part in parts])
            axes.bar(lefts, shares, widths, bottom, align="edge", color=colour, edgecolor="white", linewidth=0.6, label=_plain(name, 40))
            bottom += shares
        axes.set(xlim=(0, len(reasons)), ylim=(0, 1), xlabel="candidates, in the order of their packs", ylabel="share")
        axes.grid(visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    rates = [part[None] / part.total() for part in parts]
    accepted = sum(reason is None for reason in reasons) / len(reasons)
    return Plot(
        _svg(draw), f"Accepted: {accepted:.3f} of {len(reasons)} candidates, from {min(rates):.2f} to {max(rates):.2f} over {len(parts)} parts of the stream."
    )


def loss(curve: Sequence[Sequence[float]], epochs: Sequence[float], held_out: Sequence[float], steps_per_epoch: float) -> Plot:
    """Training loss: points (step, loss), each epoch's mean, and the loss on rows held out after each epoch, where there are such."""

    def draw(axes: Axes) -> None:
        if curve:
            axes.plot([step for step, _ in curve], [value for _, value in curve], color=GREY, linewidth=1, label="steps")
        for values, colour, style, name in ((epochs, REAL, "o-", "mean of the epoch"), (held_out, REJECTED, "s--", "rows held out")):
            if values:
                axes.plot([(epoch + 1) * steps_per_epoch for epoch in range(len(values))], values, style, color=colour, markersize=4, label=name)
        axes.set(xlabel="step", ylabel="loss per label (nats)")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", integer=True)
        axes.legend()

    told = f"Training loss: mean of the first epoch {epochs[0]:.3f}, of the last {epochs[-1]:.3f}, over {len(epochs)} epochs"
    return Plot(_svg(draw), told + (f"; on rows held out {min(held_out):.3f} at the least." if held_out else "."))


def labels(seeds: Sequence[str], accepted: Sequence[str]) -> Plot:
    """Share of each label among the seeds and among the accepted examples, the most frequent first."""
    ours, theirs = Counter(accepted), Counter(seeds)
    names = sorted({*ours, *theirs}, key=lambda name: (-ours[name], -theirs[name], name))[:MOST_LABELS]

    def draw(axes: Axes) -> None:
        for shift, counted, colour, name in ((-0.2, ours, ACCEPTED, "accepted"), (0.2, theirs, SEEDS, "seeds")):
            shares = [counted[label] / max(1, counted.total()) for label in names]
            axes.barh([place + shift for place in range(len(names))], shares, 0.38, color=colour, alpha=0.8, label=f"{name} ({counted.total():,})")
        axes.set_yticks(range(len(names)), [_plain(name, 40) for name in names])
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel="share of the answers")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    told = [f"{name} {ours[name] / max(1, ours.total()):.2f} and {theirs[name] / max(1, theirs.total()):.2f}" for name in names]
    return Plot(_svg(draw, 1.1 + 0.34 * len(names)), "Share of each label among accepted examples and among seeds: " + "; ".join(told) + ".")


def plane(points: Mapping[str, Sequence[Sequence[float]]], variance: Sequence[float]) -> Plot:
    """Prompts on two principal components of their hidden states; `variance`: the share that each shows."""
    marks = {"rejected": ("x", REJECTED, 14), "accepted": ("o", ACCEPTED, 12), "real": ("^", REAL, 16), "seeds": ("*", SEEDS, 90)}
    sound = {name: points[name] for name in marks if points.get(name)}

    def draw(axes: Axes) -> None:
        for name, (mark, colour, size) in marks.items():
            if name in sound:
                across, up = zip(*sound[name], strict=True)
                edges = None if mark == "x" else "white"
                label, opacity = _counted(name, sound[name]), 1 if name == "seeds" else 0.7
                axes.scatter(across, up, size, colour, marker=mark, alpha=opacity, label=label, edgecolors=edges, linewidths=0.7)
        axes.set(xlabel=f"first component ({variance[0]:.0%} of the variance)", ylabel=f"second component ({variance[1]:.0%})")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    centres = [
        f"{_counted(name, found)} around {sum(x for x, _ in found) / len(found):.2f}, {sum(y for _, y in found) / len(found):.2f}"
        for name, found in sound.items()
    ]
    return Plot(_svg(draw, 4.4), "Map of the prompts by two principal components: " + "; ".join(centres) + ".")


TITLES = {"seeds": "seeds", "real": "real test rows", "accepted": "accepted", "rejected": "rejected"}


def _counted(name: str, values: Sequence[Any]) -> str:
    return f"{TITLES[name]} ({len(values):,})"


def _plain(text: str, most: int) -> str:
    """One line of printable text: a label may hold anything."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _svg(draw: Callable[[Axes], None], height: float = 3.1, width: float = 8.2) -> str:
    """What `draw` puts on axes, in inches. Text stays text, in the fonts of whoever reads it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts have it
        figure, content = Figure(figsize=(width, height), layout="constrained"), io.StringIO()
        draw(figure.subplots())
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue().replace("'DejaVu Sans'", FONTS)
