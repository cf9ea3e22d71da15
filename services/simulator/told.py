"""What scoring is told of the simulated fleet: only entries that have changed, and ready engines not before the next
decision."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from services.planner.decide.charges import Swap
from services.planner.decide.scoring import Fleet
from services.simulator.decoding import LOADING, READY, Engine
from services.simulator.devices import Devices
from services.simulator.fleet import SimFleet
from services.simulator.memory import Memory

NOTHING = Swap(0.0, 0.0, 1.0)


class Told:
    """Keeps `scoring` in step."""

    def __init__(
        self,
        fleet: SimFleet,
        scoring: Fleet,
        memory: Memory,
        devices: Devices,
        queue: list[deque[int]],
        swap: Callable[[int, int], Swap | None] | None,
    ) -> None:
        """`queue` [m]; `swap`: (model, worker) -> what a load there would mean to others."""
        self._fleet, self.scoring, self._memory, self._devices = fleet, scoring, memory, devices
        self._queue, self._swap = queue, swap

    def changed(self) -> None:
        """Engines that have changed since the last decision."""
        changed = self._devices.changed
        for engine in changed:
            if engine.state == READY:
                self._ready(engine)
        changed.clear()

    def model(self, model: int, now: float) -> None:
        """All workers' states for a model."""
        for worker in range(len(self._fleet.workers)):
            self._pair(model, worker, now)

    def worker(self, worker: int, now: float) -> None:
        """All models' states on a worker."""
        for model in range(len(self._fleet.models)):
            self._pair(model, worker, now)

    def _ready(self, engine: Engine) -> None:
        model, worker = engine.model, engine.worker
        queue = self._queue[model]
        self.scoring.set_state(
            model, worker, ready=True, active=engine.n,
            waiting=-(-len(queue) // len(self._memory.holders[model])) if queue else 0,
            busy_engines=self._devices.others(worker, engine.n > 0),
        )  # fmt: skip

    def _pair(self, model: int, worker: int, now: float) -> None:
        if not self._fleet.fits[model, worker]:
            return
        engine = self._memory.engines[worker].get(model)
        if engine is not None and engine.state == READY:
            self._ready(engine)
            return
        ready_at = None
        if engine is not None and engine.state == LOADING:
            ready_at = engine.ready_at
        elif model in self._memory.pending[worker]:
            ready_at = now + float(self.scoring.costs.load_s[model, worker])
        swap = (self._swap(model, worker) if self._swap else None) or NOTHING
        self.scoring.set_state(
            model, worker, ready=False, active=0, waiting=len(self._queue[model]), ready_at=ready_at,
            busy_engines=self._devices.others(worker, 0), delay_s=swap.delay_s, burden=swap.burden,
            sharing=swap.sharing,
        )  # fmt: skip
