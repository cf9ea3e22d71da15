"""A small queueing system under the controller: three models, each with slots, in virtual time."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.planner.decide import dual, routing
from shared import messages as m
from shared.utility import utility


@dataclass(frozen=True)
class Server:
    """A model on its own device."""

    name: str
    service_s: float
    """Mean time of a query in a slot."""
    energy_j: float
    slots: int
    quality: tuple[float, ...]
    """By kind of query."""


SERVERS = (
    Server("small", 1.0, 4.0, 8, (0.35, 0.30, 0.50, 0.20)),
    Server("middle", 2.5, 12.0, 6, (0.45, 0.50, 0.52, 0.30)),
    Server("large", 8.0, 60.0, 6, (0.60, 0.55, 0.55, 0.65)),
)
KINDS = 4


@dataclass
class Outcome:
    """One query's end, in order of arrival."""

    latency_s: float
    energy_j: float
    quality: float


@dataclass
class Run:
    """What a run gave."""

    outcomes: list[Outcome] = field(default_factory=list)
    policy: m.Policy | None = None
    state: dual.State | None = None

    def p95(self, begin: int, end: int) -> float:
        ordered = sorted(o.latency_s for o in self.outcomes[begin:end])
        return ordered[math.ceil(0.95 * len(ordered)) - 1]

    def energy(self, begin: int, end: int) -> float:
        return sum(o.energy_j for o in self.outcomes[begin:end]) / (end - begin)

    def quality(self, begin: int, end: int) -> float:
        return sum(o.quality for o in self.outcomes[begin:end]) / (end - begin)


def run(
    rates: Sequence[float],
    policy: m.Policy,
    objectives: m.Objectives | None,
    *,
    queries: int,
    seed: int = 0,
    servers: Sequence[Server] = SERVERS,
    on_query: Callable[[int, m.Policy], None] | None = None,
) -> Run:
    """Serve `queries` Poisson arrivals at each of `rates` in turn; with `objectives` under the controller."""
    draw = random.Random(seed)
    state = dual.start(policy)
    current = policy if objectives is None else dual.weights(state, objectives, policy)
    free = [[0.0] * s.slots for s in servers]
    pending: list[tuple[float, int, dual.Ended]] = []
    result = Run()
    now = 0.0
    for index in range(queries * len(rates)):
        now += draw.expovariate(rates[index // queries])
        if objectives is not None:
            while pending and pending[0][0] <= now:
                state = dual.ended(state, objectives, heapq.heappop(pending)[2])
            current = dual.weights(state, objectives, policy)
        kind, size = draw.randrange(KINDS), draw.lognormvariate(-0.18, 0.6)
        weights = routing.weights_of(m.Preference(), current)
        expected = [max(min(free[s]) - now, 0.0) + servers[s].service_s for s in range(len(servers))]
        best = max(
            range(len(servers)),
            key=lambda s: utility(
                servers[s].quality[kind],
                expected[s],
                servers[s].energy_j,
                weights,
            ),
        )
        slot = min(range(servers[best].slots), key=lambda i: free[best][i])
        end = max(free[best][slot], now) + servers[best].service_s * size
        free[best][slot] = end
        outcome = Outcome(end - now, servers[best].energy_j * size, servers[best].quality[kind])
        result.outcomes.append(outcome)
        if objectives is not None:
            decided = dual.Decided(
                at=now,
                latency_s=expected[best],
                energy_j=servers[best].energy_j,
                quality=outcome.quality,
                reference=servers[-1].quality[kind],
            )
            state = dual.decided(state, objectives, decided)
            ended = dual.Ended(outcome.latency_s, outcome.energy_j, decided)
            heapq.heappush(pending, (end, index, ended))
        if on_query:
            on_query(index, current)
    result.policy, result.state = current, state
    return result
