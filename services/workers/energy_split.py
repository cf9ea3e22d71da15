"""How a device's joules are divided: between what ran on it, loads, idling, and other people's processes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

IDLE_WEIGHT = 0.2
"""Weight of the newest idle interval in the idle power that is learned."""
HORIZON_S = 1.0
"""Busy seconds over which a `Follower` makes up for what it was wrong by."""


@dataclass(frozen=True)
class Interval:
    """What was seen of a device between two readings of its meter."""

    elapsed_s: float
    total_j: float
    """By the meter."""
    work: Mapping[str, float] = field(default_factory=dict)
    """By artifact: active tokens of the interval, each weighted by the seconds it took its engine (device seconds on
    a GPU, core seconds on a CPU): a token of a large model counts for more than one of a small model."""
    loads: Mapping[str, float] = field(default_factory=dict)
    """By artifact, in the same unit: what loading it took."""
    other: float = 0.0
    """In the same unit: what processes that are not ours did on the device, where that can be seen."""
    busy_s: float = 0.0
    """Seconds in which anything ran."""


@dataclass(frozen=True)
class Shares:
    """Joules of an interval. All of them together are the meter's."""

    active: dict[str, float]
    load: dict[str, float]
    other_j: float
    idle_j: float

    @property
    def total_j(self) -> float:
        return math.fsum([*self.active.values(), *self.load.values(), self.other_j, self.idle_j])


def split(interval: Interval, idle_w: float) -> Shares:
    """Divide an interval's joules.

    The seconds in which nothing ran cost `idle_w` each; the rest goes to whatever ran, in proportion to its work, and
    carries the device's baseline power with it. When nothing ran, all of it is idle.
    """
    work = {name: amount for name, amount in interval.work.items() if amount > 0}
    loads = {name: amount for name, amount in interval.loads.items() if amount > 0}
    other = max(interval.other, 0.0)
    total_j = max(interval.total_j, 0.0)
    whole = math.fsum([*work.values(), *loads.values(), other])
    if whole <= 0 or total_j == 0:
        return Shares({}, {}, 0.0, total_j)
    idle_s = max(interval.elapsed_s - max(interval.busy_s, 0.0), 0.0)
    idle_j = min(max(idle_w, 0.0) * idle_s, total_j)
    rest_j = total_j - idle_j
    active = {name: rest_j * (amount / whole) for name, amount in work.items()}
    load = {name: rest_j * (amount / whole) for name, amount in loads.items()}
    return Shares(active, load, rest_j * (other / whole), idle_j)


def learn_idle(idle_w: float | None, interval: Interval) -> float | None:
    """The idle power after an interval: only one in which nothing ran says anything about it."""
    if interval.work or interval.loads or interval.other > 0 or interval.elapsed_s <= 0:
        return idle_w
    seen_w = max(interval.total_j, 0.0) / interval.elapsed_s
    return seen_w if idle_w is None else (1 - IDLE_WEIGHT) * idle_w + IDLE_WEIGHT * seen_w


@dataclass
class Totals:
    """What one artifact has cost since the ledger began."""

    active_j: float = 0.0
    load_j: float = 0.0
    loads: int = 0
    busy_s: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass
class EnergyLedger:
    """Sums of all intervals of a device."""

    total_j: float = 0.0
    idle_j: float = 0.0
    other_j: float = 0.0
    elapsed_s: float = 0.0
    artifacts: dict[str, Totals] = field(default_factory=dict)

    def of(self, artifact: str) -> Totals:
        return self.artifacts.setdefault(artifact, Totals())

    def add(self, interval: Interval, shares: Shares) -> None:
        self.total_j += max(interval.total_j, 0.0)
        self.elapsed_s += interval.elapsed_s
        self.idle_j += shares.idle_j
        self.other_j += shares.other_j
        for name, joules in shares.active.items():
            self.of(name).active_j += joules
        for name, joules in shares.load.items():
            self.of(name).load_j += joules

    @property
    def residual_j(self) -> float:
        """The meter's joules that stand in no account; rounding only."""
        held = [t.active_j for t in self.artifacts.values()] + [t.load_j for t in self.artifacts.values()]
        return self.total_j - math.fsum([*held, self.idle_j, self.other_j])


class Follower:
    """An engine's running estimate of its own joules, between the settlements that its supervisor sends.

    A counter that never goes back: it runs on with the busy seconds at the power of the last settlements, and makes
    up for what it was wrong by within about `HORIZON_S` further busy seconds.
    """

    def __init__(self, power_w: float) -> None:
        """`power_w`: joules per busy second to begin with."""
        self.shown_j = 0.0
        self.busy_s = 0.0
        self._power_w = max(power_w, 0.0)
        self._rate_w = self._power_w
        self._settled = (0.0, 0.0)

    def advance(self, seconds: float) -> float:
        """`seconds` more were busy; the joules shown now."""
        self.busy_s += max(seconds, 0.0)
        self.shown_j += self._rate_w * max(seconds, 0.0)
        return self.shown_j

    def settle(self, joules: float, busy_s: float) -> None:
        """Up to its `busy_s`-th busy second this engine has been charged `joules` in all."""
        before_j, before_s = self._settled
        if busy_s - before_s > 1e-6:
            self._power_w = max(joules - before_j, 0.0) / (busy_s - before_s)
            self._settled = (joules, busy_s)
        expected_j = joules + self._power_w * max(self.busy_s - busy_s, 0.0)
        self._rate_w = max(0.0, self._power_w + (expected_j - self.shown_j) / HORIZON_S)
