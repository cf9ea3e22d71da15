"""The dual controller in simulation: the planner's utility with weights moved to hold stated objectives."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from services.planner.decide import dual
from services.planner.decide.scoring import Fleet
from services.simulator.routers import Scored
from shared import messages as m

Array = NDArray[Any]


class Controlled(Scored):
    """`Scored`, told of every decision and every end, as the live controller is."""

    def __init__(
        self,
        quality: Array,
        tokens_in: Array,
        tokens_out: Array,
        policy: m.Policy,
        objectives: m.Objectives,
        *,
        reference: int = -1,
        escalate: Callable[[int, int, int], int] | None = None,
        on_move: Callable[[int, m.Policy], None] | None = None,
    ) -> None:
        """
        Args:
            quality, tokens_in, tokens_out, escalate: as for `Scored`.
            policy: the fleet's own weights, from which the prices start.
            objectives: what is to hold.
            reference: column of the objectives' reference model; -1 for none.
            on_move: called with each query and the policy that routed it.
        """
        self._policy, self._objectives, self._reference = policy, objectives, reference
        self.state = dual.start(policy)
        super().__init__(
            quality, tokens_in, tokens_out, dual.weights(self.state, objectives, policy), escalate=escalate
        )
        self._on_move = on_move
        self._open: dict[int, dual.Decided] = {}
        self._late: list[tuple[float, int]] = []
        """(time at which it becomes late, query)."""
        self._told_late: set[int] = set()

    def route(self, i: int, now: float, fleet: Fleet) -> tuple[int, int]:
        self._become_late(now)
        self.weights = dual.weights(self.state, self._objectives, self._policy)
        model, worker = super().route(i, now, fleet)
        tokens_in, tokens_out = self._tokens_in[i], float(self._tokens_out[i, model, 0])
        costs, at = fleet.costs, (model, worker)
        decided = dual.Decided(
            at=now + 1e-9,
            latency_s=float(
                fleet.wait_s[at] + costs.prefill_s[at] * tokens_in + fleet.step_s[at] * tokens_out
            ),
            energy_j=float(costs.prefill_j[at] * tokens_in + costs.decode_j[at] * tokens_out + fleet.load_j[at]),
            quality=float(self._quality[i, model, 0]),
            reference=float(self._quality[i, self._reference, 0]) if self._reference >= 0 else None,
        )  # fmt: skip
        self.state = dual.decided(self.state, self._objectives, decided)
        self._open[i] = decided
        if self._objectives.latency_p95_s is not None:
            heapq.heappush(self._late, (now + self._objectives.latency_p95_s, i))
        if self._on_move is not None:
            self._on_move(i, self.weights)
        return model, worker

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        self._become_late(now)
        decided = self._open.pop(i)
        ended = dual.Ended(latency_s, energy_j, decided, known_late=i in self._told_late)
        self._told_late.discard(i)
        self.state = dual.ended(self.state, self._objectives, ended)

    def _become_late(self, now: float) -> None:
        while self._late and self._late[0][0] < now:
            _, i = heapq.heappop(self._late)
            if i in self._open:
                self._told_late.add(i)
                self.state = dual.late(self.state, self._objectives, self._open[i])
