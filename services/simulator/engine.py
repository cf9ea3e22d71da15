"""The event loop: queries, queues, engines with continuous batching, memory, loads and evictions in virtual time.

An engine's decoding is kept as one counter, `v`: the tokens that a sequence running since the start would have by now.
All sequences of a batch advance together, one token a step, so a sequence of T tokens that joins at v ends at v + T,
and an engine needs one pending event however many sequences it runs (the virtual time of fair queueing: Zhang, 1990).
A change of the batch, or of how many engines divide the device, changes the speed of `v` and nothing else. `j` counts
the joules of one sequence in the same way, so that energy adds up by construction. Reading a prompt holds the
engine's decoding up for as long as it takes (prefill first, as continuous batching does).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.scoring import Fleet
from services.simulator.fleet import SimFleet

Array = NDArray[Any]
LOADING, READY, DRAINING = 0, 1, 2
STALLED_S = 3600.0
"""Simulated time without a query's progress after which a run cannot end any more, whatever a residency policy does."""


@dataclass(frozen=True)
class Workload:
    """n queries in order of arrival, for m models."""

    arrival_s: Array
    row: Array
    """[n] the recorded query that each repeats."""
    tokens_in: Array
    """[n]"""
    tokens_out: Array
    """[n, m], what each model really writes."""
    score: Array
    """[n, m], what each model's answer is really worth, 0 to 1."""
    answered: Array | None = None
    """[n, m], whether an answer could be read; None counts all as answered."""
    group: Array | None = None
    """[n] domain, for reports and clairvoyant policies; routers do not see it."""

    def __len__(self) -> int:
        return len(self.arrival_s)


class Router(Protocol):
    """Chooses models. `route` is called for each query as it arrives, `after` when an attempt has ended."""

    def route(self, i: int, now: float, fleet: Fleet) -> tuple[int, int]:
        """(model, worker) for query i; worker -1 leaves it to who is free."""

    def after(self, i: int, model: int, attempt: int, now: float, fleet: Fleet) -> int:
        """The model to ask next; -1 when this answer stands; -2 - m when the earlier answer of model m does."""

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        """Query i has ended."""


class Residency(Protocol):
    """Decides what is loaded and evicted, by `Simulation.load` and `Simulation.evict`."""

    tick_s: float
    """Seconds between two calls of `tick`; 0 for never."""

    def start(self, sim: Simulation) -> None:
        """Before the first arrival: `Simulation.place` puts a model into memory at no cost."""

    def routed(self, sim: Simulation, i: int, model: int, now: float) -> None:
        """Query i goes to this model."""

    def need(self, sim: Simulation, model: int, now: float) -> None:
        """Queries wait for this model, and no worker holds or loads it. Called again until one does."""

    def tick(self, sim: Simulation, now: float) -> None: ...


class Engine:
    """A model in the memory of a worker."""

    __slots__ = (
        "at", "base_j", "beside", "heap", "j", "model", "more_j", "n", "prefill", "prefill_j", "ready_at", "serial",
        "since", "slope", "slots", "state", "step", "tpot", "used", "v", "wake", "worker",
    )  # fmt: skip

    def __init__(self, model: int, worker: int, slots: int, unit: Any, now: float, serial: int) -> None:
        self.model, self.worker, self.slots = model, worker, slots
        self.tpot, self.slope, self.prefill = unit.tpot_s, unit.slope, unit.prefill_s
        self.base_j, self.more_j = unit.token_j
        self.beside = unit.prefill_s * unit.beside
        self.prefill_j = unit.prefill_j
        self.n = 0
        """Sequences running."""
        self.v = self.j = 0.0
        self.at = now
        """Time at which the counters stand; later than now while a prompt is read."""
        self.step = self.tpot
        self.heap: list[tuple[float, int, float]] = []
        """(v at which it ends, query, j at which it began)."""
        self.state, self.ready_at, self.since, self.used = LOADING, now, now, now
        self.wake = -1.0
        self.serial = serial


