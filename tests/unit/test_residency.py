"""Residency plans: what is loaded and evicted, where, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.decide import charges, residency
from services.planner.decide.demand import RATE_HALF_LIFE_S, Demand, arrived, decayed_rate, decayed_work, work_of
from services.planner.decide.residency import Plan
from services.planner.decide.rooms import Action, Forecast, Pending
from shared import messages as m
from tests import samples
from tests.samples import GB, spec, worker

A, B, C = (spec(f"{name}-int8", weights=400 * 10**6, slots=4) for name in "abc")
SPECS = {s.name: s for s in (A, B, C)}
BIG = spec("big-fp32", weights=1000 * 10**6, slots=4)
POLICY = m.Policy(fleet="f", min_residence_s=3.0, idle_evict_s=100.0, max_wait_s=5.0)
NOW = 1000.0


def engine(artifact: m.ArtifactSpec, **more: object) -> m.EngineState:
    """A ready engine that was used just now."""
    return samples.engine(artifact, **{"last_used_at": NOW, **more})


def _plan(
    workers: Sequence[m.WorkerState],
    demand: Mapping[str, Demand] | None = None,
    *,
    pinned: frozenset[str] = frozenset(),
    pending: Sequence[Pending] = (),
    held_back: frozenset[tuple[str, str]] = frozenset(),
    specs: Mapping[str, m.ArtifactSpec] = SPECS,
) -> Plan:
    return residency.plan(
        workers=workers, specs=specs, pinned=pinned, popularity={A.name: 2.0, B.name: 1.0}, demand=demand or {},
        load_s={}, pending=pending, held_back=held_back, policy=POLICY, now=NOW,
    )  # fmt: skip


def _what(plan: Plan) -> list[tuple[str, str, str, str]]:
    return [(a.kind, a.worker, a.artifact, a.reason) for a in plan.actions]


def test_demand_loads_where_memory_is_free() -> None:
    """A query for a model that is resident nowhere makes it load on the worker with the most free memory."""
    workers = [worker("w1", engines=[engine(A)]), worker("w2")]
    plan = _plan(workers, {B.name: Demand(waiting=1, waiting_since=NOW)})
    assert _what(plan) == [("load", "w2", B.name, "demand")]


def test_without_free_memory_the_least_valuable_idle_model_leaves_first() -> None:
    """The victim is the one with less demand for its bytes, and the load names it as coming before."""
    workers = [worker(engines=[engine(A, loaded_at=0.0, last_used_at=990.0), engine(B, loaded_at=0.0)])]
    demand = {
        A.name: Demand(rate=1.0, rate_at=NOW),
        B.name: Demand(rate=0.1, rate_at=NOW),
        C.name: Demand(waiting=1, waiting_since=NOW),
    }
    plan = _plan(workers, demand)
    assert _what(plan) == [
        ("evict", "w1", B.name, f"make_room_for:{C.name}"),
        ("load", "w1", C.name, "demand"),
    ]
    assert plan.actions[1].after == (B.name,)


def test_a_busy_model_stays_until_others_have_waited_long_enough() -> None:
    """Work protects a model from eviction, but not for longer than `max_wait_s`: then it is drained all the same."""
    workers = [worker(budget=500 * 10**6, engines=[engine(A, loaded_at=0.0, active=2)])]

    def demand(since: float) -> dict[str, Demand]:
        return {A.name: Demand(waiting=2), B.name: Demand(waiting=1, waiting_since=since)}

    early = _plan(workers, demand(NOW - 1.0))
    assert early.actions == ()
    assert "busy" in early.blocked[B.name]
    assert [a.kind for a in _plan(workers, demand(NOW - 6.0)).actions] == ["evict", "load"]


def test_minimum_residence_and_pins_protect() -> None:
    """A model that has just arrived or is pinned never makes room."""
    new = [worker(budget=500 * 10**6, engines=[engine(A, loaded_at=NOW - 1.0)])]
    old = [worker(budget=500 * 10**6, engines=[engine(A, loaded_at=0.0)])]
    demand = {B.name: Demand(waiting=1, waiting_since=0.0)}
    assert _plan(new, demand).actions == ()
    assert _plan(old, demand, pinned=frozenset({A.name})).actions == ()
    assert len(_plan(old, demand).actions) == 2


def test_what_was_loaded_on_a_guess_makes_room_at_once() -> None:
    """Minimum residence keeps apart those that are asked for in turns; what nobody has asked for yet is not one."""
    guess = engine(A, loaded_at=NOW - 1.0, last_used_at=NOW - 1.0)
    small = [worker(budget=500 * 10**6, engines=[guess])]
    waiting = {B.name: Demand(waiting=1, waiting_since=NOW)}
    assert [a.kind for a in _plan(small, waiting).actions] == ["evict", "load"]
    assert _plan(small, {**waiting, A.name: Demand(rate=0.1, rate_at=NOW)}).actions == ()


def test_a_pinned_model_is_loaded_without_demand() -> None:
    """Pinned means resident."""
    assert _what(_plan([worker()], pinned=frozenset({C.name}))) == [("load", "w1", C.name, "pinned")]


def test_more_queries_than_slots_bring_a_replica() -> None:
    """A hot model gets a second holder when its queries exceed its slots, where memory is free or idle."""
    workers = [worker("w1", engines=[engine(A, active=4)]), worker("w2")]
    assert _plan(workers, {A.name: Demand(waiting=4)}).actions == ()
    assert _what(_plan(workers, {A.name: Demand(waiting=6)})) == [("load", "w2", A.name, "replica")]
    only = [worker("w1", engines=[engine(A, active=4)])]
    assert _plan(only, {A.name: Demand(waiting=60)}).actions == ()


def test_work_beyond_one_engine_brings_a_replica_before_queries_wait() -> None:
    """With a forecast: nobody waits yet, but arrivals bring more than one engine can do; what is idle makes room."""
    forecast = Forecast(artifacts={A.name: 0, B.name: 1}, utilities=np.zeros((0, 2)), rates=np.zeros(0))

    def reasons(work: float, at: float = NOW) -> list[tuple[str, str, str, str]]:
        workers = [worker("w1", engines=[engine(A, active=1)]), worker("w2", engines=[engine(B, loaded_at=NOW - 60.0)])]
        return _what(
            residency.plan(
                workers=workers, specs=SPECS, pinned=frozenset(), popularity={}, load_s={}, pending=(), policy=POLICY,
                demand={A.name: Demand(waiting=1, rate=1.0, rate_at=at, work=work)}, held_back=frozenset(), now=NOW,
                forecast=forecast,
            )
        )  # fmt: skip

    assert reasons(0.7) == []
    assert [r for r in reasons(0.9) if r[0] == "load"] == [("load", "w2", A.name, "replica")]
    assert reasons(0.9, at=NOW - 240.0) == []  # it has decayed to a quarter
    assert reasons(1.7) == reasons(0.9)  # one at a time, and no worker is left for a third


def test_work_is_what_a_full_batch_spends_on_a_query() -> None:
    """Ten queries a second of a tenth of a second each are one engine's time."""
    one = work_of(prefill_s=0.05, tokens_out=100, tpot_s=0.01, slope=0.25, slots=5)
    assert one == pytest.approx(0.05 + 100 * 0.01 * 2.0 / 5)
    demand = Demand()
    for i in range(4000):
        demand = arrived(demand, i * 0.1, work_s=0.1)
    assert demand.work == pytest.approx(1.0, rel=0.15)
    assert decayed_work(demand, 399.9 + RATE_HALF_LIFE_S) == pytest.approx(demand.work / 2)


