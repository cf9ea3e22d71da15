"""Learned length of the answer: output tokens of every model on a query, with uncertainty.

Lengths are close to log-normal, so the logarithm is regressed (the same model as for quality: topics, hierarchy, ridge
remainder), and the expectation is that of a log-normal: exp(mean + variance / 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.learn.hierarchy import Prior, Sums
from services.planner.decide.learn.quality import QualityModel
from services.planner.decide.learn.topics import CLUSTERS, clusters

Array = NDArray[np.float64]

USUAL_TOKENS = 128.0
"""Expected of a model of which nothing is known."""
_USUAL = float(np.log1p(USUAL_TOKENS))
SPREAD = 0.8
"""Standard deviation of the logarithm of a length, before it has been seen."""


@dataclass(frozen=True)
class Lengths:
    """Output tokens, [n, k] each."""

    mean: Array
    """Expected."""
    low: Array
    high: Array
    """Between these two lie about 80 % of the answers."""


class LengthModel:
    """Output tokens of `models`. `update` changes it."""

    def __init__(self, log: QualityModel, square: Array | None = None, count: Array | None = None) -> None:
        """`log` predicts log(1 + tokens) less that of `USUAL_TOKENS`; `square` [k] and `count` [k] add up squared
        errors of prediction."""
        self.models = log.models
        self._log = log
        self._square = np.full(len(log.models), 4.0 * SPREAD**2) if square is None else square
        self._count = np.full(len(log.models), 4.0) if count is None else count

    @classmethod
    def start(cls, models: Sequence[str], x: NDArray[Any]) -> LengthModel:
        """Before any answer: x [n, d] are features of queries."""
        topics = clusters(x, CLUSTERS)
        return cls(QualityModel(models, topics, Sums.empty(len(models), topics.size), _prior()))

    @classmethod
    def fit(
        cls, models: Sequence[str], x: NDArray[Any], tokens: NDArray[Any],
        categories: Sequence[str | None] | None = None,
    ) -> tuple[LengthModel, Array]:  # fmt: skip
        """Learn from recorded lengths [n, k] (NaN where a model was not asked). Returns the model and the expected
        lengths [n, k] as it would have predicted them without these queries."""
        target = np.log1p(tokens) - _USUAL
        log, own = QualityModel.fit(models, x, target, categories, prior=_prior(), detail_share=1.0)
        error = np.where(np.isnan(target), 0.0, target - own) ** 2
        model = cls(log, 4.0 * SPREAD**2 + error.sum(0), 4.0 + (~np.isnan(target)).sum(0))
        return model, model._expected(own)

    def predict(self, x: NDArray[Any]) -> Lengths:
        """x [n, d]."""
        found = self._log.predict(x)
        deviation = np.sqrt(self._square / self._count + found.std**2)
        low, high = (np.expm1(_USUAL + found.mean + side * 1.28 * deviation) for side in (-1.0, 1.0))
        return Lengths(self._expected(found.mean), np.maximum(low, 0.0), high)

    def update(self, x: NDArray[Any], model: int, tokens: float) -> None:
        """One answer of the model with this index: x [d], and its length."""
        target = float(np.log1p(tokens)) - _USUAL
        self._square[model] += (target - float(self._log.predict(x[None, :]).mean[0, model])) ** 2
        self._count[model] += 1.0
        self._log.update(x, model, target)

    def _expected(self, log: Array) -> Array:
        return np.asarray(np.maximum(np.expm1(_USUAL + log + 0.5 * self._square / self._count), 1.0))


def _prior() -> Prior:
    return Prior(level=0.7, own_level=0.5, slope=0.5, own_slope=0.3, noise=0.45)
