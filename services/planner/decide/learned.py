"""Learned quality in routing: what judgements say beside what cards promise, trust in cards, and exploration. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.terms import Terms
from shared import messages as m
from shared.learn import features
from shared.learn.bandit import DRAWS, DUEL, allocation
from shared.learn.confidence import Line
from shared.learn.live import Learner
from shared.learn.live_length import Lengths
from shared.learn.quality import QualityModel, Spread
from shared.learn.readable import product
from shared.learn.signs import HIGHEST

Array = NDArray[Any]


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
) -> tuple[Array, Spread, Terms]:
    """Quality of each card for a query, 0 to 1. Where something is expected of the answer, by the query or by the card,
    it is what a readable answer is worth times what is to be seen of answers: how often they can be read, and whether
    they are longer than usual (`shared.learn.readable`).

    Args:
        learned: what is known.
        profile: of the query.
        cards: k cards.
        prior: [k] what they promise for it.
        terms: of the prior; more are added.
        expects: whether the query says what its answer must look like.

    Returns:
        [k] quality, how that expectation may deviate (not at all where nothing is learned), and terms: those given,
        with `prior`, and `learned` (the mean added to it), `std`, `scale`, `readable` (the sign of an answer that is
        expected: `shared.learn.signs`) where they apply.
    """
    k = len(cards)
    x = features.joined(np.frombuffer(profile.embedding, "<f4"), profile.form)
    learner = learned.learner
    mean, worth, chance, sign, read = np.zeros(k), Spread.none(k), np.ones(k), Spread.none(k), np.zeros(k, bool)
    if learner is not None and learner.quality is not None and len(x) == len(learner.quality.topics.centre):
        names = tuple([card.name for card in cards])
        known = _columns(names, learner.cards)
        mean, worth = _taken(learner.quality, x, known)
        if learner.readable is not None and learner.readings:
            read = known >= 0
            if not expects:
                read &= np.array([card.expect is not None for card in cards])
            if read.any():
                usual, sign = _taken(learner.readable, x, np.where(read, known, -1))
                chance = np.clip(1.0 + usual, 0.0, HIGHEST)
    scale = np.array([learned.scale(card.name) for card in cards]) if learned.standings else np.ones(k)
    quality = np.clip((prior + mean) * scale, 0.0, 1.0)
    spread = product(chance, sign, quality, Spread(scale * worth.own, scale[:, None] * worth.shared))
    quality = np.minimum(quality * chance, 1.0)
    std = spread.std / np.maximum(scale, 1e-6)
    terms.add("readable", chance, read)
    terms.add("prior", prior)
    if learner is not None:
        terms.add("learned", mean)
        terms.add("std", std)
    if learned.standings:
        terms.add("scale", scale, scale != 1.0)
    return quality, spread, terms


def _taken(model: QualityModel, x: Array, columns: Array) -> tuple[Array, Spread]:
    """Expectations for one query, and how they may deviate, at these columns; 0 and not at all where that is -1."""
    found, spread = model.guess(x)
    mean, own, shared, there = found[columns], spread.own[columns], spread.shared[columns], columns >= 0
    if not there.all():
        mean[~there], own[~there], shared[~there] = 0.0, 0.0, 0.0
    return mean, Spread(own, shared)


@lru_cache(maxsize=8)
def _columns(names: tuple[str, ...], known: tuple[str, ...]) -> Array:
    """Where each of these names is among those known; -1 where it is not. Not to be written to."""
    column = {name: i for i, name in enumerate(known)}
    return np.array([column.get(name, -1) for name in names])


def normals(learned: Learned | None, cards: int) -> tuple[int, int]:
    """Shape of the standard normals that exploring among so many cards takes."""
    learner = learned.learner if learned is not None else None
    both = () if learner is None else (learner.quality, learner.readable)
    return DRAWS, cards + sum(model.topics.size for model in both if model is not None)


def shares(utility: Array, deviations: Array, budget: float) -> Array:
    """Probabilities [k] with which each candidate is to be chosen: top-two Thompson sampling within a budget, by the
    function by which the benches explore (`shared.learn.bandit.allocation`).

    Args:
        utility: [k] of those that stand.
        deviations: [s, k] draws of how far each may be from that, for the quality in it.
        budget: largest probability of not choosing the best guess.
    """
    best = int(np.argmax(utility))
    if budget <= 0.0 or not deviations.any():
        return np.asarray(np.eye(len(utility))[best])
    return allocation(utility + deviations, best, budget=budget, duel=DUEL)


def draw(share: Array, uniform: float) -> int:
    """The index that `uniform` (0 to 1) draws."""
    return min(int(np.searchsorted(np.cumsum(share), uniform, side="right")), len(share) - 1)
