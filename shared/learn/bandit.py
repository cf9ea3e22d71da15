"""Learning from the outcome of the chosen model alone: choices that explore, with propensities that are exact.

Thompson sampling (Thompson 1933; for contextual linear models Agrawal and Goyal 2013): a model is chosen as often as it
is the best under the posterior. The share of posterior draws in which each model wins is the distribution that the
choice is then drawn from, so the logged propensity is exact however few the draws. Where few outcomes are seen,
`duel` asks the challengers more often than that (top-two sampling, Russo 2020): pure Thompson sampling hardly asks who
is second, and to know the best means to know that the second is worse. Exploration is capped by a budget: the share of
choices that may differ from the best guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.learn.quality import Prediction

Array = NDArray[np.float64]

DRAWS = 32
LEAST = 0.1
"""Share of draws that a model must win to be a challenger. Without it the best guess after 3,000 queries was as good
(0.448), and the mean score on the way 1.4 points lower (0.405 against 0.420; 16 seeds on each of four halves)."""


class Quality(Protocol):
    """What is known: `quality.QualityModel`, or `readable.ReadableQuality`."""

    models: tuple[str, ...]

    def predict(self, x: NDArray[Any], prior: NDArray[Any] | None = None) -> Prediction: ...

    def sample(self, x: NDArray[Any], normal: Array, prior: NDArray[Any] | None = None) -> Array: ...

    def shape(self, draws: int) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class Choice:
    model: int
    propensity: float
    """Probability with which this model was to be chosen."""
    distribution: Array
    """[k]"""


def distribution(
    model: Quality,
    x: NDArray[Any],
    normal: Array,
    *,
    cost: NDArray[Any] | float = 0.0,
    prior: NDArray[Any] | None = None,
    budget: float = 1.0,
    floor: float = 0.0,
    duel: float = 0.0,
) -> Array:
    """Probabilities [k] of choosing each model for a query.

    Args:
        model: what is known.
        x: [d] features.
        normal: standard normals (`shape_of`).
        cost: [k] taken from the expected score: the utility's other terms.
        prior: [k] what the cards promise.
        budget: largest probability, 0 to 1, of not choosing the best guess.
        duel: share of choices that go to a challenger: the winner of those draws that the first draw's winner loses.
        floor: smallest probability of any model, at most 1 / k; what off-policy evaluation needs.
    """
    offset = None if prior is None else prior[None, :]
    drawn = model.sample(x[None, :], normal, offset)[:, 0, :] - cost
    share = np.bincount(drawn.argmax(1), minlength=len(model.models)) / len(drawn)
    if duel > 0.0:
        share = challenged(share, duel, LEAST)
    best = int((model.predict(x[None, :], offset).mean[0] - cost).argmax())
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


def shape_of(model: Quality, draws: int = DRAWS) -> tuple[int, int, int]:
    """Shape of the standard normals that `distribution` takes."""
    return model.shape(draws)
