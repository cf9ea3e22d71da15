"""Chooses tokens from logits, greedy or sampled, and says how sure the model was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.messages import Sampling

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """A chosen token with its log-probability under the model's own distribution and that one's entropy, in nats."""

    token: int
    logprob: float
    entropy: float


def choose(logits: Logits, settings: list[Sampling], generators: list[np.random.Generator]) -> list[Choice]:
    """One token per row of `logits` [n, vocab]. Confidence is measured before temperature and truncation."""
    top = logits.max(axis=-1, keepdims=True)
    shifted = logits - top
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    log_total = np.log(total)
    entropy = log_total - np.einsum("nv,nv->n", weights, shifted) / total
    greedy = logits.argmax(axis=-1)
    choices = []
    for row, (setting, generator) in enumerate(zip(settings, generators, strict=True)):
        token = int(greedy[row])
        if setting.temperature > 0:
            token = _sample(shifted[row], setting, generator)
        logprob = float(shifted[row, token] - log_total[row])
        choices.append(Choice(token, logprob, max(float(entropy[row]), 0.0)))
    return choices


def generator(seed: int | None) -> np.random.Generator:
    """A random source of one request: the same seed gives the same choices."""
    return np.random.default_rng(seed)


def _sample(logits: Logits, setting: Sampling, source: np.random.Generator) -> int:
    """Temperature, then the top k, then the smallest set with probability top p (nucleus sampling)."""
    count = logits.shape[-1]
    keep = min(setting.top_k or count, count)
    candidates = np.argpartition(logits, count - keep)[count - keep :] if keep < count else np.arange(count)
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
