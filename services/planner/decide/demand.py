"""How much each artifact is asked for: queries waiting, and arrivals with the work they bring, decayed. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

RATE_HALF_LIFE_S = 120.0


@dataclass(frozen=True)
class Demand:
    """Queries for one artifact."""

    waiting: int = 0
    """Dispatched and not yet done: waiting or running."""
    waiting_since: float | None = None
    """Unix time since which some query has been waiting without an engine."""
    rate: float = 0.0
    """Arrivals per second, exponentially decayed."""
    rate_at: float = 0.0
    work: float = 0.0
    """Engine-seconds a second that arrivals bring, decayed like `rate`; 1 keeps one engine busy with full batches."""


def arrived(demand: Demand, now: float, count: int = 1, work_s: float = 0.0) -> Demand:
    """The demand after `count` further arrivals of `work_s` each (`work_of`): rate and work decay with a half-life of
    `RATE_HALF_LIFE_S`."""
    kept = decayed_rate(demand, now)
    weight = math.log(2.0) / RATE_HALF_LIFE_S
    return Demand(
        waiting=demand.waiting + count,
        waiting_since=demand.waiting_since,
        rate=kept + count * weight,
        rate_at=now,
        work=decayed_work(demand, now) + count * work_s * weight,
    )


def work_of(*, prefill_s: float, tokens_out: float, tpot_s: float, slope: float, slots: int) -> float:
    """Seconds of an engine that runs full batches which one query takes: reading holds all up, and of a step there is
    a share for each slot."""
    return prefill_s + tokens_out * tpot_s * (1.0 + slope * (slots - 1)) / slots


def decayed_work(demand: Demand, now: float) -> float:
    """Engine-seconds a second as of now."""
    return demand.work * math.exp2(-max(now - demand.rate_at, 0.0) / RATE_HALF_LIFE_S)


def decayed_rate(demand: Demand, now: float) -> float:
    """Arrivals per second as of now."""
    return demand.rate * math.exp2(-max(now - demand.rate_at, 0.0) / RATE_HALF_LIFE_S)
