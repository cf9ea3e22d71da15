"""The dual controller: prices that hold stated objectives, on a queueing system in virtual time."""

from __future__ import annotations

import dataclasses
import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.decide import dual
from shared import messages as m
from tests.unit.queue_model import run

POLICY = m.Policy(fleet="f", w_latency=0.05, w_energy=0.01)
S, J = 8.0, 13.0
BOTH = m.Objectives(latency_p95_s=S, energy_j_per_query=J)
QUERIES = 3000
positive = st.floats(1e-3, 1e3)


def test_both_objectives_hold_within_five_per_cent_after_500_queries_and_after_the_load_has_doubled() -> None:
    for seed in (1, 2):
        result = run((2.0, 4.0), POLICY, BOTH, queries=QUERIES, seed=seed)
        for begin in (500, QUERIES + 500):
            end = begin + QUERIES - 500
            assert result.p95(begin, end) <= 1.05 * S
            assert result.energy(begin, end) <= 1.05 * J


def test_its_quality_is_within_two_hundredths_of_the_best_fixed_weights_that_hold_the_same_objectives() -> None:
    grid = (0.02, 0.1, 0.3, 1.0)
    best = 0.0
    for w_l, w_e in itertools.product(grid, grid):
        fixed = msgspec.structs.replace(POLICY, w_latency=w_l, w_energy=w_e, latency_slo_s=S, energy_ref_j=J)
        result = run((2.0,), fixed, None, queries=QUERIES, seed=5)
        if result.p95(500, QUERIES) <= S and result.energy(500, QUERIES) <= J:
            best = max(best, result.quality(500, QUERIES))
    ours = run((2.0,), POLICY, BOTH, queries=QUERIES, seed=5)
    assert best > 0.0
    assert ours.quality(500, QUERIES) >= best - 0.02


def test_an_objective_that_is_slack_leaves_the_fleets_own_weights() -> None:
    """Prices fall to their lower bound; over so large scales that is routing by quality alone."""
    loose = m.Objectives(latency_p95_s=1e4, energy_j_per_query=1e6)
    result = run((0.2,), POLICY, loose, queries=1500)
    assert result.quality(1000, 1500) == pytest.approx(
        sum(max(q) for q in zip((0.35, 0.30, 0.50, 0.20), (0.60, 0.55, 0.55, 0.65), strict=True)) / 4, abs=0.02
    )


def test_an_objective_that_no_policy_can_hold_is_reported_and_its_price_turns_at_once_when_it_is_eased() -> None:
    """Anti-windup: the integral waits at its bound."""
    state = dual.start(POLICY)
    hard = m.Objectives(energy_j_per_query=1.0)
    one = dual.Decided(at=1.0, latency_s=1.0, energy_j=5.0)
    for at in range(1, 2000):
        one = dataclasses.replace(one, at=float(at))
        state = dual.ended(dual.decided(state, hard, one), hard, dual.Ended(1.0, 5.0, one))
    assert dual.held(state, hard).infeasible == ("energy_j",)
    assert dual.weights(state, hard, POLICY).w_energy == pytest.approx(dual.HIGHEST["energy"])
    eased = m.Objectives(energy_j_per_query=20.0)
    before = dual.weights(state, eased, POLICY).w_energy
    for at in range(2000, 2300):
        state = dual.decided(state, eased, dataclasses.replace(one, at=float(at)))
        state = dual.ended(state, eased, dual.Ended(1.0, 5.0, one))
    assert dual.weights(state, eased, POLICY).w_energy < before / 2


def test_predictions_that_are_wrong_by_a_factor_are_corrected_by_what_ends() -> None:
    """Every query takes twice the predicted energy; the objective still holds for what is really spent."""
    state, objectives = dual.start(POLICY), m.Objectives(energy_j_per_query=10.0)
    spent: list[float] = []
    for at in range(1, 3000):
        w = dual.weights(state, objectives, POLICY)
        cards = [(0.4, 3.0), (0.5, 9.0)]  # quality and predicted joules; 6 and 18 J really
        q, e = max(cards, key=lambda c: c[0] - w.w_energy * c[1] / w.energy_ref_j)
        one = dual.Decided(at=float(at), latency_s=1.0, energy_j=e, quality=q)
        state = dual.ended(dual.decided(state, objectives, one), objectives, dual.Ended(1.0, 2 * e, one))
        spent.append(2 * e)
    assert sum(spent[500:]) / len(spent[500:]) == pytest.approx(10.0, rel=0.05)


