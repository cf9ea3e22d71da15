"""What is to be seen of an answer before anybody has judged it: whether it could be read, and how long it is.

An answer that is long for its model is rarely right, one that is short for it often is; models write at length where
they do not know. So an answer has a *sign*: 0 when it cannot be read, else what answers of its relative length are
worth, over what readable answers are worth on average:

    sign = (a + b l) / mean score,    l = log(1 + tokens) - the mean of that for this model

with a and b by ridge regression over the judged readable answers of all models. Signs are a surrogate outcome (Prentice
1989; the surrogate index of Athey, Chetty, Imbens and Kang 2019): every answer has one, and only some are judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PENALTY = 3.0
"""Of the slope b: it is nought until some tens of answers have been judged."""
WORTH = 0.05, 0.95
"""Bounds of a + b l."""
HIGHEST = 2.0
"""No answer promises more than this, over what is usual."""
_LEAST_MEAN = 0.02


class Signs(msgspec.Struct, frozen=True):
    """How to tell an answer's sign."""

    usual: dict[str, float] = {}
    """Mean of log(1 + tokens) of readable answers, by card."""
    level: float = 0.5
    slope: float = 0.0
    mean: float = 0.5

    def of(self, card: str, tokens: int, *, readable: bool = True) -> float:
        """The sign of an answer of so many tokens (0: not known, taken to be usual)."""
        if not readable:
            return 0.0
        usual = self.usual.get(card)
        if usual is None or tokens < 1:
            return 1.0
        worth = min(max(self.level + self.slope * (math.log1p(tokens) - usual), WORTH[0]), WORTH[1])
        return min(worth / self.mean, HIGHEST)


def learn(readable: Iterable[tuple[str, int]], judged: Sequence[tuple[str, int, float]]) -> Signs:
    """From readable answers (card, tokens) and those of them that were judged (card, tokens, score)."""
    logs: dict[str, list[float]] = {}
    for card, tokens in readable:
        if tokens > 0:
            logs.setdefault(card, []).append(math.log1p(tokens))
    usual = {card: sum(found) / len(found) for card, found in logs.items()}
    known = [
        (math.log1p(tokens) - usual[card], score) for card, tokens, score in judged if tokens > 0 and card in usual
    ]
    if len(known) < 2:
        return Signs(usual)
    length, score = np.array(known, np.float64).T
    mean = float(score.mean())
    if mean < _LEAST_MEAN:
        return Signs(usual)
    middle = float(length.mean())
    off = length - middle
    slope = float(off @ (score - mean) / (off @ off + PENALTY))
    return Signs(usual, mean - slope * middle, slope, mean)
