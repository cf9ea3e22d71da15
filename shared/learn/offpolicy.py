"""What another policy would have earned, from decisions logged with their propensities.

Inverse propensity scoring (Horvitz and Thompson 1952), its self-normalised form (Swaminathan and Joachims 2015), and
doubly robust estimation (Dudik, Langford and Li 2011), which is right if either the propensities or the predictions
are. `shrunk` draws its weights in where they are large (Su, Dimakopoulou, Krishnamurthy and Dudik 2020): a little bias
for much variance, and the smallest error here. Intervals are normal, from the influence of each logged decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Z95 = 1.96
MAX_WEIGHT = 50.0
"""Importance weights are cut here: a bias of little, against a variance of much."""


SHRINKAGE = 30.0
"""Weights w become w s / (w^2 + s): small ones stay, and none is above 2.7. Of 1 to 300, 10 and 30 had the smallest
error for both candidates of the bench (40 logs)."""


@dataclass(frozen=True)
class Logged:
    """n decisions of which the reward is known."""

    chosen: NDArray[np.int64]
    propensity: Array
    """Probability with which the logging policy chose it."""
    reward: Array


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float
    """About 95 % of such intervals hold the truth."""
    effective: float
    """Logged decisions that the estimate rests on, after weighting (Kish 1965)."""


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate should take over."""

    promote: bool
    gain: Estimate
    reason: str


def ips(logged: Logged, target: Array) -> Estimate:
    """`target` [n, k]: probabilities of the candidate policy."""
    weight = _weights(logged, target)
    return _estimate(weight * logged.reward, weight)


def snips(logged: Logged, target: Array) -> Estimate:
    """Self-normalised: weights are made to add up to n."""
    weight = _weights(logged, target)
    total = weight.sum()
    if total <= 0.0:
        return Estimate(float("nan"), -math.inf, math.inf, 0.0)
    value = float((weight * logged.reward).sum() / total)
    return _estimate(value + weight * (logged.reward - value) / weight.mean(), weight)


def doubly_robust(logged: Logged, target: Array, predicted: NDArray[Any]) -> Estimate:
    """`predicted` [n, k]: expected rewards, by a model that has not seen these rewards."""
    weight = _weights(logged, target)
    rows = np.arange(len(weight))
    return _estimate((target * predicted).sum(1) + weight * (logged.reward - predicted[rows, logged.chosen]), weight)


def shrunk(logged: Logged, target: Array, predicted: NDArray[Any]) -> Estimate:
    """Doubly robust with weights drawn in. What that leaves out of the estimate is known as far as the log goes, and
    widens the interval to each side."""
    weight = _raw_weights(logged, target)
    drawn = weight * SHRINKAGE / (weight**2 + SHRINKAGE)
    residual = logged.reward - predicted[np.arange(len(weight)), logged.chosen]
    found = _estimate((target * predicted).sum(1) + drawn * residual, drawn)
    left = abs(float(((weight - drawn) * residual).mean())) if len(weight) else 0.0
    return Estimate(found.value, found.low - left, found.high + left, found.effective)


def kinship(residual: Array) -> Array:
    """[k, k]: by how much the score of model b is above its prediction, on average, for each point by which that of a
    is above its own, entry [b, a], from recorded scores less predictions [n, k] by fits that have not seen them. What
    one model gets wrong others do too; queries that not all models have answered (NaN) are left out.

    Raises:
        ValueError: fewer than two queries are known of all models.
    """
    known = residual[~np.isnan(residual).any(axis=1)]
    if len(known) < 2:
        raise ValueError("kinship needs two queries that all models have answered")
    covariance = np.atleast_2d(np.cov(known.T))
    return np.asarray(covariance / np.maximum(np.diag(covariance), 1e-12)[None, :])


def imputed(logged: Logged, target: Array, predicted: NDArray[Any], kin: Array) -> Estimate:
    """The mean of two corrections of what is predicted: `shrunk`, and what the logged reward says of the other models'
    rewards on the very same query (`kinship`), which needs no weights at all: regression imputation (Sarndal, Swensson
    and Wretman 1992). The one errs by variance where weights are large, the other where predictions are."""
    weight = _raw_weights(logged, target)
    drawn = weight * SHRINKAGE / (weight**2 + SHRINKAGE)
    told = (target * kin[:, logged.chosen].T).sum(1)
    both = (drawn + told) / 2.0
    residual = logged.reward - predicted[np.arange(len(weight)), logged.chosen]
    found = _estimate((target * predicted).sum(1) + both * residual, both)
    left = abs(float(((weight - both) * residual).mean())) if len(weight) else 0.0
    return Estimate(found.value, found.low - left, found.high + left, found.effective)


def gain(logged: Logged, candidate: Array, present: Array, predicted: NDArray[Any]) -> Estimate:
    """Doubly robust estimate of the candidate's advantage over the present policy, both [n, k]: paired, so that what
    the two share cancels."""
    rows = np.arange(len(logged.reward))
    weight = _weights(logged, candidate)
    difference = weight - _weights(logged, present)
    residual = logged.reward - predicted[rows, logged.chosen]
    return _estimate(((candidate - present) * predicted).sum(1) + difference * residual, weight)


def judge(
    logged: Logged, candidate: Array, present: Array, predicted: NDArray[Any], least_effective: float = 200.0
) -> Verdict:
    """Promote when the lower bound of the gain is above nought and rests on enough decisions."""
    found = gain(logged, candidate, present, predicted)
    if found.effective < least_effective:
        return Verdict(False, found, f"rests on {found.effective:.0f} decisions, {least_effective:.0f} are needed")
    if found.low <= 0.0:
        return Verdict(False, found, f"gains between {found.low:+.4f} and {found.high:+.4f}: not certain")
    return Verdict(True, found, f"gains at least {found.low:+.4f}")


def _raw_weights(logged: Logged, target: Array) -> Array:
    wanted = target[np.arange(len(logged.chosen)), logged.chosen]
    return np.asarray(wanted / np.maximum(logged.propensity, 1e-12))


def _weights(logged: Logged, target: Array) -> Array:
    return np.asarray(np.minimum(_raw_weights(logged, target), MAX_WEIGHT))


def _estimate(parts: Array, weight: Array) -> Estimate:
    n = len(parts)
    if n < 2:
        return Estimate(float("nan"), -math.inf, math.inf, float(n))
    value, error = float(parts.mean()), float(parts.std(ddof=1)) / math.sqrt(n)
    squares = float((weight**2).sum())
    return Estimate(
        value, value - Z95 * error, value + Z95 * error, float(weight.sum() ** 2 / squares) if squares else 0.0
    )
