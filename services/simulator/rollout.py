"""Residency by rollout, on one worker: every swap that could be made now is followed by a simple rule's swaps, and the
one after which queries wait least is made (Bertsekas, Tsitsiklis and Wu 1997). With knowledge of the arrivals it is the
offline bound of `bench.residency`; with a forecast it shows what lookahead would be worth.

The rule: load the absent model whose queries have waited longest all together, once that is `worth_s`; what is asked
for least makes room. Serving takes no time in this picture, loads and what they wait for do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.outlook import FORECAST_FROM, Outlook
from services.simulator.engine import READY, Simulation, warm_start

Array = NDArray[Any]
STEP_S = 1.5
HORIZON_S = 90.0
PAUSE_S = 1.0
"""Between two decisions."""
DRAIN_S = 1.0
LEFT_S = 5.0
"""A query that still waits at the horizon counts for as much more at least."""


class Rollout:
    """Serves a blind router, whose choices do not depend on what is resident."""

    tick_s = PAUSE_S

    def __init__(
        self, order: list[int], *, worth_s: float, swap_price_s: float = 0.0, future: tuple[Array, Array] | None = None
    ) -> None:
        """
        Args:
            order: preference for the memory at the start.
            worth_s: seconds of waiting, of all queries together, for which the rule that goes on makes a swap.
            swap_price_s: seconds of waiting that a swap counts for: the Lagrange multiplier of a bound on swaps.
            future: (arrival times [n], models [n]) that will come; a forecast from what has come without it.
        """
        self._order = order
        self._worth_s, self._price_s = worth_s, swap_price_s
        self._future = future
        self._last = -np.inf

    def start(self, sim: Simulation) -> None:
        if sim.workers != 1:
            raise ValueError("a rollout knows one worker")
        self._seen = Outlook(sim.fleet.names)
        self._rows = np.eye(sim.models) - 1.0
        self._load_s = np.array([row[0].load_s for row in sim.fleet.unit]) + DRAIN_S
        warm_start(sim, self._order)

    def routed(self, sim: Simulation, i: int, model: int, now: float) -> None:
        self._seen.seen(now, self._rows[model])

    def need(self, sim: Simulation, model: int, now: float) -> None:
        self.tick(sim, now)

    def tick(self, sim: Simulation, now: float) -> None:
        engines = sim.engines[0]
        if now < self._last + 0.95 * PAUSE_S or sim.pending(0) or any(e.state != READY for e in engines.values()):
            return
        self._last = now
        held = np.array([model in engines for model in range(sim.models)])
        arrivals = self._arrivals(sim.models, now)
        rate = arrivals.sum(axis=0) / HORIZON_S
        waiting = np.array([0 if h else len(q) for h, q in zip(held, sim.queue, strict=True)], float)
        waited = np.array([sum(now - sim.work.arrival_s[i] for i in q) for q in sim.queue], float) * ~held
        wanted = [m for m in np.flatnonzero(~held).tolist() if waiting[m] or rate[m] > rate[held].min(initial=np.inf)]
        sizes = sim.fleet.footprint_bytes
        swaps = [
            (m, v)
            for m in wanted
            for v in [*np.flatnonzero(held).tolist(), -1]
            if sim.free[0] + (sizes[v] if v >= 0 else 0) >= sizes[m]
        ]
        if not swaps:
            return
        costs = self._play([(-1, -1), *swaps], held, waiting, waited, arrivals, rate)
        best = int(costs.argmin())
        if best:
            model, victim = swaps[best - 1]
            if victim >= 0:
                sim.evict(victim, 0)
            sim.load(model, 0)

    def _arrivals(self, models: int, now: float) -> Array:
        """[steps, models] queries that come, or are expected to."""
        steps = int(HORIZON_S / STEP_S)
        if self._future is None:
            u, rates = self._seen.rows(now)
            rate = rates @ (u == 0.0) if self._seen.count >= FORECAST_FROM else np.full(models, 1.0 / models)
            return np.tile((rate + 1e-4) * STEP_S, (steps, 1))
        at, chosen = self._future
        first, last = np.searchsorted(at, (now, now + HORIZON_S), side="right")
        found = np.zeros((steps, models))
        np.add.at(found, (np.minimum((at[first:last] - now) // STEP_S, steps - 1).astype(int), chosen[first:last]), 1.0)
        return found

    def _play(
        self, swaps: list[tuple[int, int]], held: Array, waiting: Array, waited: Array, arrivals: Array, rate: Array
    ) -> Array:
        """[swaps] seconds of waiting within the horizon and what is left then, after each of the swaps."""
        count = len(swaps)
        rows = np.arange(count)
        hold, wait, area = (np.tile(x, (count, 1)) for x in (held, waiting, waited))
        model, busy, until = np.zeros(count, int), np.zeros(count, bool), np.zeros(count)
        cost = np.zeros(count)
        for k, (coming, leaving) in enumerate(swaps):
            if coming >= 0:
                hold[k, leaving] &= leaving < 0
                model[k], busy[k], until[k], cost[k] = coming, True, self._load_s[coming], self._price_s
        for step, came in enumerate(arrivals):
            now = (step + 1) * STEP_S
            wait += came * ~hold
            area += wait * STEP_S
            cost += wait.sum(axis=1) * STEP_S
            done = rows[busy & (now >= until)]
            hold[done, model[done]], wait[done, model[done]], area[done, model[done]] = True, 0.0, 0.0
            busy[done] = False
            longest = np.where(hold, -1.0, area).argmax(axis=1)
            begin = rows[~busy & (area[rows, longest] >= self._worth_s) & ~hold[rows, longest]]
            if len(begin):
                hold[begin, np.where(hold, rate, np.inf).argmin(axis=1)[begin]] = False
                model[begin], busy[begin] = longest[begin], True
                until[begin] = now + self._load_s[longest[begin]]
                cost[begin] += self._price_s
        left = np.where(~hold & (wait > 0.0), np.maximum(self._worth_s - area, wait * LEFT_S), 0.0)
        return np.asarray(cost + left.sum(axis=1))
