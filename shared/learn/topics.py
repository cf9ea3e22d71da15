"""What a query is about, in few soft shares: the bottleneck through which quality is learned.

A few thousand outcomes cannot say much about 400 features; they can about a dozen topics. Where the recorded queries
name their categories, a ridge classifier on the features gives the shares, its logits taken at the temperature under
which held-out categories are most probable (Guo et al. 2017). Where they do not, topics are clusters of the features:
k-means from a deterministic start (bisection along principal directions; Boley 1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.learn import linear

Array = NDArray[np.float64]

CLUSTERS = 8
"""Topics where no categories are known. Tried: 4, 6, 8 and 12; after 600 outcomes of chosen models they route
alike within the noise (0.438, 0.440, 0.442, 0.436, standard error 0.004)."""
NESTED = (4, 8)
"""Topics of a model that starts from nothing: a coarse partition beside a finer one, each adding up to 1. While
outcomes are few the coarse one is learned first, for it pools more of them; later the finer one adds to it."""
KINDS = 2
"""Topics by form alone, where facts about the text's form are among the features: whether the options are numbers
goes along with what sets two good models apart (correlations 0.13 and -0.13), more than any domain does. The best guess
after 3,000 queries was 1.25 points below the offline router with a partition of 4 by content beside this one and 1.41
with 4 and 8 by content alone; 3 by form gave 1.38 (12 to 16 seeds on each of eight halves, standard error 0.13)."""
SOFTNESS = 0.1
"""Temperature of clusters' shares, as a share of the mean squared distance to the nearest middle. Of 0.05,
0.1 and 0.2 the best in the middle, by less than the noise (0.435, 0.442, 0.438, standard error 0.005)."""
FAR = 5.0
"""Standard deviations beyond which a fact about a text's form counts for no more when topics are made."""
LEAST_DEVIATION = 1e-3
TEMPERATURES = np.geomspace(0.03, 1.0, 16)
_ROUNDS = 25


