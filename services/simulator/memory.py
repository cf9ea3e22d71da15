"""What is in the memory of each worker, what is coming and what is leaving."""

from __future__ import annotations

from services.simulator.decoding import DRAINING, READY, Agenda, Engine
from services.simulator.devices import Devices
from services.simulator.fleet import SimFleet


class Memory:
    """Engines by worker and by model. It never exceeds a worker's budget: a load waits until its bytes are free."""

    def __init__(self, fleet: SimFleet, engines: list[dict[int, Engine]], devices: Devices, agenda: Agenda) -> None:
        self._fleet, self._devices, self._agenda = fleet, devices, agenda
        self.engines = engines
        """[w] by model, in whatever state."""
        self.free = list(fleet.budget_bytes)
        self._low = list(self.free)
        self.holders: list[list[Engine]] = [[] for _ in fleet.models]
        """[m] ready engines that take work."""
        self.coming = [0] * len(fleet.models)
        """[m] loads under way or waiting for memory."""
        self.pending: list[list[int]] = [[] for _ in fleet.workers]
        """[w] models whose load waits for memory, or for the load before it."""
        self.loads = self.evictions = 0
        self.load_j = 0.0
        self._gone_j = 0.0

    def place(self, model: int, worker: int, now: float) -> bool:
        """Put a model into memory at no cost. False if it does not fit, or is there."""
        if model in self.engines[worker] or not self._fleet.fits[model, worker]:
            return False
        if self._fleet.footprint_bytes[model] > self.free[worker]:
            return False
        engine = self._engine(model, worker, now)
        engine.state, engine.since = READY, float("-inf")  # it has been there: no minimum residence protects it
        self.holders[model].append(engine)
        return True

    def order(self, model: int, worker: int) -> bool:
        """Have a load wait for `begin`. False if it is there, coming, or could never fit."""
        if model in self.engines[worker] or not self._fleet.fits[model, worker] or model in self.pending[worker]:
            return False
        self.coming[model] += 1
        self.pending[worker].append(model)
        return True

    def begin(self, worker: int, now: float) -> None:
        """Begin the first load that waits, if its memory is free: one at a time, for loads on a worker share its
        drive; all that there is memory for where engines take turns at a host's cores, for those read from memory."""
        pending, devices = self.pending[worker], self._devices
        while pending and (devices.turns or not devices.loading[worker]):
            model = pending[0]
            if self._fleet.footprint_bytes[model] > self.free[worker] or model in self.engines[worker]:
                return
            pending.pop(0)
            engine = self._engine(model, worker, now)
            devices.begin_load(engine, now)
            if devices.turns:
                devices.retime(worker, None, now)
            self.loads += 1
            self.load_j += self._fleet.unit[model][worker].load_j

    def loaded(self, engine: Engine, now: float) -> None:
        """A load has ended."""
        engine.state, engine.since, engine.used, engine.at = READY, now, now, now
        self._devices.loading[engine.worker].remove(engine)
        if self._devices.turns:
            self._devices.retime(engine.worker, None, now)
        self.coming[engine.model] -= 1
        self.holders[engine.model].append(engine)

    def drain(self, model: int, worker: int) -> Engine | None:
        """It takes no new work from now on. None if no ready engine is there."""
        engine = self.engines[worker].get(model)
        if engine is None or engine.state != READY:
            return None
        engine.state = DRAINING
        self.holders[model].remove(engine)
        self.evictions += 1
        return engine

    def leave(self, engine: Engine) -> None:
        """A drained engine's memory is free."""
        del self.engines[engine.worker][engine.model]
        self.free[engine.worker] += self._fleet.footprint_bytes[engine.model]
        self._gone_j += engine.spent_j

    def promised(self, worker: int) -> int:
        """Bytes that loads which wait for memory will take."""
        return sum(self._fleet.footprint_bytes[model] for model in self.pending[worker])

    def peak_bytes(self) -> list[int]:
        """[w] most that was in use."""
        return [budget - low for budget, low in zip(self._fleet.budget_bytes, self._low, strict=True)]

    def spent_j(self) -> float:
        """Joules of all engines that ever were, loads apart."""
        return self._gone_j + sum(engine.spent_j for held in self.engines for engine in held.values())

    def _engine(self, model: int, worker: int, now: float) -> Engine:
        self._agenda.serial += 1
        unit = self._fleet.unit[model][worker]
        engine = Engine(model, worker, self._fleet.models[model].slots, unit, now, self._agenda.serial)
        self.engines[worker][model] = engine
        self.free[worker] -= self._fleet.footprint_bytes[model]
        self._low[worker] = min(self._low[worker], self.free[worker])
        return engine
