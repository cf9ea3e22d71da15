"""A chance as a line in predicted quality, drawn to the identity where there is little data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STRENGTH = 200.0
"""Observations that weigh as much as the belief that a sight says nothing. Of many plans the one that chance flatters
looks best, so lines are drawn in firmly: with a 70 B model at 0.27 of its energy, 25, 100 and 400 give 0.526, 0.529 and
0.531, and 1.8, 1.8 and 1.6 attempts a query (mean of two cross-validations of two folds)."""


def fit(x: NDArray[Any], y: NDArray[Any]) -> Array:
    """(level, slope) of y on x, drawn to (0, 1)."""
    if not len(x):
        return np.array([0.0, 1.0])
    off, middle = y - x, x.mean()
    level = off.sum() / (len(x) + STRENGTH)
    slope = ((x - middle) * off).sum() / (((x - middle) ** 2).sum() + STRENGTH * 0.02)
    return np.array([level - slope * middle, 1.0 + slope])


def at(line: Array, x: NDArray[Any]) -> Array:
    """The chance at x, between 0 and 1."""
    return np.asarray(np.clip(line[0] + line[1] * x, 0.0, 1.0))
