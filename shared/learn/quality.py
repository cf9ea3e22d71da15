"""Learned quality: the expected score of every model on a query, with uncertainty, updated outcome by outcome.

    q(x, m) = prior(x, m) + z(x) . u_m + r_m(x)

`z` are soft topics (`topics`), `u_m` the weights of a hierarchical Bayesian regression (`hierarchy`), whose sums take
in one outcome at a time for as long as the system runs. `r_m` is what a batch of recorded outcomes says beyond them:
ridge regression of the remainder on all features, along the mean of the models (difficulty) and the principal
directions of their differences, each with its own penalty (curds and whey; Breiman and Friedman 1997). `prior` is what
the model's card promises; it is given with the query and is all there is before the first outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.learn import hierarchy, linear
from shared.learn.arrays import Packed, pack, stored, unpack
from shared.learn.topics import NESTED, Topics, clusters, supervised

Array = NDArray[np.float64]

VERSION = "quality.v1"
DETAIL = 0.5
"""Share of the ridge on differences between models that is used. Squared error would have all of it; the choice of the
best model is made worse by its noise (0.464 and 0.467 without it, 0.466 and 0.466 with half, 0.464
and 0.464 with all: two cross-validations of two folds)."""
BEGIN = hierarchy.Prior(own_level=0.07, own_slope=0.1)
"""Where nothing has been learned: models are believed to differ little, and by topic hardly more. A few bad answers at
first are then taken for bad luck, and the model is asked again (readable.WORTH)."""
SWEEPS = 3
REFIT_EVERY = 100
"""Outcomes between two choices of the prior by evidence, along with what was believed of it beforehand. Without that
belief 600 outcomes of chosen models misled it (0.4 points, standard error 0.4); with it the best guess is as good as
under the prior as it stands and varies less (1.36 points below the offline router either way, standard deviation
between seeds 1.0 and 1.2), and a card that promises far too much is found out sooner."""


@dataclass(frozen=True)
class Prediction:
    """Expected scores, and the standard deviation of that expectation (not of a single outcome)."""

    mean: Array
    """[n, k]"""
    std: Array
    """[n, k]"""


@dataclass(frozen=True)
class Spread:
    """How expected scores for one query may deviate from their means, and whose do so together."""

    own: Array
    """[k] standard deviation of what is each model's own."""
    shared: Array
    """[k, s]: what a standard normal [s], the same for all models, does to each. Most of it is how hard the query is,
    which is no reason to choose any of them."""

    @classmethod
    def none(cls, models: int, shared: int = 0) -> Spread:
        """Nothing is uncertain."""
        return cls(np.zeros(models), np.zeros((models, shared)))

    @property
    def std(self) -> Array:
        """[k], both together."""
        return np.asarray(np.sqrt(self.own**2 + np.einsum("ks,ks->k", self.shared, self.shared)))

    def shape(self, draws: int) -> tuple[int, int]:
        """Of the standard normals that so many `deviations` take."""
        return draws, self.shared.shape[0] + self.shared.shape[1]

    def deviations(self, normal: NDArray[Any]) -> Array:
        """[draws, k] for standard normals of `shape`, or of more columns."""
        k, s = self.shared.shape
        return np.asarray(self.own * normal[:, :k] + normal[:, k : k + s] @ self.shared.T)


