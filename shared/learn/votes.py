"""A third opinion where two answers differ: it is counted as a vote, and does not have the last word.

After a and b have given different answers, t may say what a says, what b says, or something else. Two that agree
against a third are right far more often than t alone; where all three differ, any of them may be the likeliest. The
chances of both are lines in predicted quality (`lines`), learned from recorded answers for every triple of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.learn import lines

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Votes:
    """Lines (level, slope), of models [a, b, t] each."""

    joins: Array
    """[k, k, k, 2]: t says what a says, in a's quality."""
    pair: Array
    """[k, k, k, 2]: a is right when t says the same and b does not, in the mean of a's and t's quality."""
    torn: Array
    """[k, k, k, 3, 2]: a, b or t is right when all three differ, in its own quality."""

    @classmethod
    def fit(cls, quality: NDArray[Any], score: NDArray[Any], heard: NDArray[np.bool_], answer: NDArray[Any]) -> Votes:
        """All [n, k]: quality as predicted without these queries, scores, whether an answer could be read, and it."""
        k = quality.shape[1]
        joins, pair, torn = np.zeros((k, k, k, 2)), np.zeros((k, k, k, 2)), np.zeros((k, k, k, 3, 2))
        for a in range(k):
            for b in range(k):
                apart = np.flatnonzero(heard[:, a] & heard[:, b] & (answer[:, a] != answer[:, b]))
                for t in range(k):
                    if len({a, b, t}) < 3:
                        continue
                    rows = apart[heard[apart, t]]
                    with_a, with_b = (answer[rows, t] == answer[rows, m] for m in (a, b))
                    joins[a, b, t] = lines.fit(quality[rows, a], with_a.astype(np.float64))
                    both = rows[with_a]
                    pair[a, b, t] = lines.fit((quality[both, a] + quality[both, t]) / 2.0, score[both, a])
                    alone = rows[~with_a & ~with_b]
                    for place, m in enumerate((a, b, t)):
                        torn[a, b, t, place] = lines.fit(quality[alone, m], score[alone, m])
        return cls(joins, pair, torn)

    def worth(self, a: int, b: int, t: int, quality: NDArray[Any]) -> tuple[Array, Integers]:
        """For queries of this quality [n, k]: the expected score once t could be read too, and whose answer to take if
        all three differ (0, 1 or 2 for a, b or t)."""
        first, second, third = (quality[:, m] for m in (a, b, t))
        with_a, with_b = lines.at(self.joins[a, b, t], first), lines.at(self.joins[b, a, t], second)
        total = np.maximum(with_a + with_b, 1.0)
        each = np.stack([lines.at(self.torn[a, b, t, place], quality[:, m]) for place, m in enumerate((a, b, t))], 1)
        worth = (
            with_a * lines.at(self.pair[a, b, t], (first + third) / 2.0)
            + with_b * lines.at(self.pair[b, a, t], (second + third) / 2.0)
        ) / total + np.maximum(1.0 - with_a - with_b, 0.0) * each.max(1)
        return np.asarray(worth), np.asarray(each.argmax(1))
