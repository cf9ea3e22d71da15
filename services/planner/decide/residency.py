"""Which artifacts each worker holds: ahead of demand where a forecast is given, and never thrashing. Pure.

One pass, in order (the numbers stand in the code too):

1. An artifact with waiting queries, held or being loaded nowhere, is needed; so is a pinned one. The longest
   wait comes first.
2. An artifact whose holders have fewer slots than queries waiting and running gets a replica; with a forecast, so does
   one whose arrivals bring more work than `FULL` of what its holders can do, before queries have to wait.
3. A new worker that holds nothing takes the artifact most likely to be asked for (warm start).
4. A needed artifact goes to the worker where it costs least: free memory first, else the set of victims with the
   smallest value. A victim is ready, not pinned, past its minimum residence (unless nobody has asked for it yet), and
   has no queries of its own, unless the need has waited longer than `max_wait_s`: then work in hand no longer
   protects it.
   A replica or a warm start evicts only what has been without work; a warm start evicts nothing.
   With a forecast, queries that wait are grouped: work in hand, or worth to come, protects a victim until those
   who wait have waited, together, for as long as its absence will make others wait (rent or buy: at most twice
   the least possible wait), and for `max_wait_s` at most.
5. An artifact unused for `idle_evict_s` and not pinned leaves.
6. With a forecast: the exchange that gains most is made (prefetch), if within the time for which the forecast is
   trusted it earns more than the load costs (hysteresis), and if no replica leaves that 2 would bring back.

Value per byte: with a forecast, what routing would lose without the artifact (`outlook`). Without one, after
GreedyDual-Size (Cao and Irani, 1997) with a decayed demand rate in place of a count: what keeping an artifact saves
is demand rate x load time, and what it costs is memory.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from services.planner.decide.outlook import Array, exchange, wished, worth
from shared import messages as m

RATE_HALF_LIFE_S = 120.0
CANDIDATES = 4
"""Artifacts, and workers for each, that an exchange is worked out for in full."""
FULL = 0.8
"""Work that one engine is planned for, as a share of its time: beyond it queues grow faster than batches gain."""
WARM_START_S = 30.0
"""A worker older than this is empty for a reason (idle eviction), and stays so until there is demand."""


@dataclass(frozen=True)
class Demand:
    """Queries for one artifact."""

    waiting: int = 0
    """Dispatched and not yet done: waiting or running."""
    waiting_since: float | None = None
    """Unix time since which some query has been waiting without an engine."""
    rate: float = 0.0
    """Arrivals per second, exponentially decayed."""
    rate_at: float = 0.0
    work: float = 0.0
    """Engine-seconds a second that arrivals bring, decayed like `rate`; 1 keeps one engine busy with full batches."""


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


@dataclass(frozen=True)
class Plan:
    actions: tuple[Action, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    """Value of each resident artifact by `worker/artifact`, in seconds of load saved per second and gigabyte."""
    blocked: Mapping[str, str] = field(default_factory=dict)
    """Needed artifacts that cannot be loaded now, with the reason."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """With a forecast: utility per second that routing would lose without each resident artifact."""


@dataclass
class _Room:
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


def arrived(demand: Demand, now: float, count: int = 1, work_s: float = 0.0) -> Demand:
    """The demand after `count` further arrivals of `work_s` each (`work_of`): rate and work decay with a half-life of
    `RATE_HALF_LIFE_S`."""
    kept = decayed_rate(demand, now)
    weight = math.log(2.0) / RATE_HALF_LIFE_S
    return Demand(
        waiting=demand.waiting + count,
        waiting_since=demand.waiting_since,
        rate=kept + count * weight,
        rate_at=now,
        work=decayed_work(demand, now) + count * work_s * weight,
    )


def work_of(*, prefill_s: float, tokens_out: float, tpot_s: float, slope: float, slots: int) -> float:
    """Seconds of an engine that runs full batches which one query takes: reading holds all up, and of a step there is
    a share for each slot."""
    return prefill_s + tokens_out * tpot_s * (1.0 + slope * (slots - 1)) / slots


def decayed_work(demand: Demand, now: float) -> float:
    """Engine-seconds a second as of now."""
    return demand.work * math.exp2(-max(now - demand.rate_at, 0.0) / RATE_HALF_LIFE_S)


def decayed_rate(demand: Demand, now: float) -> float:
    """Arrivals per second as of now."""
    return demand.rate * math.exp2(-max(now - demand.rate_at, 0.0) / RATE_HALF_LIFE_S)


def plan(
    *,
    workers: Sequence[m.WorkerState],
    specs: Mapping[str, m.ArtifactSpec],
    pinned: frozenset[str],
    popularity: Mapping[str, float],
    demand: Mapping[str, Demand],
    load_s: Mapping[str, float],
    pending: Sequence[Pending],
    held_back: frozenset[tuple[str, str]],
    policy: m.Policy,
    now: float,
    forecast: Forecast | None = None,
) -> Plan:
    """One pass over the fleet.

    `popularity`: how likely each artifact is to be asked for, for the warm start. `load_s`: seconds to load each.
    `held_back`: (worker, artifact) whose last load failed and must not be tried again yet.
    """
    rooms = [_room(worker, pending) for worker in workers if not worker.draining]
    losses = _losses(rooms, forecast)
    values = {
        f"{room.state.worker}/{engine.artifact}": _value(engine, demand, load_s, now, losses)
        for room in rooms
        for engine in room.state.engines
    }
    actions: list[Action] = []
    blocked: dict[str, str] = {}
    context = _Pass(rooms, specs, pinned, demand, values, held_back, policy, now, load_s, forecast, losses)
    for artifact, reason in _needs(context):  # 1
        blocked.update(context.place(artifact, reason, actions))
    for artifact in _short_of_slots(context):  # 2
        context.place(artifact, "replica", actions)
    for room in rooms:  # 3
        started = now - room.state.started_at < WARM_START_S
        if started and not room.holds and not room.leaving and room.untouched:
            for artifact in _warm(context, popularity):
                if not context.place(artifact, "warm_start", actions, only=room):
                    break
    actions += _idle(context)  # 5
    if forecast is not None and forecast.prefetch:
        _exchange(context, forecast, actions)  # 6
    return Plan(tuple(actions), values, blocked, losses)


def _room(worker: m.WorkerState, pending: Sequence[Pending]) -> _Room:
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
    return _Room(worker, free, max(free, 0), holds, leaving, coming)


@dataclass
class _Pass:
    rooms: list[_Room]
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

    def place(self, artifact: str, reason: str, actions: list[Action], only: _Room | None = None) -> dict[str, str]:
        """4: put the artifact on the worker where that costs least; what stands in the way, if it cannot be."""
        spec = self.specs[artifact]
        choices: list[tuple[float, int, str, _Room, tuple[m.EngineState, ...]]] = []
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
        self, room: _Room, artifact: str, reason: str, victims: Sequence[m.EngineState], actions: list[Action]
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

    def _victims(self, room: _Room, needed: int, artifact: str, reason: str) -> tuple[m.EngineState, ...] | None:
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
                if self._may_go(e, room, starved=True)
                and (starved or rented >= patience * self._absence_cost(e, artifact))
            ]
        else:
            allowed = [e for e in room.state.engines if self._may_go(e, room, starved)]
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

    def _may_go(self, engine: m.EngineState, room: _Room, starved: bool) -> bool:
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
        if any((room.state.worker, spec.name) in self.held_back for room in self.rooms):
            return "its last load failed; waiting before the next attempt"
        return "all that could leave is busy, pinned or newly loaded"


def _needs(context: _Pass) -> list[tuple[str, str]]:
    held = set().union(*(room.holds for room in context.rooms)) if context.rooms else set()
    waiting = [
        (d.waiting_since if d.waiting_since is not None else context.now, artifact)
        for artifact, d in context.demand.items()
        if d.waiting > 0 and artifact in context.specs and artifact not in held
    ]
    pinned = [a for a in sorted(context.pinned) if a not in held and a not in {w[1] for w in waiting}]
    return [(artifact, "demand") for _, artifact in sorted(waiting)] + [(a, "pinned") for a in pinned]


def _short_of_slots(context: _Pass) -> list[str]:
    """Artifacts that need one more engine, those that lack most first."""
    short: list[tuple[float, str]] = []
    for artifact, demand in context.demand.items():
        spec = context.specs.get(artifact)
        holders = [room.state.device for room in context.rooms if artifact in room.holds]
        if spec is None or not holders:
            continue
        lacking = _lacking(context, spec, demand, holders)
        if lacking > 0:
            short.append((-lacking, artifact))
    return [artifact for _, artifact in sorted(short)]


def _lacking(context: _Pass, spec: m.ArtifactSpec, demand: Demand, holders: Sequence[m.Device]) -> float:
    """Slots that an artifact's queries lack when these devices hold it; negative when there are some to spare."""
    lacking = float(demand.waiting - sum(spec.at_once(device) for device in holders))
    if context.forecast is not None:
        lacking = max(lacking, (decayed_work(demand, context.now) / FULL - len(holders)) * spec.slots)
    return lacking


