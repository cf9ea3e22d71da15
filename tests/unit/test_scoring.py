"""The scoring core: agreement of its ways in, monotonicity, what a load and a slot cost others."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.planner.decide import scoring
from services.planner.decide.scoring import Costs, Fleet, Limits
from shared import messages as m

ARTIFACTS, WORKERS = 3, 2
seconds = st.floats(0.001, 50.0)


def _fleet(seed: int = 0, **more: Any) -> Fleet:
    rng = np.random.default_rng(seed)
    shape = (ARTIFACTS, WORKERS)
    costs = Costs(
        prefill_s=rng.uniform(1e-4, 1e-2, shape), tpot_s=rng.uniform(1e-3, 0.1, shape), slope=np.full(shape, 0.2),
        load_s=rng.uniform(1, 10, shape), prefill_j=rng.uniform(0, 0.1, shape), decode_j=rng.uniform(0.1, 1, shape),
        load_j=rng.uniform(10, 500, shape),
    )  # fmt: skip
    fits = np.ones(shape, bool)
    return Fleet("abc", ("w1", "w2"), costs, [4] * ARTIFACTS, fits, shared=(False, False), **more)


def _policy(wq: float = 1.0, wl: float = 0.3, we: float = 0.1) -> m.Policy:
    return m.Policy(fleet="f", w_quality=wq, w_latency=wl, w_energy=we)


states = st.lists(
    st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 20)),
    min_size=ARTIFACTS * WORKERS, max_size=ARTIFACTS * WORKERS,
)  # fmt: skip


@settings(max_examples=60)
@given(st.integers(0, 99), states, st.integers(1, 900), st.lists(st.floats(1, 800), min_size=3, max_size=3))
def test_the_lean_way_and_the_explained_way_agree(
    seed: int, state: list[tuple[bool, int, int]], tokens_in: int, tokens_out: list[float]
) -> None:
    """`utilities` (simulation) and `score` (live) give the same utility and worker, whatever the state."""
    fleet = _fleet(seed)
    for k, (ready, active, waiting) in enumerate(state):
        fleet.set_state(*divmod(k, WORKERS), ready=ready, active=active if ready else 0, waiting=waiting)
    q, out = np.array([0.2, 0.5, 0.4]), np.array(tokens_out)
    lean = fleet.utilities(q[:, None], tokens_in, out[:, None], _policy(), 0.0).copy()
    full = scoring.score(fleet, np.arange(3), q, np.full(3, tokens_in), out, _policy())
    np.testing.assert_allclose(lean.max(axis=1), full.utility, rtol=1e-9, atol=1e-9)
    assert (lean.argmax(axis=1) == full.worker).all()
    parts = full.u_quality + full.u_latency + full.u_energy + full.u_crowding + full.u_burden
    np.testing.assert_allclose(parts, full.utility, atol=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 99), states)
def test_telling_all_at_once_equals_telling_one_by_one(seed: int, state: list[tuple[bool, int, int]]) -> None:
    """`set_all` writes what `set_state` writes for each pair."""
    one, all_ = _fleet(seed), _fleet(seed)
    ready = np.array([s[0] for s in state]).reshape(ARTIFACTS, WORKERS)
    active = np.array([s[1] if s[0] else 0 for s in state], float).reshape(ARTIFACTS, WORKERS)
    waiting = np.array([s[2] for s in state], float).reshape(ARTIFACTS, WORKERS)
    for a, w in np.ndindex(ARTIFACTS, WORKERS):
        one.set_state(a, w, ready=bool(ready[a, w]), active=int(active[a, w]), waiting=int(waiting[a, w]))
    all_.set_all(ready=ready, coming=np.zeros_like(ready), active=active, waiting=waiting)
    for name in ("wait_s", "step_s", "load_s", "load_j", "crowd_s", "burden"):
        np.testing.assert_allclose(getattr(one, name), getattr(all_, name), err_msg=name)


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1), st.floats(1, 500), st.floats(0, 500))
def test_utility_rises_with_quality_and_falls_with_length(
    seed: int, q: float, more_q: float, tokens: float, more_tokens: float
) -> None:
    """Better predicted answers never score lower; longer ones, which take more time and energy, never higher."""
    fleet = _fleet(seed)

    def u(quality: float, length: float) -> Any:
        return fleet.utilities(np.full((3, 1), quality), 100, np.full((3, 1), length), _policy(), 0.0).copy()

    base = u(q, tokens)
    assert (u(q + more_q, tokens) >= base).all()
    assert (u(q, tokens + more_tokens) <= base).all()


@given(st.integers(0, 9), st.integers(0, 20), st.floats(0, 5), st.floats(0, 30))
def test_utility_falls_with_waiting_burden_and_delay(seed: int, waiting: int, burden: float, delay_s: float) -> None:
    """A longer queue at a resident model, and a dearer or later load of an absent one, never raise the utility."""

    def u(**state: Any) -> float:
        fleet = _fleet(seed)
        fleet.set_state(0, 0, **state)
        return float(fleet.utilities(np.full((3, 1), 0.5), 50, np.full((3, 1), 80.0), _policy(), 0.0)[0, 0])

    ready = {"ready": True, "active": 4}
    assert u(**ready, waiting=waiting + 1) <= u(**ready, waiting=waiting)
    cold = {"ready": False, "active": 0, "waiting": 0}
    assert u(**cold, burden=burden, delay_s=delay_s) <= u(**cold)
    assert u(**cold) < u(ready=True, active=0, waiting=0)


def test_queries_that_wait_share_a_load() -> None:
    """The second who waits for a model answers for half of the load's energy and of what it costs others."""
    fleet = _fleet()
    fleet.set_state(0, 0, ready=False, active=0, waiting=0, burden=2.0)
    alone_j, alone = fleet.load_j[0, 0], fleet.burden[0, 0]
    fleet.set_state(0, 0, ready=False, active=0, waiting=1, burden=2.0)
    assert fleet.load_j[0, 0] == alone_j / 2
    assert fleet.burden[0, 0] == alone / 2