class QualityModel:
    """Quality of `models`. `update` changes it; everything else leaves it as it is."""

    def __init__(
        self,
        models: Sequence[str],
        topics: Topics,
        sums: hierarchy.Sums | None = None,
        prior: hierarchy.Prior | None = None,
        detail: tuple[Array, Array] | None = None,
        believed: hierarchy.Prior | None = None,
    ) -> None:
        """`detail`: centre [d] and weights [d, k] of the remainder. `believed`: the prior before any evidence, where
        `prior` is no longer that."""
        self.models = tuple(models)
        self.topics = topics
        self.sums = sums or hierarchy.Sums.empty(len(self.models), topics.size)
        self.prior = prior or hierarchy.Prior()
        self.believed = believed or self.prior
        self._detail = detail
        self._since = 0
        self.posterior = hierarchy.solve(self.sums, self.prior)

    @classmethod
    def start(
        cls,
        models: Sequence[str],
        x: NDArray[Any],
        count: int | Sequence[int] = NESTED,
        prior: hierarchy.Prior = BEGIN,
        *,
        form: int = 0,
    ) -> QualityModel:
        """Before any outcome: topics from the features [n, d] of queries alone (`form`: see `topics.clusters`)."""
        return cls(models, clusters(x, count, form=form), prior=prior)

    @classmethod
    def fit(
        cls,
        models: Sequence[str],
        x: NDArray[Any],
        y: NDArray[Any],
        categories: Sequence[str | None] | None = None,
        *,
        prior: hierarchy.Prior | None = None,
        detail_share: float = DETAIL,
    ) -> tuple[QualityModel, Array]:
        """Learn from recorded outcomes.

        Args:
            models: k names.
            x: [n, d] features.
            y: [n, k] scores, NaN where a model was not asked.
            categories: [n]; topics are clusters of the features where there are fewer than two.
            prior: where the search for the prior begins.
            detail_share: share of the ridge on differences between models that is used.

        Returns:
            The model, and its predictions [n, k] for these queries as it would have made them without them.
        """
        if categories is not None and len({c for c in categories if c}) > 1:
            topics, z = supervised(x, categories)
        else:
            topics = clusters(x)
            z = topics.encode(x)
        sums = hierarchy.Sums.empty(len(models), topics.size)
        sums.add_all(z, y)
        prior = prior or hierarchy.Prior()
        for _ in range(SWEEPS):
            prior = hierarchy.choose_prior(sums, prior)
        base = z @ hierarchy.solve(sums, prior).mean.T
        basis = _directions(y - base)
        rest = np.where(np.isnan(y), 0.0, y - base) @ basis
        found = linear.fit(x, rest)
        scale = np.where(np.arange(len(models)) == 0, 1.0, detail_share)
        back = (basis * scale).T
        # The level of the remainder is nought but for rounding: the sums hold the levels.
        detail = (found.centre, found.weights @ back)
        return cls(models, topics, sums, prior, detail), base + (found.own - found.level) @ back

    def predict(self, x: NDArray[Any], prior: NDArray[Any] | None = None) -> Prediction:
        """x [n, d]; `prior` [n, k] is what the cards promise, 0 when left out."""
        mean, std = self.posterior.predict(self.topics.encode(x))
        return Prediction(mean + self._offset(x, prior), std)

    def expected(self, x: NDArray[Any]) -> Array:
        """The means [n, k] of `predict` alone."""
        return np.asarray(self.topics.encode(x) @ self.posterior.mean.T + self._offset(x, None))

    def expected_one(self, x: NDArray[Any]) -> Array:
        """`expected` for one query: [d] to [k]."""
        found = self.posterior.mean @ self.topics.encode_one(x)
        return found if self._detail is None else found + (x - self._detail[0]) @ self._detail[1]

    def guess(self, x: NDArray[Any]) -> tuple[Array, Spread]:
        """`expected_one` and `spread` of one query at once: x [d]."""
        z = self.topics.encode_one(x)
        mean = self.posterior.mean @ z
        if self._detail is not None:
            mean = mean + (x - self._detail[0]) @ self._detail[1]
        return mean, Spread(*self.posterior.spread(z))

    def spread(self, x: NDArray[Any], prior: NDArray[Any] | None = None) -> Spread:
        """How the expectations of `predict` may deviate for one query, x [d]; `prior` makes no difference."""
        return Spread(*self.posterior.spread(self.topics.encode_one(x)))

    def update(self, x: NDArray[Any], model: int, score: float, prior: float = 0.0, weight: float = 1.0) -> None:
        """One outcome of the model with this index: x [d]."""
        self._add(x, model, score - prior, weight)
        self._since += 1
        if self._since >= REFIT_EVERY:
            self.prior = hierarchy.choose_prior(self.sums, self.prior, self.believed)
            self._since = 0
        self.posterior = hierarchy.solve(self.sums, self.prior)

    def withdraw(self, x: NDArray[Any], model: int, score: float, prior: float = 0.0, weight: float = 1.0) -> None:
        """Take back an outcome that was given to `update`; `weight` is what it counts by now (`forget`)."""
        self._add(x, model, score - prior, -weight)
        self.posterior = hierarchy.solve(self.sums, self.prior)

    def forget(self, model: int, keep: float) -> None:
        """A model has changed: what is known of it counts `keep` (0 to 1) of what it did."""
        self.sums.scale(model, keep)
        self.posterior = hierarchy.solve(self.sums, self.prior)

    def with_models(self, models: Sequence[str]) -> QualityModel:
        """The same knowledge for another list of models: new ones begin at the level that all share."""
        sums = hierarchy.Sums.empty(len(models), self.topics.size)
        detail = None if self._detail is None else np.zeros((len(self._detail[0]), len(models)))
        for new, name in enumerate(models):
            if name in self.models:
                old = self.models.index(name)
                sums.zz[new], sums.zy[new] = self.sums.zz[old], self.sums.zy[old]
                sums.yy[new], sums.count[new] = self.sums.yy[old], self.sums.count[old]
                if detail is not None and self._detail is not None:
                    detail[:, new] = self._detail[1][:, old]
        kept = None if detail is None or self._detail is None else (self._detail[0], detail)
        return QualityModel(models, self.topics, sums, self.prior, kept, self.believed)

    def to_bytes(self) -> bytes:
        """For the knowledge base."""
        arrays = {
            "centre": self.topics.centre, "weights": self.topics.weights, "level": self.topics.level,
            "mean": self.topics.mean, "zz": self.sums.zz, "zy": self.sums.zy, "yy": self.sums.yy,
            "count": self.sums.count,
        }  # fmt: skip
        if self._detail is not None:
            arrays |= {"detail_centre": self._detail[0], "detail_weights": self._detail[1]}
        return msgspec.msgpack.encode(
            _Stored(
                VERSION,
                self.models,
                self.topics.temperature,
                self.prior,
                self._since,
                pack(arrays),
                self.topics.parts,
                self.believed,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> QualityModel:
        """Raises ValueError when these bytes are not a quality model of this version."""
        found = stored(data, _Stored, VERSION, "a quality model")
        try:
            a = unpack(found.arrays)
            topics = Topics(a["centre"], a["weights"], a["level"], found.temperature, a["mean"], found.parts)
            sums = hierarchy.Sums(a["zz"], a["zy"], a["yy"], a["count"])
            detail = (a["detail_centre"], a["detail_weights"]) if "detail_centre" in a else None
        except KeyError as error:
            raise ValueError(f"no quality model: {error}") from None
        model = cls(found.models, topics, sums, found.prior, detail, found.believed)
        model._since = found.since
        return model

    def _add(self, x: NDArray[Any], model: int, over: float, weight: float) -> None:
        row = np.asarray(x)[None, :]
        if self._detail is not None:
            over -= float(self._offset(row, None)[0, model])
        self.sums.add(self.topics.encode(row)[0], model, over, weight)

    def _offset(self, x: NDArray[Any], prior: NDArray[Any] | None) -> Array:
        """[n, k]: what does not come from the sums."""
        total = np.zeros((len(x), len(self.models))) if prior is None else np.asarray(prior, np.float64)
        if self._detail is not None:
            total = total + (x - self._detail[0]) @ self._detail[1]
        return total


class _Stored(msgspec.Struct, frozen=True):
    version: str
    models: tuple[str, ...]
    temperature: float
    prior: hierarchy.Prior
    since: int
    arrays: dict[str, Packed]
    parts: tuple[int, ...] = ()
    believed: hierarchy.Prior | None = None


def _directions(y: NDArray[Any]) -> Array:
    """An orthonormal basis [k, k] of the models: their mean, then the principal directions of their differences."""
    k = y.shape[1]
    together = np.full((k, 1), 1.0 / np.sqrt(k))
    filled = np.where(np.isnan(y), 0.0, y)
    apart = filled - filled @ together @ together.T
    vectors = np.linalg.eigh(apart.T @ apart)[1][:, ::-1]
    return np.concatenate([together, vectors[:, : k - 1]], axis=1)
