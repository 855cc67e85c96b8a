"""Which of the answered candidates become examples, when all of them are there, and which are kept back for the gate. No Ray, no model.

A pure function of the committed candidates and the recipe: it is computed again wherever it is needed, and stored nowhere.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from translora_ray.evaluation.metrics import reading
from translora_ray.recipe import Synthesis
from translora_ray.records import Candidate, derive_seed
from translora_ray.stream.plan import Plan

LIGHTEST, HEAVIEST = -3.0, 3.0
"""Log-odds beyond these say that the discriminator was calibrated on few verdicts, not that a prompt is worth a hundred others."""


def choose(plan: Plan, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """(examples to train on, examples held out) of all candidates of a run, each in the order of their index.

    `plan.quota` and `plan.held_out` of them where the method chooses among more; the last ones by index are held out, of each kind as many as it has, but where
    training has begun with the first ones, whichever they are.
    Seeds with other values are as many of them as of all, and taken by chance: all look like the task, and verdicts say little about values.
    """
    accepted = sorted((candidate for candidate in candidates if candidate.accepted), key=lambda candidate: candidate.index)
    wanted = plan.quota + plan.held_out
    if plan.chooses:
        filled, listed = _kinds(plan, accepted)
        best = _balanced(plan, sorted(listed, key=lambda candidate: _worth(plan, candidate), reverse=True), plan.most_of_a_label(wanted))
        share = round(wanted * len(filled) / max(1, len(accepted)))
        filled = sorted(filled, key=lambda candidate: derive_seed(candidate.seed, "filled"))[: max(share, wanted - len(best))]
        accepted = sorted([*filled, *best[: wanted - len(filled)]], key=lambda candidate: candidate.index)
    chosen = accepted[:wanted]
    held_out = len(chosen) * plan.held_out // wanted
    filled, listed = ([], chosen) if plan.recipe.overlap else _kinds(plan, chosen)
    of_filled = round(held_out * len(filled) / max(1, len(chosen)))
    apart = {candidate.index for kind, count in ((filled, of_filled), (listed, held_out - of_filled)) for candidate in kind[len(kind) - count :]}
    return [candidate for candidate in chosen if candidate.index not in apart], [candidate for candidate in chosen if candidate.index in apart]


def _kinds(plan: Plan, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """(seeds with other values, others)."""
    found: tuple[list[Candidate], list[Candidate]] = ([], [])
    for candidate in candidates:
        found[not plan.fills(candidate.index)].append(candidate)
    return found


def _balanced(plan: Plan, candidates: Sequence[Candidate], most: int | None) -> list[Candidate]:
    """The first `most` candidates of each label."""
    if most is None:
        return list(candidates)
    counted = Counter[str]()
    kept = []
    for candidate in candidates:
        label = reading(plan.kit.task, candidate.target or "")
        counted[label] += 1
        if counted[label] <= most:
            kept.append(candidate)
    return kept


def by_generator(synthesis: Synthesis, candidates: Sequence[Candidate]) -> dict[str, dict[str, int]]:
    """How many candidates each generator wrote, and how many of them were accepted: a candidate's index tells its pack, and the pack its generator."""
    found: dict[str, dict[str, int]] = {generator: {"candidates": 0, "accepted": 0} for generator in synthesis.generator}
    for candidate in candidates:
        counts = found[synthesis.writer(candidate.index // synthesis.pack_size)]
        counts["candidates"] += 1
        counts["accepted"] += candidate.accepted
    return found


def _worth(plan: Plan, candidate: Candidate) -> float:
    """Excess, or a key that draws without replacement by weight (Efraimidis and Spirakis, 2006; here with Gumbel noise)."""
    if plan.by_excess:
        return _number(candidate.excess)
    a, b = plan.calibration
    weight = min(HEAVIEST, max(LIGHTEST, a * _number(candidate.verdict) + b))
    draw = random.Random(derive_seed(candidate.seed, "importance")).random()
    return weight - math.log(-math.log(draw or 0.5))


def _number(value: float | None) -> float:
    """Last of all where there is none."""
    return -math.inf if value is None or math.isnan(value) else value
