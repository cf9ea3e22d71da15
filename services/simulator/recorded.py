"""A simulation of queries that a live system has answered: from its decisions, its learned costs and its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide import cost
from services.planner.decide.scoring import slope_of_penalty
from services.simulator.engine import Residency, Result, Simulation, Workload
from services.simulator.fleet import SimFleet, SimModel
from services.simulator.planned import Options, Planned, warm_utilities
from services.simulator.profile import UnitCosts
from services.simulator.residency import ON_DEMAND
from services.simulator.routers import Scored
from shared import messages as m
from shared.errors import DataInvalid

Array = NDArray[Any]
UNUSABLE = -10.0
"""Utility in the outlook of an artifact that a query could not have gone to."""


@dataclass(frozen=True)
class Answered:
    """One recorded query."""

    at: float
    """Seconds, in any clock."""
    route: m.Route
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Recorded:
    """Ready to simulate. The unit of choice is the artifact: the best of its cards stands for it."""

    fleet: SimFleet
    work: Workload
    quality: Array
    """[n, artifacts], minus infinity where no card of the artifact stood."""
    tokens_out: Array
    """[n, artifacts] predicted."""
    policy: m.Policy
    resident: tuple[tuple[int, ...], ...]
    """[workers] artifacts resident at the start."""


def build(
    answered: Sequence[Answered],
    cards: Mapping[str, m.Card],
    workers: Sequence[m.WorkerState],
    qos: m.Qos,
    policy: m.Policy,
    overhead_s: float,
) -> Recorded:
    """Put recorded queries together. What a model would have written that was not asked is taken to be as long as what
    was written; what was learned of an artifact's speed contains the sharing of its device.

    Raises:
        DataInvalid: there is nothing to replay.
    """
    if not answered or not workers:
        raise DataInvalid("There is nothing to replay.", "Ask some queries first, and see that a worker runs.")
    specs = {card.artifact.name: card.artifact for card in cards.values()}
    names = sorted(specs)
    learned = {(a.artifact, a.device_class): a for a in qos.artifacts}
    unit = []
    for name in names:
        row = []
        for w in workers:
            u = cost.unit_costs(specs[name], w.device, learned.get((name, w.device.device_class)))
            row.append(
                UnitCosts(
                    u.prefill_s, u.tpot_s, cost.BATCH_SLOPE, u.load_s, u.prefill_j, u.decode_j, u.load_j,
                    (0.0, u.decode_j),
                )
            )  # fmt: skip
        unit.append(tuple(row))
    sizes = tuple(specs[name].footprint_bytes for name in names)
    budgets = tuple(w.budget_bytes for w in workers)
    models = tuple(
        SimModel(name=name, parameters_b=1.0, memory=size, slots=specs[name].slots)
        for name, size in zip(names, sizes, strict=True)
    )
    fleet = SimFleet(
        policy.fleet, models, tuple(w.worker for w in workers), budgets, sizes, tuple(unit),
        np.less_equal.outer(np.array(sizes), np.array(budgets)), shared=False, overhead_s=overhead_s,
    )  # fmt: skip
    ordered = sorted(answered, key=lambda a: a.at)
    n, column = len(ordered), {name: i for i, name in enumerate(names)}
    quality = np.full((n, len(names)), -np.inf)
    tokens = np.full((n, len(names)), 1.0)
    for i, one in enumerate(ordered):
        for c in one.route.candidates:
            if c.artifact in column and c.excluded is None and c.quality > quality[i, column[c.artifact]]:
                quality[i, column[c.artifact]] = c.quality
                tokens[i, column[c.artifact]] = c.terms.get("tokens_out", 1.0)
    kept = np.isfinite(quality).any(axis=1)
    work = Workload(
        np.array([a.at - ordered[0].at for a in ordered])[kept], np.arange(n)[kept],
        np.array([float(a.tokens_in) for a in ordered])[kept],
        np.repeat(np.array([[float(a.tokens_out)] for a in ordered]), len(names), axis=1)[kept],
        np.where(np.isfinite(quality), quality, 0.0)[kept],
    )  # fmt: skip
    resident = tuple(
        tuple(column[e.artifact] for e in w.engines if e.state == "ready" and e.artifact in column) for w in workers
    )
    return Recorded(fleet, work, quality[kept], tokens[kept], policy, resident)


def simulate(recorded: Recorded, residency: str = "planned") -> Result:
    """What would have happened. `residency` is `planned` (the planner's), `lru`, `lfu` or `gdsf`.

    Scores of the result are predicted quality: nobody has judged answers that were not given.

    Raises:
        DataInvalid: there is no such residency policy.
    """
    r, policy = recorded, recorded.policy
    if residency == "planned":
        usable = np.where(np.isfinite(r.quality), r.quality, UNUSABLE)
        warm = warm_utilities(r.fleet, usable, r.work.tokens_in, r.tokens_out, policy)
        keeper: Residency = Planned(
            lambda i, _model: warm[i],
            [policy.w_energy * row[0].load_j / policy.energy_ref_j for row in r.fleet.unit],
            r.work.arrival_s,
            order=(),
            second_cost=policy.w_latency * slope_of_penalty(policy.latency_slo_s),
            options=Options(min_residence_s=policy.min_residence_s, max_wait_s=policy.max_wait_s, tick_s=0.5),
        )
    elif residency in ON_DEMAND:
        keeper = ON_DEMAND[residency]((), 0)
    else:
        raise DataInvalid(
            f"There is no residency policy {residency!r}.", f"Use planned, {', '.join(sorted(ON_DEMAND))}."
        )
    router = Scored(r.quality, r.work.tokens_in, r.tokens_out, policy)
    simulation = Simulation(r.fleet, r.work, router, keeper)
    for worker, models in enumerate(r.resident):
        for model in models:
            simulation.place(model, worker)
    return simulation.run()


def changed(
    recorded: Recorded, *, budget_bytes: int = 0, workers: int = 0, policy: m.Policy | None = None, faster: float = 1.0
) -> Recorded:
    """The same queries on another fleet or under another policy.

    Args:
        recorded: what was.
        budget_bytes: of every worker, if not 0; nothing is resident at the start then.
        workers: as many, each like the first, if not 0.
        policy: weights and objectives.
        faster: queries arrive this many times as fast.

    Raises:
        DataInvalid: a model that queries need fits no worker any more.
    """
    fleet, resident = recorded.fleet, recorded.resident
    count = workers or len(fleet.workers)
    if workers or budget_bytes:
        names = tuple(f"worker-{i + 1}" for i in range(count))
        budgets = (budget_bytes or fleet.budget_bytes[0],) * count
        fits = np.less_equal.outer(np.array(fleet.footprint_bytes), np.array(budgets))
        alone = np.isfinite(recorded.quality).sum(axis=1) == 1
        only = set(np.isfinite(recorded.quality[alone]).argmax(axis=1).tolist()) if alone.any() else set()
        for model in range(len(fleet.models)):
            if not fits[model].any() and (model in only or not fits.any()):
                raise DataInvalid(f"{fleet.names[model]} would fit no worker.", "Give more memory.")
        fleet = replace(
            fleet, workers=names, budget_bytes=budgets, fits=fits, unit=tuple((row[0],) * count for row in fleet.unit)
        )
        resident = ((),) * count
    work = replace(recorded.work, arrival_s=recorded.work.arrival_s / faster)
    return replace(recorded, fleet=fleet, work=work, resident=resident, policy=policy or recorded.policy)
