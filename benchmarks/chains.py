"""What is kept of quality.py's chains, and what is read from them: table, verdicts beside each other, plot."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy
import results

from translora_ray.evaluation.gate import REFUSE, REVIEW, SHIP
from translora_ray.recipe import Gate

SHOWN: dict[str, str] = {
    "target_base": "bare target",
    "target_few_shot": "few-shot target",
    "seeds_only": "seeds alone",
    "unfiltered": "list, unfiltered",
    "paper": "list, discriminator (paper)",
    "importance": "list, importance",
    "excess": "list, excess",
    "both": "list, both",
    "default": "default",
    "alone": "default, for a kit without a discriminator",
    "cut": "default, by the discriminator's cut",
    "target": "default, the target base writes",
    "turns": "default, source and target base write in turn",
    "adapter": "default, a generator adapter writes",
    "source_adapter": "source adapter",
    "oracle": "oracle",
}
"""Rows of the table: a transfer's way, or an arm of the paper's evaluation, and its title."""
PAIRS = [("default", "unfiltered"), ("default", "paper"), ("alone", "unfiltered")]
"""Which should be above which."""
DRAWS = 10_000
KEPT = results.ROOT / "benchmarks" / "quality.json"
Chain = dict[str, Any]
"""What is kept of a chain: `commit`, `settings` (a digest), `accuracy` of each of `SHOWN`, and by way `verdicts` (without and with real rows), `agreement` with
the teacher (value and ends), by which a verdict without real rows can be told anew where the gate's rule changes, `paired`, what is gained on the test rows
(value and ends), and `candidates`."""


def finished() -> dict[str, dict[str, Chain]]:
    """{task: {seed: chain}} of what is kept."""
    found: dict[str, dict[str, Chain]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return found


def keep(chains: dict[str, dict[int, Chain]], order: Iterable[str]) -> dict[str, dict[str, Chain]]:
    """Add chains to what is kept; returns all of it, tasks in their order."""
    found = finished()
    for name, by_seed in chains.items():
        found.setdefault(name, {}).update({str(seed): chain for seed, chain in by_seed.items()})
    kept = {name: dict(sorted(found[name].items())) for name in order if found.get(name)}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def recovery(chain: Chain, arm: str) -> float | None:
    """(arm - bare target) / (oracle - bare target); None where the arm was not made."""
    found = chain["accuracy"]
    return (found[arm] - found["target_base"]) / (found["oracle"] - found["target_base"]) if arm in found else None


def interval(by_task: Sequence[Sequence[float]]) -> str:
    """Mean of the tasks' means, with a 95 % interval over seeds: chains are drawn anew within each task, whose test rows its seeds share, and their deviations
    taken by sqrt(n / (n - 1)), as few chains vary too little among themselves. Of single seeds there is none."""
    mean = statistics.mean(map(statistics.mean, by_task))
    if min(map(len, by_task)) < 2:
        return f"{mean:.3f}"
    draw = numpy.random.default_rng(0)
    apart = [draw.choice(values, (DRAWS, len(values))).mean(axis=1) - statistics.mean(values) for values in by_task]
    wider = [deviations * (len(values) / (len(values) - 1)) ** 0.5 for deviations, values in zip(apart, by_task, strict=True)]
    return results.interval(mean, *(mean + float(end) for end in numpy.quantile(numpy.mean(wider, axis=0), (0.025, 0.975))))


def gain(chain: Chain, ours: str, theirs: str) -> float | None:
    """By how much more one arm recovers than another."""
    a, b = recovery(chain, ours), recovery(chain, theirs)
    return None if a is None or b is None else a - b


def by_task(kept: dict[str, dict[str, Chain]], figure: Callable[[Chain], float | None]) -> list[list[float]]:
    """The figure of each task's chains, where they have it; tasks of which none has it left out."""
    found = [[value for chain in by_seed.values() if (value := figure(chain)) is not None] for by_seed in kept.values()]
    return [values for values in found if values]