def _spare(context: _Pass, room: _Room, artifact: str) -> bool:
    """Whether the others that hold the artifact are enough without this room, or there are none: what routing loses
    without it tells then."""
    spec, demand = context.specs.get(artifact), context.demand.get(artifact)
    holders = [other.state.device for other in context.rooms if other is not room and artifact in other.holds]
    return spec is None or demand is None or not holders or _lacking(context, spec, demand, holders) <= 0


def _warm(context: _Pass, popularity: Mapping[str, float]) -> list[str]:
    """Artifacts by likelihood of use, those that nobody holds yet first."""
    held = set().union(*(room.holds for room in context.rooms)) if context.rooms else set()
    return sorted(context.specs, key=lambda a: (a in held, -popularity.get(a, 0.0), a))


def _idle(context: _Pass) -> list[Action]:
    if not context.policy.idle_evict_s:
        return []
    return [
        Action("evict", room.state.worker, engine.artifact, "idle")
        for room in context.rooms
        for engine in room.state.engines
        if context._may_go(engine, room, starved=False)
        and engine.artifact in room.holds
        and context.now - max(engine.last_used_at, engine.loaded_at) > context.policy.idle_evict_s
    ]


@dataclass(frozen=True)
class Swap:
    """What routing has to know of an artifact that would have to be loaded: arguments of `scoring.Fleet.set_state`."""

    delay_s: float
    burden: float
    sharing: float