def test_a_quality_floor_raises_the_weight_of_quality() -> None:
    objectives = m.Objectives(min_quality_ratio=0.95, reference="big")
    state = dual.start(POLICY)
    for at in range(1, 400):
        state = dual.decided(state, objectives, dual.Decided(float(at), 1.0, 1.0, quality=0.4, reference=0.6))
    assert dual.weights(state, objectives, POLICY).w_quality > 2.0
    for at in range(400, 2000):
        state = dual.decided(state, objectives, dual.Decided(float(at), 1.0, 1.0, quality=0.6, reference=0.4))
    assert dual.weights(state, objectives, POLICY).w_quality == pytest.approx(POLICY.w_quality)


def test_a_power_objective_gives_each_query_its_share_at_the_present_rate() -> None:
    state, objectives = dual.start(POLICY), m.Objectives(energy_j_per_hour=3600.0)
    for at in range(1, 2000):
        state = dual.decided(state, objectives, dual.Decided(at * 0.5, 1.0, 1.0))
    assert dual.energy_limit_j(objectives, state.gap_s) == pytest.approx(0.5, rel=0.01)


def test_weights_without_objectives_are_the_fleets_own() -> None:
    state = dual.start(POLICY)
    for at in range(1, 100):
        state = dual.decided(state, m.Objectives(), dual.Decided(float(at), 100.0, 1e6))
    assert dual.weights(state, m.Objectives(), POLICY) == POLICY


def test_the_share_aimed_at_leaves_room_for_the_scatter_of_a_window() -> None:
    a = dual.exceedance_target()
    assert a + dual.CONFIDENCE_Z * math.sqrt(a * 0.95 / dual.WINDOW) == pytest.approx(dual.TAIL)


def test_a_small_move_is_not_told_and_a_changed_objective_is() -> None:
    told = msgspec.structs.replace(POLICY, w_latency=0.3)
    assert not dual.told(told, msgspec.structs.replace(told, w_latency=0.303))
    assert dual.told(told, msgspec.structs.replace(told, w_latency=0.31))
    assert dual.told(told, msgspec.structs.replace(told, latency_slo_s=1.0))
    assert dual.told(None, told)


@given(st.lists(st.tuples(positive, positive, positive, positive), max_size=60), positive, positive)
def test_prices_stay_within_their_bounds_and_the_same_input_gives_the_same_state(
    seen: list[tuple[float, float, float, float]], limit_s: float, limit_j: float
) -> None:
    objectives = m.Objectives(latency_p95_s=limit_s, energy_j_per_query=limit_j, min_quality_ratio=1.0, reference="r")

    def play() -> dual.State:
        state = dual.start(POLICY)
        for at, (predicted_s, predicted_j, latency, energy) in enumerate(seen, start=1):
            one = dual.Decided(float(at), predicted_s, predicted_j, quality=0.5, reference=0.5)
            state = dual.ended(dual.decided(state, objectives, one), objectives, dual.Ended(latency, energy, one))
        return state

    state = play()
    assert state == play()
    w = dual.weights(state, objectives, POLICY)
    for name, value in (("latency", w.w_latency), ("energy", w.w_energy), ("quality", w.w_quality)):
        lowest, highest = getattr(POLICY, f"w_{name}"), dual.HIGHEST[name]
        assert lowest * (1 - 1e-9) <= value <= highest * (1 + 1e-9)
    assert dual.LEAST_SPREAD <= state.spread <= dual.GREATEST_SPREAD


@given(positive, st.floats(1.001, 10.0), st.sampled_from([0.1, 0.5, 1.5]))
def test_the_probability_of_being_late_grows_with_the_prediction(ratio: float, factor: float, spread: float) -> None:
    assert 0.0 <= dual.late_probability(ratio, spread) <= dual.late_probability(ratio * factor, spread) <= 1.0
    assert dual.late_probability(1.0, spread) == pytest.approx(0.5)
