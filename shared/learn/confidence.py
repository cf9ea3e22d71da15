"""What a card's confidence says of whether its answer is right, learned from judgements. Pure: no clock, no files.

A card's confidence in an answer is the mean log-probability of its tokens, c. What that is worth differs from model to
model, so that for each card, with q what was predicted of the query and z = (c - mean) / deviation over its answers,

    logit P(right | q, c) = logit q + level + slope z,      level ~ N(0, LEVEL^2),  slope ~ N(0, SLOPE^2),  slope >= 0

is learned by maximum a posteriori (Platt 1999, with the predicted quality as offset and a Gaussian prior in place of
his corrected targets). Before any judgement the confidence says nothing and the chance is q; each prior weighs as
much as 16 judgements. Scores between 0 and 1 count as shares of right (quasi-likelihood; Papke and Wooldridge 1996).

The knowledge owner keeps one `Confidences`, feeds it, stores it, and tells planners the `lines`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.bounded import put
from shared.chance import chance, logit
from shared.learn import arrays

Array = NDArray[Any]
LEVEL = 0.5
"""The judgements behind the predicted quality are these too: it is right on average. A judgement at an even chance adds
1/4 to the precision, so this weighs as much as 16."""
SLOPE = 0.5
"""As much as 16 judgements."""
KEPT = 500
"""Latest judgements of a card, by which its line is drawn."""
MEMORY = 500.0
"""Answers over which a card's mean and deviation are taken, the latest weighing most."""
LEAST_DEVIATION = 1e-3
VERSION = "confidences.v1"
_ROUNDS = 25
_ENOUGH = 1e-9


class Line(msgspec.Struct, frozen=True):
    """How the chance of being right goes with a card's confidence."""

    level: float = 0.0
    slope: float = 0.0
    """Per standard deviation of the card's confidence, 0 or more."""
    mean: float = 0.0
    """Of the card's confidence,"""
    deviation: float = 1.0
    """and its standard deviation."""

    def of(self, quality: float) -> tuple[float, float]:
        """(level, slope) of the logit of the chance in the confidence as it is, for a query of this quality."""
        slope = self.slope / self.deviation
        return logit(quality) + self.level - slope * self.mean, slope

    def chance(self, quality: float, confidence: float) -> float:
        """Of being right, 0 to 1."""
        level, slope = self.of(quality)
        return chance(level, slope, confidence)


class _Usual(msgspec.Struct):
    """Of a card's confidence over its answers."""

    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0
    """Mean squared deviation."""

    def add(self, value: float) -> None:
        self.count = min(self.count + 1.0, MEMORY)
        off = value - self.mean
        self.mean += off / self.count
        self.square += (off * (value - self.mean) - self.square) / self.count


class _Judged(msgspec.Struct, frozen=True, gc=False):
    quality: float
    confidence: float
    score: float


class _Stored(msgspec.Struct, frozen=True):
    version: str
    cards: tuple[str, ...]
    judgements: int
    usual: dict[str, _Usual]
    judged: dict[str, list[tuple[str, _Judged]]]


class _Told(msgspec.Struct, frozen=True):
    version: str
    lines: dict[str, Line]


