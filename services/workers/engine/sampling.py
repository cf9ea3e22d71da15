"""Chooses tokens from logits, greedy or sampled, and says how sure the model was."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineFailed
from shared.messages import Sampling

Logits = NDArray[np.float32]

_NEGLIGIBLE = -30.0
"""Tokens less likely than the best by this factor (in nats) are never drawn: sorting 49 k of them takes 4 ms."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token with its log-probability under the model's own distribution and that one's entropy, in nats."""

    token: int
    logprob: float
    entropy: float


_DIRECT = (-30.0, 60.0)
"""Best logits of which the exponentials, and all that count beside it, are numbers as they are: the best need not be
subtracted from each, which is a fifth of choosing."""


class Chooser:
    """Chooses row by row in a buffer of its own: arrays of this size are mapped and unmapped by the kernel each time
    they are made, which cost more (0.1 ms a row) than the arithmetic (0.04 ms for 49 k tokens)."""

    def __init__(self, vocab: int) -> None:
        self._weights = np.empty(vocab, np.float32)
        self._ones = np.ones(vocab, np.float32)

    def choose(self, logits: Logits, setting: Sampling, generator: np.random.Generator) -> Choice:
        """A token for `logits` [vocab]. Confidence is measured before temperature and truncation.

        Raises:
            EngineFailed: the logits are not finite.
        """
        best, weights = int(logits.argmax()), self._weights
        if not _DIRECT[0] <= logits[best] <= _DIRECT[1]:
            with np.errstate(invalid="ignore"):  # of what is not finite: told below
                logits = logits - logits[best]
        np.exp(logits, out=weights)
        total = float(weights.dot(self._ones))  # BLAS: half the time of `sum`
        if not math.isfinite(total):
            raise EngineFailed("The model's output is not finite.", "Verify the model, or use another variant of it.")
        log_total = math.log(total)
        entropy = log_total - float(weights.dot(logits)) / total
        token = _sample(logits, setting, generator) if setting.temperature > 0 else best
        return Choice(token, float(logits[token]) - log_total, max(entropy, 0.0))


def generator(seed: int | None) -> np.random.Generator:
    """A random source of one request: the same seed gives the same choices."""
    return np.random.default_rng(seed)


def _sample(logits: Logits, setting: Sampling, source: np.random.Generator) -> int:
    """Temperature, then the top k, then the smallest set with probability top p (nucleus sampling)."""
    candidates = np.flatnonzero(logits > logits.max() + _NEGLIGIBLE * setting.temperature)
    count = len(candidates)
    keep = min(setting.top_k or count, count)
    if keep < count:
        candidates = candidates[np.argpartition(logits[candidates], count - keep)[count - keep :]]
    scaled = logits[candidates].astype(np.float64) / setting.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if setting.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order])
        size = int(np.searchsorted(reached, setting.top_p)) + 1
        candidates, weights = candidates[order[:size]], weights[order[:size]]
        weights = weights / weights.sum()
    return int(source.choice(candidates, p=weights))
