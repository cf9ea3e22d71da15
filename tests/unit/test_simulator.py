"""The event simulator: every query ends once, joules add up, memory holds, and plain cases match arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.simulator.engine import Result, Simulation, Workload
from services.simulator.fleet import SimFleet, SimModel
from services.simulator.planned import Options, Planned, warm_utilities
from services.simulator.profile import UnitCosts
from services.simulator.residency import ON_DEMAND, Fixed
from services.simulator.routers import Fixed as FixedRouter
from services.simulator.routers import Scored
from shared import messages as m

UNIT = UnitCosts(
    prefill_s=0.001, tpot_s=0.01, slope=0.1, load_s=5.0, prefill_j=0.02, decode_j=0.5, load_j=300.0, token_j=(0.4, 0.1)
)
POLICY = m.Policy(fleet="f", w_latency=0.1, w_energy=0.0)


def _fleet(models: int = 4, workers: int = 1, room: int = 2, slots: int = 4, *, shared: bool = True) -> SimFleet:
    """Models of one size, and workers that hold `room` of them."""
    made = tuple(SimModel(name=f"m{i}", parameters_b=1.0, memory=100, slots=slots) for i in range(models))
    return SimFleet(
        name="test", models=made, workers=tuple(f"w{i}" for i in range(workers)), budget_bytes=(room * 100,) * workers,
        footprint_bytes=(100,) * models, unit=((UNIT,) * workers,) * models, fits=np.ones((models, workers), bool),
        shared=shared, overhead_s=0.0,
    )  # fmt: skip


def _work(arrival_s: list[float], tokens_out: list[float] | float = 100.0, models: int = 4, **more: Any) -> Workload:
    n = len(arrival_s)
    out = (
        np.full((n, models), tokens_out) if np.isscalar(tokens_out) else np.tile(np.array(tokens_out)[:, None], models)
    )
    return Workload(
        arrival_s=np.array(arrival_s, float), row=np.arange(n), tokens_in=np.full(n, 200.0),
        tokens_out=np.asarray(out, float), score=np.ones((n, models)), **more,
    )  # fmt: skip


def _run(fleet: SimFleet, work: Workload, choices: list[int], residency: Any = None, **more: Any) -> Result:
    return Simulation(fleet, work, FixedRouter(np.array(choices)), residency or Fixed(), **more).run()


def test_a_query_alone_takes_its_prompt_and_its_tokens() -> None:
    """Latency is prefill plus tokens times the time of one; the first token comes one step after the prompt."""
    result = _run(_fleet(), _work([1.0]), [0])
    assert result.latency_s[0] == pytest.approx(200 * 0.001 + 100 * 0.01)
    assert result.ttft_s[0] == pytest.approx(0.2 + 0.01)
    assert result.energy_j[0] == pytest.approx(200 * 0.02 + 100 * 0.5)
    assert result.loads == 0


def test_a_batch_shares_steps_and_joules() -> None:
    """Two that start together each read first (one after the other), then go on at the step of a batch of two."""
    result = _run(_fleet(), _work([0.0, 0.0]), [0, 0])
    assert result.latency_s[1] == pytest.approx(0.4 + 100 * 0.01 * 1.1)
    assert result.energy_j[1] == pytest.approx(200 * 0.02 + 100 * (0.4 / 2 + 0.1))


def test_engines_on_one_device_divide_it() -> None:
    """Two models at work on one device take twice as long each; on a device of their own they do not."""
    together = _run(_fleet(shared=True), _work([0.0, 0.0]), [0, 1])
    apart = _run(_fleet(shared=False), _work([0.0, 0.0]), [0, 1])
    assert apart.latency_s.max() == pytest.approx(1.2)
    assert together.latency_s.max() > 1.9 * 1.2


def test_more_queries_than_slots_wait() -> None:
    """With one slot the second starts when the first has ended."""
    result = _run(_fleet(slots=1), _work([0.0, 0.0]), [0, 0])
    assert result.latency_s[1] == pytest.approx(2 * 1.2)


def test_an_absent_model_is_loaded_and_waited_for_once() -> None:
    """Two queries for an absent model wait for one load; the least recently used model made room."""
    result = _run(_fleet(), _work([0.0, 1.0, 10.0, 10.5]), [0, 0, 3, 3], ON_DEMAND["lru"](None, 0))
    assert (result.loads, result.evictions) == (1, 1)
    assert result.latency_s[2] > 5.0
    assert list(result.hit) == [True, True, False, False]
    assert result.load_j == 300.0


def test_each_policy_evicts_by_its_own_rank() -> None:
    """LRU takes the least recent, LFU the least frequent; greedy dual ages what was frequent long ago."""
    frequent_then_recent = _work([0.0, 1.0, 2.0, 20.0, 40.0, 60.0])
    choices = [0, 0, 0, 1, 2, 0]  # model 0 is frequent, model 1 recent, when model 2 comes
    lru = _run(_fleet(), frequent_then_recent, choices, ON_DEMAND["lru"](None, 0))
    lfu = _run(_fleet(), frequent_then_recent, choices, ON_DEMAND["lfu"](None, 0))
    gdsf = _run(_fleet(), frequent_then_recent, choices, ON_DEMAND["gdsf"](None, 0))
    assert not lru.hit[5]
    assert lfu.hit[5]
    assert gdsf.hit[5]
    alternating = _work([float(20 * i) for i in range(12)])
    later = [0, 0, 0, 1, 2, 1, 2, 1, 2, 1, 2, 1]  # model 0 was frequent once
    aged = _run(_fleet(), alternating, later, ON_DEMAND["gdsf"](None, 0))
    kept = _run(_fleet(), alternating, later, ON_DEMAND["lfu"](None, 0))
    assert aged.loads < kept.loads


def test_an_unread_answer_is_asked_again_and_both_attempts_count() -> None:
    """Latency and energy of a cascade are the sums of its attempts."""
    work = _work([0.0])
    router = Scored(
        np.array([[0.9, 0.5, 0.1, 0.1]]), work.tokens_in, work.tokens_out, POLICY,
        escalate=lambda _i, model, attempt: 1 if model == 0 and attempt == 1 else -1,
    )  # fmt: skip
    result = Simulation(_fleet(room=4), work, router, Fixed()).run()
    assert (result.model[0], result.attempts[0]) == (1, 2)
    assert result.latency_s[0] == pytest.approx(2 * 1.2)
    assert result.energy_j[0] == pytest.approx(2 * 54.0)


def test_a_query_that_can_never_end_is_an_error() -> None:
    """Fixed residency refuses a model that is not there."""
    with pytest.raises(RuntimeError, match="m3 is not resident"):
        _run(_fleet(), _work([0.0]), [3])


queries = st.lists(
    st.tuples(st.floats(0, 200), st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=40
)  # fmt: skip
policies = st.sampled_from(["lru", "lfu", "gdsf", "planned", "joint"])


@settings(max_examples=60, deadline=None)
@given(queries, policies, st.integers(1, 2), st.integers(1, 3), st.integers(1, 4))
def test_whatever_happens_queries_joules_and_bytes_are_conserved(
    asked: list[tuple[float, int, int]], policy: str, workers: int, room: int, slots: int
) -> None:
    """Every query ends once with its own latency and energy; engines' joules are the queries' joules; no worker ever
    holds more than its memory; the same input gives the same result."""
    asked = sorted(asked)
    fleet = _fleet(workers=workers, room=room, slots=slots)
    work = _work([a for a, _, _ in asked], [float(t) for _, t, _ in asked])
    choices = np.array([c for _, _, c in asked])

    def run() -> Result:
        quality = np.full((len(asked), 4), 0.2)
        quality[np.arange(len(asked)), choices] = 0.9
        warm = warm_utilities(fleet, quality, work.tokens_in, work.tokens_out, POLICY)
        router: Any = FixedRouter(choices)
        if policy == "joint":
            router = Scored(quality, work.tokens_in, work.tokens_out, POLICY)
        if policy in ON_DEMAND:
            keeper: Any = ON_DEMAND[policy](None, 0)
        else:
            missed = np.eye(4) - 1.0
            rows = (lambda i, _m: warm[i]) if policy == "joint" else (lambda _i, model: missed[model])
            keeper = Planned(rows, [0.0] * 4, work.arrival_s, second_cost=0.01 * (policy == "joint"), options=Options())
        return Simulation(fleet, work, router, keeper, joint=policy == "joint").run()

    result = run()
    assert (result.latency_s > 0.0).all()
    assert (result.model >= 0).all()
    assert (result.attempts == 1).all()
    alone = 200 * UNIT.prefill_s + work.tokens_out[:, 0] * UNIT.tpot_s
    assert (result.latency_s >= alone - 1e-6).all()
    assert result.energy_j.sum() == pytest.approx(result.engine_j)
    assert all(peak <= budget for peak, budget in zip(result.peak_bytes, fleet.budget_bytes, strict=True))
    if policy != "joint":
        assert (result.model == choices).all()
    again = run()
    np.testing.assert_array_equal(result.latency_s, again.latency_s)
    np.testing.assert_array_equal(result.model, again.model)


@pytest.mark.parametrize("seed", [1, 12, 14])
def test_an_eviction_in_a_pass_does_not_give_its_memory_away_twice(seed: int) -> None:
    """Freeing memory asks for what is wanted, in the middle of the pass that freed it for something else: the load it
    was freed for still comes, and every query ends."""
    rng = np.random.default_rng(seed)
    arrival_s, choices = np.cumsum(rng.exponential(1.0, 60)), rng.integers(0, 5, 60)
    missed = np.eye(5) - 1.0
    keeper = Planned(
        lambda _i, model: missed[model], [0.0] * 5, arrival_s, choices=choices,
        options=Options(foresight_s=60.0, patience=0.3),
    )  # fmt: skip
    work = _work(arrival_s.tolist(), models=5)
    result = Simulation(_fleet(models=5, room=3), work, FixedRouter(choices), keeper, joint=False).run()
    assert (result.latency_s > 0.0).all()


def test_what_is_resident_from_the_start_may_make_room_at_once() -> None:
    """Minimum residence counts from a load; what was there before the first query has been there long enough."""
    sim = Simulation(_fleet(room=1), _work([0.0]), FixedRouter(np.array([0])), Fixed())
    assert sim.place(0, 0)
    assert sim.engines[0][0].since == float("-inf")


def test_a_model_that_one_engine_cannot_serve_gets_a_second_worker_ahead_of_the_queue() -> None:
    """Two workers, all queries for one model, arriving a little faster than one engine serves with full batches."""
    arrival_s = np.arange(400) * 0.3
    work = _work(arrival_s.tolist(), models=2)

    def run(options: Options) -> Result:
        fleet = _fleet(models=2, workers=2, room=1)
        keeper = Planned(lambda _i, model: np.eye(2)[model], [0.0] * 2, arrival_s, order=(), options=options)
        sim = Simulation(fleet, work, FixedRouter(np.zeros(400, int)), keeper)
        sim.place(0, 0)
        sim.place(1, 1)
        return sim.run()

    result = run(Options(min_residence_s=1.0))
    assert result.loads == 1
    assert result.latency_s[200:].mean() < 3.0  # one engine: service of 0.525 s for each, and the queue grows for ever
