"""A simulation of queries that a live system has answered: from its decisions, its learned costs and its workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.planner.decide.demand import work_of
from services.planner.decide.outlook import warm_row
from services.planner.decide.routing import weights_of
from services.planner.decide.scoring import Fleet, Weights, slope_of_penalty
from services.simulator import telemetry
from services.simulator.beliefs import Beliefs
from services.simulator.engine import Residency, Result, Router, Simulation, Workload
from services.simulator.fleet import SimFleet, SimModel
from services.simulator.planned import Options, Planned
from services.simulator.profile import Profile, UnitCosts
from services.simulator.residency import ON_DEMAND
from services.simulator.routers import Fixed, Scored
from services.simulator.telemetry import Run
from shared import messages as m
from shared.errors import DataInvalid
from shared.utility import LN2

Array = NDArray[Any]
TICK_S = 0.25
"""Between the placement's plans while queries are under way, as live."""
UNUSABLE = -10.0
"""Utility in the outlook of an artifact that a query could not have gone to."""


@dataclass(frozen=True)
class Answered:
    """One recorded query."""

    at: float
    """Seconds, in any clock."""
    route: m.Route
    tokens_in: int
    """That had to be read: those in the engine's cache are not counted."""
    tokens_out: int
    preference: m.Preference = field(default_factory=m.Preference)
    """Weights that the query asked for itself."""
    run: Run | None = None
    """What it took; without any, costs are as routing believes them to be."""
    counted: bool = True
    """The planner knew of the prompt's tokens what its route says; else it knows `tokens_in`."""


@dataclass(frozen=True)
class Own:
    """The fleet's weights with a query's own in their place."""

    w_quality: float
    w_latency: float
    w_energy: float
    latency_slo_s: float
    energy_ref_j: float


@dataclass(frozen=True)
class Recorded:
    """Ready to simulate. The unit of choice is the artifact: the best of its cards stands for it."""

    fleet: SimFleet
    work: Workload
    quality: Array
    """[n, artifacts], minus infinity where no card of the artifact stood."""
    tokens_out: Array
    """[n, artifacts] predicted."""
    tokens_in: Array
    """[n] of the prompt, as the planner counted them; `work` has what was read."""
    policy: m.Policy
    resident: tuple[tuple[int, ...], ...]
    """[workers] artifacts resident at the start."""
    preferences: tuple[m.Preference, ...] = ()
    """[n]; none has any when empty."""
    beliefs: Callable[[], Beliefs] | None = None
    """Learns costs as the live planner does; they stay as they were without it."""
    before: tuple[tuple[float, m.Route], ...] = ()
    """(time, route) of queries routed before the first one: residency has seen them."""

    def weights(self) -> list[Own] | m.Policy:
        """Of each query; one for all when no query has a preference."""
        p = self.policy
        if all(one == m.Preference() for one in self.preferences):
            return p
        found = [weights_of(one, p) for one in self.preferences]
        return [Own(w["w_q"], w["w_l"], w["w_e"], p.latency_slo_s, p.energy_ref_j) for w in found]


def build(
    answered: Sequence[Answered],
    cards: Mapping[str, m.Card],
    workers: Sequence[m.WorkerState],
    qos: m.Qos,
    policy: m.Policy,
    overhead_s: float,
    profile: Profile | None = None,
    before: Sequence[tuple[float, m.Route]] = (),
) -> Recorded:
    """Put recorded queries together. What a model would have written that was not asked is taken to be as long as what
    was written. Costs are the profile's, or without one what the queries took, less what others put on them
    (`telemetry`); the planner takes them to be what it has learned, as it did.

    With a profile `qos` is what was known when the first query came, and the planner learns from there on; without one
    it is what is known now, and stands. `before`: routes of earlier queries, in the clock of `answered`.

    Raises:
        DataInvalid: there is nothing to replay, or the profile lacks an artifact.
    """
    if not answered or not workers:
        raise DataInvalid("There is nothing to replay.", "Ask some queries first, and see that a worker runs.")
    specs = {card.artifact.name: card.artifact for card in cards.values()}
    names = sorted(specs)
    ordered_specs = [specs[name] for name in names]
    unit = _units(ordered_specs, workers, qos, [a.run for a in answered if a.run], profile)
    sizes = tuple(specs[name].footprint_bytes for name in names)
    budgets = tuple(w.budget_bytes for w in workers)
    models = tuple(
        SimModel(name=name, parameters_b=1.0, memory=size, slots=specs[name].slots)
        for name, size in zip(names, sizes, strict=True)
    )
    device, places = telemetry.devices(workers)
    fleet = SimFleet(
        policy.fleet, models, tuple(w.worker for w in workers), budgets, sizes, unit,
        np.less_equal.outer(np.array(sizes), np.array(budgets)), shared=True, overhead_s=overhead_s,
        device=device, places=places,
        turns=any(w.device.kind == "cpu" for w in workers) if profile is None else profile.turns,
        turn_cost=1.0 if profile is None else profile.turn_cost,
        load_beside=0.0 if profile is None else profile.load_beside,
        believed=_units(ordered_specs, workers, qos, [], None),
    )  # fmt: skip
    column = {name: i for i, name in enumerate(names)}
    ordered, quality, tokens, counted = _predicted(sorted(answered, key=lambda a: a.at), column)
    if not ordered:
        raise DataInvalid(
            "No recorded query can be replayed: the fleet has none of the models they could have gone to.",
            "Use a fleet with models that were there when the queries were recorded.",
        )
    work = Workload(
        np.array([a.at - ordered[0].at for a in ordered]), np.arange(len(ordered)),
        np.array([float(a.tokens_in) for a in ordered]),
        np.repeat(np.array([[float(a.tokens_out)] for a in ordered]), len(names), axis=1),
        np.where(np.isfinite(quality), quality, 0.0),
    )  # fmt: skip
    resident = tuple(
        tuple(column[e.artifact] for e in w.engines if e.state == "ready" and e.artifact in column) for w in workers
    )
    beliefs = None
    if profile is not None:
        usual = float(work.tokens_in.mean()), float(work.tokens_out.mean())
        devices = [w.device for w in workers]
        beliefs = partial(Beliefs, ordered_specs, devices, qos, tokens_in=usual[0], tokens_out=usual[1])
    start = ordered[0].at
    return Recorded(
        fleet, work, quality, tokens, counted, policy, resident, tuple(a.preference for a in ordered), beliefs,
        tuple((at - start, route) for at, route in before),
    )  # fmt: skip


