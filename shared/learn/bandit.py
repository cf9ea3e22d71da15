"""Learning from the outcome of the chosen model alone: choices that explore, with propensities that are exact.

Thompson sampling (Thompson 1933; for contextual linear models Agrawal and Goyal 2013): a model is chosen as often as it
is the best under the posterior. The share of posterior draws in which each model wins is the distribution that the
choice is then drawn from, so the logged propensity is exact however few the draws. Exploration is capped by a budget:
the share of choices that may differ from the best guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.learn.quality import QualityModel

Array = NDArray[np.float64]

DRAWS = 32


@dataclass(frozen=True)
class Choice:
    model: int
    propensity: float
    """Probability with which this model was to be chosen."""
    distribution: Array
    """[k]"""


def distribution(
    model: QualityModel,
    x: NDArray[Any],
    normal: Array,
    *,
    cost: NDArray[Any] | float = 0.0,
    prior: NDArray[Any] | None = None,
    budget: float = 1.0,
    floor: float = 0.0,
) -> Array:
    """Probabilities [k] of choosing each model for a query.

    Args:
        model: what is known.
        x: [d] features.
        normal: [s, k + 1, p] standard normals (`shape_of`).
        cost: [k] taken from the expected score: the utility's other terms.
        prior: [k] what the cards promise.
        budget: largest probability, 0 to 1, of not choosing the best guess.
        floor: smallest probability of any model, at most 1 / k; what off-policy evaluation needs.
    """
    offset = None if prior is None else prior[None, :]
    drawn = model.sample(x[None, :], normal, offset)[:, 0, :] - cost
    share = np.bincount(drawn.argmax(1), minlength=len(model.models)) / len(drawn)
    best = int((model.predict(x[None, :], offset).mean[0] - cost).argmax())
    off = 1.0 - share[best]
    if off > budget:
        share *= budget / off
        share[best] = 1.0 - budget
    return np.asarray((1.0 - floor * len(share)) * share + floor)


def choose(probabilities: Array, uniform: float) -> Choice:
    """The choice that `uniform` (0 to 1) draws."""
    index = int(np.searchsorted(np.cumsum(probabilities), uniform * probabilities.sum(), side="right"))
    index = min(index, len(probabilities) - 1)
    return Choice(index, float(probabilities[index]), probabilities)


def shape_of(model: QualityModel, draws: int = DRAWS) -> tuple[int, int, int]:
    """Shape of the standard normals that `distribution` takes."""
    return draws, len(model.models) + 1, model.topics.size