@dataclass(frozen=True)
class Topics:
    """`softmax(((x - centre) @ weights + level) / temperature)`, less its mean, behind a constant 1.

    With `parts`, the topics are several partitions side by side, of so many topics each, and each adds up to 1."""

    centre: Array
    """[d]"""
    weights: Array
    """[d, t]"""
    level: Array
    """[t]"""
    temperature: float
    mean: Array
    """[t]: shares of the topics among the queries that this was made from."""
    parts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Entries of what `encode` gives."""
        return len(self.level) + 1

    def shares(self, x: NDArray[Any]) -> Array:
        """[n, d] to [n, t], each row adding up to 1 (to the number of `parts`, if there are any)."""
        logits = ((x - self.centre) @ self.weights + self.level) / self.temperature
        if not self.parts:
            return linear.softmax(logits)
        return np.hstack([linear.softmax(part) for part in np.split(logits, np.cumsum(self.parts)[:-1], axis=1)])

    def encode(self, x: NDArray[Any]) -> Array:
        """Features of the topics: [n, d] to [n, 1 + t]."""
        return _centred(self.shares(x), self.mean)

    def encode_one(self, x: NDArray[Any]) -> Array:
        """`encode` of one query, [d] to [1 + t], for those who decide on its way: in a third of the operations."""
        weights, level = self._folded
        logits = x @ weights
        logits += level
        encoded = np.empty(self.size)
        encoded[0] = 1.0
        at = 0
        for size in self.parts or (len(level),):
            part = logits[at : at + size]
            part -= part.max()
            np.exp(part, out=part)
            part /= part.sum()
            at += size
        np.subtract(logits, self.mean, out=encoded[1:])
        return encoded

    @cached_property
    def _folded(self) -> tuple[Array, Array]:
        """Weights [d, t] and levels [t] with centre and temperature in them."""
        return self.weights / self.temperature, (self.level - self.centre @ self.weights) / self.temperature


def supervised(x: NDArray[Any], categories: Sequence[str | None]) -> tuple[Topics, Array]:
    """Topics that are the categories, and the encoding of each row by a fit that has not seen it [n, 1 + t]."""
    names = sorted({c for c in categories if c})
    index = {name: i for i, name in enumerate(names)}
    known = np.array([bool(c) for c in categories])
    target = np.zeros((len(categories), len(names)))
    for row, category in enumerate(categories):
        if category:
            target[row, index[category]] = 1.0
    target[~known] = np.nan
    found = linear.fit(x, target)
    losses = []
    truth = np.array([index[c] for c in categories if c])
    for temperature in TEMPERATURES:
        share = linear.softmax(found.own[known] / temperature)
        losses.append(-np.log(np.maximum(share[np.arange(len(truth)), truth], 1e-9)).mean())
    temperature = float(TEMPERATURES[int(np.argmin(losses))])
    own = linear.softmax(found.own / temperature)
    topics = Topics(found.centre, found.weights, found.level, temperature, own.mean(0))
    return topics, _centred(own, topics.mean)


def clusters(x: NDArray[Any], count: int | Sequence[int] = CLUSTERS, *, form: int = 0) -> Topics:
    """Topics that are clusters of the features [n, d]; several counts give several partitions side by side, and `form`,
    how many of the last features are facts about the text's form (`features.FORM`), one by these alone beside them.
    Where there are such, the others are by the features before them; facts count in standard deviations among x."""
    x = np.asarray(x, np.float64)
    centre = x.mean(0)
    y = x - centre
    if isinstance(count, int) and not form:
        weights, level, temperature = _partition(y, count)
        topics = Topics(centre, weights, level, temperature, np.zeros(len(level)))
    else:  # each with a temperature of its own, which goes into its weights
        counts = (count,) if isinstance(count, int) else count
        about = y[:, : y.shape[1] - form]
        found = [(weights / heat, level / heat) for weights, level, heat in (_partition(about, c) for c in counts)]
        if form:
            found = [(np.vstack([weights, np.zeros((form, weights.shape[1]))]), level) for weights, level in found]
            scale = np.maximum(y[:, -form:].std(0), LEAST_DEVIATION)
            weights, level, heat = _partition(np.clip(y[:, -form:] / scale, -FAR, FAR), KINDS)
            weights = weights / scale[:, None] / heat
            found.append((np.vstack([np.zeros((about.shape[1], len(level))), weights]), level / heat))
        parts = tuple(len(level) for _, level in found)
        level = np.concatenate([level for _, level in found])
        topics = Topics(centre, np.hstack([weights for weights, _ in found]), level, 1.0, np.zeros(len(level)), parts)
    return replace(topics, mean=topics.shares(x).mean(0))


def _partition(y: Array, count: int) -> tuple[Array, Array, float]:
    """Weights [d, t], level [t] and temperature of the clusters of centred features y [n, d]."""
    middles = _bisected(y, min(count, len(y)))
    for _ in range(_ROUNDS):
        nearest = (2.0 * y @ middles.T - (middles**2).sum(1)).argmax(1)
        middles = np.stack(
            [y[nearest == j].mean(0) if (nearest == j).any() else middles[j] for j in range(len(middles))]
        )
    nearest = (2.0 * y @ middles.T - (middles**2).sum(1)).argmax(1)
    spread = float(((y - middles[nearest]) ** 2).sum(1).mean())
    return 2.0 * middles.T, -(middles**2).sum(1), max(SOFTNESS * spread, 1e-6)


def _bisected(y: Array, count: int) -> Array:
    """Means [count, d] of the parts got by halving the part with the most variance, again and again."""
    parts = [y]
    while len(parts) < count:
        widest = max(
            range(len(parts)), key=lambda j: ((parts[j] - parts[j].mean(0)) ** 2).sum() if len(parts[j]) > 1 else -1.0
        )
        part = parts.pop(widest)
        if len(part) < 2:
            parts.append(part)
            break
        off = part - part.mean(0)
        direction = np.linalg.eigh(off.T @ off)[1][:, -1]
        above = off @ direction > np.median(off @ direction)
        if above.all() or not above.any():
            parts.append(part)
            break
        parts += [part[above], part[~above]]
    return np.stack([part.mean(0) for part in parts])


def _centred(shares: Array, mean: Array) -> Array:
    return np.concatenate([np.ones((len(shares), 1)), shares - mean], axis=1)