def reconsidered(answered: Sequence[Answered], cards: Mapping[str, m.Card]) -> list[Answered]:
    """The same queries before another fleet's cards. A card that was weighed keeps what was predicted of it; of another
    there is what it promises for the query's domains, and the usual length, its own limit at most."""
    found = []
    for one in answered:
        weighed = {c.card: c for c in one.route.candidates}
        lengths = [c.terms["tokens_out"] for c in one.route.candidates if "tokens_out" in c.terms]
        usual = float(np.mean(lengths)) if lengths else float(one.tokens_out)
        candidates = []
        for name, card in cards.items():
            was = weighed.get(name)
            if was is not None and was.artifact == card.artifact.name:
                candidates.append(was)
                continue
            known = sum(one.route.domains.values()) or 1.0
            promised = sum(p * card.domains.get(d, card.quality) for d, p in one.route.domains.items()) / known
            candidates.append(
                m.Candidate(
                    card=name, artifact=card.artifact.name, quality=promised if one.route.domains else card.quality,
                    terms={"tokens_out": min(usual, float(card.max_tokens))},
                )
            )  # fmt: skip
        found.append(replace(one, route=msgspec.structs.replace(one.route, candidates=candidates)))
    return found


def retimed(answered: Sequence[Answered], rows: Sequence[tuple[float, int, int]]) -> list[Answered]:
    """A trace's arrivals (seconds, tokens in, tokens out), with recorded queries in turn for what is predicted."""
    ordered = sorted(answered, key=lambda a: a.at)
    return [
        replace(ordered[i % len(ordered)], at=at, tokens_in=tokens_in, tokens_out=max(tokens_out, 1), counted=False)
        for i, (at, tokens_in, tokens_out) in enumerate(rows)
    ]


def _units(
    specs: Sequence[m.ArtifactSpec],
    workers: Sequence[m.WorkerState],
    qos: m.Qos,
    runs: Sequence[Run],
    profile: Profile | None,
) -> tuple[tuple[UnitCosts, ...], ...]:
    if profile is not None:
        return tuple(
            (
                profile.costs(
                    spec.name, parameters_b=1.0, active_b=1.0, memory_bytes=spec.footprint_bytes, gpus=1, sequences=0
                ),
            )
            * len(workers)
            for spec in specs
        )
    learned = {(a.artifact, a.device_class): a for a in qos.artifacts}
    mine = telemetry.by_artifact(runs)
    return tuple(
        tuple(
            telemetry.alone(spec, w.device, learned.get((spec.name, w.device.device_class)), mine.get(spec.name, ()))
            for w in workers
        )
        for spec in specs
    )


def _predicted(ordered: Sequence[Answered], column: Mapping[str, int]) -> tuple[list[Answered], Array, Array, Array]:
    """Queries that could go to some artifact, for each the quality and tokens out predicted of its best card there, and
    its tokens in."""
    counted = np.array([float(one.tokens_in) for one in ordered])
    quality = np.full((len(ordered), len(column)), -np.inf)
    tokens = np.full((len(ordered), len(column)), 1.0)
    for i, one in enumerate(ordered):
        for c in one.route.candidates:
            if c.artifact in column and c.excluded is None and c.quality > quality[i, column[c.artifact]]:
                quality[i, column[c.artifact]] = c.quality
                tokens[i, column[c.artifact]] = c.terms.get("tokens_out", 1.0)
                if one.counted:
                    counted[i] = c.terms.get("tokens_in", counted[i])
    kept = np.isfinite(quality).any(axis=1)
    found = [one for one, k in zip(ordered, kept.tolist(), strict=True) if k]
    return found, quality[kept], tokens[kept], counted[kept]


