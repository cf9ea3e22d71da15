"""Ridge regression of many targets at once, each with its own penalty, chosen by exact leave-one-out error.

One singular value decomposition serves every target and every penalty (Golub, Heath and Wahba 1979; the leave-one-out
residual of a linear smoother is its residual over one minus its leverage).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PENALTIES = np.geomspace(0.1, 3000.0, 16)


@dataclass(frozen=True)
class Ridge:
    """`(x - centre) @ weights + level`."""

    centre: Array
    """[d]"""
    weights: Array
    """[d, t]"""
    level: Array
    """[t]"""
    own: Array
    """[n, t]: for each row fitted, the prediction by a fit that has not seen it."""

    def predict(self, x: NDArray[Any]) -> Array:
        """x [n, d] gives [n, t]."""
        return np.asarray((x - self.centre) @ self.weights + self.level, np.float64)


def fit(x: NDArray[Any], targets: NDArray[Any], penalties: Array = PENALTIES) -> Ridge:
    """x [n, d], targets [n, t]; NaN targets count as the target's mean."""
    x = np.asarray(x, np.float64)
    known = ~np.isnan(targets)
    level = np.where(known, targets, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    centred = np.where(known, targets - level, 0.0)
    centre = x.mean(0)
    u, s, vt = np.linalg.svd(x - centre, full_matrices=False)
    projected, squares = u.T @ centred, u**2
    best = np.full(targets.shape[1], np.inf)
    shrink = np.zeros((len(s), targets.shape[1]))
    own = np.zeros(targets.shape)
    for penalty in penalties:
        share = s**2 / (s**2 + penalty)
        left = np.maximum(1.0 - squares @ share - 1.0 / len(x), 1e-6)[:, None]
        residual = np.where(known, (centred - u @ (share[:, None] * projected)) / left, 0.0)
        error = (residual**2).sum(0)
        better = error < best
        best = np.where(better, error, best)
        shrink[:, better] = (s / (s**2 + penalty))[:, None]
        own[:, better] = (centred - residual)[:, better] + level[better]
    return Ridge(centre, vt.T @ (shrink * projected), level, own)


def softmax(logits: NDArray[Any]) -> Array:
    """Along the last axis."""
    power = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(power / power.sum(-1, keepdims=True), np.float64)
