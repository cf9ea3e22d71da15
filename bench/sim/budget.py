"""Keeps an energy budget while it runs: a ladder of plans at falling prices, and a hand that climbs it.

A price is found on the queries learned from, and other queries cost a few per cent more or less at it. So an account is
kept. Each query adds to it the budget's share of what the reference alone would have taken, and takes off what it did
take. The rung for the next query is the one that is expected to spend what is left, by the end or over `HORIZON`
queries. (Live, the dual controller moves one price and plans anew; here plans for all queries are made beforehand.)

What the reference would have taken is never known but where it was asked. `Allowance` predicts it from the query, and
again from what has been heard: where the reference has answered, it is what it wrote, and where it was cut off what it
writes in the mean when it goes on; elsewhere a regression says how
much shorter or longer than predicted, by how the models that were asked kept to their predictions and by the very fact
that the reference was not needed. That is unbiased on the queries learned from, under the plan that is carried out.
What stays uncertain has a standard error, and the account aims at its lower end (`SIGMAS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.scoring import Fleet
from services.simulator.engine import Router

Array = NDArray[Any]

HORIZON = 300
"""Queries over which a debt is paid back."""
LAST = 20
"""and no fewer than this at the end, when the last queries cannot pay back everything."""
RUNGS = (0.1, 0.25, 0.4, 0.55, *np.linspace(0.7, 1.3, 13).tolist())
"""Of the budget."""
SIGMAS = 2.0
"""Standard errors of what the reference alone would take that are left unspent. They are not small: 1 % of
llama-3.1-70b's answers ramble and hold 15 % of its tokens, so its mean over 3,000 queries is uncertain by 3 to 4 %.
With 1.5 one half in eight took 0.476 of 0.47."""
SPARE = 0.03
"""And no less than this share of the budget: at the end of 1,200 queries the account was up to 4 % in debt, for one
rambling answer of a large model takes as much as a score of others."""
PENALTY = 200.0
"""Ridge on the regression of its length: observations of typical size."""


@dataclass(frozen=True)
class Allowance:
    """What the reference alone would take for each of n queries, in joules."""

    token_j: float
    """Joules of the reference for each token that it writes, its prompt's share included."""
    predicted: Array
    """[n, k] tokens that each model was expected to write."""
    reference: int
    """Column, or -1 where the reference is none of the models."""
    alone: Array
    """[n] tokens that the reference is expected to write."""
    level: float
    """Tokens by which it writes more than that where it is not asked,"""
    slopes: Array
    """[2 k] and more for every token by which an asked model did, and for each model having been asked."""
    error: float
    """Relative standard error of the mean over the run."""
    limit: float = float("inf")
    """Tokens after which the reference is cut off,"""
    beyond: float = 0.0
    """and those that it would have written then."""

    def before(self, i: int) -> float:
        """Joules, before anything is heard."""
        return self.token_j * float(self.alone[i])

    def after(self, i: int, asked: Sequence[int], written: Array) -> float:
        """Joules, given what these models wrote [k] (others' entries are not looked at)."""
        if self.reference in asked:
            wrote = float(written[self.reference])
            return self.token_j * (wrote if wrote < self.limit else self.beyond)
        k = len(self.slopes) // 2
        more = self.level + sum(
            float(self.slopes[m]) * float(written[m] - self.predicted[i, m]) + float(self.slopes[k + m]) for m in asked
        )
        return self.token_j * max(float(self.alone[i]) + more, 1.0)

    @classmethod
    def fit(
        cls, alone_own: Array, alone_real: Array, own: Array, real: Array, asked: Array, reference: int,
        *, token_j: float, alone: Array, predicted: Array, count: int, limit: float = float("inf"),
    ) -> Allowance:  # fmt: skip
        """Learn from recorded lengths and from who would have been asked.

        Args:
            alone_own, alone_real: [l] tokens of the reference, as predicted without the query and as recorded.
            own, real: [l, k] the same of the models, NaN in `real` where one was not asked when it was recorded.
            asked: [l, k] whom the plan would have asked.
            reference: its column among them, or -1.
            token_j, alone, predicted: see the class; of the n queries to come.
            count: how many are to be served.
            limit: tokens after which the reference is cut off; in `real` it then has these.
        """
        limit = float(np.float32(limit))  # as lengths are recorded
        heard = asked & ~np.isnan(real)
        off = alone_real - alone_own
        unasked = ~np.isnan(off) & (~heard[:, reference] if reference >= 0 else np.ones(len(off), bool))
        x = np.hstack([np.where(heard, np.nan_to_num(real - own), 0.0), heard.astype(float)])[unasked]
        y = off[unasked]
        level, slopes, left = 0.0, np.zeros(x.shape[1]), np.zeros(0)
        if len(y):
            centre, scale = x.mean(0), np.maximum(x.std(0), 1e-9)
            z = (x - centre) / scale
            slopes = np.linalg.solve(z.T @ z + PENALTY * np.eye(z.shape[1]), z.T @ (y - y.mean())) / scale
            level = float(y.mean() - centre @ slopes)
            left = y - level - x @ slopes
        long = alone_real[alone_real >= limit]
        beyond = float(long.mean()) if len(long) else 0.0
        if reference >= 0:
            cut = heard[:, reference] & (alone_real >= limit)
            left = np.append(left, alone_real[cut] - beyond)
        spread = np.sqrt((left**2).sum() / max(len(off), 1)) / float(np.nanmean(alone_real))
        error = float(spread * np.sqrt(1.0 / max(count, 1) + 1.0 / max(len(off), 1)))
        return cls(token_j, predicted, reference, alone, level, slopes, error, limit, beyond)


