"""Learned length of the answer: output tokens of every model on a query, with uncertainty.

Lengths are close to log-normal, so the logarithm is regressed (the same model as for quality: topics, hierarchy, ridge
remainder). The expectation is the exponential times a factor for each model, the ratio of what was written to what the
exponential had said (smearing; Duan 1983): the log-normal's own factor is 15 to 28 % too low for models that sometimes
ramble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.learn.arrays import Packed, pack, stored, unpack
from shared.learn.hierarchy import Prior, Sums
from shared.learn.quality import QualityModel
from shared.learn.topics import CLUSTERS, clusters

Array = NDArray[np.float64]

VERSION = "length.v1"
USUAL_TOKENS = 128.0
"""Expected of a model of which nothing is known."""
_USUAL = float(np.log1p(USUAL_TOKENS))
USUAL_WEIGHT = 4.0
"""Answers that this expectation is worth."""
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

    def __init__(self, log: QualityModel, sums: Array | None = None) -> None:
        """`log` predicts log(1 + tokens) less that of `USUAL_TOKENS`; `sums` [4, k] add up squared errors of it,
        answers, tokens written, and tokens that the exponential had said."""
        self.models = log.models
        self._log = log
        if sums is None:
            factor = np.exp(SPREAD**2 / 2.0)
            usual = np.array([SPREAD**2, 1.0, USUAL_TOKENS * factor, USUAL_TOKENS])
            sums = np.repeat(USUAL_WEIGHT * usual[:, None], len(log.models), axis=1)
        self._sums = sums

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
        model = cls(log)
        known = ~np.isnan(target)
        for row, what in enumerate(((target - own) ** 2, known, tokens, np.expm1(_USUAL + own))):
            model._sums[row] += np.where(known, what, 0.0).sum(0)
        return model, model._expected(own)

    def predict(self, x: NDArray[Any]) -> Lengths:
        """x [n, d]."""
        found = self._log.predict(x)
        deviation = np.sqrt(self._sums[0] / self._sums[1] + found.std**2)
        low, high = (np.expm1(_USUAL + found.mean + side * 1.28 * deviation) for side in (-1.0, 1.0))
        return Lengths(self._expected(found.mean), np.maximum(low, 0.0), high)

    def expected(self, x: NDArray[Any]) -> Array:
        """Expected output tokens [n, k] for x [n, d]: the means of `predict` alone, for those who decide on the way."""
        return self._expected(self._log.expected(x))

    def expected_one(self, x: NDArray[Any]) -> Array:
        """`expected` for one query: [d] to [k]."""
        return self._expected(self._log.expected_one(x))

    def update(self, x: NDArray[Any], model: int, tokens: float) -> None:
        """One answer of the model with this index: x [d], and its length."""
        target = float(np.log1p(tokens)) - _USUAL
        said = float(self._log.predict(x[None, :]).mean[0, model])
        self._sums[:, model] += ((target - said) ** 2, 1.0, tokens, np.expm1(_USUAL + said))
        self._log.update(x, model, target)

    @property
    def width(self) -> int:
        """Features of a query."""
        return len(self._log.topics.centre)

    def seen(self, model: int) -> float:
        """Answers of this model that have been learned from."""
        return float(self._sums[1, model]) - USUAL_WEIGHT

    def with_models(self, models: Sequence[str]) -> LengthModel:
        """The same knowledge for another list of models: new ones begin at the level that all share."""
        changed = LengthModel(self._log.with_models(models))
        for new, name in enumerate(models):
            if name in self.models:
                changed._sums[:, new] = self._sums[:, self.models.index(name)]
        return changed

    def to_bytes(self) -> bytes:
        """For the knowledge base."""
        return msgspec.msgpack.encode(_Stored(VERSION, self._log.to_bytes(), pack({"sums": self._sums})))

    @classmethod
    def from_bytes(cls, data: bytes) -> LengthModel:
        """Raises ValueError when these bytes are not a length model of this version."""
        found = stored(data, _Stored, VERSION, "a length model")
        try:
            return cls(QualityModel.from_bytes(found.log), unpack(found.arrays)["sums"])
        except KeyError as error:
            raise ValueError(f"no length model: {error}") from None

    def _expected(self, log: Array) -> Array:
        return np.asarray(np.maximum(np.expm1(_USUAL + log) * self._sums[2] / self._sums[3], 1.0))


def _prior() -> Prior:
    return Prior(level=0.7, own_level=0.5, slope=0.5, own_slope=0.3, noise=0.45)


class _Stored(msgspec.Struct, frozen=True):
    version: str
    log: bytes
    arrays: dict[str, Packed]
