"""May an adapter ship? Checks with thresholds from the recipe, and their verdict. Figures in, words out: nothing is measured here.

Each check says ship, review or refuse; the worst of them is the verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from translora_ray.config import Gate
from translora_ray.records import TaskRow

SHIP, REVIEW, REFUSE = ORDER = ("ship", "review", "refuse")
ONE_SIDED = 0.8
"""Share of one answer among examples, where seeds have several, from which a person looks at them."""
LONG = 3.0
"""Times that the examples' answers may be longer than the seeds', in the mean, before a person looks at them."""


def check(name: str, value: float, ship: float, refuse: float | None, reason: str) -> dict[str, Any]:
    """A figure that should be at least `ship`, and at least `refuse`, where there is one, by all means."""
    verdict = SHIP if value >= ship else REFUSE if refuse is not None and not value >= refuse else REVIEW
    wanted = f"at least {ship:g}" + ("" if refuse is None else f", by all means {refuse:g}")
    return {"name": name, "value": value, "wanted": wanted, "verdict": verdict, "reason": "" if verdict == SHIP else f"{reason} ({value:.3f})"}


def without_rows(gate: Gate, measured: dict[str, float], accepted: float, labels: dict[str, Any]) -> dict[str, Any]:
    """The verdict after a transfer. `measured`: `agreement` with the teacher on prompts not trained on, `seeds`: accuracy on them, and, where the kit tells
    how real prompts are judged, what `gating.likeness` found; `accepted`: share of candidates that became examples; `labels`: what `answers` found.
    That the adapter's modules are applied is proved when it is loaded, and an error otherwise."""
    checks = [
        check("agreement with the teacher", measured["agreement"], gate.ship, gate.refuse, "the adapter answers new prompts otherwise than its teacher"),
        check("accuracy on the seeds", measured["seeds"], gate.ship, gate.refuse, "the adapter gets seeds wrong"),
        check("share of candidates accepted", accepted, gate.acceptance, None, "few candidates were accepted"),
    ]
    if "likeness" in measured:
        least = min(gate.likeness, measured["chance"])  # few real prompts tell little
        checks.append(check("examples that look more real than real prompts", measured["likeness"], least, None, "examples lie far from real prompts"))
    if "labels" in labels:
        checks.append(check("share of the labels among the examples", labels["labels"], 1.0, None, f"no example has the label {labels['missing']}"))
    checks.append(check("room left by the most frequent answer", labels["others"], 1 - ONE_SIDED, None, "nearly all examples have one answer"))
    checks.append(check("length of the seeds' answers to the examples'", labels["shorter"], 1 / LONG, None, "answers are longer than the seeds'"))
    return verdict(checks)


def answers(classes: Sequence[str], seeds: Sequence[TaskRow], given: Sequence[str]) -> dict[str, Any]:
    """What the examples' answers look like beside the seeds': `labels`, the share of the task's that occur, and one that is `missing`; `others`, the share of
    examples without the most frequent answer, 1 where the seeds have one answer; `shorter`, the mean length of the seeds' answers by that of the examples'."""
    counted = Counter(given)
    lengths = [sum(map(len, texts)) / len(texts) for texts in ([seed.target for seed in seeds], given)]
    several = len({seed.target for seed in seeds}) > 1
    found: dict[str, Any] = {"others": 1 - counted.most_common(1)[0][1] / len(given) if several else 1.0, "shorter": lengths[0] / max(1.0, lengths[1])}
    if classes:
        missing = [label for label in classes if label not in counted]
        found |= {"labels": 1 - len(missing) / len(classes), "missing": repr(missing[0]) if missing else ""}
    return found


def on_rows(gate: Gate, paired: dict[str, Any]) -> dict[str, Any]:
    """The verdict on real rows: is transferred minus the better of source adapter and bare target above `-gate.loss`? `paired` is `against` of an evaluation.

    Ship where it is with its whole interval, refuse where it is with none of it, review between.
    """
    low, high, allowed = paired["low"], paired["high"], -gate.loss
    found = SHIP if low >= allowed else REFUSE if high < allowed else REVIEW
    reason = "" if found == SHIP else f"{paired['difference']:+.3f} ({low:+.3f} to {high:+.3f}) against {paired['arm'].replace('_', ' ')}"
    name = f"transferred minus {paired['arm'].replace('_', ' ')}"
    return verdict([{"name": name, "value": paired["difference"], "wanted": f"at least {allowed:g}, interval and all", "verdict": found, "reason": reason}])


def verdict(checks: list[dict[str, Any]]) -> dict[str, Any]:
    worst = max((each["verdict"] for each in checks), key=ORDER.index)
    return {"verdict": worst, "reasons": [each["reason"] for each in checks if each["reason"]], "checks": checks}