def test_a_load_is_charged_for_what_it_pushes_out_however_new_that_is() -> None:
    """Right after a load nothing may leave yet; what another load would cost others is told all the same."""
    utilities, rates = np.tile([1.0, 0.0, 0.5], (30, 1)), np.full(30, 0.05)
    forecast = Forecast(
        artifacts={A.name: 0, B.name: 1, C.name: 2}, utilities=utilities, rates=rates, patience=0.6, second_cost=0.01
    )

    def burden(loaded_at: float) -> float:
        full = worker("w1", budget=A.footprint_bytes, engines=[engine(A, loaded_at=loaded_at)])
        found = charges.charges(
            workers=[full], specs=SPECS, pinned=frozenset(), demand={}, load_s={}, policy=POLICY, now=NOW,
            forecast=forecast,
        )  # fmt: skip
        return found[B.name].burden

    assert burden(NOW - 0.5) == burden(NOW - 60.0) > 0.0


def test_a_new_worker_warms_up_with_what_is_likely_to_be_asked_for() -> None:
    """An empty new worker takes the most popular model that nobody holds; an old empty one takes nothing."""
    fresh = [worker("w1", started_at=NOW - 1, engines=[engine(A)]), worker("w2", started_at=NOW - 1)]
    assert _what(_plan(fresh)) == [("load", "w2", B.name, "warm_start")]
    assert _plan([worker(started_at=0.0)]).actions == ()