@dataclass
class Result:
    """What happened, [n] unless said otherwise. Energy includes every attempt, and loads in `load_j` apart."""

    model: Array
    latency_s: Array
    ttft_s: Array
    energy_j: Array
    attempts: Array
    hit: Array
    """The first attempt found its model resident."""
    score: Array
    arrival_s: Array
    row: Array
    loads: int = 0
    evictions: int = 0
    load_j: float = 0.0
    engine_j: float = 0.0
    """Joules by the engines' own counters: the sum of `energy_j`."""
    peak_bytes: list[int] = field(default_factory=list)
    """[w] most memory in use."""
    events: int = 0
    decision_s: list[float] = field(default_factory=list)
    """Wall time of sampled routing decisions."""


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
    ) -> None:
        """`clock`: wall time, to sample the cost of decisions; none are timed without it."""
        self.fleet, self.work, self.router, self.residency = fleet, work, router, residency
        self.models, self.workers = len(fleet.models), len(fleet.workers)
        self.scoring = Fleet(
            fleet.names, fleet.workers, fleet.costs(), [m.slots for m in fleet.models], fleet.fits,
            shared=(fleet.shared and not fleet.believed,) * self.workers, joint=joint, crowding=crowding,
        )  # fmt: skip
        if len(work):
            self.scoring.service_tokens[:, 0] = np.mean(work.tokens_in)
            self.scoring.service_tokens[:, 1] = np.nan_to_num(np.nanmean(work.tokens_out, axis=0), nan=128.0)
        self.now = 0.0
        self.free = list(fleet.budget_bytes)
        self.engines: list[dict[int, Engine]] = [{} for _ in range(self.workers)]
        """[w] by model, in whatever state."""
        self.holders: list[list[Engine]] = [[] for _ in range(self.models)]
        """[m] ready engines that take work."""
        self.coming = [0] * self.models
        """[m] loads under way or waiting for memory."""
        self.queue: list[deque[int]] = [deque() for _ in range(self.models)]
        self.waiting_since: list[float] = [-1.0] * self.models
        """[m] when the oldest query began to wait for a model that is not resident; -1 when none does."""
        device = fleet.device or tuple(range(self.workers))
        self._device = device
        together: list[list[int]] = [[] for _ in range(max(device) + 1 if device else 0)]
        for worker, number in enumerate(device):
            together[number].append(worker)
        self._mates = [together[number] for number in device]
        """[w] workers on the same device."""
        self._turns = fleet.turns and fleet.shared
        self._places = fleet.places or (1.0,) * self.workers
        self._busy = [0] * len(together)
        """[device] engines at work."""
        self._share = [1.0] * len(self._busy)
        """[device] by how much its engines slow each other down."""
        self._changed: set[Engine] = set()
        """Engines whose state scoring has not been told since the last decision."""
        self._pending: list[list[tuple[int, float]]] = [[] for _ in range(self.workers)]
        self._loading = [False] * self.workers
        self._events: list[tuple[float, int, int, Any]] = []
        self._serial = 0
        self._clock = clock
        self._swap = getattr(residency, "swap", None)
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
        self.loads = self.evictions = 0
        self.load_j = 0.0
        self._engine_j = 0.0
        self._low = list(self.free)
        self._count = 0
        self._samples: list[float] = []

    # What residency policies do

    def place(self, model: int, worker: int) -> bool:
        """Put a model into memory at no cost, before the first arrival. False if it does not fit."""
        if model in self.engines[worker] or not self.fleet.fits[model, worker]:
            return False
        if self.fleet.footprint_bytes[model] > self.free[worker]:
            return False
        engine = self._engine(model, worker)
        engine.state, engine.since = READY, float("-inf")  # it has been there: no minimum residence protects it
        self.holders[model].append(engine)
        self.tell_worker(worker)
        return True

    def load(self, model: int, worker: int) -> bool:
        """Load as soon as memory is there (evict first). False if it is there, coming, or could never fit."""
        if model in self.engines[worker] or not self.fleet.fits[model, worker]:
            return False
        if any(m == model for m, _ in self._pending[worker]):
            return False
        self.coming[model] += 1
        self._pending[worker].append((model, self.now))
        self._begin_loads(worker)
        return True

    def evict(self, model: int, worker: int) -> bool:
        """Take no new work, finish what runs, then leave. False if no ready engine is there."""
        engine = self.engines[worker].get(model)
        if engine is None or engine.state != READY:
            return False
        engine.state = DRAINING
        self.holders[model].remove(engine)
        self.evictions += 1
        if engine.n == 0:
            self._leave(engine)
        else:
            self.tell_worker(worker)
        return True

    def pending(self, worker: int) -> list[int]:
        """Models whose load waits for memory."""
        return [model for model, _ in self._pending[worker]]

    def promised(self, worker: int) -> int:
        """Bytes that loads which wait for memory will take."""
        return sum(self.fleet.footprint_bytes[model] for model, _ in self._pending[worker])

    # The loop

    def run(self) -> Result:
        """Play the whole workload; every query ends once."""
        work, events, born = self.work, self._events, self._born
        pop, n = heapq.heappop, len(work)
        self.residency.start(self)
        for worker in range(self.workers):
            self.tell_worker(worker)
        if self.residency.tick_s and n:
            self._push(born[0] + self.residency.tick_s, 2, None)
        i, upcoming = 0, born[0] if n else float("inf")
        progress = 0.0
        while self._open:
            if events and events[0][0] <= upcoming:
                at, _, kind, what = pop(events)
                if kind == 0:
                    if what.wake == at:
                        self.now = progress = at
                        self._step(what, at)
                elif kind == 1:
                    self.now = at
                    self._ready(what, at)
                else:
                    if i == n and at - max(progress, born[-1]) > STALLED_S:
                        raise RuntimeError(self._stuck())
                    self.now = at
                    self.residency.tick(self, at)
                    self.ask_for_unmet()
                    self._push(at + self.residency.tick_s, 2, None)
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
        self._tell_changed()
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
            self.tell_model(model)
            if not self.coming[model]:
                self.residency.need(self, model, now)
        else:
            self._changed.update(holders)

    def _join(self, engine: Engine, i: int, now: float) -> None:
        n = engine.n
        if now > engine.at:
            if n:
                dv = (now - engine.at) / engine.step
                engine.v += dv
                spent = dv * (engine.base_j / n + engine.more_j)
                engine.j += spent
                self._engine_j += spent * n
            engine.at = now
        worker = engine.worker
        engine.n = n = n + 1
        engine.used = now
        if n == 1:
            self._busier(worker, 1, engine)
        share = self._turn(engine) if self._turns else self._share[self._device[worker]]
        engine.at += (engine.prefill if n == 1 and share == 1.0 else engine.beside) * self._tin[i] * share
        if engine.prefill_j:
            self._energy[i] += engine.prefill_j * self._tin[i]
            self._engine_j += engine.prefill_j * self._tin[i]
        engine.step = engine.tpot * (1.0 + engine.slope * (n - 1)) * share
        if self._attempts[i] == 1:
            self._ttft[i] = engine.at + engine.step - self._born[i]
        heapq.heappush(engine.heap, (engine.v + self._tout[i][engine.model], i, engine.j))
        self._wake(engine)
        self._changed.add(engine)
        if self._turns:
            self._retime(worker, engine)

    def _step(self, engine: Engine, now: float) -> None:
        """Sequences end; queued queries take their slots."""
        n, heap = engine.n, engine.heap
        engine.wake = -1.0  # a second event may stand at this very time
        dv = (now - engine.at) / engine.step
        engine.v += dv
        spent = dv * (engine.base_j / n + engine.more_j)
        engine.j += spent
        self._engine_j += spent * n
        engine.at = engine.used = now
        ended: list[int] = []
        cascade = self._cascades
        limit = engine.v + 1e-6
        while heap and heap[0][0] <= limit:
            _, i, j = heapq.heappop(heap)
            self._energy[i] += engine.j - j
            ended.append(i)
        engine.n = n - len(ended)
        if engine.n == 0:
            self._busier(engine.worker, -1, engine)
        model, queue = engine.model, self.queue[engine.model]
        if engine.state == READY:
            joined = False
            while queue and engine.n < engine.slots:
                self._join(engine, queue.popleft(), now)
                joined = True
            if not joined and engine.n:
                share = self._turn(engine) if self._turns else self._share[self._device[engine.worker]]
                engine.step = engine.tpot * (1.0 + engine.slope * (engine.n - 1)) * share
                self._wake(engine)
            self._changed.add(engine)
        elif engine.n == 0:
            self._leave(engine)
        else:
            share = self._turn(engine) if self._turns else self._share[self._device[engine.worker]]
            engine.step = engine.tpot * (1.0 + engine.slope * (engine.n - 1)) * share
            self._wake(engine)
        if self._turns and ended:
            self._retime(engine.worker, engine)
        for i in ended:
            if cascade:
                self._tell_changed()
            further = self.router.after(i, model, self._attempts[i], now, self.scoring)
            if further >= 0:
                self.residency.routed(self, i, further, now)
                self._dispatch(i, further, -1, now)
                continue
            if further < -1:
                self._model[i] = -2 - further
            latency = now - self._born[i] + self.fleet.overhead_s
            self._done[i] = latency
            self._open -= 1
            self.router.observe(i, model, latency, self._energy[i], now)

    def _busier(self, worker: int, change: int, changed: Engine) -> None:
        """An engine begins or stops to work: those beside it on the device become slower or faster."""
        device = self._device[worker]
        self._busy[device] += change
        if not self.fleet.shared:
            return
        share = max(self._busy[device] / self._places[worker], 1.0)
        same = share == self._share[device] and not self._turns
        self._share[device] = share
        for mate in self._mates[worker]:
            for engine in self.engines[mate].values():
                if engine is changed:
                    continue
                if engine.n and not same:
                    self._slow(engine, share)
                if engine.state == READY:
                    self._changed.add(engine)

    def _slow(self, engine: Engine, share: float) -> None:
        """Its steps take `share` times as long as alone from now on."""
        n = engine.n
        if self.now > engine.at:
            dv = (self.now - engine.at) / engine.step
            engine.v += dv
            spent = dv * (engine.base_j / n + engine.more_j)
            engine.j += spent
            self._engine_j += spent * n
            engine.at = self.now
        engine.step = engine.tpot * (1.0 + engine.slope * (n - 1)) * (self._turn(engine) if self._turns else share)
        self._wake(engine)

    def _turn(self, engine: Engine) -> float:
        """By how much an engine with work is slowed down where each waits for a step of every other in turn."""
        own = engine.tpot * (1.0 + engine.slope * (engine.n - 1))
        others, loading = 0.0, 0
        for mate in self._mates[engine.worker]:
            loading += self._loading[mate]
            for other in self.engines[mate].values():
                if other.n and other is not engine:
                    others += other.tpot * (1.0 + other.slope * (other.n - 1))
        slower: float = (own + others) / own / self._places[engine.worker]
        return max(slower, 1.0) + loading

    def _retime(self, worker: int, changed: Engine | None) -> None:
        """An engine's batch has changed, and with it how long the others of its device wait for a turn."""
        for mate in self._mates[worker]:
            for engine in self.engines[mate].values():
                if engine.n and engine is not changed:
                    self._slow(engine, 1.0)

    def _others(self, worker: int, own: int) -> float:
        """By how much an engine with work would be slowed down by others, less 1; `own` is 1 if it is at work now."""
        return max((self._busy[self._device[worker]] - own + 1) / self._places[worker] - 1.0, 0.0)

    def _wake(self, engine: Engine) -> None:
        at = engine.at + max(engine.heap[0][0] - engine.v, 0.0) * engine.step
        engine.wake = at
        self._serial += 1
        heapq.heappush(self._events, (at, self._serial, 0, engine))

    def _push(self, at: float, kind: int, what: Any) -> None:
        self._serial += 1
        heapq.heappush(self._events, (at, self._serial, kind, what))

    # Memory

    def _engine(self, model: int, worker: int) -> Engine:
        self._serial += 1
        unit = self.fleet.unit[model][worker]
        engine = Engine(model, worker, self.fleet.models[model].slots, unit, self.now, self._serial)
        self.engines[worker][model] = engine
        self.free[worker] -= self.fleet.footprint_bytes[model]
        if self.free[worker] < self._low[worker]:
            self._low[worker] = self.free[worker]
        return engine

    def _begin_loads(self, worker: int) -> None:
        """One at a time: loads on a worker share its drive."""
        pending = self._pending[worker]
        if pending and not self._loading[worker]:
            model, _ = pending[0]
            if self.fleet.footprint_bytes[model] > self.free[worker] or model in self.engines[worker]:
                self.tell_worker(worker)
                return
            pending.pop(0)
            self._loading[worker] = True
            if self._turns:
                self._retime(worker, None)
            engine = self._engine(model, worker)
            unit = self.fleet.unit[model][worker]
            engine.ready_at = self.now + unit.load_s
            self.loads += 1
            self.load_j += unit.load_j
            self._push(engine.ready_at, 1, engine)
        self.tell_worker(worker)

    def _ready(self, engine: Engine, now: float) -> None:
        engine.state, engine.since, engine.used, engine.at = READY, now, now, now
        self._loading[engine.worker] = False
        if self._turns:
            self._retime(engine.worker, None)
        model = engine.model
        self.coming[model] -= 1
        self.holders[model].append(engine)
        self.waiting_since[model] = -1.0
        queue = self.queue[model]
        while queue and engine.n < engine.slots:
            self._join(engine, queue.popleft(), now)
        self.tell_model(model)
        self._begin_loads(engine.worker)
        self.ask_for_unmet()

    def _leave(self, engine: Engine) -> None:
        del self.engines[engine.worker][engine.model]
        self.free[engine.worker] += self.fleet.footprint_bytes[engine.model]
        if self.queue[engine.model] and not self.holders[engine.model] and self.waiting_since[engine.model] < 0:
            self.waiting_since[engine.model] = self.now
        self._begin_loads(engine.worker)
        self.ask_for_unmet()

    def ask_for_unmet(self) -> None:
        """Tell the residency policy again of models that queries wait for."""
        for model in range(self.models):
            if self.queue[model] and not self.holders[model] and not self.coming[model]:
                self.residency.need(self, model, self.now)

    # What scoring is told

    def _tell_changed(self) -> None:
        for engine in self._changed:
            if engine.state == READY:
                self._tell(engine)
        self._changed.clear()

    def _tell(self, engine: Engine) -> None:
        """A ready engine's state, after a change."""
        model, worker = engine.model, engine.worker
        queue = self.queue[model]
        self.scoring.set_state(
            model, worker, ready=True, active=engine.n,
            waiting=-(-len(queue) // len(self.holders[model])) if queue else 0,
            busy_engines=self._others(worker, engine.n > 0),
        )  # fmt: skip

    def tell_model(self, model: int) -> None:
        """All workers' states for a model."""
        for worker in range(self.workers):
            self._tell_pair(model, worker)

    def tell_worker(self, worker: int) -> None:
        """All models' states on a worker."""
        for model in range(self.models):
            self._tell_pair(model, worker)

    def _tell_pair(self, model: int, worker: int) -> None:
        if not self.fleet.fits[model, worker]:
            return
        engine = self.engines[worker].get(model)
        if engine is not None and engine.state == READY:
            self._tell(engine)
            return
        pending = any(m == model for m, _ in self._pending[worker])
        ready_at = None
        if engine is not None and engine.state == LOADING:
            ready_at = engine.ready_at
        elif pending:
            ready_at = self.now + self.fleet.planned_with[model][worker].load_s
        swap = None if self._swap is None else self._swap(self, model, worker)
        self.scoring.set_state(
            model, worker, ready=False, active=0, waiting=len(self.queue[model]), ready_at=ready_at,
            busy_engines=self._others(worker, 0), delay_s=swap.delay_s if swap else 0.0,
            burden=swap.burden if swap else 0.0, sharing=swap.sharing if swap else 1.0,
        )  # fmt: skip

    def _result(self) -> Result:
        n = len(self.work)
        model = np.array(self._model, np.int64)
        energy = np.array(self._energy)
        score = self.work.score[np.arange(n), model] if n else np.zeros(0)
        budgets = self.fleet.budget_bytes
        return Result(
            model=model, latency_s=np.array(self._done), ttft_s=np.array(self._ttft), energy_j=energy,
            attempts=np.array(self._attempts), hit=np.array(self._hit, bool), score=np.nan_to_num(score),
            arrival_s=self.work.arrival_s, row=self.work.row, loads=self.loads, evictions=self.evictions,
            load_j=self.load_j, engine_j=self._engine_j,
            peak_bytes=[b - low for b, low in zip(budgets, self._low, strict=True)], events=self._count,
            decision_s=self._samples,
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