def simulate(recorded: Recorded, residency: str = "planned", choices: Sequence[int] | None = None) -> Result:
    """What would have happened. `residency` is `planned` (the planner's), `lru`, `lfu` or `gdsf`; `choices`: [n]
    artifacts that answered, in place of routing.

    Scores of the result are predicted quality: nobody has judged answers that were not given.

    Raises:
        DataInvalid: there is no such residency policy.
    """
    r, policy = recorded, recorded.policy
    found = r.weights()
    own = found if isinstance(found, list) else None
    if residency == "planned":
        keeper: Residency = Planned(
            lambda i, _model: _warm_row(r, simulation.scoring, policy if own is None else own[i], i),
            [policy.w_energy * row[0].load_j / policy.energy_ref_j for row in r.fleet.planned_with],
            r.work.arrival_s,
            order=(),
            second_cost=policy.w_latency * slope_of_penalty(policy.latency_slo_s),
            options=Options(
                min_residence_s=policy.min_residence_s, max_wait_s=policy.max_wait_s, tick_s=TICK_S, at_once=True
            ),
            before=_before(r),
        )
    elif residency in ON_DEMAND:
        keeper = ON_DEMAND[residency]((), 0)
    else:
        raise DataInvalid(
            f"There is no residency policy {residency!r}.", f"Use planned, {', '.join(sorted(ON_DEMAND))}."
        )
    router: Router = (
        Scored(r.quality, r.tokens_in, r.tokens_out, policy if own is None else own)
        if choices is None
        else Fixed(np.array(choices, np.int64))
    )
    simulation = Simulation(r.fleet, r.work, router, keeper, beliefs=r.beliefs() if r.beliefs else None)
    for worker, models in enumerate(r.resident):
        for model in models:
            simulation.place(model, worker)
    return simulation.run()


def _warm_row(r: Recorded, scoring: Fleet, weights: Weights, i: int) -> Array | None:
    """[artifacts] for the outlook, as `outlook.warm_row` makes it live: what each would be worth, were it resident and
    free, at the batch that it has now. None when the query left no choice."""
    if np.isfinite(r.quality[i]).sum() < 2:
        return None
    worker = np.argmax(r.fleet.fits, axis=1)
    rows = np.arange(len(worker))
    costs, tokens_in, tokens_out = scoring.costs, float(r.tokens_in[i]), r.tokens_out[i]
    latency = costs.prefill_s[rows, worker] * tokens_in + scoring.step_s[rows, worker] * tokens_out
    joules = costs.prefill_j[rows, worker] * tokens_in + costs.decode_j[rows, worker] * tokens_out
    return np.asarray(
        np.where(np.isfinite(r.quality[i]), r.quality[i], UNUSABLE) * weights.w_quality
        - np.log1p(latency / weights.latency_slo_s) * (weights.w_latency / LN2)
        - joules * (weights.w_energy / weights.energy_ref_j)
    )


def _before(r: Recorded) -> list[tuple[float, int, Array | None, float]]:
    """Earlier queries as `Planned` takes them."""
    column = {name: i for i, name in enumerate(r.fleet.names)}
    found = []
    for at, route in r.before:
        row = warm_row(route, column, r.policy)
        first = next((c for c in route.candidates if route.order and c.card == route.order[0]), None)
        if first is None or first.artifact not in column:
            continue
        model = column[first.artifact]
        unit = r.fleet.planned_with[model][0]
        work_s = work_of(
            prefill_s=first.terms.get("prefill_s", 0.0), tokens_out=first.terms.get("tokens_out", 0.0),
            tpot_s=unit.tpot_s, slope=unit.slope, slots=r.fleet.models[model].slots,
        )  # fmt: skip
        found.append((at, model, row, work_s))
    return found


def changed(
    recorded: Recorded, *, budget_bytes: int = 0, workers: int = 0, policy: m.Policy | None = None, faster: float = 1.0
) -> Recorded:
    """The same queries on another fleet or under another policy.

    Args:
        recorded: what was.
        budget_bytes: of every worker, if not 0; nothing is resident at the start then.
        workers: as many, each like the first and with a device of its own, if not 0.
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
            fleet, workers=names, budget_bytes=budgets, fits=fits, unit=tuple((row[0],) * count for row in fleet.unit),
            believed=tuple((row[0],) * count for row in fleet.believed),
            device=() if workers else fleet.device, places=() if workers else fleet.places,
        )  # fmt: skip
        resident = ((),) * count
    work = replace(recorded.work, arrival_s=recorded.work.arrival_s / faster)
    beliefs = None if workers else recorded.beliefs  # of the workers that there were
    return replace(
        recorded, fleet=fleet, work=work, resident=resident, policy=policy or recorded.policy, beliefs=beliefs
    )
