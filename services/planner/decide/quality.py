"""Predicted quality of an answer by a card, before anything has been learned: the card's own scores for the
query's domains, moved by how alike the query is to what the card is for, and by users' feedback."""

from __future__ import annotations

import math

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
