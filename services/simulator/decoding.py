"""An engine's decoding as two counters, and the events that it causes.

An engine's decoding is kept as one counter, `v`: the tokens that a sequence running since the start would have by now.
All sequences of a batch advance together, one token a step, so a sequence of T tokens that joins at v ends at v + T,
and an engine needs one pending event however many sequences it runs (the virtual time of fair queueing: Zhang, 1990).
A change of the batch, or of how many engines divide the device, changes the speed of `v` and nothing else. `j` counts
the joules of one sequence in the same way, so that energy adds up by construction. Reading a prompt holds the
engine's decoding up for as long as it takes (prefill first, as continuous batching does).
"""

from __future__ import annotations

import heapq
from typing import Any

from services.simulator.profile import UnitCosts

LOADING, READY, DRAINING = 0, 1, 2


class Engine:
    """A model in the memory of a worker."""

    __slots__ = (
        "at", "base_j", "beside", "heap", "j", "left", "model", "more_j", "n", "prefill", "prefill_j", "ready_at",
        "rows", "serial", "since", "slope", "slots", "spent_j", "state", "step", "tpot", "used", "v", "wake", "worker",
    )  # fmt: skip

    def __init__(self, model: int, worker: int, slots: int, unit: UnitCosts, now: float, serial: int) -> None:
        self.model, self.worker, self.slots = model, worker, slots
        self.tpot, self.slope, self.prefill = unit.tpot_s, unit.slope, unit.prefill_s
        self.base_j, self.more_j = unit.token_j
        self.beside = unit.prefill_s * unit.beside
        self.prefill_j = unit.prefill_j
        self.n = 0
        """Sequences running."""
        self.v = self.j = self.rows = 0.0
        """`rows`: sequences that took part, summed over the steps."""
        self.left = unit.load_s
        """Seconds that loading takes yet with nothing else at work, as of `at`."""
        self.spent_j = 0.0
        """Of all its sequences together."""
        self.at = now
        """Time at which the counters stand; later than now while a prompt is read."""
        self.step = self.tpot
        """Seconds of a token at this batch and this share of the device."""
        self.heap: list[tuple[float, int, float]] = []
        """(v at which it ends, query, j at which it began)."""
        self.state, self.ready_at, self.since, self.used = LOADING, now, now, now
        self.wake = -1.0
        self.serial = serial

    def advance(self, now: float) -> None:
        """Bring the counters to the time `now`; while a prompt is read they stand."""
        if now > self.at:
            n = self.n
            if n:
                dv = (now - self.at) / self.step
                self.v += dv
                self.rows += dv * n
                spent = dv * (self.base_j / n + self.more_j)
                self.j += spent
                self.spent_j += spent * n
            self.at = now

    def own_step(self) -> float:
        """Seconds of a step of this batch with the device to itself."""
        return self.tpot * (1.0 + self.slope * (self.n - 1))


class Agenda:
    """Pending events in order of time, those of one time in order of making."""

    def __init__(self) -> None:
        self.events: list[tuple[float, int, int, Any]] = []
        """(time, serial, kind, what)."""
        self.serial = 0

    def push(self, at: float, kind: int, what: Any) -> None:
        self.serial += 1
        heapq.heappush(self.events, (at, self.serial, kind, what))

    def wake(self, engine: Engine) -> None:
        """When the first of its sequences ends as things stand; earlier events of the engine are void by this."""
        at = engine.at + max(engine.heap[0][0] - engine.v, 0.0) * engine.step
        engine.wake = at
        self.serial += 1
        heapq.heappush(self.events, (at, self.serial, ENDED, engine))


ENDED, LOADED, TICK = 0, 1, 2
"""Kinds of events."""
