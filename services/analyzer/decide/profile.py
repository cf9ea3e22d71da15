"""From a query's embedding to its profile. Pure: arrays in, a `Profile` out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.analyzer.decide.domains import DOMAINS
from shared import messages as m

Vectors = NDArray[np.float32]

DOMAIN_TEMPERATURE = 0.08
"""Softness of the domain distribution over cosine similarities of a unit-length sentence embedding."""
NEAREST = 3
"""Exemplars of a card or domain that count: its best few, so that a broad card is not punished for breadth."""


@dataclass(frozen=True)
class CardVectors:
    """Embeddings of one card: `description` [hidden], `exemplars` [n, hidden]; all of unit length."""

    description: Vectors
    exemplars: Vectors


def texts_of(card: m.Card) -> list[str]:
    """What is embedded for a card: the description first, then each exemplar."""
    return [card.description, *card.exemplars]


def card_vectors(embedded: Vectors) -> CardVectors:
    """Split the embeddings of `texts_of` [1 + n, hidden]."""
    return CardVectors(embedded[0], embedded[1:])


def affinity(query: Vectors, card: CardVectors) -> float:
    """Similarity of a query to what a card is for, -1 to 1.

    The mean of the few nearest exemplars, with a quarter for the description: similarities of task prompts
    to bare descriptions are low (0.03 to 0.11 on MiniLM), so exemplars carry the signal.
    """
    described = float(card.description @ query)
    if not len(card.exemplars):
        return described
    return 0.75 * _nearest(card.exemplars @ query) + 0.25 * described


def domains(query: Vectors, prototypes: dict[str, Vectors]) -> dict[str, float]:
    """Probability by domain: softmax over the mean similarity to each domain's nearest prototypes."""
    names = list(prototypes)
    scores = np.array([_nearest(prototypes[name] @ query) for name in names]) / DOMAIN_TEMPERATURE
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return {name: round(float(weight), 4) for name, weight in zip(names, weights, strict=True)}


def difficulty(tokens_in: int, by_domain: dict[str, float]) -> float:
    """A prior for how hard a query is, 0 to 1, until outcomes are learned from: longer and less clear-cut
    questions are harder, and so are the domains in which small models fail most."""
    spread = -sum(p * math.log(p) for p in by_domain.values() if p > 0) / math.log(max(len(by_domain), 2))
    hard = sum(by_domain.get(name, 0.0) for name in ("mathematics", "law", "medicine", "code"))
    length = 1 - math.exp(-tokens_in / 300)
    return round(min(1.0, 0.15 + 0.3 * length + 0.2 * spread + 0.35 * hard), 4)


def make_profile(
    *,
    text: str,
    embedding: Vectors,
    cards: dict[str, CardVectors],
    prototypes: dict[str, Vectors],
    tokens_in: dict[str, int],
    tokens_out: float,
) -> m.Profile:
    """Everything the planner needs to know about one query. `embedding` [hidden], unit length."""
    by_domain = domains(embedding, prototypes)
    longest = max(tokens_in.values(), default=len(text) // 4)
    return m.Profile(
        embedding=embedding.astype("<f4").tobytes(),
        domains=by_domain,
        affinity={name: round(affinity(embedding, card), 4) for name, card in cards.items()},
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        difficulty=difficulty(longest, by_domain),
        prompt_chars=len(text),
    )


def prototype_texts() -> list[tuple[str, str]]:
    """(domain, sentence) of every prototype."""
    return [(name, sentence) for name, sentences in DOMAINS.items() for sentence in sentences]


def query_text(query: m.Query) -> str:
    """What a query is about, for the embedding: the prompt, or the user's last turns (newest first)."""
    if query.prompt is not None:
        return query.prompt
    turns = [turn.content for turn in query.messages or [] if turn.role == "user"]
    return "\n".join(reversed(turns))


def full_text(query: m.Query) -> str:
    """All that the model will read, for counting tokens."""
    if query.prompt is not None:
        return query.prompt
    return "\n".join(turn.content for turn in query.messages or [])


def _nearest(similarities: Vectors) -> float:
    if len(similarities) > NEAREST:
        similarities = np.partition(similarities, -NEAREST)[-NEAREST:]
    return float(similarities.mean())