def table(kept: dict[str, dict[str, Chain]]) -> str:
    """Markdown for what is finished."""
    chains = [chain for by_seed in kept.values() for chain in by_seed.values()]
    commits = ", ".join(sorted({chain["commit"] for chain in chains}))
    lines = [f"Commits {commits}. Accuracy on the test rows, mean of the seeds; recovery is the mean of the tasks', with a 95 % interval over seeds.", ""]
    heads = [f"{name.split('/')[1]} ({len(by_seed)} seeds)" for name, by_seed in kept.items()]
    lines += [f"| | {' | '.join(heads)} | recovery |", "|---" * (len(kept) + 2) + "|"]
    for arm, title in SHOWN.items():
        cells = [[chain["accuracy"][arm] for chain in by_seed.values() if arm in chain["accuracy"]] for by_seed in kept.values()]
        if recovered := by_task(kept, partial(recovery, arm=arm)):
            lines.append(f"| {title} | {' | '.join(f'{statistics.mean(cell):.3f}' if cell else '-' for cell in cells)} | {interval(recovered)} |")
    lines.append("")
    for ours, theirs in PAIRS:
        if apart := by_task(kept, partial(gain, ours=ours, theirs=theirs)):
            lines.append(f"{SHOWN[ours][0].upper()}{SHOWN[ours][1:]} less {SHOWN[theirs]}, chain by chain: {interval(apart)} of recovery.  ")
    return "\n".join([*lines, "", *verdicts(chains)])


def verdicts(chains: Sequence[Chain]) -> list[str]:
    """The gate's verdict without real rows beside the one on the test rows, of chains whose agreement was kept: by today's rule. They contradict each other
    where one ships what the other refuses."""
    counted = Counter(tuple(pair) for chain in chains for way, pair in chain["verdicts"].items() if way in chain["agreement"])
    lines = ["| gate without real rows | on the test rows | transfers |", "|---|---|---|"]
    lines += [f"| {before} | {after} | {counted[before, after]} |" for before, after in sorted(counted)]
    same, contradictions = (sum(count for pair, count in counted.items() if wrong(pair)) for wrong in (_same, _contradicting))
    lines += ["", f"The same in {same} of {counted.total()}; contradictions (one ships what the other refuses): {contradictions}."]
    again = sum(redrawn(chain["verdicts"][way][1], *chain["paired"][way]) for chain in chains for way in chain["agreement"])
    return [*lines, f"As many other test rows are expected to give the verdict of these in {again:.1f} of {counted.total()}."]


def redrawn(verdict: str, gained: float, low: float, high: float, loss: float = Gate().loss) -> float:
    """Chance that as many test rows, drawn anew, come to the same verdict: what is gained there is about normal around what was gained here, with twice the
    variance, as both vary; its interval is as wide."""
    found, (below, above) = NormalDist(gained, max(1e-9, 2**0.5 * (high - low) / 2 / 1.96)), (gained - low, high - gained)
    refuse, ship = found.cdf(-loss - above), 1 - found.cdf(-loss + below)
    return {SHIP: ship, REFUSE: refuse, REVIEW: 1 - ship - refuse}[verdict]


def _same(pair: tuple[str, ...]) -> bool:
    return len(set(pair)) == 1


def _contradicting(pair: tuple[str, ...]) -> bool:
    return set(pair) == {"ship", "refuse"}


def plot(kept: dict[str, dict[str, Chain]], place: Path) -> None:
    """Recovery of each arm in each chain."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    chains = {name: list(by_seed.values()) for name, by_seed in kept.items()}
    arms = [arm for arm in SHOWN if arm not in {"target_base", "oracle"} and any(recovery(c, arm) is not None for found in chains.values() for c in found)]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(arms) + 1.2), layout="constrained")
    for number, (name, found) in enumerate(chains.items()):
        points = [(recovery(chain, arm), line) for line, arm in enumerate(arms) for chain in found]
        known = [(value, line + 0.12 * (number - len(chains) / 2)) for value, line in points if value is not None]
        axes.plot(*zip(*known, strict=True), "o", markersize=4, label=name.split("/")[1])
    axes.set_yticks(range(len(arms)), [SHOWN[arm] for arm in arms])
    axes.invert_yaxis()
    axes.axvline(0.9, color="0.7", linewidth=1)
    axes.set_xlabel("recovery: (arm - bare target) / (oracle - bare target)")
    axes.legend(fontsize="small")
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)
