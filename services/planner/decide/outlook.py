"""What routing would gain from each set of resident artifacts: the demand forecast that residency plans by. Pure.

Every routed query leaves one row: the utility that each artifact would have for it, *were it resident and free*. A set
S of resident artifacts is then worth

    V(S) = sum over recent queries i of rate_i x max over a in S of u[i, a]        (utility per second)

which is the facility-location function: monotone and submodular, so that greedy choices and single exchanges are close
to the best set (Nemhauser, Wolsey and Fisher, 1978). Rows are weighted as exponentially decayed arrival rates at two
horizons, so that a shift of the mix shows within a minute and a quiet minute does not forget the hour. No clusters have
to be formed: a domain is present in the rows as the queries that ask for the same artifact.

When routing does not know of residency (separate mode), a row is `-miss_cost` for all artifacts but the one chosen, and
V is the hit rate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared import messages as m
from shared.utility import latency_penalty

Array = NDArray[Any]
ROWS = 512
SHORT_S = 60.0
LONG_S = 600.0
FORECAST_FROM = 20
"""Routed queries from which on residency trusts a forecast."""
SHORT_SHARE = 0.75
"""Weight of the short horizon in the forecast."""


class Outlook:
    """The last `ROWS` queries' rows, in a ring."""

    def __init__(
        self,
        artifacts: Sequence[str],
        rows: int = ROWS,
        *,
        short_s: float = SHORT_S,
        long_s: float = LONG_S,
        short_share: float = SHORT_SHARE,
    ) -> None:
        self.artifacts = tuple(artifacts)
        self.index = {name: i for i, name in enumerate(self.artifacts)}
        self._horizons = ((short_share, short_s), (1.0 - short_share, long_s))
        self._u = np.zeros((rows, len(self.artifacts)))
        self._at = np.full(rows, -np.inf)
        self._next = 0
        self.count = 0
        """Rows seen since the start."""

    def seen(self, now: float, utilities: Array) -> None:
        """A query was routed; `utilities` [artifacts] were each resident and free, minus infinity where it may not."""
        self._u[self._next] = np.maximum(utilities, utilities.max() - 10.0)
        self._at[self._next] = now
        self._next = (self._next + 1) % len(self._at)
        self.count += 1

    def rows(self, now: float) -> tuple[Array, Array]:
        """(utilities [n, artifacts], rates [n] per second) of what counts as of now."""
        age = np.maximum(now - self._at, 0.0)
        known = np.isfinite(self._at)
        age, u = age[known], self._u[known]
        rate = np.zeros(len(age))
        # Seen for less than a horizon, or more rows than the ring holds: what was seen is the horizon.
        span = max(float(age.max()), 10.0) if len(age) else 10.0
        for share, horizon in self._horizons:
            full = horizon / math.log(2.0) * (1.0 - 2.0 ** (-span / horizon))
            rate += share * np.exp2(-age / horizon) / full
        return u, rate


def warm_row(route: m.Route, artifacts: Mapping[str, int], policy: m.Policy) -> Array | None:
    """[artifacts] what each would have been worth for a routed query, were it resident and free: the decision's own
    terms without waiting and loading. None when the query left no choice."""
    row = np.full(len(artifacts), -np.inf)
    for c in route.candidates:
        column = artifacts.get(c.artifact)
        if column is None or c.excluded not in (None, "over_max_latency", "misses_deadline") or not c.terms:
            continue
        latency_s = c.terms["prefill_s"] + c.terms["decode_s"]
        u = (
            route.weights.get("w_q", policy.w_quality) * c.quality
            - route.weights.get("w_l", policy.w_latency) * latency_penalty(latency_s / policy.latency_slo_s)
            - route.weights.get("w_e", policy.w_energy) * c.terms["active_j"] / policy.energy_ref_j
        )
        row[column] = max(row[column], u)
    return row if np.isfinite(row).sum() > 1 else None


def worth(u: Array, rate: Array, held: Collection[int]) -> tuple[Array, Array]:
    """(gain [a] of adding each artifact, loss [a] of removing each held one), in utility per second.

    With nothing held, what is gained is measured from the worst artifact of each row.
    """
    artifacts = u.shape[1]
    gain, loss = np.zeros(artifacts), np.zeros(artifacts)
    if not len(u):
        return gain, loss
    mine = sorted(held)
    if not mine:
        return rate @ (u - u.min(axis=1, keepdims=True)), loss
    part = u[:, mine]
    best = part.argmax(axis=1)
    first = part.max(axis=1)
    gain = rate @ np.maximum(u - first[:, None], 0.0)
    gain[mine] = 0.0
    second = np.partition(part, -2, axis=1)[:, -2] if len(mine) > 1 else u.min(axis=1)
    loss[mine] = np.bincount(best, rate * (first - second), minlength=len(mine))
    return gain, loss


def wished(u: Array, rate: Array, held: Collection[int]) -> Array:
    """[a] queries per second for which each artifact would be better than all that are held."""
    mine = sorted(held)
    if not len(u) or not mine:
        return np.zeros(u.shape[1])
    return np.asarray(rate @ (u > u[:, mine].max(axis=1, keepdims=True)))


def exchange(
    u: Array, rate: Array, held: Collection[int], leaving: Collection[int], coming: int
) -> tuple[float, float]:
    """V(held - leaving + coming) - V(held), and its standard error, both in utility per second.

    The error is that of a sum of Poisson arrivals: the root of the sum of squared contributions.
    """
    if not len(u):
        return 0.0, 0.0
    before, after = sorted(held), sorted((set(held) - set(leaving)) | {coming})
    old = u[:, before].max(axis=1) if before else u.min(axis=1)
    parts = rate * (u[:, after].max(axis=1) - old)
    return float(parts.sum()), float(np.sqrt(parts @ parts))