def test_idle_models_leave() -> None:
    """A model unused for `idle_evict_s` is evicted, unless pinned."""
    workers = [worker(engines=[engine(A, loaded_at=0.0, last_used_at=NOW - 101.0)])]
    assert _what(_plan(workers)) == [("evict", "w1", A.name, "idle")]
    assert _plan(workers, pinned=frozenset({A.name})).actions == ()


def test_commands_under_way_are_not_given_again() -> None:
    """What was commanded and has not shown yet counts as done: memory and models are not promised twice."""
    demand = {A.name: Demand(waiting=1, waiting_since=NOW), B.name: Demand(waiting=1, waiting_since=NOW)}
    pending = [Pending("load", "w1", A.name, A.footprint_bytes)]
    plan = _plan([worker(budget=900 * 10**6)], demand, pending=pending)
    assert _what(plan) == [("load", "w1", B.name, "demand")]
    assert _plan([worker(budget=500 * 10**6)], demand, pending=pending).actions == ()


def test_nothing_is_loaded_where_the_store_lacks_it() -> None:
    """Neither for those who wait nor at a warm start; what stands in the way is said."""
    demand = {A.name: Demand(waiting=1, waiting_since=NOW)}
    poor = worker("w1", lacks=[A.name], started_at=NOW)
    plan = _plan([poor], demand)
    assert not [action for action in plan.actions if action.artifact == A.name]
    assert "calm models pull" in plan.blocked[A.name]
    assert ("load", "w2", A.name, "demand") in _what(_plan([poor, worker("w2", budget=GB // 2)], demand))


def test_a_failed_load_is_held_back() -> None:
    """The same load on the same worker is not tried again while it is held back; another worker may."""
    demand = {A.name: Demand(waiting=1, waiting_since=NOW)}
    held = frozenset({("w1", A.name)})
    assert _plan([worker("w1")], demand, held_back=held).actions == ()
    assert _what(_plan([worker("w1"), worker("w2", budget=GB // 2)], demand, held_back=held)) == [
        ("load", "w2", A.name, "demand")
    ]


def test_draining_workers_take_nothing() -> None:
    """A worker that is leaving gets no load."""
    assert _plan([worker(draining=True)], {A.name: Demand(waiting=1, waiting_since=0.0)}).actions == ()


def test_demand_rate_decays() -> None:
    """After one half-life the rate has halved; each arrival adds the same amount."""
    one = arrived(Demand(), NOW)
    assert one.waiting == 1
    assert abs(decayed_rate(one, NOW + RATE_HALF_LIFE_S) - one.rate / 2) < 1e-12


engines = st.lists(
    st.tuples(st.sampled_from([A, B, C]), st.integers(0, 4), st.floats(900, 999)),  # loaded, and used since (at NOW)
    max_size=3,
    unique_by=lambda e: e[0].name,
)
demands = st.dictionaries(
    st.sampled_from(sorted(SPECS)), st.tuples(st.integers(0, 20), st.none() | st.floats(900, 1000)), max_size=3
)


@given(st.lists(st.tuples(st.integers(1, 16), engines), min_size=1, max_size=3), demands)
def test_no_plan_ever_exceeds_memory_or_evicts_what_is_protected(
    fleet: list[tuple[int, list[tuple[m.ArtifactSpec, int, float]]]], wanted: dict[str, tuple[int, float | None]]
) -> None:
    """Carried out in order, a plan keeps each worker within its budget; the same input gives the same plan."""
    workers = [
        worker(f"w{i}", budget=n * 10**8, engines=[engine(s, active=a, loaded_at=t) for s, a, t in held])
        for i, (n, held) in enumerate(fleet)
    ]
    workers = [w for w in workers if w.used_bytes <= w.budget_bytes]
    demand = {a: Demand(waiting=n, waiting_since=since) for a, (n, since) in wanted.items()}
    plan = _plan(workers, demand)
    assert plan == _plan(workers, demand)
    for state in workers:
        used = {e.artifact: e.footprint_bytes for e in state.engines}
        loaded_at = {e.artifact: e.loaded_at for e in state.engines}
        for action in [a for a in plan.actions if a.worker == state.worker]:
            _apply(action, used, loaded_at)
            assert sum(used.values()) <= state.budget_bytes


def _apply(action: Action, used: dict[str, int], loaded_at: dict[str, float]) -> None:
    if action.kind == "evict":
        assert NOW - loaded_at[action.artifact] >= POLICY.min_residence_s
        del used[action.artifact]
    else:
        assert action.artifact not in used
        used[action.artifact] = SPECS[action.artifact].footprint_bytes


def test_what_needs_the_memory_of_an_eviction_waits_for_it_whoever_ordered_that() -> None:
    """Neither a second load of the same pass nor one of a later pass reaches a worker before the memory is free."""
    workers = [worker(budget=1300 * 10**6, engines=[engine(BIG, loaded_at=0.0)])]
    demand = {A.name: Demand(waiting=1, waiting_since=0.0), B.name: Demand(waiting=1, waiting_since=1.0)}
    plan = _plan(workers, demand, specs={**SPECS, BIG.name: BIG})
    assert [(a.kind, a.artifact, a.after) for a in plan.actions] == [
        ("evict", BIG.name, ()), ("load", A.name, (BIG.name,)), ("load", B.name, (BIG.name,)),
    ]  # fmt: skip
    under_way = [Pending("evict", "w1", BIG.name), Pending("load", "w1", A.name, A.footprint_bytes)]
    later = _plan(workers, {B.name: demand[B.name]}, pending=under_way, specs={**SPECS, BIG.name: BIG})
    assert [(a.kind, a.artifact, a.after) for a in later.actions] == [("load", B.name, (BIG.name,))]


def test_a_load_into_free_memory_waits_for_no_eviction() -> None:
    """Another model on its way out of the worker is none of its business."""
    workers = [worker(engines=[engine(A, loaded_at=0.0)])]
    plan = _plan(workers, {B.name: Demand(waiting=1)}, pending=[Pending("evict", "w1", A.name)])
    assert [(a.kind, a.after) for a in plan.actions] == [("load", ())]


def test_prefetching_leaves_replicas_that_are_needed() -> None:
    """A replica is no loss to routing, but who waits for its slots would bring it back at once."""
    utilities, rates = np.tile([1.0, 2.0], (30, 1)), np.full(30, 0.05)
    forecast = Forecast(artifacts={A.name: 0, B.name: 1}, utilities=utilities, rates=rates)
    size = A.footprint_bytes
    workers = [worker(name, budget=size, engines=[engine(A, loaded_at=0.0)]) for name in ("w1", "w2")]

    def reasons(waiting: int) -> list[tuple[str, str, str, str]]:
        return _what(
            residency.plan(
                workers=workers, specs=SPECS, pinned=frozenset(), popularity={}, load_s={}, pending=(), policy=POLICY,
                demand={A.name: Demand(waiting=waiting)}, held_back=frozenset(), now=NOW, forecast=forecast,
            )
        )  # fmt: skip

    assert reasons(A.slots + 1) == []
    assert [r[3] for r in reasons(1) if r[0] == "load"] == ["prefetch"]
