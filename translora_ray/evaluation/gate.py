"""May an adapter ship? Checks with thresholds from the recipe, and their verdict. Figures in, words out: nothing is measured here.

Each check says ship, review or refuse; the worst of them is the verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from translora_ray.recipe import Gate
from translora_ray.records import TaskRow

SHIP, REVIEW, REFUSE = ORDER = ("ship", "review", "refuse")
ONE_SIDED = 0.8
"""Share of one answer among examples, where seeds have several, from which a person looks at them."""
RARE = 0.2
"""Share of an even one that a label may have among the examples, before a person looks at them: of what is hardly shown nothing is learnt."""
LONG = 3.0
"""Times that the examples' answers may be longer than the seeds', in the mean, before a person looks at them."""


def check(
    name: str, value: float, ship: float, refuse: float | None, reason: str, ends: tuple[float, float] | None = None, least: float | None = None
) -> dict[str, Any]:
    """A figure that should be at least `ship`, and at least `refuse`, where there is one, by all means.

    `ends` are those of its 95 % interval, where it has one. It is refused where all of the interval lies below `refuse`, and ships where none of it lies below
    `least`, which is `refuse` where it is left out: few answers tell little.
    """
    (low, high), least = ends or (value, value), refuse if least is None else least
    found = {"name": name, "value": value, "wanted": f"at least {ship:g}" + ("" if refuse in (None, ship) else f", by all means {refuse:g}"), "verdict": REVIEW}
    told = f"{value:.3f}" + (f", {low:.3f} to {high:.3f}" if ends else "")
    if refuse is not None and (high < refuse or value != value):  # NaN is as bad as can be
        found["verdict"] = REFUSE
    elif value >= ship and least is not None and low < least:
        reason = f"too few answers for the {name}"
    elif value >= ship:
        found["verdict"] = SHIP
    found["reason"] = "" if found["verdict"] == SHIP else f"{reason} ({told})"
    return found | ({"low": low, "high": high} if ends else {})


def without_rows(gate: Gate, measured: dict[str, Any], accepted: float, labels: dict[str, Any]) -> dict[str, Any]:
    """The verdict after a transfer. `measured`: `agreement` with the teacher on prompts not trained on, `seeds`: accuracy on them, each with the ends of its
    95 % interval as `agreement_ends` and `seeds_ends`, and, where the kit tells how real prompts are judged, what `gating.likeness` found; `accepted`: share
    of candidates that became examples; `labels`: what `answers` found. That the adapter's modules are applied is proved when it is loaded, and an error
    otherwise. Agreement is refused as a loss on real rows is: where it is too little with its whole interval. Without `seeds`, whose answers can then not be
    told right from wrong, answers that differ may be as good, and a person looks at them."""
    otherwise, by_all_means = "the adapter answers new prompts otherwise than its teacher", gate.ship if "seeds" in measured else None
    checks = [check("agreement with the teacher", measured["agreement"], gate.ship, by_all_means, otherwise, measured["agreement_ends"], gate.refuse)]
    if "seeds" in measured:
        checks.append(check("accuracy on the seeds", measured["seeds"], gate.ship, gate.refuse, "the adapter gets seeds wrong", measured["seeds_ends"]))
    checks.append(check("share of candidates accepted", accepted, gate.acceptance, None, "few candidates were accepted"))
    if "likeness" in measured:
        least = min(gate.likeness, measured["chance"])  # few real prompts tell little
        checks.append(check("examples that look more real than real prompts", measured["likeness"], least, None, "examples lie far from real prompts"))
    if "labels" in labels:
        reason = f"{labels['rarest']} is the label of {labels['fewest'] or 'none'} of the examples"
        checks.append(check("examples of the rarest label, to an even share", labels["labels"], RARE, None, reason))
    checks.append(check("room left by the most frequent answer", labels["others"], 1 - ONE_SIDED, None, "nearly all examples have one answer"))
    checks.append(check("length of the seeds' answers to the examples'", labels["shorter"], 1 / LONG, None, "answers are longer than the seeds'"))
    return verdict(checks)


def answers(classes: Sequence[str], seeds: Sequence[TaskRow], given: Sequence[str]) -> dict[str, Any]:
    """What the examples' answers, as they are read, look like beside the seeds': `labels`, the examples of the `rarest` label, of which there are `fewest`, by
    an even share of them; `others`, the share of examples without the most frequent answer, 1 where the seeds have one answer; `shorter`, the mean length of
    the seeds' answers by that of the examples'."""
    counted = Counter(given)
    lengths = [sum(map(len, texts)) / len(texts) for texts in ([seed.target for seed in seeds], given)]
    several = len({seed.target for seed in seeds}) > 1
    found: dict[str, Any] = {"others": 1 - counted.most_common(1)[0][1] / len(given) if several else 1.0, "shorter": lengths[0] / max(1.0, lengths[1])}
    if classes:
        rarest = min(classes, key=lambda label: counted[label])
        found |= {"labels": counted[rarest] * len(classes) / len(given), "rarest": repr(rarest), "fewest": counted[rarest]}
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