class Confidences:
    """What the confidences of `cards` say."""

    def __init__(self, cards: Sequence[str]) -> None:
        self.cards = tuple(sorted(cards))
        self.judgements = 0
        """Taken in so far."""
        self._usual: dict[str, _Usual] = {}
        self._judged: dict[str, OrderedDict[str, _Judged]] = {}
        self._lines: dict[str, Line] = {}

    def heard(self, card: str, confidence: float) -> None:
        """A card gave an answer with this mean log-probability."""
        if card in self.cards and math.isfinite(confidence):
            self._usual.setdefault(card, _Usual()).add(confidence)
            self._lines.pop(card, None)

    def judged(self, card: str, quality: float, confidence: float, score: float, query_id: str) -> bool:
        """One judgement (0 to 1) of an answer of which `quality` had been predicted; a further one of the same answer
        takes its place. False when it teaches nothing."""
        if card not in self.cards or not math.isfinite(confidence):
            return False
        kept = self._judged.setdefault(card, OrderedDict())
        self.judgements += query_id not in kept
        kept.pop(query_id, None)
        put(kept, query_id, _Judged(quality, confidence, score), KEPT)
        self._lines.pop(card, None)
        return True

    def changed(self, card: str) -> None:
        """A card answers differently from before: what was judged says nothing of it now."""
        for known in (self._usual, self._judged, self._lines):
            known.pop(card, None)

    def use(self, cards: Sequence[str]) -> None:
        """The fleet has other cards now; what is known of those that stay is kept."""
        self.cards = tuple(sorted(cards))
        for card in [*self._usual, *self._judged]:
            if card not in self.cards:
                self.changed(card)

    @property
    def lines(self) -> dict[str, Line]:
        """By card, of those that were judged."""
        for card, judged in self._judged.items():
            if card not in self._lines:
                usual = self._usual.get(card, _Usual())
                deviation = max(math.sqrt(usual.square), LEAST_DEVIATION)
                level, slope = fit(
                    np.array([logit(one.quality) for one in judged.values()]),
                    np.array([(one.confidence - usual.mean) / deviation for one in judged.values()]),
                    np.array([one.score for one in judged.values()]),
                )
                self._lines[card] = Line(level, slope, usual.mean, deviation)
        return dict(self._lines)

    def to_bytes(self) -> bytes:
        """For the knowledge base: up to 500 judgements a card, 50 bytes each."""
        judged = {card: list(kept.items()) for card, kept in self._judged.items()}
        return msgspec.msgpack.encode(_Stored(VERSION, self.cards, self.judgements, self._usual, judged))

    @classmethod
    def from_bytes(cls, data: bytes) -> Confidences:
        """Raises ValueError when these bytes are not confidences of this version."""
        stored = arrays.stored(data, _Stored, VERSION, "confidences")
        found = cls(stored.cards)
        found.judgements, found._usual = stored.judgements, stored.usual
        found._judged = {card: OrderedDict(kept) for card, kept in stored.judged.items()}
        return found


def told(lines: dict[str, Line]) -> bytes:
    """Lines as planners are told them."""
    return msgspec.msgpack.encode(_Told(VERSION, lines))


def heard(data: bytes) -> dict[str, Line]:
    """What `told` gave. Raises ValueError when these bytes are not lines of this version."""
    return arrays.stored(data, _Told, VERSION, "lines").lines


def fit(offset: Array, z: Array, score: Array) -> tuple[float, float]:
    """(level, slope) that are most probable given logits [n] of predicted quality, standardised confidences [n] and
    scores [n], 0 to 1: Newton's method on a strictly concave function, from nought."""
    if not len(z):
        return 0.0, 0.0
    level, slope = _newton(offset, np.stack([np.ones(len(z)), z], axis=1), score, np.array([LEVEL, SLOPE]))
    if slope >= 0.0:
        return float(level), float(slope)
    return float(_newton(offset, np.ones((len(z), 1)), score, np.array([LEVEL]))[0]), 0.0


def _newton(offset: Array, x: Array, score: Array, deviation: Array) -> Array:
    weights, precision = np.zeros(x.shape[1]), np.diag(deviation**-2.0)
    value = _value(offset, x, score, deviation, weights)
    for _ in range(_ROUNDS):
        p = 1.0 / (1.0 + np.exp(-(offset + x @ weights)))
        slope = x.T @ (score - p) - precision @ weights
        step = np.linalg.solve((x * (p * (1.0 - p))[:, None]).T @ x + precision, slope)
        while (after := _value(offset, x, score, deviation, weights + step)) < value and np.abs(step).max() > _ENOUGH:
            step /= 2.0  # too far, where chances are near 0 or 1
        weights, value = weights + step, max(after, value)
        if np.abs(step).max() <= _ENOUGH:
            break
    return np.asarray(weights)


def _value(offset: Array, x: Array, score: Array, deviation: Array, weights: Array) -> float:
    """Logarithm of the posterior density, but for a constant."""
    at = offset + x @ weights
    return float((score * at - np.logaddexp(0.0, at)).sum() - 0.5 * ((weights / deviation) ** 2).sum())
