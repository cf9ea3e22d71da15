"""What each worker holds and will hold, and where an artifact goes at the least cost: step 4 of `residency`. Pure.

Value per byte: with a forecast, what routing would lose without the artifact (`outlook`). Without one, after
GreedyDual-Size (Cao and Irani, 1997) with a decayed demand rate in place of a count: what keeping an artifact saves
is demand rate x load time, and what it costs is memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.planner.decide.demand import Demand, decayed_rate
from services.planner.decide.outlook import Array, worth
from shared import messages as m


@dataclass(frozen=True)
class Pending:
    """A command that was issued and has not shown its effect yet."""

    kind: str
    """`load` or `evict`."""
    worker: str
    artifact: str
    footprint_bytes: int = 0


@dataclass(frozen=True)
class Action:
    """One load or evict, with the reason code that is logged, stored and shown."""

    kind: str
    worker: str
    artifact: str
    reason: str
    after: tuple[str, ...] = ()
    """Artifacts whose eviction from the same worker must come first: this pass ordered it, or an earlier one."""


@dataclass(frozen=True)
class Forecast:
    """What routing would gain from each artifact: `outlook.Outlook.rows`, and what a load costs in the same unit."""

    artifacts: Mapping[str, int]
    """Column of each artifact."""
    utilities: Array
    """[queries, artifacts], were each resident and free."""
    rates: Array
    """[queries], per second."""
    load_cost: Mapping[str, float] = field(default_factory=dict)
    """Utility that loading an artifact costs by itself (its energy)."""
    trusted_s: float = 120.0
    """For how long the mix is expected to stay as it is."""
    noise_z: float = 0.0
    """Standard errors of the forecast by which an exchange must gain besides. The price of a load damps enough: 0.5
    made no difference to latency in `bench.residency`, and cost up to 0.2 points of accuracy."""
    prefetch: bool = True
    patience: float = 0.0
    """Those who wait for a load wait together for at least this share of what it will make others wait."""
    second_cost: float = 0.0
    """Utility that a second of waiting costs; if not 0, what a load costs others is counted in utility lost, else in
    seconds waited."""


@dataclass
class Room:
    """A worker as this pass sees it: what it holds, and what it will hold once commands under way have ended."""

    state: m.WorkerState
    free: int
    vacant: int
    """Bytes that are free already: what fits into them need not wait for evictions."""
    holds: set[str]
    leaving: set[str] = field(default_factory=set)
    coming: int = 0
    """Bytes that evictions under way will free, and that no load has been given yet."""
    untouched: bool = True

    def quiet(self) -> bool:
        """Nothing is loading or leaving, and this pass has changed nothing."""
        return self.untouched and not self.leaving and all(e.state == "ready" for e in self.state.engines)


def room_of(worker: m.WorkerState, pending: Sequence[Pending]) -> Room:
    """A worker once the commands under way have taken effect."""
    holds = {e.artifact for e in worker.engines if e.state in ("ready", "loading")}
    leaving = {e.artifact for e in worker.engines if e.state == "draining"}
    free = worker.budget_bytes - worker.used_bytes
    present = {e.artifact for e in worker.engines}
    for command in pending:
        if command.worker != worker.worker:
            continue
        if command.kind == "load" and command.artifact not in present:
            holds.add(command.artifact)
            free -= command.footprint_bytes
        elif command.kind == "evict":
            holds.discard(command.artifact)
            leaving.add(command.artifact)
    coming = sum(e.footprint_bytes for e in worker.engines if e.artifact in leaving)
    return Room(worker, free, max(free, 0), holds, leaving, coming)


def losses_of(rooms: Sequence[Room], forecast: Forecast | None) -> dict[str, float]:
    """Utility per second that routing would lose without each artifact that one worker alone holds."""
    if forecast is None:
        return {}
    holders: dict[str, int] = {}
    for room in rooms:
        for artifact in room.holds:
            holders[artifact] = holders.get(artifact, 0) + 1
    columns = {a: forecast.artifacts[a] for a in holders if a in forecast.artifacts}
    _, loss = worth(forecast.utilities, forecast.rates, set(columns.values()))
    return {a: float(loss[c]) if holders[a] == 1 else 0.0 for a, c in columns.items()}


def value_of(
    engine: m.EngineState,
    demand: Mapping[str, Demand],
    load_s: Mapping[str, float],
    now: float,
    losses: Mapping[str, float],
) -> float:
    """Seconds of loading saved per second and gigabyte, with recency to tell unused engines apart; with a forecast,
    utility saved per second and gigabyte."""
    recency = 1e-6 / (1.0 + max(now - max(engine.last_used_at, engine.loaded_at), 0.0))
    gigabytes = max(engine.footprint_bytes, 1) / 1e9
    if engine.artifact in losses:
        return (losses[engine.artifact] + recency) / gigabytes
    rate = decayed_rate(demand.get(engine.artifact, Demand()), now)
    return (rate + recency) * max(load_s.get(engine.artifact, 1.0), 0.1) / gigabytes


@dataclass
class Pass:
    """What one pass knows; `place` and `carry_out` change its rooms as they add actions."""

    rooms: list[Room]
    specs: Mapping[str, m.ArtifactSpec]
    pinned: frozenset[str]
    demand: Mapping[str, Demand]
    values: Mapping[str, float]
    held_back: frozenset[tuple[str, str]]
    policy: m.Policy
    now: float
    load_s: Mapping[str, float]
    forecast: Forecast | None
    losses: Mapping[str, float]

    def place(self, artifact: str, reason: str, actions: list[Action], only: Room | None = None) -> dict[str, str]:
        """4: put the artifact on the worker where that costs least; what stands in the way, if it cannot be."""
        spec = self.specs[artifact]
        choices: list[tuple[float, int, str, Room, tuple[m.EngineState, ...]]] = []
        rooms = [
            room
            for room in ([only] if only else self.rooms)
            if artifact not in room.holds and (room.state.worker, artifact) not in self.held_back
        ]
        # Free memory costs nothing, so nothing beats it: with some, no victims need be compared.
        for room in [r for r in rooms if r.free >= spec.footprint_bytes] or rooms:
            victims = self._victims(room, spec.footprint_bytes, artifact, reason)
            if victims is not None:
                price = sum(self.values[f"{room.state.worker}/{v.artifact}"] * v.footprint_bytes for v in victims)
                choices.append((price, len(victims), room.state.worker, room, victims))
        if not choices:
            return {artifact: self._obstacle(spec)}
        _, _, _, room, victims = min(choices, key=lambda c: (c[0], c[1], -c[3].free, c[2]))
        self.carry_out(room, artifact, reason, victims, actions)
        return {}

    def carry_out(
        self, room: Room, artifact: str, reason: str, victims: Sequence[m.EngineState], actions: list[Action]
    ) -> None:
        """Note the actions, and the room as it will be."""
        for victim in victims:
            actions.append(Action("evict", room.state.worker, victim.artifact, f"make_room_for:{artifact}"))
            room.free += victim.footprint_bytes
            room.holds.discard(victim.artifact)
            room.leaving.add(victim.artifact)
        size = self.specs[artifact].footprint_bytes
        after = () if size <= room.vacant else tuple(sorted(room.leaving))
        actions.append(Action("load", room.state.worker, artifact, reason, after))
        room.free -= size
        room.vacant = max(room.vacant - size, 0)
        if room.free < 0:  # the rest comes from evictions under way, which the load waits for
            room.coming += room.free
            room.free = 0
        room.holds.add(artifact)
        room.untouched = False

    def _victims(self, room: Room, needed: int, artifact: str, reason: str) -> tuple[m.EngineState, ...] | None:
        """The cheapest set of engines to evict so that `needed` bytes are free; None when there is none."""
        # What is already on its way out will free its memory: the load names it in `after` and waits for it.
        missing = needed - room.free
        if missing <= 0:
            return ()
        if room.coming >= missing:
            return None if reason in ("replica", "warm_start") else ()
        if reason == "warm_start":
            return None
        since = self.demand.get(artifact, Demand()).waiting_since
        starved = reason == "demand" and since is not None and self.now - since > self.policy.max_wait_s
        if self.forecast is not None and reason == "demand":
            # Rent or buy: each victim may leave once those who wait have waited as long as its absence costs others.
            rented = self.demand[artifact].waiting * (self.now - since) / 2.0 if since is not None else 0.0
            patience = self.forecast.patience
            allowed = [
                e
                for e in room.state.engines
                if self.may_go(e, room, starved=True)
                and (starved or rented >= patience * self._absence_cost(e, artifact))
            ]
        else:
            allowed = [e for e in room.state.engines if self.may_go(e, room, starved)]
        best: tuple[float, tuple[m.EngineState, ...]] | None = None
        for size in range(1, min(len(allowed), 4) + 1):
            for chosen in itertools.combinations(allowed, size):
                if sum(e.footprint_bytes for e in chosen) + room.coming < missing:
                    continue
                price = sum(self.values[f"{room.state.worker}/{e.artifact}"] * e.footprint_bytes for e in chosen)
                if best is None or price < best[0]:
                    best = (price, chosen)
            if best is not None:
                break
        return best[1] if best else None

    def _absence_cost(self, engine: m.EngineState, artifact: str) -> float:
        """Seconds that queries for the engine's artifact will wait, all together, while `artifact` takes its place."""
        holders = sum(engine.artifact in room.holds for room in self.rooms)
        if holders > 1:
            return 0.0
        absent = self.load_s.get(artifact, 1.0) + self.load_s.get(engine.artifact, 1.0) + self.policy.min_residence_s
        if self.forecast is not None and self.forecast.second_cost:
            return self.losses.get(engine.artifact, 0.0) * absent / self.forecast.second_cost
        rate = decayed_rate(self.demand.get(engine.artifact, Demand()), self.now)
        return rate * absent * absent / 2.0

    def may_go(self, engine: m.EngineState, room: Room, starved: bool) -> bool:
        if engine.state != "ready" or engine.artifact in room.leaving or engine.artifact in self.pinned:
            return False
        demand = self.demand.get(engine.artifact, Demand())
        wanted = decayed_rate(demand, self.now) > 0.0 or engine.last_used_at > engine.loaded_at
        if wanted and self.now - engine.loaded_at < self.policy.min_residence_s:
            return False
        busy = engine.active > 0 or demand.waiting > 0
        return starved or not busy

    def _obstacle(self, spec: m.ArtifactSpec) -> str:
        if not any(room.state.budget_bytes >= spec.footprint_bytes for room in self.rooms):
            return "no worker has this much memory"
        if all(spec.name in room.state.lacks for room in self.rooms):
            return "no worker has it in its model store: run `calm models pull` where workers run"
        if any((room.state.worker, spec.name) in self.held_back for room in self.rooms):
            return "its last load failed; waiting before the next attempt"
        return "all that could leave is busy, pinned or newly loaded"

    def cheapest(self, room: Room, needed: int) -> tuple[m.EngineState, ...] | None:
        """What routing would miss least, until `needed` bytes are free; all drain first, so work does not protect."""
        missing = needed - room.free
        chosen: list[m.EngineState] = []
        if missing > 0:
            allowed = [e for e in room.state.engines if self.may_go(e, room, starved=True)]
            for engine in sorted(
                allowed, key=lambda e: (self.losses.get(e.artifact, 0.0) / e.footprint_bytes, e.artifact)
            ):
                chosen.append(engine)
                missing -= engine.footprint_bytes
                if missing <= 0:
                    break
        return tuple(chosen) if missing <= 0 else None
