"""From a query's embedding to its profile. Pure: arrays in, a `Profile` out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.analyzer.decide.domains import DOMAINS
from shared import messages as m
from shared.learn import features

Vectors = NDArray[np.float32]

DOMAIN_TEMPERATURE = 0.08
"""Softness of the domain distribution over cosine similarities of a unit-length sentence embedding."""
FORM_CHARS = 4_000
"""Of a text are looked at for facts about its form: 0.07 ms for a question of 400 characters, 0.4 ms for so many."""
NEAREST = 3
"""Exemplars of a card or domain that count: its best few, so that a broad card is not punished for breadth."""


@dataclass(frozen=True)
class References:
    """What a query is compared with: all vectors in one matrix, so that a query costs one product.

    `matrix` [rows, hidden], rows of unit length: of each card the description and then its exemplars, of each domain
    its prototypes. `cards` and `domains` say which rows are whose, as (name, first row, last row + 1).
    """

    matrix: Vectors
    cards: tuple[tuple[str, int, int], ...]
    domains: tuple[tuple[str, int, int], ...]


def texts_of(card: m.Card) -> list[str]:
    """What is embedded for a card: the description first, then each exemplar."""
    return [card.description, *card.exemplars]


def references(cards: Mapping[str, Vectors], prototypes: Mapping[str, Vectors]) -> References:
    """Stack the embeddings of each card's `texts_of` [1 + n, hidden] and of each domain's prototypes [n, hidden]."""
    parts = [*cards.values(), *prototypes.values()]
    ends = list(itertools.accumulate(len(part) for part in parts))
    spans = [(end - len(part), end) for part, end in zip(parts, ends, strict=True)]
    return References(
        np.ascontiguousarray(np.concatenate(parts)) if parts else np.zeros((0, 0), np.float32),
        tuple((name, *span) for name, span in zip(cards, spans[: len(cards)], strict=True)),
        tuple((name, *span) for name, span in zip(prototypes, spans[len(cards) :], strict=True)),
    )


def similarities(query: Vectors, known: References) -> list[float]:
    """Cosine of the query [hidden] with every row of the references."""
    found: list[float] = (known.matrix @ query).tolist() if len(known.matrix) else []
    return found


def affinities(similar: Sequence[float], known: References) -> dict[str, float]:
    """Similarity of a query to what each card is for, -1 to 1.

    The mean of the few nearest exemplars, with a quarter for the description: similarities of task prompts
    to bare descriptions are low (0.03 to 0.11 on MiniLM), so exemplars carry the signal.
    """
    result: dict[str, float] = {}
    for name, first, end in known.cards:
        described = similar[first]
        near = _nearest(similar[first + 1 : end]) if end - first > 1 else described
        result[name] = round(0.75 * near + 0.25 * described, 4)
    return result


def domains(similar: Sequence[float], known: References) -> dict[str, float]:
    """Probability by domain: softmax over the mean similarity to each domain's nearest prototypes."""
    scores = [_nearest(similar[first:end]) / DOMAIN_TEMPERATURE for _, first, end in known.domains]
    top = max(scores, default=0.0)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return {name: round(weight / total, 4) for (name, _, _), weight in zip(known.domains, weights, strict=True)}


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
    known: References,
    tokens_in: dict[str, int],
    tokens_out: float,
) -> m.Profile:
    """Everything the planner needs to know about one query. `embedding` [hidden], unit length."""
    similar = similarities(embedding, known)
    by_domain = domains(similar, known)
    longest = max(tokens_in.values(), default=len(text) // 4)
    return m.Profile(
        embedding=embedding.astype("<f4").tobytes(),
        form=features.packed(text[:FORM_CHARS]),
        domains=by_domain,
        affinity=affinities(similar, known),
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


def _nearest(similar: Sequence[float]) -> float:
    """Mean of the highest few."""
    best = sorted(similar)[-NEAREST:]
    return sum(best) / len(best)
