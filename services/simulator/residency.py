"""Residency policies to compare: fixed, and three that load on demand and evict by rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.simulator.engine import READY, Engine, Simulation, warm_start


class Fixed:
    """What fits from the start, in the given order of preference, stays. With it all must fit."""

    tick_s = 0.0

    def __init__(self, order: Sequence[int] | None = None) -> None:
        self._order = order

    def start(self, sim: Simulation) -> None:
        warm_start(sim, range(sim.models) if self._order is None else self._order)

    def routed(self, sim: Simulation, i: int, model: int, now: float) -> None: ...

    def need(self, sim: Simulation, model: int, now: float) -> None:
        raise RuntimeError(f"{sim.fleet.names[model]} is not resident, and fixed residency loads nothing")

    def tick(self, sim: Simulation, now: float) -> None: ...


class OnDemand:
    """Loads what a query waits for at once, and evicts the ready model with the lowest rank until it fits."""

    tick_s = 0.0

    def __init__(self, order: Sequence[int] | None = None, most: int = 0) -> None:
        """`order`: preference for the memory at the start. `most`: models per worker at most; 0 is by memory alone."""
        self._order = order
        self._most = most

    def start(self, sim: Simulation) -> None:
        warm_start(sim, range(sim.models) if self._order is None else self._order)

    def routed(self, sim: Simulation, i: int, model: int, now: float) -> None:
        for engine in sim.holders[model]:
            self.used(sim, engine, now)

    def need(self, sim: Simulation, model: int, now: float) -> None:
        size = sim.fleet.footprint_bytes[model]
        best: tuple[float, int, list[Engine]] | None = None
        for worker in range(sim.workers):
            if not sim.fleet.fits[model, worker] or sim.engines[worker].get(model) is not None:
                continue
            ready = sorted(
                (e for e in sim.engines[worker].values() if e.state == READY),
                key=lambda e: (self.rank(sim, e, now), e.serial),
            )
            leaving = sum(
                sim.fleet.footprint_bytes[e.model] for e in sim.engines[worker].values() if e.state not in (READY, 0)
            )
            room, victims = sim.free[worker] + leaving - sim.promised(worker), list[Engine]()
            held = len(ready)
            while ready and (room < size or (self._most and held >= self._most)):
                victims.append(ready.pop(0))
                room += sim.fleet.footprint_bytes[victims[-1].model]
                held -= 1
            if room >= size:
                price = max((self.rank(sim, v, now) for v in victims), default=float("-inf"))
                if best is None or price < best[0]:
                    best = (price, worker, victims)
        if best is None:
            return  # all that could leave is loading or draining; asked again when that has ended
        _, worker, victims = best
        for victim in victims:
            self.evicted(sim, victim, now)
            sim.evict(victim.model, worker)
        sim.load(model, worker)

    def tick(self, sim: Simulation, now: float) -> None: ...

    def used(self, sim: Simulation, engine: Engine, now: float) -> None:
        """A query goes to a resident model."""

    def evicted(self, sim: Simulation, engine: Engine, now: float) -> None:
        """It leaves."""

    def rank(self, sim: Simulation, engine: Engine, now: float) -> float:
        raise NotImplementedError


class Lru(OnDemand):
    """Least recently used leaves first."""

    def rank(self, sim: Simulation, engine: Engine, now: float) -> float:
        return engine.used


class Lfu(OnDemand):
    """Least frequently used since it was loaded leaves first."""

    def __init__(self, order: Sequence[int] | None = None, most: int = 0) -> None:
        super().__init__(order, most)
        self._count: dict[int, int] = {}

    def used(self, sim: Simulation, engine: Engine, now: float) -> None:
        self._count[engine.serial] = self._count.get(engine.serial, 0) + 1

    def rank(self, sim: Simulation, engine: Engine, now: float) -> float:
        return float(self._count.get(engine.serial, 0))


class GreedyDualSizeFrequency(OnDemand):
    """Lowest L + frequency x load time / bytes leaves first; L rises to that value (Cherkasova, HPL-98-69R1, 1998)."""

    def __init__(self, order: Sequence[int] | None = None, most: int = 0) -> None:
        super().__init__(order, most)
        self._floor = 0.0
        self._count: dict[int, int] = {}
        self._value: dict[int, float] = {}

    def used(self, sim: Simulation, engine: Engine, now: float) -> None:
        self._count[engine.serial] = count = self._count.get(engine.serial, 0) + 1
        load_s = sim.fleet.unit[engine.model][engine.worker].load_s
        self._value[engine.serial] = self._floor + count * load_s / (sim.fleet.footprint_bytes[engine.model] / 1e9)

    def evicted(self, sim: Simulation, engine: Engine, now: float) -> None:
        self._floor = max(self._floor, self.rank(sim, engine, now))

    def rank(self, sim: Simulation, engine: Engine, now: float) -> float:
        if engine.serial not in self._value:  # the query that had it loaded counts
            self.used(sim, engine, now)
        return self._value[engine.serial]


ON_DEMAND: dict[str, Callable[[Sequence[int] | None, int], OnDemand]] = {
    "lru": Lru,
    "lfu": Lfu,
    "gdsf": GreedyDualSizeFrequency,
}
