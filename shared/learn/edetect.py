"""Sequential change detection by betting: e-detectors. Pure.

An e-value is a number that is at most 1 on average as long as nothing has changed: the gain factor of a fair bet
against "nothing has changed". The Shiryaev-Roberts sum R <- (R + 1) e bets anew from every moment on; R - n is then a
martingale at most, so by Ville's inequality the probability that R reaches A within n observations is at most n / A,
and an alarm at R >= A comes without a change once in A observations or more seldom (Shin, Ramdas & Rinaldo,
"E-detectors: A Nonparametric Framework for Sequential Change Detection", New England Journal of Statistics in Data
Science 2, 2023). No distribution, no independence is assumed: only the mean given the past.

Several bets run side by side, and the mean of their sums, by weight, is again such a sum.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

THRESHOLD = 2e5
"""A: one false alarm in this many observations at most; within 4,000 observations with probability 0.02 at most."""
DROPS = (0.75, 0.5)
DROP_WEIGHTS = (0.3, 0.7)
"""Bets on the mean having fallen to this share of what was expected. Halving is what must be noticed soonest."""
SIDES = (-0.9, -0.5, 0.5, 0.9)
"""Bets on ranks having become lower or higher. None is so small that a reference that happens to lie two standard
errors off would win it something."""


@dataclass(frozen=True)
class Sums:
    """Shiryaev-Roberts sums, one for each bet."""

    values: tuple[float, ...] = ()
    count: int = 0


def bet(sums: Sums, factors: Sequence[float]) -> Sums:
    """Play one observation's e-values, one for each bet."""
    before = sums.values or (0.0,) * len(factors)
    return Sums(
        tuple(min((r + 1.0) * max(e, 0.0), 1e300) for r, e in zip(before, factors, strict=True)), sums.count + 1
    )


def evidence(sums: Sums, weights: Sequence[float] | None = None) -> float:
    """R: the mean of the sums by weight; equal weights when none are given."""
    if not sums.values:
        return 0.0
    if weights is None:
        return sum(sums.values) / len(sums.values)
    return sum(r * w for r, w in zip(sums.values, weights, strict=True))


def fallen(score: float, expected: float, drops: Sequence[float] = DROPS) -> tuple[float, ...]:
    """E-values against "the mean of `score` is at least `expected`"; both 0 to 1.

    1 + (1 - r)(p - y) / (1 - p) is the likelihood ratio of Bernoulli(r p) to Bernoulli(p) where y is 0 or 1, and, being
    linear in y, is an e-value for every score from 0 to 1.
    """
    p = min(max(expected, 0.01), 0.99)
    return tuple(1.0 + (1.0 - r) * (p - score) / (1.0 - p) for r in drops)


def risen(score: float, level: float, factors: Sequence[float]) -> tuple[float, ...]:
    """E-values against "the mean of `score` is at most `level`": bets on its being `factors` (above 1) times that."""
    p = min(max(level, 0.01), 0.99)
    capped = (min(f, 0.5 + 0.5 / p) for f in factors)
    return tuple(1.0 + (f - 1.0) * (score - p) / (1.0 - p) for f in capped)


@dataclass(frozen=True)
class Ranks:
    """Change of a real quantity's distribution, in level, without knowing the distribution.

    The first `Ranks.REFERENCE` observations are the reference; each later one is replaced by its rank among them,
    0 to 1 with mean 1/2 while nothing has changed, and bets are placed on higher or lower ranks (conformal test
    martingales: Vovk et al., "Retrain or Not Retrain: Conformal Test Martingales for Change-Point Detection", COPA
    2021).
    """

    reference: tuple[float, ...] = ()
    """Ascending."""
    sums: Sums = field(default_factory=Sums)

    @property
    def complete(self) -> bool:
        return len(self.reference) >= REFERENCE

    @property
    def evidence(self) -> float:
        return evidence(self.sums)

    @property
    def rising(self) -> bool:
        """Whether the evidence is for higher values."""
        half = len(self.sums.values) // 2
        return sum(self.sums.values[half:]) > sum(self.sums.values[:half])


REFERENCE = 1000
"""Observations against which later ones are ranked."""


def ranked(state: Ranks, value: float) -> Ranks:
    """Take in one observation."""
    if not math.isfinite(value):
        return state
    if not state.complete:
        reference = list(state.reference)
        insort(reference, value)
        return Ranks(tuple(reference), state.sums)
    below, upto = bisect_left(state.reference, value), bisect_right(state.reference, value)
    rank = (0.5 * (below + upto) + 0.5) / (len(state.reference) + 1.0)
    return Ranks(state.reference, bet(state.sums, [1.0 + side * (2.0 * rank - 1.0) for side in SIDES]))


@dataclass(frozen=True)
class Mix:
    """Change of the mix of queries: shares of domains against those of a reference."""

    names: tuple[str, ...] = ()
    level: tuple[float, ...] = ()
    """Mean share of each domain over the reference."""
    count: int = 0
    """Observations in the reference so far."""
    sums: Sums = field(default_factory=Sums)

    @property
    def evidence(self) -> float:
        return evidence(self.sums)

    @property
    def growing(self) -> str:
        """The domain for whose growth the evidence is strongest; empty before there is any."""
        if not self.sums.values:
            return ""
        best = max(range(len(self.sums.values)), key=lambda k: self.sums.values[k])
        return self.names[best]


MIX_REFERENCE = 1000
"""Queries whose mix later ones are compared with."""
MIX_FACTOR = 2.0
"""Bets on a domain's share having doubled. One that shrinks lets another grow."""


def mixed(state: Mix, shares: Sequence[tuple[str, float]]) -> Mix:
    """Take in the domain probabilities of one query (they sum to 1); domains must not change."""
    given = dict(shares)
    names = state.names or tuple(sorted(given))
    values = [min(max(given.get(name, 0.0), 0.0), 1.0) for name in names]
    if state.count < MIX_REFERENCE:
        level = state.level or (0.0,) * len(names)
        n = state.count + 1
        return Mix(names, tuple(a + (x - a) / n for a, x in zip(level, values, strict=True)), n, state.sums)
    factors = [risen(x, _upper(a, state.count), (MIX_FACTOR,))[0] for x, a in zip(values, state.level, strict=True)]
    return Mix(names, state.level, state.count, bet(state.sums, factors))


def _upper(level: float, count: int) -> float:
    """What the true share may be, two standard errors above the one seen: that much growth is no change."""
    return level + 2.0 * math.sqrt(level * (1.0 - level) / count) + 1.0 / count
