"""Quality in two parts: what is to be seen of an answer, and what it is worth beside that.

    q(x, m) = E[sign | x, m] . worth(x, m),      E[score | sign, x, m] = sign . worth(x, m)

The sign (`signs`) is 0 for an answer that cannot be read; with signs of 0 and 1 alone this is P(readable | x, m) times
E[score | readable, x, m].

Whether an answer could be read is seen with every answer, judged or not, and an unreadable one is worth nothing. So the
first factor is learned from all answers and the second from judgements of readable ones alone: where one answer in five
is judged, the first has five times as much to go by, and the second varies less from topic to topic than their product
(what sets models apart by topic is in good part that some ramble there). Both are the regression of `quality`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.learn import hierarchy
from shared.learn.quality import Prediction, QualityModel, Spread
from shared.learn.signs import HIGHEST
from shared.learn.topics import Topics

Array = NDArray[np.float64]

READABLE = hierarchy.Prior(level=0.2, own_level=0.15, slope=0.2, own_slope=0.3, noise=0.35)
"""Of the chance that an answer can be read, around 1: until something unreadable has come, all is taken to be."""
WORTH = hierarchy.Prior(own_level=0.07, own_slope=0.07)
"""Of what a readable answer is worth. With models' levels believed to differ by 0.15 the best guess after 3,000 queries
was 1.67 points below the offline router, with 0.07 and 0.05 1.36 and 1.39 (24 seeds on each of four halves, standard
error 0.12): a good model that was unlucky at first was not asked again."""


class ReadableQuality:
    """Quality of `models` in two parts. `heard` and `judged` change it; everything else leaves it as it is."""

    def __init__(self, readable: QualityModel, worth: QualityModel) -> None:
        self.models = worth.models
        self.readable, self.worth = readable, worth

    @classmethod
    def start(cls, models: Sequence[str], topics: Topics) -> ReadableQuality:
        """Before any answer."""
        return cls(QualityModel(models, topics, prior=READABLE), QualityModel(models, topics, prior=WORTH))

    def heard(self, x: NDArray[Any], model: int, sign: float) -> None:
        """An answer came: x [d], and its sign (1 or 0 where only reading it is known)."""
        self.readable.update(x, model, sign, 1.0)

    def judged(self, x: NDArray[Any], model: int, score: float, prior: float = 0.0, sign: float = 1.0) -> None:
        """A readable answer was judged; `prior` is what the card promised for one of the usual sign. What cannot be
        read is worth nothing, which `heard` has been told."""
        over, weight = beyond(score, prior, sign)
        self.worth.update(x, model, over, weight=weight)

    def predict(self, x: NDArray[Any], prior: NDArray[Any] | None = None) -> Prediction:
        """x [n, d]; `prior` [n, k] is what the cards promise for a readable answer, 0 when left out."""
        readable, worth = self.readable.predict(x, np.ones((len(x), len(self.models)))), self.worth.predict(x, prior)
        first, second = np.clip(readable.mean, 0.0, HIGHEST), np.clip(worth.mean, 0.0, 1.0)
        return Prediction(first * second, np.hypot(first * worth.std, second * readable.std))

    def spread(self, x: NDArray[Any], prior: NDArray[Any] | None = None) -> Spread:
        """How the expectations of `predict` may deviate for one query, x [d], to first order in each factor; `prior`
        [k]."""
        row, promised = x[None, :], None if prior is None else prior[None, :]
        first = np.clip(self.readable.predict(row, np.ones((1, len(self.models)))).mean[0], 0.0, HIGHEST)
        second = np.clip(self.worth.predict(row, promised).mean[0], 0.0, 1.0)
        return product(first, self.readable.spread(x), second, self.worth.spread(x))


def product(first: NDArray[Any], of_first: Spread, second: NDArray[Any], of_second: Spread) -> Spread:
    """How the product of two independent estimates [k] may deviate, to first order."""
    return Spread(
        np.hypot(first * of_second.own, second * of_first.own),
        np.hstack([first[:, None] * of_second.shared, second[:, None] * of_first.shared]),
    )


def beyond(score: float, prior: float, sign: float) -> tuple[float, float]:
    """The outcome that a judged answer is for what it is worth beside its sign, less the prior, and its weight: least
    squares of score against sign . (prior + worth)."""
    return score / sign - prior, sign * sign
