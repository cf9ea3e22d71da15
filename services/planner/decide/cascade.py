"""The route of a query whose answers may be handed on: which cards, and below what chance of being right each is
followed by the next, by the utility that routes are chosen by.

Pure. An attempt costs what its terms say at the present weights: energy, crowding and burden as for one card alone, and
of latency what it adds to the attempts before it. The mathematics is `shared.learn.live_cascade`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from shared import messages as m
from shared.learn.confidence import Line
from shared.learn.live_cascade import Offers, plan
from shared.utility import latency_penalty

TRIED = 5
"""Candidates of the highest utility that a cascade is made of: 2 ms of planning; eight take 6."""


def wanted(query: m.Query, policy: m.Policy) -> bool:
    """Whether answers to this query may be handed on."""
    return policy.cascade if query.cascade is None else query.cascade


def steps(
    query: m.Query, policy: m.Policy, standing: Sequence[m.Candidate], lines: Mapping[str, Line],
    weights: Mapping[str, float], cards: Mapping[str, m.Card], left_s: float, *, first: bool,
) -> tuple[list[m.Candidate], list[m.CascadeStep]]:  # fmt: skip
    """The candidates in the order in which they are to be asked, and the steps of the first of them: one where no
    answer is worth handing on, none where quality has no weight.

    Args:
        query: the query.
        policy: for the scales of latency and energy.
        standing: the candidates that stand, the best first.
        lines: what confidences say, by card.
        weights: `w_q`, `w_l` and `w_e` of this query.
        cards: the fleet's.
        left_s: until the query's deadline.
        first: whether the first one is to be asked first in any case (it is being explored).
    """
    tried = list(standing[:TRIED])
    if weights["w_q"] <= 0.0 or not tried:
        return list(standing), []
    readable = np.array([min(c.terms.get("readable", 1.0), 1.0) for c in tried])
    found = plan(
        Offers(
            quality=np.array([c.quality for c in tried]) / np.maximum(readable, 1e-3),
            readable=readable,
            level=np.array([lines.get(c.card, _NOTHING).level for c in tried]),
            slope=np.array([lines.get(c.card, _NOTHING).slope for c in tried]),
            latency_s=np.array([c.latency_s for c in tried]),
            price=np.array([c.terms["u_quality"] + c.terms["u_latency"] - c.utility for c in tried]),
            alike=np.array([[_same(cards[a.card], cards[b.card]) for b in tried] for a in tried]),
        ),
        weights["w_q"],
        lambda seconds: weights["w_l"] * latency_penalty(seconds / policy.latency_slo_s),
        left_s=min(left_s, query.constraints.max_latency_s or math.inf),
        joules=np.array([c.energy_j for c in tried]),
        most_j=query.constraints.max_energy_j or math.inf,
        first=0 if first else None,
    )
    asked = [tried[step.index] for step in found.steps]
    rest = [c for c in standing if c not in asked]
    result = []
    for step, candidate in zip(found.steps, asked, strict=True):
        quality = candidate.quality / max(readable[step.index], 1e-3)
        level, slope = lines.get(candidate.card, _NOTHING).of(quality)
        result.append(
            m.CascadeStep(
                level=level, slope=slope, below=step.below, chance=step.chance, reached=step.reached,
                latency_s=candidate.latency_s,
            )
        )  # fmt: skip
    return [*asked, *rest], result


_NOTHING = Line()


def _same(one: m.Card, other: m.Card) -> bool:
    """Whether two cards would say the same, as far as their settings tell."""
    return _settings(one) == _settings(other)


def _settings(card: m.Card) -> tuple[object, ...]:
    return (
        card.artifact.name, card.adapter, card.system_prompt, card.max_tokens, card.temperature, card.top_p, card.top_k
    )  # fmt: skip