def test_a_load_under_way_is_waited_for_only_as_long_as_it_still_takes() -> None:
    """What is left of a load shrinks with the clock, and its energy is spent in any case."""
    fleet = _fleet()
    fleet.set_state(0, 0, ready=False, active=0, waiting=0, ready_at=10.0)
    fleet.clock(4.0)
    assert fleet.wait_s[0, 0] == 6.0
    assert fleet.load_j[0, 0] == 0.0
    fleet.clock(12.0)
    assert fleet.wait_s[0, 0] == 0.0


def test_a_worker_that_keeps_the_limits_is_taken_before_one_that_does_not() -> None:
    """The slow and frugal worker is preferred, until the query's latency limit excludes it."""
    shape = (1, 2)
    costs = Costs(
        prefill_s=np.zeros(shape), tpot_s=np.array([[0.1, 0.01]]), slope=np.zeros(shape), load_s=np.zeros(shape),
        prefill_j=np.zeros(shape), decode_j=np.array([[0.1, 5.0]]), load_j=np.zeros(shape),
    )  # fmt: skip
    fleet = Fleet(("a",), ("slow", "fast"), costs, [4], np.ones(shape, bool), shared=(False, False))
    arguments = (fleet, np.array([0]), np.array([0.5]), np.array([10]), np.array([100.0]), _policy(wl=0.01, we=1.0))
    assert scoring.score(*arguments).worker[0] == 0
    assert scoring.score(*arguments, Limits(max_latency_s=2.0)).worker[0] == 1


def test_blind_scoring_sees_no_queue_and_no_load() -> None:
    """With `joint` off, utility depends on the query alone."""
    fleet = _fleet(joint=False)
    before = fleet.utilities(np.full((3, 1), 0.5), 50, np.full((3, 1), 80.0), _policy(), 0.0).copy()
    fleet.set_state(0, 0, ready=False, active=0, waiting=50, burden=9.0)
    np.testing.assert_array_equal(
        before, fleet.utilities(np.full((3, 1), 0.5), 50, np.full((3, 1), 80.0), _policy(), 0.0)
    )
