"""Learning from the outcome of the chosen model alone: choices that explore, with propensities that are exact.

The planner and the benches draw their choices by `allocation`.

Thompson sampling (Thompson 1933; for contextual linear models Agrawal and Goyal 2013): a model is chosen as often as it
is the best under the posterior. The share of posterior draws in which each model wins is the distribution that the
choice is then drawn from, so the logged propensity is exact however few the draws. Where few outcomes are seen,
`duel` asks the challengers more often than that (top-two sampling, Russo 2020): pure Thompson sampling hardly asks who
is second, and to know the best means to know that the second is worse. Exploration is capped by a budget: the share of
choices that may differ from the best guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.learn.quality import Spread

Array = NDArray[np.float64]

DRAWS = 32
LEAST = 0.1
"""Share of draws that a model must win to be a challenger. Without it the best guess after 3,000 queries was as good
(0.448), and the mean score on the way 1.4 points lower (0.405 against 0.420; 16 seeds on each of four halves)."""


DUEL = 0.5
"""Share of choices that go to a challenger, within the budget."""


@dataclass(frozen=True)
class Choice:
    model: int
    propensity: float
    """Probability with which this model was to be chosen."""
    distribution: Array
    """[k]"""


def distribution(
    mean: Array,
    spread: Spread,
    normal: NDArray[Any],
    *,
    budget: float = 1.0,
    floor: float = 0.0,
    duel: float = 0.0,
) -> Array:
    """Probabilities [k] of choosing each model for a query.

    Args:
        mean: [k] what each is expected to be worth: the score, or a utility of which it is a part.
        spread: how that may deviate.
        normal: standard normals (`Spread.shape`).
        budget, floor, duel: as in `allocation`.
    """
    return allocation(mean + spread.deviations(normal), int(mean.argmax()), budget=budget, floor=floor, duel=duel)


def allocation(drawn: Array, best: int, *, budget: float = 1.0, floor: float = 0.0, duel: float = 0.0) -> Array:
    """Probabilities [k] of choosing each model, from draws of what each is worth [s, k].

    Args:
        drawn: from the posterior.
        best: index of the best guess.
        budget: largest probability, 0 to 1, of not choosing the best guess.
        floor: smallest probability of any model, at most 1 / k; what off-policy evaluation needs.
        duel: share of choices that go to a challenger: the winner of those draws that the first draw's winner loses.
    """
    share = np.bincount(drawn.argmax(1), minlength=drawn.shape[1]) / len(drawn)
    if duel > 0.0:
        share = challenged(share, duel, LEAST)
    off = 1.0 - share[best]
    if off > budget:
        share *= budget / off
        share[best] = 1.0 - budget
    return np.asarray((1.0 - floor * len(share)) * share + floor)


def challenged(share: Array, duel: float, least: float = 0.0) -> Array:
    """Top-two sampling in closed form: probabilities [k] of taking a draw's winner, and with chance `duel` the winner
    of further draws until it is another one; a sole winner has no challenger. Winners of fewer than `least` of the
    draws are passed over, unless all are."""
    kept = np.where(share >= least, share, 0.0)
    share = kept / kept.sum() if kept.any() else share
    if share.max() >= 1.0:
        return share
    odds = share / (1.0 - share)
    return np.asarray((1.0 - duel) * share + duel * share * (odds.sum() - odds))


def choose(probabilities: Array, uniform: float) -> Choice:
    """The choice that `uniform` (0 to 1) draws."""
    index = int(np.searchsorted(np.cumsum(probabilities), uniform * probabilities.sum(), side="right"))
    index = min(index, len(probabilities) - 1)
    return Choice(index, float(probabilities[index]), probabilities)
