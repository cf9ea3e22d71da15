"""Predicted quality of an answer by a card, before anything has been learned: the card's own scores for the
query's domains, moved by how alike the query is to what the card is for, and by users' feedback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.terms import Terms
from shared import messages as m

FIT_SCALE = 0.12
"""Affinity above the mean of all cards that counts as a good fit. Relative, for embedders differ in their level."""
FIT_SPAN = 0.3
"""Fit moves the score by at most this share, up or down."""
FEEDBACK_PRIOR = 20.0
"""Feedback events that weigh as much as the prior."""


def predict(card: m.Card, profile: m.Profile, qos: m.CardQos | None) -> tuple[float, dict[str, float]]:
    """Quality 0 to 1, with its terms: `domain_score`, `affinity`, `fit`, `feedback`."""
    covered = sum(p for name, p in profile.domains.items() if name in card.domains)
    scored = sum(p * card.domains[name] for name, p in profile.domains.items() if name in card.domains)
    prior = scored + (1.0 - covered) * card.quality
    level = sum(profile.affinity.values()) / len(profile.affinity) if profile.affinity else 0.0
    similarity = profile.affinity.get(card.name, level)
    fit = 1.0 + FIT_SPAN * math.tanh((similarity - level) / FIT_SCALE)
    quality = min(1.0, prior * fit)
    count = qos.feedback_count if qos else 0
    mean = qos.feedback_mean if qos else 0.0
    if count:
        quality = (quality * FEEDBACK_PRIOR + mean * count) / (FEEDBACK_PRIOR + count)
    terms = {"domain_score": prior, "affinity": similarity, "fit": fit}
    if count:
        terms["feedback"] = mean
    return quality, terms


class Prior:
    """`predict` for all cards of a fleet at once."""

    def __init__(self, cards: Sequence[m.Card], qos: m.Qos) -> None:
        self._names = [card.name for card in cards]
        names = sorted({name for card in cards for name in card.domains})
        self._domain = {name: i for i, name in enumerate(names)}
        self._score = np.zeros((len(cards), len(names)))
        self._known = np.zeros((len(cards), len(names)))
        for row, card in enumerate(cards):
            for name, score in card.domains.items():
                self._score[row, self._domain[name]] = score
                self._known[row, self._domain[name]] = 1.0
        self._quality = np.array([card.quality for card in cards])
        feedback = {c.card: c for c in qos.cards}
        self._count = np.array([feedback[n].feedback_count if n in feedback else 0 for n in self._names], np.float64)
        self._mean = np.array([feedback[n].feedback_mean if n in feedback else 0.0 for n in self._names])
        self._heard = np.flatnonzero(self._count > 0).tolist()

    def predict(self, profile: m.Profile) -> tuple[NDArray[Any], Terms]:
        """Quality [k], and each card's terms, as `predict` gives them for one card."""
        share = np.zeros(len(self._domain))
        for name, p in profile.domains.items():
            if name in self._domain:
                share[self._domain[name]] = p
        prior = self._score @ share + (1.0 - self._known @ share) * self._quality
        alike = profile.affinity
        level = sum(alike.values()) / len(alike) if alike else 0.0
        similarity = np.array([alike.get(name, level) for name in self._names])
        fit = 1.0 + FIT_SPAN * np.tanh((similarity - level) / FIT_SCALE)
        quality = np.minimum(1.0, prior * fit)
        if self._heard:  # where none is, the formula leaves quality as it is
            weight = FEEDBACK_PRIOR + self._count
            quality = np.where(self._count > 0, (quality * FEEDBACK_PRIOR + self._mean * self._count) / weight, quality)
        terms = Terms(domain_score=prior, affinity=similarity, fit=fit)
        if self._heard:
            terms.add("feedback", self._mean, self._count > 0)
        return quality, terms
