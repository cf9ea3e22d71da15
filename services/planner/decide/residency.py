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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.planner.decide.demand import Demand, decayed_work
from services.planner.decide.outlook import exchange, worth
from services.planner.decide.rooms import Action, Forecast, Pass, Pending, Room, losses_of, room_of, value_of
from shared import messages as m

CANDIDATES = 4
"""Artifacts, and workers for each, that an exchange is worked out for in full."""
FULL = 0.8
"""Work that one engine is planned for, as a share of its time: beyond it queues grow faster than batches gain."""
WARM_START_S = 30.0
"""A worker older than this is empty for a reason (idle eviction), and stays so until there is demand."""


@dataclass(frozen=True)
class Plan:
    actions: tuple[Action, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    """Value of each resident artifact by `worker/artifact`, in seconds of load saved per second and gigabyte."""
    blocked: Mapping[str, str] = field(default_factory=dict)
    """Needed artifacts that cannot be loaded now, with the reason."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """With a forecast: utility per second that routing would lose without each resident artifact."""


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
    rooms = [room_of(worker, pending) for worker in workers if not worker.draining]
    losses = losses_of(rooms, forecast)
    values = {
        f"{room.state.worker}/{engine.artifact}": value_of(engine, demand, load_s, now, losses)
        for room in rooms
        for engine in room.state.engines
    }
    held_back |= {(worker.worker, artifact) for worker in workers for artifact in worker.lacks}
    actions: list[Action] = []
    blocked: dict[str, str] = {}
    context = Pass(rooms, specs, pinned, demand, values, held_back, policy, now, load_s, forecast, losses)
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


def _needs(context: Pass) -> list[tuple[str, str]]:
    held = set().union(*(room.holds for room in context.rooms)) if context.rooms else set()
    waiting = [
        (d.waiting_since if d.waiting_since is not None else context.now, artifact)
        for artifact, d in context.demand.items()
        if d.waiting > 0 and artifact in context.specs and artifact not in held
    ]
    pinned = [a for a in sorted(context.pinned) if a not in held and a not in {w[1] for w in waiting}]
    return [(artifact, "demand") for _, artifact in sorted(waiting)] + [(a, "pinned") for a in pinned]


def _short_of_slots(context: Pass) -> list[str]:
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


def _lacking(context: Pass, spec: m.ArtifactSpec, demand: Demand, holders: Sequence[m.Device]) -> float:
    """Slots that an artifact's queries lack when these devices hold it; negative when there are some to spare."""
    lacking = float(demand.waiting - sum(spec.at_once(device) for device in holders))
    if context.forecast is not None:
        lacking = max(lacking, (decayed_work(demand, context.now) / FULL - len(holders)) * spec.slots)
    return lacking


def _spare(context: Pass, room: Room, artifact: str) -> bool:
    """Whether the others that hold the artifact are enough without this room, or there are none: what routing loses
    without it tells then."""
    spec, demand = context.specs.get(artifact), context.demand.get(artifact)
    holders = [other.state.device for other in context.rooms if other is not room and artifact in other.holds]
    return spec is None or demand is None or not holders or _lacking(context, spec, demand, holders) <= 0


def _warm(context: Pass, popularity: Mapping[str, float]) -> list[str]:
    """Artifacts by likelihood of use, those that nobody holds yet first."""
    held = set().union(*(room.holds for room in context.rooms)) if context.rooms else set()
    return sorted(context.specs, key=lambda a: (a in held, -popularity.get(a, 0.0), a))


def _idle(context: Pass) -> list[Action]:
    if not context.policy.idle_evict_s:
        return []
    return [
        Action("evict", room.state.worker, engine.artifact, "idle")
        for room in context.rooms
        for engine in room.state.engines
        if context.may_go(engine, room, starved=False)
        and engine.artifact in room.holds
        and context.now - max(engine.last_used_at, engine.loaded_at) > context.policy.idle_evict_s
    ]


def _exchange(context: Pass, forecast: Forecast, actions: list[Action]) -> None:
    """6: one load ahead of demand, on a worker where nothing else is under way."""
    held = {forecast.artifacts[a] for room in context.rooms for a in room.holds if a in forecast.artifacts}
    gain, _ = worth(forecast.utilities, forecast.rates, held)
    names = {column: a for a, column in forecast.artifacts.items() if a in context.specs}
    best: tuple[float, Room, str, tuple[m.EngineState, ...]] | None = None
    for column in sorted(names, key=lambda c: -gain[c])[:CANDIDATES]:
        artifact = names[column]
        if gain[column] <= 0.0:
            break
        options = []
        for room in context.rooms:
            if artifact in room.holds or (room.state.worker, artifact) in context.held_back or not room.quiet():
                continue
            victims = context.cheapest(room, context.specs[artifact].footprint_bytes)
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
