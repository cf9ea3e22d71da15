"""Routers behind one small interface: the plain ones that ours must beat, and ours.

    router = Knn()
    router.fit(learn, embed(learn.prompts))
    wanted = router.scores(judge, embed(judge.prompts))    # [n, k]: higher is better; choose wanted.argmax(1)

`x` is always the embeddings of the prompts. Those that learn query by query also have `choose` and `observe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.sim import learned
from bench.sim.data import Outcomes
from shared.learn import linear
from shared.learn.quality import QualityModel

Array = NDArray[Any]


class Router(Protocol):
    name: str

    def fit(self, learn: Outcomes, x: Array) -> None:
        """Learn from recorded outcomes; x [n, d]."""

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        """[n, k], by the models of the outcomes learned from."""


class Single:
    """Always one model: the best of the given ones on the queries learned from, or the named one."""

    def __init__(self, model: str = "", name: str = "best-single") -> None:
        self.name, self._model = name if not model else f"single:{model}", model
        self._level = np.zeros(0)

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._level = np.nanmean(learn.score, axis=0)
        if self._model:
            self._level = np.array([float(m == self._model) for m in learn.models])

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return np.tile(self._level, (len(outcomes), 1))


class RoundRobin:
    name = "round-robin"

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._k = len(learn.models)

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return np.eye(self._k)[np.arange(len(outcomes)) % self._k]


class Random:
    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._k = len(learn.models)

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return np.random.default_rng(self._seed).random((len(outcomes), self._k))


class Semantic:
    """The plain reading of the CALM paper: the model whose description is most like the query. Learns nothing."""

    name = "semantic"

    def __init__(self, descriptions: Mapping[str, Array]) -> None:
        """`descriptions`: the embedding [d] of each model's description."""
        self._descriptions = descriptions

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._matrix = np.stack([self._descriptions[m] for m in learn.models])

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return np.asarray(x @ self._matrix.T)


class CategoryBest:
    """Knows each query's true category, which no router does, and takes the best model of it."""

    name = "category-best"

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._all = np.nanmean(learn.score, axis=0)
        names = np.array([c or "" for c in learn.categories])
        self._of: dict[str, Array] = {c: np.nanmean(learn.score[names == c], axis=0) for c in map(str, set(names)) if c}

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        rows = [self._of[c] if c in self._of else self._all for c in outcomes.categories]  # noqa: SIM401 typed as never None
        return np.stack(rows)


class Knn:
    """Mean score among the nearest queries; their number is chosen by leaving one out."""

    name = "knn"
    sizes = (25, 50, 100, 200, 400, 800)

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._x, self._y = x, np.where(np.isnan(learn.score), np.nanmean(learn.score, axis=0), learn.score)
        sizes = [s for s in self.sizes if s < len(x)] or [max(len(x) - 1, 1)]
        sample = np.arange(0, len(x), max(1, len(x) // 1500))
        likeness = x[sample] @ x.T
        likeness[np.arange(len(sample)), sample] = -np.inf
        errors = [((_nearest(likeness, self._y, s) - self._y[sample]) ** 2).sum() for s in sizes]
        self._size = sizes[int(np.argmin(errors))]

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return _nearest(x @ self._x.T, self._y, self._size)


def _nearest(likeness: Array, y: Array, size: int) -> Array:
    nearest = np.argpartition(-likeness, size - 1, axis=1)[:, :size]
    return np.asarray(y[nearest].mean(1))


class Ridge:
    """Ridge regression of the scores on the embedding, its penalty by leaving one out."""

    name = "ridge"

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._ridge = linear.fit(x, learn.score.astype(np.float64))

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return self._ridge.predict(x)


class WinRate:
    """After RouteLLM (Ong et al. 2024): the strong model where its chance of beating the weak one passes a threshold.

    The scores are the weak model's level, and that plus the chance less the threshold, so that a price on the strong
    model's energy moves the threshold."""

    name = "win-rate"

    def __init__(self, strong: str) -> None:
        self._strong = strong

    def fit(self, learn: Outcomes, x: Array) -> None:
        level = np.nanmean(learn.score, axis=0)
        self._to = learn.models.index(self._strong)
        level[self._to] = -np.inf
        self._from, self._k = int(np.argmax(level)), len(learn.models)
        wins = (learn.score[:, self._to] > learn.score[:, self._from]).astype(np.float64)
        self._ridge = linear.fit(x, wins[:, None])

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        result = np.full((len(outcomes), self._k), -1e9)
        result[:, self._from] = 0.0
        result[:, self._to] = self._ridge.predict(x)[:, 0]
        return result


class LinUcb:
    """LinUCB with disjoint linear models (Li et al. 2010), on the principal components of the embeddings."""

    name = "linucb"

    def __init__(self, models: Sequence[str], x: Array, alpha: float = 0.5, components: int = 16) -> None:
        centre = x.mean(0)
        axes = np.linalg.eigh((x - centre).T @ (x - centre))[1][:, ::-1][:, :components]
        self._centre, self._axes = centre, axes / np.sqrt((((x - centre) @ axes) ** 2).sum(1).mean())
        p = axes.shape[1] + 1
        self._a, self._b = np.stack([np.eye(p)] * len(models)), np.zeros((len(models), p))
        self._inverse: Array = self._a.copy()
        self._alpha = alpha

    def fit(self, learn: Outcomes, x: Array) -> None:
        for row, model in np.argwhere(~np.isnan(learn.score)):
            self._add(x[row], int(model), float(learn.score[row, model]))
        self._inverse = np.linalg.inv(self._a)

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return self.means(x)

    def means(self, x: Array) -> Array:
        """Expected scores [n, k], without the width."""
        return np.asarray(self._encode(x) @ np.einsum("kpq,kq->kp", self._inverse, self._b).T)

    def choose(self, x: Array) -> int:
        z = self._encode(x[None, :])[0]
        mean = np.einsum("kpq,kq->kp", self._inverse, self._b) @ z
        width = np.sqrt(np.einsum("p,kpq,q->k", z, self._inverse, z))
        return int(np.argmax(mean + self._alpha * width))

    def observe(self, x: Array, model: int, score: float) -> None:
        self._add(x, model, score)
        self._inverse[model] = np.linalg.inv(self._a[model])

    def _encode(self, x: Array) -> Array:
        return np.hstack([np.ones((len(x), 1)), (x - self._centre) @ self._axes])

    def _add(self, x: Array, model: int, score: float) -> None:
        z = self._encode(x[None, :])[0]
        self._a[model] += np.outer(z, z)
        self._b[model] += score * z


class Calm:
    """Ours: learned quality (docs/decision-model.md, Quality)."""

    name = "calm"

    def fit(self, learn: Outcomes, x: Array) -> None:
        self._learn = learn
        self._model, self.own = QualityModel.fit(
            learn.models, learned.features(x, learn, learn), learn.score.astype(np.float64), learn.categories
        )

    def scores(self, outcomes: Outcomes, x: Array) -> Array:
        return self._model.predict(learned.features(x, outcomes, self._learn)).mean