def swap(*, cost: float, rate: float, waiting: int, waited_s: float, forecast: Forecast, max_wait_s: float) -> Swap:
    """How queries for an absent artifact will be grouped, and what each will have to answer for.

    With arrivals at `rate` and a load that costs others `cost` (utility), waiting T before each load costs
    (cost + rate T^2 / 2 x second_cost) / T a second, which is least at T = sqrt(2 cost / (rate second_cost)): the
    square-root law of lot sizes (Harris, 1913). `waited_s`: how long the oldest has waited already.
    """
    if not forecast.second_cost or forecast.patience <= 0.0:
        return Swap(0.0, cost, 1.0)
    patience_s = math.sqrt(2.0 * forecast.patience * cost / (max(rate, 1e-6) * forecast.second_cost))
    patience_s = min(patience_s, max_wait_s)
    return Swap(max(patience_s - waited_s, 0.0), cost, max(1.0 + rate * patience_s, float(waiting)))


def charges(
    *,
    workers: Sequence[m.WorkerState],
    specs: Mapping[str, m.ArtifactSpec],
    pinned: frozenset[str],
    demand: Mapping[str, Demand],
    load_s: Mapping[str, float],
    policy: m.Policy,
    now: float,
    forecast: Forecast,
) -> dict[str, Swap]:
    """What routing has to know of each artifact that is neither resident nor coming: the least that loading it on any
    worker costs others, who miss what makes room until it is back."""
    rooms = [_room(worker, ()) for worker in workers if not worker.draining]
    held = {a for room in rooms for a in room.holds}
    losses = _losses(rooms, forecast)
    # What is protected for its newness now may leave a moment later: it is missed all the same.
    later = msgspec.structs.replace(policy, min_residence_s=0.0)
    context = _Pass(rooms, specs, pinned, demand, {}, frozenset(), later, now, load_s, forecast, losses)
    columns = {forecast.artifacts[a] for a in held if a in forecast.artifacts}
    rates = wished(forecast.utilities, forecast.rates, columns)
    cheap = heapq.nsmallest(
        4 * CANDIDATES, rooms, key=lambda r: (sum(losses.get(a, 0.0) for a in r.holds), r.state.worker)
    )
    found: dict[str, Swap] = {}
    for artifact, spec in specs.items():
        if artifact in held or artifact not in forecast.artifacts:
            continue
        absent = load_s.get(artifact, 1.0) + policy.min_residence_s
        prices = [0.0] * any(room.free >= spec.footprint_bytes for room in rooms) or [
            sum(losses.get(v.artifact, 0.0) * (absent + load_s.get(v.artifact, 1.0)) for v in victims)
            for room in cheap
            if (victims := _cheapest(context, room, spec.footprint_bytes)) is not None
        ]
        if prices:
            wanted = demand.get(artifact, Demand())
            found[artifact] = swap(
                cost=min(prices) + forecast.load_cost.get(artifact, 0.0),
                rate=float(rates[forecast.artifacts[artifact]]), waiting=wanted.waiting,
                waited_s=0.0 if wanted.waiting_since is None else now - wanted.waiting_since,
                forecast=forecast, max_wait_s=policy.max_wait_s,
            )  # fmt: skip
    return found


