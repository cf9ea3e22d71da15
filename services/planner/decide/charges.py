"""What routing has to know of an artifact that would have to be loaded: its delay, and its cost to others. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from services.planner.decide.demand import Demand
from services.planner.decide.outlook import wished
from services.planner.decide.rooms import Forecast, Pass, losses_of, room_of
from shared import messages as m

CHEAPEST_ROOMS = 16
"""Workers, those with least to lose first, for which the cost of a load is worked out in full."""


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
    rooms = [room_of(worker, ()) for worker in workers if not worker.draining]
    held = {a for room in rooms for a in room.holds}
    losses = losses_of(rooms, forecast)
    # What is protected for its newness now may leave a moment later: it is missed all the same.
    later = msgspec.structs.replace(policy, min_residence_s=0.0)
    context = Pass(rooms, specs, pinned, demand, {}, frozenset(), later, now, load_s, forecast, losses)
    columns = {forecast.artifacts[a] for a in held if a in forecast.artifacts}
    rates = wished(forecast.utilities, forecast.rates, columns)
    cheap = heapq.nsmallest(
        CHEAPEST_ROOMS, rooms, key=lambda r: (sum(losses.get(a, 0.0) for a in r.holds), r.state.worker)
    )
    found: dict[str, Swap] = {}
    for artifact, spec in specs.items():
        if artifact in held or artifact not in forecast.artifacts:
            continue
        absent = load_s.get(artifact, 1.0) + policy.min_residence_s
        prices = [0.0] * any(room.free >= spec.footprint_bytes for room in rooms) or [
            sum(losses.get(v.artifact, 0.0) * (absent + load_s.get(v.artifact, 1.0)) for v in victims)
            for room in cheap
            if (victims := context.cheapest(room, spec.footprint_bytes)) is not None
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
