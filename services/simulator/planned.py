"""The planner's own residency (`services.planner.decide.residency`) at work in a simulation, and the same with
knowledge of the future, which is the offline bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from services.planner.decide import charges, residency
from services.planner.decide.charges import Swap
from services.planner.decide.demand import Demand, arrived, work_of
from services.planner.decide.outlook import FORECAST_FROM, Outlook
from services.planner.decide.rooms import Forecast, Pending
from services.planner.decide.scoring import Weights
from services.simulator.engine import DRAINING, LOADING, READY, Engine, Simulation, warm_start
from services.simulator.fleet import SimFleet
from shared import messages as m
from shared.utility import LN2

Array = NDArray[Any]
STATES: dict[int, Literal["loading", "ready", "draining"]] = {LOADING: "loading", READY: "ready", DRAINING: "draining"}
TYPICAL_BATCH = 4


@dataclass(frozen=True)
class Options:
    """What the planned residency may use. `min_residence_s` and `max_wait_s` are those of `shared.messages.Policy`."""

    prefetch: bool = True
    patience: float = 0.6
    """Grouping of queries that wait: `rooms.Forecast.patience`."""
    burden: bool = True
    """Routing is told what a load would cost others."""
    noise_z: float = 0.0
    """`rooms.Forecast.noise_z`."""
    min_residence_s: float = 10.0
    max_wait_s: float = 60.0
    tick_s: float = 2.0
    at_once: bool = False
    """What was ordered makes for another plan at once, as a worker's report of it does live; else at the next tick."""
    foresight_s: float = 0.0
    """If not 0, the forecast is the queries that will come in this time: clairvoyant."""


def warm_utilities(
    fleet: SimFleet, quality: Array, tokens_in: Array, tokens_out: Array, weights: Weights | Sequence[Weights]
) -> Array:
    """[n, m] utility of each model for each query, were it resident and moderately busy."""
    if isinstance(weights, Sequence):
        return np.concatenate(
            [
                warm_utilities(fleet, quality[i : i + 1], tokens_in[i : i + 1], tokens_out[i : i + 1], own)
                for i, own in enumerate(weights)
            ]
        )
    costs = fleet.costs()
    best = np.argmax(fleet.fits, axis=1)
    rows = np.arange(len(best))
    step = costs.tpot_s[rows, best] * (1.0 + costs.slope[rows, best] * (TYPICAL_BATCH - 1))
    latency = np.asarray(tokens_in)[:, None] * costs.prefill_s[rows, best] + tokens_out * step
    energy = np.asarray(tokens_in)[:, None] * costs.prefill_j[rows, best] + tokens_out * costs.decode_j[rows, best]
    return np.asarray(
        quality * weights.w_quality
        - np.log1p(latency / weights.latency_slo_s) * (weights.w_latency / LN2)
        - energy * (weights.w_energy / weights.energy_ref_j)
    )