class Budgeted:
    """One of several routers for each query, so that mean joules come to a budget or less."""

    cascades = True

    def __init__(
        self, routers: Sequence[Router], shares: Sequence[float], allowance: Allowance, ratio: float, count: int,
        written: Array | None = None, rows: Array | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            routers: of the same queries, each at another price.
            shares: what each is expected to spend, relative to the budget; ascending.
            allowance: what the reference alone would take.
            ratio: the budget, as a share of that.
            count: queries to be served.
            written: [n, k] tokens that each model would write, of which those heard are looked at; None: none is.
            rows: [n] which of the allowance's queries each is.
        """
        self._routers, self._shares = list(routers), np.asarray(shares)
        self._allowance, self._written = allowance, written
        self._ratio = ratio * (1.0 - max(SIGMAS * allowance.error, SPARE))
        self._rows: list[int] = (np.arange(len(allowance.alone)) if rows is None else np.asarray(rows)).tolist()
        self._mean_j = self._ratio * float(np.mean([allowance.before(row) for row in set(self._rows)]))
        self._left = count
        self._of: dict[int, Router] = {}
        self._asked: dict[int, list[int]] = {}
        self._owed_j = 0.0
        self._now = self._nearest(1.0)

    def route(self, i: int, now: float, fleet: Fleet) -> tuple[int, int]:
        router = self._of[i] = self._routers[self._now]
        self._asked[i] = []
        self._left -= 1
        return router.route(i, now, fleet)

    def after(self, i: int, model: int, attempt: int, now: float, fleet: Fleet) -> int:
        self._asked[i].append(model)
        return self._of[i].after(i, model, attempt, now, fleet)

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        self._of.pop(i).observe(i, model, latency_s, energy_j, now)
        asked, row = self._asked.pop(i), self._rows[i]
        if self._written is None:
            would = self._allowance.before(row)
        else:
            would = self._allowance.after(row, asked, self._written[i])
        self._owed_j += energy_j - self._ratio * would
        horizon = min(HORIZON, max(self._left, LAST))
        self._now = self._nearest(1.0 - self._owed_j / (horizon * self._mean_j))

    def _nearest(self, share: float) -> int:
        return int(np.abs(self._shares - share).argmin())
