"""How engines on one device slow each other down."""

from __future__ import annotations

from services.simulator.decoding import LOADED, READY, Agenda, Engine
from services.simulator.fleet import SimFleet


class Devices:
    """Who is at work on each device."""

    def __init__(self, fleet: SimFleet, engines: list[dict[int, Engine]], agenda: Agenda) -> None:
        self._engines, self._agenda = engines, agenda
        workers = len(fleet.workers)
        device = fleet.device or tuple(range(workers))
        self._device = device
        together: list[list[int]] = [[] for _ in range(max(device) + 1 if device else 0)]
        for worker, number in enumerate(device):
            together[number].append(worker)
        self._mates = [together[number] for number in device]
        """[w] workers on the same device."""
        self._shared = fleet.shared
        self.turns = fleet.turns and fleet.shared
        self._places = fleet.places or (1.0,) * workers
        self._busy = [0] * len(together)
        """[device] engines at work."""
        self._share = [1.0] * len(self._busy)
        """[device] by how much its engines slow each other down."""
        self.loading: list[list[Engine]] = [[] for _ in range(workers)]
        """[w] what is being loaded."""
        self._turn_cost, self._load_beside = fleet.turn_cost, fleet.load_beside
        self.changed: set[Engine] = set()
        """Engines whose state scoring has not been told since the last decision."""

    def slower(self, engine: Engine) -> float:
        """By how much an engine with work is slowed down now."""
        return self._turn(engine) if self.turns else self._share[self._device[engine.worker]]

    def others(self, worker: int, own: int) -> float:
        """By how much an engine with work would be slowed down by others, less 1; `own` is 1 if it is at work now."""
        return max((self._busy[self._device[worker]] - own + 1) / self._places[worker] - 1.0, 0.0)

    def busier(self, worker: int, change: int, changed: Engine, now: float) -> None:
        """An engine begins or stops to work: those beside it on the device become slower or faster."""
        device = self._device[worker]
        self._busy[device] += change
        if not self._shared:
            return
        share = max(self._busy[device] / self._places[worker], 1.0)
        same = share == self._share[device] and not self.turns
        self._share[device] = share
        for mate in self._mates[worker]:
            for engine in self._engines[mate].values():
                if engine is changed:
                    continue
                if engine.n and not same:
                    self._pace(engine, now)
                if engine.state == READY:
                    self.changed.add(engine)
        if self.turns:
            for mate in self._mates[worker]:
                for loaded in self.loading[mate]:
                    self._pace_load(loaded, now)

    def begin_load(self, engine: Engine, now: float) -> None:
        """A load is under way from now on; it ends at `Engine.ready_at`."""
        self.loading[engine.worker].append(engine)
        engine.at, engine.step = now, 1.0
        self._pace_load(engine, now)

    def _pace_load(self, engine: Engine, now: float) -> None:
        """What is left of a load takes as long as those at work on the device now let it."""
        engine.left = max(engine.left - (now - engine.at) / engine.step, 0.0)
        engine.at = now
        busy = self._busy[self._device[engine.worker]] / self._places[engine.worker] if self.turns else 0.0
        engine.step = 1.0 + self._load_beside * busy
        engine.ready_at = now + engine.left * engine.step
        self._agenda.push(engine.ready_at, LOADED, engine)

    def retime(self, worker: int, changed: Engine | None, now: float) -> None:
        """An engine's batch has changed, or a load has begun or ended, and with it how long the others of its device
        wait for a turn."""
        for mate in self._mates[worker]:
            for engine in self._engines[mate].values():
                if engine.n and engine is not changed:
                    self._pace(engine, now)

    def _pace(self, engine: Engine, now: float) -> None:
        """Its steps take another time from now on."""
        engine.advance(now)
        engine.step = engine.own_step() * self.slower(engine)
        self._agenda.wake(engine)

    def _turn(self, engine: Engine) -> float:
        """By how much an engine with work is slowed down where each waits for a step of every other in turn."""
        own = engine.own_step()
        others, loading = 0.0, 0
        for mate in self._mates[engine.worker]:
            loading += bool(self.loading[mate])
            for other in self._engines[mate].values():
                if other.n and other is not engine:
                    others += other.own_step()
        slower: float = (own + others) / own / self._places[engine.worker]
        if others:
            slower *= self._turn_cost
        return max(slower, 1.0) + loading
