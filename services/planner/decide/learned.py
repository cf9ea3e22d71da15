"""Learned quality in routing: what judgements say beside what cards promise, trust in cards, and exploration. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared import messages as m
from shared.learn import features
from shared.learn.confidence import Line
from shared.learn.live import Learner
from shared.learn.live_length import Lengths
from shared.learn.signs import HIGHEST

Array = NDArray[Any]
Terms = list[dict[str, float]]


@dataclass(frozen=True)
class Learned:
    """What the knowledge owner told: the learner and its version, and how the cards stand."""

    learner: Learner | None = None
    version: int = 0
    standings: Mapping[str, m.CardStanding] = field(default_factory=dict)
    lengths: Lengths | None = None
    """Learned output tokens of answers,"""
    lengths_version: int = 0
    """and their version."""
    lines: Mapping[str, Line] = field(default_factory=dict)
    """What confidences say, by card,"""
    lines_version: int = 0
    """and their version."""

    def quarantined(self, card: str) -> bool:
        standing = self.standings.get(card)
        return standing is not None and standing.state == "quarantined"

    def scale(self, card: str) -> float:
        standing = self.standings.get(card)
        return standing.scale if standing is not None else 1.0


def tokens_out(learned: Learned, profile: m.Profile, cards: Sequence[m.Card], otherwise: Array) -> Array:
    """[k] output tokens expected of each card for a query; `otherwise` [k] where little has been learned."""
    if learned.lengths is None or not profile.embedding:
        return otherwise
    x = np.frombuffer(profile.embedding, "<f4").astype(np.float64)
    found = learned.lengths.expected(x, [card.name for card in cards])
    return np.where(np.isnan(found), otherwise, found)


def predict(
    learned: Learned, profile: m.Profile, cards: Sequence[m.Card], prior: Array, terms: Terms, *, expects: bool = False
) -> tuple[Array, Array, Terms]:
    """Quality of each card for a query, 0 to 1. Where something is expected of the answer, by the query or by the card,
    it is what a readable answer is worth times what is to be seen of answers: how often they can be read, and whether
    they are longer than usual (`shared.learn.readable`).

    Args:
        learned: what is known.
        profile: of the query.
        cards: k cards.
        prior: [k] what they promise for it.
        terms: of the prior, one for each card.
        expects: whether the query says what its answer must look like.

    Returns:
        [k] quality, [k] standard deviation of that expectation (0 where nothing is learned), and terms: those given,
        with `prior`, and `learned` (the mean added to it), `std`, `scale`, `readable` (the sign of an answer that is
        expected: `shared.learn.signs`) where they apply.
    """
    k = len(cards)
    mean, std = np.zeros(k), np.zeros(k)
    readable: dict[int, tuple[float, float]] = {}
    x = features.joined(np.frombuffer(profile.embedding, "<f4"), profile.form)
    learner = learned.learner
    if learner is not None and learner.quality is not None and len(x) == len(learner.quality.topics.centre):
        row = {name: i for i, name in enumerate(learner.cards)}
        known = [i for i, card in enumerate(cards) if card.name in row]
        columns = [row[cards[i].name] for i in known]
        found = learner.quality.predict(x[None, :])
        mean[known], std[known] = found.mean[0, columns], found.std[0, columns]
        if expects or any(card.expect is not None for card in cards):
            readable = _readable(learner, x, [(i, row[cards[i].name]) for i in known if expects or cards[i].expect])
    scale = np.array([learned.scale(card.name) for card in cards])
    quality = np.clip((prior + mean) * scale, 0.0, 1.0)
    for i, (chance, spread) in readable.items():
        # `std` is that of quality before `scale`, which multiplies it wherever it is used
        std[i] = np.hypot(chance * std[i], quality[i] / max(scale[i], 1e-6) * spread)
        quality[i] = min(quality[i] * chance, 1.0)
        terms[i]["readable"] = chance
    for i, term in enumerate(terms):
        term["prior"] = float(prior[i])
        if learner is not None:
            term["learned"], term["std"] = float(mean[i]), float(std[i])
        if scale[i] != 1.0:
            term["scale"] = float(scale[i])
    return quality, std, terms


def _readable(learner: Learner, x: Array, wanted: Sequence[tuple[int, int]]) -> dict[int, tuple[float, float]]:
    """Expected sign of an answer, and its standard deviation, by index of the card; `wanted` has each
    card's index and its column in what is learned."""
    if learner.readable is None or not learner.readings or not wanted:
        return {}
    found = learner.readable.predict(x[None, :], np.ones((1, len(learner.cards))))
    return {i: (float(np.clip(found.mean[0, j], 0.0, HIGHEST)), float(found.std[0, j])) for i, j in wanted}


def shares(utility: Array, spread: Array, normal: Array, budget: float) -> Array:
    """Probabilities [k] with which each candidate is to be chosen: Thompson sampling within a budget.

    The share of draws in which a candidate is the best when each utility deviates by `spread` (Thompson, Biometrika
    25, 1933). The best guess keeps at least 1 - `budget`.

    Args:
        utility: [k] of those that stand.
        spread: [k] standard deviation of the part of utility that quality is.
        normal: [s, k] standard normal draws.
        budget: largest probability of not choosing the best guess.
    """
    best = int(np.argmax(utility))
    if budget <= 0.0 or len(normal) == 0 or not spread.any():
        return np.asarray(np.eye(len(utility))[best])
    share = np.bincount((utility + spread * normal).argmax(axis=1), minlength=len(utility)) / len(normal)
    off = 1.0 - share[best]
    if off > budget:
        share = share * (budget / off)
        share[best] = 1.0 - budget
    return np.asarray(share)


def draw(share: Array, uniform: float) -> int:
    """The index that `uniform` (0 to 1) draws."""
    return min(int(np.searchsorted(np.cumsum(share), uniform, side="right")), len(share) - 1)
