"""Keeps an energy budget while it runs: a ladder of plans at falling prices, and a hand that climbs it.

A price is found on the queries learned from, and other queries cost a few per cent more or less at it. What has been
spent is known as queries end, so the share to aim at next is the budget less what is owed, paid back over `HORIZON`
queries: integral control, on the expected spending of each rung. (Live, the dual controller moves one price and plans
anew; here plans for all queries are made beforehand.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.scoring import Fleet
from services.simulator.engine import Router

HORIZON = 300
"""Queries over which a debt is paid back. A price that is off by 5 % leaves 5 % x HORIZON / n of the budget at the end
of n queries."""
RUNGS = tuple(np.linspace(0.7, 1.3, 13).tolist())
"""Of the budget."""


class Budgeted:
    """One of several routers for each query, so that mean joules come to a budget."""

    cascades = True

    def __init__(self, routers: Sequence[Router], shares: Sequence[float], allowed_j: NDArray[np.float64]) -> None:
        """
        Args:
            routers: of the same queries, each at another price.
            shares: what each is expected to spend, relative to the budget; ascending.
            allowed_j: [n], which each query adds to the budget.
        """
        self._routers, self._shares = list(routers), np.asarray(shares)
        self._allowed_j: list[float] = allowed_j.tolist()
        self._horizon_j = float(allowed_j.mean()) * HORIZON
        self._of: dict[int, Router] = {}
        self._owed_j = 0.0
        self._now = self._nearest(1.0)

    def route(self, i: int, now: float, fleet: Fleet) -> tuple[int, int]:
        router = self._of[i] = self._routers[self._now]
        return router.route(i, now, fleet)

    def after(self, i: int, model: int, attempt: int, now: float, fleet: Fleet) -> int:
        return self._of[i].after(i, model, attempt, now, fleet)

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        self._of.pop(i).observe(i, model, latency_s, energy_j, now)
        self._owed_j += energy_j - self._allowed_j[i]
        self._now = self._nearest(1.0 - self._owed_j / self._horizon_j)

    def _nearest(self, share: float) -> int:
        return int(np.abs(self._shares - share).argmin())