def _losses(rooms: Sequence[_Room], forecast: Forecast | None) -> dict[str, float]:
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


def _exchange(context: _Pass, forecast: Forecast, actions: list[Action]) -> None:
    """6: one load ahead of demand, on a worker where nothing else is under way."""
    held = {forecast.artifacts[a] for room in context.rooms for a in room.holds if a in forecast.artifacts}
    gain, _ = worth(forecast.utilities, forecast.rates, held)
    names = {column: a for a, column in forecast.artifacts.items() if a in context.specs}
    best: tuple[float, _Room, str, tuple[m.EngineState, ...]] | None = None
    for column in sorted(names, key=lambda c: -gain[c])[:CANDIDATES]:
        artifact = names[column]
        if gain[column] <= 0.0:
            break
        options = []
        for room in context.rooms:
            if artifact in room.holds or (room.state.worker, artifact) in context.held_back or not room.quiet():
                continue
            victims = _cheapest(context, room, context.specs[artifact].footprint_bytes)
            if victims is not None and all(_spare(context, room, v.artifact) for v in victims):
                lost = sum(context.losses.get(v.artifact, 0.0) for v in victims)
                options.append((lost, len(victims), room.state.worker, room, victims))
        for _, _, _, room, victims in sorted(options, key=lambda o: o[:3])[:CANDIDATES]:
            leaving = {
                forecast.artifacts[v.artifact]
                for v in victims
                if v.artifact in forecast.artifacts and sum(v.artifact in other.holds for other in context.rooms) == 1
            }
            net, error = exchange(forecast.utilities, forecast.rates, held, leaving, column)
            lost = sum(context.losses.get(v.artifact, 0.0) for v in victims)
            price = forecast.load_cost.get(artifact, 0.0) + lost * context.load_s.get(artifact, 1.0)
            earned = (net - forecast.noise_z * error) * forecast.trusted_s - price
            if earned > 0.0 and (best is None or earned > best[0]):
                best = (earned, room, artifact, victims)
    if best is not None:
        _, room, artifact, victims = best
        context.carry_out(room, artifact, "prefetch", victims, actions)


def _cheapest(context: _Pass, room: _Room, needed: int) -> tuple[m.EngineState, ...] | None:
    """What routing would miss least, until `needed` bytes are free; drained first, so work in hand does not protect."""
    missing = needed - room.free
    chosen: list[m.EngineState] = []
    if missing > 0:
        allowed = [e for e in room.state.engines if context._may_go(e, room, starved=True)]
        for engine in sorted(
            allowed, key=lambda e: (context.losses.get(e.artifact, 0.0) / e.footprint_bytes, e.artifact)
        ):
            chosen.append(engine)
            missing -= engine.footprint_bytes
            if missing <= 0:
                break
    return tuple(chosen) if missing <= 0 else None


def _value(
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
