"""How long to wait for an answer: a model that writes on and on rambles, and what it says in the end is rarely right.

A few answers are many times as long as a model's others. They hold much of what it writes, and are worth less than what
another model would say to the same query. So a model is given a limit of tokens; what has not ended by then is cut off
and counts as an answer that could not be read, after which another model may be asked (`cascade`). For each model the
limit is the T that maximises, over recorded outcomes,

    mean of (score where tokens <= T, else what is to be had elsewhere)  -  price x mean of min(tokens, T)

which is optimal stopping (Chow, Robbins and Siegmund 1971) with one threshold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RAMBLING = 3.0
"""An answer is never cut off before it is so many times as long as the model's median one. Without such a bound, a
limit takes the place of routing: answers of ordinary length are cut off because others are as good, which is known
before the first token."""
STEPS = 60
"""Lengths that are tried, between the least limit and the longest answer."""


def limits(
    tokens: NDArray[Any],
    score: NDArray[Any],
    elsewhere: NDArray[Any],
    token_price: NDArray[Any],
    least: float = RAMBLING,
) -> Array:
    """Tokens [k] after which each model is cut off; infinite where it is better never to be.

    Args:
        tokens: [n, k] that each model wrote, NaN where it was not asked.
        score: [n, k] what its answers were worth.
        elsewhere: [n, k] what was to be had from others in its place, less their price; NaN where that is not known.
        token_price: [k] of a token, in units of score.
        least: smallest limit, in medians of a model's lengths.
    """
    found = np.full(tokens.shape[1], np.inf)
    for m in range(tokens.shape[1]):
        known = ~np.isnan(tokens[:, m] + score[:, m] + elsewhere[:, m])
        if not known.any():
            continue
        t, own, other = tokens[known, m], score[known, m], elsewhere[known, m]
        lowest = least * max(float(np.median(t)), 1.0)
        tail = np.sort(t[t > lowest])
        if not len(tail):
            continue
        tried = np.unique(np.append(np.quantile(tail, np.linspace(0.0, 1.0, STEPS)), lowest))
        worth = [
            np.where(t <= limit, own, other).mean() - token_price[m] * np.minimum(t, limit).mean() for limit in tried
        ]
        best = float(tried[int(np.argmax(worth))])
        found[m] = best if best < tail[-1] else np.inf
    return found
