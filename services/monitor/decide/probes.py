"""Which model to ask a golden probe, and when: known questions that keep watch where feedback does not. Pure.

A quarantined model is probed often, for it earns its way back by probes alone. One under suspicion is probed as often,
so that suspicion is settled soon. Of the others, the one that went longest without a judgement is probed now and then,
so that a model that gets little traffic is not forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

OFTEN = 20
"""Queries between two probes while some model is quarantined or under suspicion: 5 % of the traffic,"""
OFTEN_S = 5.0
"""or this many seconds, where there is little traffic."""
SELDOM = 200
"""Queries between two probes otherwise: 0.5 % of the traffic."""


@dataclass(frozen=True)
class Watched:
    """One model as far as probing is concerned."""

    card: str
    quarantined: bool = False
    warning: bool = False
    idle: int = 0
    """Queries since it was last judged."""


def choose(watched: Sequence[Watched], count: int) -> str | None:
    """The card to probe after `count` queries since the start, or None when it is no probe's turn."""
    urgent = [w for w in watched if w.quarantined or w.warning]
    if urgent:
        return max(urgent, key=_order).card if count % OFTEN == 0 else None
    if not watched or count % SELDOM:
        return None
    return max(watched, key=_order).card


def due(watched: Sequence[Watched], since: int, since_s: float, *, spare: bool) -> str | None:
    """The same for a system that runs by the clock: the card to probe now, or None.

    Args:
        watched: the cards that there are probes for.
        since: queries since the last probe.
        since_s: seconds since the last probe ended.
        spare: nobody waits for capacity; a probe never makes anyone wait.
    """
    if not spare or not watched:
        return None
    urgent = [w for w in watched if w.quarantined or w.warning]
    if urgent and (since >= OFTEN or since_s >= OFTEN_S):
        return max(urgent, key=_order).card
    return max(watched, key=_order).card if since >= SELDOM else None


def score(text: str, expect: str) -> float:
    """1 for an answer that the expected pattern is found in, else 0."""
    return 1.0 if re.search(expect, text, re.IGNORECASE) else 0.0


def _order(watched: Watched) -> tuple[int, bool, str]:
    return watched.idle, watched.quarantined, watched.card
