"""Plans of whom to ask, one after the other: worth what they say, and never worse than one answer."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.learn import live_cascade
from shared.learn.live_cascade import MOST, Offers, Plan, plan

PART = st.floats(0.05, 0.95)
OFFER = st.tuples(
    PART, st.floats(0.2, 1.0), st.floats(-0.5, 0.5), st.floats(0.0, 2.5), st.floats(0.1, 9.0), st.floats(0.0, 0.3)
)


def delay(seconds: float) -> float:
    return 0.1 * math.log2(1.0 + seconds / 5.0)


def offers(*rows: tuple[float, float, float, float, float, float]) -> Offers:
    return Offers(*(np.array(column) for column in zip(*rows, strict=True)))


SMALL = (0.6, 1.0, 0.0, 1.5, 1.0, 0.01)
LARGE = (0.75, 1.0, 0.0, 1.5, 4.0, 0.1)


def cards(found: Plan) -> list[int]:
    return [step.index for step in found.steps]


def test_the_cheap_card_is_asked_first_where_its_confidence_tells_and_the_dear_one_where_it_does_not() -> None:
    found = plan(offers(SMALL, LARGE), 1.0, delay)
    assert cards(found) == [0, 1]
    assert 0.3 < found.steps[0].below < 0.7
    assert 0.1 < found.steps[1].reached < 0.7
    assert found.steps[1].chance < 0.75  # what the small one is unsure of is harder for the large one too
    blind = plan(offers((*SMALL[:3], 0.0, *SMALL[4:]), LARGE), 1.0, delay)
    assert blind.steps[0].reached == 1.0
    assert len(blind.steps) == 1 or blind.steps[1].reached == pytest.approx(0.0)


def test_a_dearer_attempt_is_asked_for_less() -> None:
    below = []
    for price in (0.0, 0.05, 0.1, 0.2, 0.4):
        found = plan(offers(SMALL, (*LARGE[:5], price)), 1.0, delay, first=0)
        below.append(found.steps[0].below)
    assert below == sorted(below, reverse=True)
    assert below[-1] < below[0]


def test_an_answer_that_cannot_be_read_is_handed_on_without_any_judgement() -> None:
    found = plan(offers((0.6, 0.5, 0.0, 0.0, 1.0, 0.01), (0.6, 0.9, 0.0, 0.0, 1.0, 0.02)), 1.0, delay, first=0)
    assert cards(found) == [0, 1]
    assert found.steps[1].reached == pytest.approx(0.5)


@given(st.lists(OFFER, min_size=1, max_size=6))
def test_a_plan_is_never_worth_less_than_its_best_single_answer(
    rows: list[tuple[float, float, float, float, float, float]],
) -> None:
    """Each card at most once, no more attempts than are allowed, the last is not followed."""
    given_ = offers(*rows)
    found = plan(given_, 1.0, delay)
    singles = [plan(offers(row), 1.0, delay).worth for row in rows]
    assert found.worth >= max(singles) - 1e-9
    assert len(set(cards(found))) == len(found.steps) <= min(MOST, len(rows))
    assert found.steps[-1].below == 0.0
    assert all(step.below > 0.0 for step in found.steps[:-1])
    reached = [step.reached for step in found.steps]
    assert reached[0] == 1.0
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(reached))


def test_what_a_plan_is_worth_is_what_carrying_it_out_comes_to() -> None:
    """Against draws: confidences at random, answers handed on by the plan's rule, the likeliest given."""
    given_ = offers(SMALL, (0.7, 0.9, 0.2, 1.0, 2.0, 0.05), LARGE)
    found = plan(given_, 1.0, delay)
    rng, total, n = np.random.default_rng(0), 0.0, 20_000
    for _ in range(n):
        best, shift, elapsed = 0.0, 0.0, 0.0
        for step in found.steps:
            q = min(max(given_.quality[step.index] - shift, 0.02), 0.98)
            at = math.log(q / (1.0 - q)) + given_.level[step.index] + given_.slope[step.index] * rng.normal()
            p = 1.0 / (1.0 + math.exp(-at)) if rng.random() < given_.readable[step.index] else 0.0
            after = elapsed + given_.latency_s[step.index]
            total -= given_.price[step.index] + delay(after) - delay(elapsed)
            elapsed, best = after, max(best, p)
            shift = live_cascade.KINSHIP * max(given_.quality[step.index] - p, 0.0)
            if best >= step.below:
                break
        total += best
    assert found.worth == pytest.approx(total / n, abs=0.02)


def test_time_energy_and_cards_that_say_the_same_bound_a_plan() -> None:
    free = offers(SMALL, LARGE)
    assert len(plan(free, 1.0, delay, left_s=5.5).steps) == 2
    assert len(plan(free, 1.0, delay, left_s=4.5).steps) == 1
    joules = np.array([1.0, 9.0])
    assert len(plan(free, 1.0, delay, joules=joules, most_j=10.5).steps) == 2
    assert len(plan(free, 1.0, delay, joules=joules, most_j=9.5).steps) == 1
    twins = replace(free, alike=np.ones((2, 2), bool))
    assert len(plan(twins, 1.0, delay).steps) == 1
