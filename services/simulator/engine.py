"""The event loop: queries, queues, engines with continuous batching, memory, loads and evictions in virtual time.

Its parts: `decoding` (an engine's counters), `devices` (how engines slow each other down), `memory` (what is held, what
comes and goes), `told` (what scoring knows of it), `workload` (what goes in and out).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from services.planner.decide.charges import Swap
from services.planner.decide.scoring import Fleet
from services.simulator.beliefs import REFRESH_S, Beliefs
from services.simulator.decoding import DRAINING, ENDED, LOADED, LOADING, READY, TICK, Agenda, Engine
from services.simulator.devices import Devices
from services.simulator.fleet import SimFleet, costs_of
from services.simulator.memory import Memory
from services.simulator.told import Told
from services.simulator.workload import Residency, Result, Router, Workload

__all__ = [
    "DRAINING", "LOADING", "READY", "Engine", "Residency", "Result", "Router", "Simulation", "Workload", "warm_start",
]  # fmt: skip

STALLED_S = 3600.0
"""Simulated time without a query's progress after which a run cannot end any more, whatever a residency policy does."""


class Simulation:
    """One run."""

    def __init__(
        self,
        fleet: SimFleet,
        work: Workload,
        router: Router,
        residency: Residency,
        *,
        joint: bool = True,
        crowding: bool = True,
        clock: Callable[[], float] | None = None,
        beliefs: Beliefs | None = None,
    ) -> None:
        """`clock`: wall time, to sample the cost of decisions; none are timed without it. `beliefs`: learns what the
        planner takes costs to be; they stay what they were at the start without it."""
        self.fleet, self.work, self.router, self.residency = fleet, work, router, residency
        self.models, self.workers = len(fleet.models), len(fleet.workers)
        self._joint, self._crowding = joint, crowding
        self._beliefs, self._believed = beliefs, (0, 0.0)
        self._marks: dict[int, tuple[float, float, float, float]] = {}
        """With beliefs: when a query took its slot, when its first token came, and the engine's counters then."""
        self.planned_with = fleet.planned_with if beliefs is None else beliefs.units()
        """[m][w] what the planner takes costs to be."""
        self.scoring = self._scored()
        if len(work):
            self.scoring.service_tokens[:, 0] = np.mean(work.tokens_in)
            self.scoring.service_tokens[:, 1] = np.nan_to_num(np.nanmean(work.tokens_out, axis=0), nan=128.0)
        self.now = 0.0
        self.engines: list[dict[int, Engine]] = [{} for _ in range(self.workers)]
        """[w] by model, in whatever state."""
        self.queue: list[deque[int]] = [deque() for _ in range(self.models)]
        self.waiting_since: list[float] = [-1.0] * self.models
        """[m] when the oldest query began to wait for a model that is not resident; -1 when none does."""
        self._agenda = Agenda()
        self._devices = Devices(fleet, self.engines, self._agenda)
        self._memory = Memory(fleet, self.engines, self._devices, self._agenda)
        self.free, self.holders = self._memory.free, self._memory.holders
        self._told = Told(fleet, self.scoring, self._memory, self._devices, self.queue, self._swap_of(residency))
        self._changed: Callable[[Simulation, float], None] | None = getattr(residency, "changed", None)
        """Residency is told of loads and evictions that have ended, where it wants to know."""
        self._clock = clock
        self._cascades = getattr(router, "cascades", True)
        n = len(work)
        self._tin: list[float] = work.tokens_in.tolist()
        self._tout: list[list[float]] = np.maximum(work.tokens_out, 1.0).tolist()
        self._born: list[float] = work.arrival_s.tolist()
        self._energy = [0.0] * n
        self._ttft = [0.0] * n
        self._done = [0.0] * n
        self._model = [-1] * n
        self._attempts = [0] * n
        self._hit = [False] * n
        self._open = n
        self._count = 0
        self._samples: list[float] = []

    def _swap_of(self, residency: Residency) -> Callable[[int, int], Swap | None] | None:
        known = getattr(residency, "swap", None)
        return None if known is None else lambda model, worker: known(self, model, worker)

    def _scored(self) -> Fleet:
        fleet = self.fleet
        return Fleet(
            fleet.names, fleet.workers, costs_of(self.planned_with), [m.slots for m in fleet.models], fleet.fits,
            shared=(fleet.shared and not fleet.believed,) * self.workers, joint=self._joint, crowding=self._crowding,
        )  # fmt: skip

    def _believe(self, beliefs: Beliefs, now: float) -> None:
        """Let the planner know what was learned, as often as it hears of it live."""
        changes, at = self._believed
        if beliefs.changes == changes or now - at < REFRESH_S:
            return
        self._believed = (beliefs.changes, now)
        self.planned_with = beliefs.units()
        tokens = self.scoring.service_tokens
        self.scoring = self._told.scoring = self._scored()
        self.scoring.service_tokens[:] = tokens
        for worker in range(self.workers):
            self.tell_worker(worker)

    # What residency policies do

    def place(self, model: int, worker: int) -> bool:
        """Put a model into memory at no cost, before the first arrival. False if it does not fit."""
        placed = self._memory.place(model, worker, self.now)
        if placed:
            self.tell_worker(worker)
        return placed

    def load(self, model: int, worker: int) -> bool:
        """Load as soon as memory is there (evict first). False if it is there, coming, or could never fit."""
        if not self._memory.order(model, worker):
            return False
        self._begin_loads(worker)
        return True

    def evict(self, model: int, worker: int) -> bool:
        """Take no new work, finish what runs, then leave. False if no ready engine is there."""
        engine = self._memory.drain(model, worker)
        if engine is None:
            return False
        if engine.n == 0:
            self._leave(engine)
        else:
            self.tell_worker(worker)
        return True

    def pending(self, worker: int) -> list[int]:
        """Models whose load waits for memory."""
        return list(self._memory.pending[worker])

    def promised(self, worker: int) -> int:
        """Bytes that loads which wait for memory will take."""
        return self._memory.promised(worker)

    def tell_worker(self, worker: int) -> None:
        """Tell scoring all models' states on a worker."""
        self._told.worker(worker, self.now)

    def ask_for_unmet(self) -> None:
        """Tell the residency policy again of models that queries wait for."""
        for model in range(self.models):
            if self.queue[model] and not self.holders[model] and not self._memory.coming[model]:
                self.residency.need(self, model, self.now)

    # The loop

    def run(self) -> Result:
        """Play the whole workload; every query ends once."""
        work, events, born = self.work, self._agenda.events, self._born
        pop, n = heapq.heappop, len(work)
        self.residency.start(self)
        for worker in range(self.workers):
            self.tell_worker(worker)
        if self.residency.tick_s and n:
            self._agenda.push(born[0] + self.residency.tick_s, TICK, None)
        i, upcoming = 0, born[0] if n else float("inf")
        progress = 0.0
        while self._open:
            if events and events[0][0] <= upcoming:
                at, _, kind, what = pop(events)
                if kind == ENDED:
                    if what.wake == at:
                        self.now = progress = at
                        self._step(what, at)
                elif kind == LOADED:
                    if what.ready_at == at and what.state == LOADING:
                        self.now = at
                        self._ready(what, at)
                else:
                    if i == n and at - max(progress, born[-1]) > STALLED_S:
                        raise RuntimeError(self._stuck())
                    self.now = at
                    self.residency.tick(self, at)
                    self.ask_for_unmet()
                    self._agenda.push(at + self.residency.tick_s, TICK, None)
            elif i < n:
                self.now = upcoming
                self._arrive(i, upcoming)
                i += 1
                upcoming = born[i] if i < n else float("inf")
            else:
                raise RuntimeError(self._stuck())
            self._count += 1
        return self._result()

    def _stuck(self) -> str:
        waiting = [self.fleet.names[m] for m in range(self.models) if self.queue[m]]
        return f"{self._open} queries can never end; they wait for {', '.join(waiting)}"

    def _arrive(self, i: int, now: float) -> None:
        if self._beliefs is not None:
            self._believe(self._beliefs, now)
        self._told.changed()
        if self._clock is not None and i & 63 == 0:
            began = self._clock()
            model, worker = self.router.route(i, now, self.scoring)
            self._samples.append(self._clock() - began)
        else:
            model, worker = self.router.route(i, now, self.scoring)
        self._hit[i] = bool(self.holders[model])
        self.residency.routed(self, i, model, now)
        self._dispatch(i, model, worker, now)

    def _dispatch(self, i: int, model: int, worker: int, now: float) -> None:
        self._attempts[i] += 1
        self._model[i] = model
        chosen = None
        holders = self.holders[model]
        for engine in holders:
            if engine.n < engine.slots:
                if engine.worker == worker:
                    chosen = engine
                    break
                if chosen is None or engine.n < chosen.n:
                    chosen = engine
        if chosen is not None and not self.queue[model]:
            self._join(chosen, i, now)
            return
        self.queue[model].append(i)
        if not holders:
            if self.waiting_since[model] < 0:
                self.waiting_since[model] = now
            self._told.model(model, now)
            if not self._memory.coming[model]:
                self.residency.need(self, model, now)
        else:
            self._devices.changed.update(holders)

    def _join(self, engine: Engine, i: int, now: float) -> None:
        """A query takes a slot; its prompt is read first."""
        engine.advance(now)
        devices, worker = self._devices, engine.worker
        engine.n = n = engine.n + 1
        engine.used = now
        if n == 1:
            devices.busier(worker, 1, engine, now)
        slower = devices.slower(engine)
        engine.at += (engine.prefill if n == 1 and slower == 1.0 else engine.beside) * self._tin[i] * slower
        if engine.prefill_j:
            self._energy[i] += engine.prefill_j * self._tin[i]
            engine.spent_j += engine.prefill_j * self._tin[i]
        engine.step = engine.own_step() * slower
        if self._attempts[i] == 1:
            self._ttft[i] = engine.at + engine.step - self._born[i]
        if self._beliefs is not None:
            self._marks[i] = (now, engine.at + engine.step, engine.v, engine.rows)
        heapq.heappush(engine.heap, (engine.v + self._tout[i][engine.model], i, engine.j))
        self._agenda.wake(engine)
        devices.changed.add(engine)
        if devices.turns:
            devices.retime(worker, engine, now)

    def _step(self, engine: Engine, now: float) -> None:
        """Sequences end; queued queries take their slots."""
        heap, devices, model = engine.heap, self._devices, engine.model
        engine.wake = -1.0  # a second event may stand at this very time
        engine.advance(now)
        engine.used = now
        ended: list[int] = []
        limit = engine.v + 1e-6
        while heap and heap[0][0] <= limit:
            _, i, j = heapq.heappop(heap)
            self._energy[i] += engine.j - j
            ended.append(i)
            if self._beliefs is not None:
                self._learn(self._beliefs, engine, i, now)
        engine.n -= len(ended)
        if engine.n == 0:
            devices.busier(engine.worker, -1, engine, now)
        joined = engine.state == READY and self._admit(engine, now)
        if engine.n and not joined:
            engine.step = engine.own_step() * devices.slower(engine)
            self._agenda.wake(engine)
        if engine.state == READY:
            devices.changed.add(engine)
        elif engine.n == 0:
            self._leave(engine)
        if devices.turns and ended:
            devices.retime(engine.worker, engine, now)
        for i in ended:
            self._end(i, model, now)

    def _learn(self, beliefs: Beliefs, engine: Engine, i: int, now: float) -> None:
        began, first, v, rows = self._marks.pop(i)
        beliefs.answered(
            engine.model, engine.worker, tokens_in=self._tin[i], tokens_out=self._tout[i][engine.model],
            prefill_s=first - began, decode_s=max(now - first, 0.0), batch_mean=(engine.rows - rows) / (engine.v - v),
        )  # fmt: skip

    def _admit(self, engine: Engine, now: float) -> bool:
        """Queued queries take free slots; whether any did."""
        queue, joined = self.queue[engine.model], False
        while queue and engine.n < engine.slots:
            self._join(engine, queue.popleft(), now)
            joined = True
        return joined

    def _end(self, i: int, model: int, now: float) -> None:
        """An attempt has ended; the query too, unless the router asks another model."""
        if self._cascades:
            self._told.changed()
        further = self.router.after(i, model, self._attempts[i], now, self.scoring)
        if further >= 0:
            self.residency.routed(self, i, further, now)
            self._dispatch(i, further, -1, now)
            return
        if further < -1:
            self._model[i] = -2 - further
        latency = now - self._born[i] + self.fleet.overhead_s
        self._done[i] = latency
        self._open -= 1
        self.router.observe(i, model, latency, self._energy[i], now)

    # Loads and evictions

    def _begin_loads(self, worker: int) -> None:
        self._memory.begin(worker, self.now)
        self.tell_worker(worker)

    def _ready(self, engine: Engine, now: float) -> None:
        if self._beliefs is not None:
            self._beliefs.loaded(engine.model, engine.worker, now - engine.since)
        self._memory.loaded(engine, now)
        self.waiting_since[engine.model] = -1.0
        self._admit(engine, now)
        self._told.model(engine.model, now)
        self._begin_loads(engine.worker)
        self.ask_for_unmet()
        if self._changed is not None:
            self._changed(self, now)

    def _leave(self, engine: Engine) -> None:
        model = engine.model
        self._memory.leave(engine)
        if self.queue[model] and not self.holders[model] and self.waiting_since[model] < 0:
            self.waiting_since[model] = self.now
        self._begin_loads(engine.worker)
        self.ask_for_unmet()
        if self._changed is not None:
            self._changed(self, self.now)

    def _result(self) -> Result:
        n, memory = len(self.work), self._memory
        model = np.array(self._model, np.int64)
        score = self.work.score[np.arange(n), model] if n else np.zeros(0)
        return Result(
            model=model, latency_s=np.array(self._done), ttft_s=np.array(self._ttft),
            energy_j=np.array(self._energy), attempts=np.array(self._attempts), hit=np.array(self._hit, bool),
            score=np.nan_to_num(score), arrival_s=self.work.arrival_s, row=self.work.row, loads=memory.loads,
            evictions=memory.evictions, load_j=memory.load_j, engine_j=memory.spent_j(),
            peak_bytes=memory.peak_bytes(), events=self._count, decision_s=self._samples,
        )  # fmt: skip


def warm_start(sim: Simulation, order: Sequence[int]) -> None:
    """Fill memory in this order of preference: each model once, then replicas while there is room."""
    for _ in range(sim.workers):
        placed = False
        for model in order:
            rooms = sorted(range(sim.workers), key=lambda w: (len(sim.engines[w]), -sim.free[w], w))
            if any(sim.place(model, worker) for worker in rooms):
                placed = True
        if not placed:
            break
