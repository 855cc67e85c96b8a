"""Is a difference real? Two arms on the same rows, compared row by row. Nothing here knows what the arms are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

Z95 = 1.959963984540054
DRAWS = 10_000
AUC_DRAWS = 2_000
FEW = 30
"""Rows below which the width of the interval is said."""


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (E. B. Wilson, 1927): never outside 0..1, fair at the ends."""
    share, spread = successes / n, Z95 * Z95 / n
    middle, half = share + spread / 2, Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """(mean of ours minus theirs, low, high): 95 % percentile bootstrap over rows, the same rows drawn for both (Efron and Tibshirani, 1993).

    The draws are the same ones every time, so the same scores give the same interval.
    """
    differences = numpy.asarray(ours, dtype=float) - numpy.asarray(theirs, dtype=float)
    generator, n = numpy.random.default_rng(0), len(differences)
    means = [differences[generator.integers(0, n, size=n)].mean() for _ in range(DRAWS)]
    low, high = numpy.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Exact two-sided p of McNemar's test on right and wrong (a score of 0.5 or more is right): the rows on which the arms differ fall either way
    with equal chance where neither is better. 1 where they differ nowhere."""
    won = sum(a >= 0.5 > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b >= 0.5 > a for a, b in zip(ours, theirs, strict=True))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / (1 << (won + lost))
    return min(1.0, 2 * tail)


def auc(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """(area under the ROC curve, low, high): the share of pairs in which ours is higher, ties by half; 95 % percentile bootstrap, each side drawn by itself.

    An area of exactly 0 or 1 has no spread to draw from, so the interval is widened to Wilson's of as many rows as the smaller side has.
    """
    pairs = numpy.asarray(ours, dtype=float)[:, None] - numpy.asarray(theirs, dtype=float)[None]
    won = ((pairs > 0) + 0.5 * (pairs == 0)).astype(numpy.float32)
    generator, (n, m) = numpy.random.default_rng(0), won.shape
    drawn, other = (generator.multinomial(size, [1 / size] * size, size=AUC_DRAWS).astype(numpy.float32) for size in (n, m))
    areas = ((drawn @ won) * other).sum(axis=1) / (n * m)
    area = float(won.mean(dtype=float))
    low, high = map(float, numpy.percentile(areas, [2.5, 97.5]))
    if area in {0.0, 1.0}:
        low, high = wilson(area * min(n, m), min(n, m))
    return area, low, high


def chance_interval(n: int, m: int) -> tuple[float, float]:
    """95 % interval of an AUC of 0.5 from n and m rows (Mann and Whitney, 1947: variance (n + m + 1) / 12nm where the sides are alike)."""
    half = Z95 * math.sqrt((n + m + 1) / (12 * n * m))
    return max(0.0, 0.5 - half), min(1.0, 0.5 + half)


def binomial_tail(least: int, n: int, share: float) -> float:
    """Chance of at least so many of n, each of which comes with the chance `share` (between 0 and 1)."""

    def logarithm(k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return ways + k * math.log(share) + (n - k) * math.log1p(-share)

    return min(1.0, sum(math.exp(logarithm(k)) for k in range(least, n + 1)))


def flips(before: Sequence[float], after: Sequence[float]) -> list[int]:
    """Rows that were right before and are wrong after."""
    return [row for row, (a, b) in enumerate(zip(before, after, strict=True)) if a >= 0.5 > b]