class Planned:
    """Residency by `residency.plan`, with a forecast from the queries routed so far."""

    def __init__(
        self,
        utilities: Callable[[int, int], Array | None],
        load_cost: Sequence[float],
        arrival_s: Array,
        *,
        order: Sequence[int] | None = None,
        choices: Array | None = None,
        second_cost: float = 0.0,
        options: Options | None = None,
        before: Sequence[tuple[float, int, Array | None, float]] = (),
    ) -> None:
        """
        Args:
            utilities: (query, chosen model) -> [m] row for the outlook; none of a query that has no choice.
            load_cost: [m] utility that a load costs by itself.
            arrival_s: [n], for the clairvoyant only.
            order: preference for the memory at the start.
            choices: [n] models that a blind router will choose, for the clairvoyant only.
            second_cost: utility that a second of waiting costs, 0 for a blind router.
            options: see there.
            before: (time, model, [m] row for the outlook, seconds of work) of queries routed before the first; no row
                of one that had no choice.
        """
        self.options = options or Options()
        self._before = before
        self.tick_s = self.options.tick_s
        self._utilities = utilities
        self._load_cost = load_cost
        self._arrival_s = arrival_s
        self._order = order
        self._choices = choices
        self._second_cost = second_cost
        self._demand: dict[str, Demand] = {}
        self._charges: dict[str, Swap] = {}
        self._acting = False

    def start(self, sim: Simulation) -> None:
        fleet = sim.fleet
        self._specs = {
            name: m.ArtifactSpec(
                name=name, model=name, variant="x", weights_bytes=size, kv_bytes_per_token=0,
                slots=model.slots, context=4096,
            )
            for name, size, model in zip(fleet.names, fleet.footprint_bytes, fleet.models, strict=True)
        }  # fmt: skip
        self._first = [int(np.argmax(row)) for row in fleet.fits]
        self._index = {name: i for i, name in enumerate(fleet.names)}
        self._outlook = Outlook(fleet.names)
        self._policy = m.Policy(
            fleet=fleet.name, min_residence_s=self.options.min_residence_s, idle_evict_s=0.0,
            max_wait_s=self.options.max_wait_s,
        )  # fmt: skip
        self._device = m.Device(kind="cuda", name="simulated")
        warm_start(sim, range(sim.models) if self._order is None else self._order)
        for at, model, row, work_s in self._before:
            if row is not None:
                self._outlook.seen(at, row)
            name = fleet.names[model]
            self._demand[name] = arrived(self._demand.get(name, Demand()), at, work_s=work_s)

    def _load_s(self, sim: Simulation) -> dict[str, float]:
        return {
            name: sim.planned_with[i][first].load_s
            for i, (name, first) in enumerate(zip(sim.fleet.names, self._first, strict=True))
        }

    def routed(self, sim: Simulation, i: int, model: int, now: float) -> None:
        row = self._utilities(i, model)
        if row is not None:
            self._outlook.seen(now, row)
        name = sim.fleet.names[model]
        tokens_in, tokens_out = sim.scoring.service_tokens[model]
        unit = sim.planned_with[model][self._first[model]]
        work_s = work_of(
            prefill_s=unit.prefill_s * tokens_in, tokens_out=tokens_out, tpot_s=unit.tpot_s, slope=unit.slope,
            slots=sim.fleet.models[model].slots,
        )  # fmt: skip
        self._demand[name] = arrived(self._demand.get(name, Demand()), now, work_s=work_s)

    def need(self, sim: Simulation, model: int, now: float) -> None:
        self._pass(sim, now)

    def tick(self, sim: Simulation, now: float) -> None:
        self._pass(sim, now)
        if self.options.burden and sim.scoring.joint:
            for worker in range(sim.workers):
                sim.tell_worker(worker)

    def swap(self, sim: Simulation, model: int, worker: int) -> Swap | None:
        """What a load of this model would mean to others, as of the last pass."""
        return self._charges.get(sim.fleet.names[model])

    def _forecast(self, sim: Simulation, now: float) -> Forecast | None:
        options = self.options
        if not options.foresight_s and self._outlook.count < FORECAST_FROM:
            return None
        if options.foresight_s:
            first, last = np.searchsorted(self._arrival_s, (now, now + options.foresight_s))
            picked = range(first, last, max(1, (last - first) // 512))
            found = (self._utilities(i, -1 if self._choices is None else int(self._choices[i])) for i in picked)
            rows = [row for row in found if row is not None]
            u = np.array(rows) if rows else np.zeros((0, sim.models))
            rates = np.full(len(u), (last - first) / max(len(u), 1) / options.foresight_s)
        else:
            u, rates = self._outlook.rows(now)
        return Forecast(
            artifacts=self._index, utilities=u, rates=rates,
            load_cost=dict(zip(sim.fleet.names, self._load_cost, strict=True)),
            trusted_s=options.foresight_s or 120.0,
            noise_z=options.noise_z,
            prefetch=options.prefetch, patience=options.patience, second_cost=self._second_cost,
        )  # fmt: skip

    def _pass(self, sim: Simulation, now: float) -> None:
        if self._acting:  # an eviction of this very pass asks again before its load has been given: it is coming
            return
        for _ in range(sim.models if self.options.at_once else 1):
            if not self._act(sim, now):
                return

    def changed(self, sim: Simulation, now: float) -> None:
        """A load or an eviction has ended."""
        if self.options.at_once:
            self._pass(sim, now)

    def _only_ordered(self, engine: Engine, now: float) -> bool:
        """Its load begins this very moment: live, the planner would have no report of that yet."""
        return self.options.at_once and engine.state == LOADING and engine.since == now

    def _act(self, sim: Simulation, now: float) -> bool:
        """One plan; whether it ordered anything."""
        fleet, policy = sim.fleet, self._policy
        workers, pending = [], []
        for w, name in enumerate(fleet.workers):
            engines = [
                m.EngineState(
                    artifact=fleet.names[e.model], state=STATES[e.state],
                    footprint_bytes=fleet.footprint_bytes[e.model], slots=e.slots,
                    active=e.n, loaded_at=e.since, last_used_at=e.used,
                )
                for e in sim.engines[w].values()
                if not self._only_ordered(e, now)
            ]  # fmt: skip
            workers.append(
                m.WorkerState(
                    worker=name, host="simulated", device=self._device, budget_bytes=fleet.budget_bytes[w],
                    engines=engines, started_at=-1e9,
                )
            )  # fmt: skip
            pending += [
                Pending("load", name, fleet.names[model], fleet.footprint_bytes[model])
                for model in (
                    *sim.pending(w),
                    *(e.model for e in sim.engines[w].values() if self._only_ordered(e, now)),
                )
            ]
        demand = {}
        for i, name in enumerate(fleet.names):
            old = self._demand.get(name, Demand())
            since = sim.waiting_since[i]
            waiting = len(sim.queue[i]) + sum(e.n for e in sim.holders[i])
            demand[name] = replace(old, waiting=waiting, waiting_since=since if since >= 0 else None)
        forecast, load_s = self._forecast(sim, now), self._load_s(sim)
        plan = residency.plan(
            workers=workers, specs=self._specs, pinned=frozenset(), popularity={}, demand=demand,
            load_s=load_s, pending=pending, held_back=frozenset(), policy=policy, now=now, forecast=forecast,
        )  # fmt: skip
        if forecast is not None and self.options.burden and sim.scoring.joint:
            self._charges = charges.charges(
                workers=workers, specs=self._specs, pinned=frozenset(), demand=demand, load_s=load_s,
                policy=policy, now=now, forecast=forecast,
            )  # fmt: skip
        number = {name: w for w, name in enumerate(fleet.workers)}
        self._acting = True
        for action in plan.actions:
            model, worker = self._index[action.artifact], number[action.worker]
            if action.kind == "evict":
                sim.evict(model, worker)
            else:
                sim.load(model, worker)
        self._acting = False
        return bool(plan.actions)
