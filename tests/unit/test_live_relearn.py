"""Relearning in steps, while judgements go on, comes to what relearning at once comes to, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.learn import live
from shared.learn.live import START, Learner, first_quality
from shared.learn.live_relearn import SteppedLearner

CARDS = ["alpha", "beta", "gamma"]
WIDTH = 6
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("answer"), st.integers(0, 60), st.sampled_from(CARDS), st.integers(0, 1)),
        st.tuples(st.just("again"), st.integers(0, 60), st.sampled_from(CARDS), st.integers(0, 1)),
        st.tuples(st.just("changed"), st.integers(0, 0), st.sampled_from(CARDS), st.integers(0, 1)),
        st.tuples(st.just("use"), st.integers(0, 2), st.just(""), st.just(0)),
        st.tuples(st.just("steps"), st.integers(0, 8), st.just(""), st.just(0)),
    ),
    max_size=60,
)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RESIGN", 4)
    monkeypatch.setattr("shared.learn.relearned.CHUNK", 5)


def begun(kind: Callable[[list[str]], Any]) -> Any:
    learner, draw = kind(CARDS), np.random.default_rng(0)
    made = [first for _ in range(START) if (first := learner.seen(draw.normal(0.0, 1.0, WIDTH))) is not None]
    learner.begin(first_quality(learner.cards, made[0]))
    return learner


def tell(learner: Learner, what: str, i: int, card: str, good: int) -> None:
    x, tokens = np.random.default_rng(i).normal(0.0, 1.0, WIDTH), 20 + 31 * i % 400
    if what == "answer":
        learner.heard(card, x, i % 7 != 0, f"q{i}", tokens)
    if what in {"answer", "again"}:
        learner.judged(card, x, 0.5, float(good), f"q{i}")
    if what == "changed":
        learner.changed(card, 0.5)
    if what == "use":
        learner.use([CARDS[:2], CARDS, [*CARDS, "delta"]][i])


def same(one: Learner, other: Learner) -> None:
    assert one.cards == other.cards
    assert (one.judgements, one.readings, one.signs) == (other.judgements, other.readings, other.signs)
    assert one.patience == other.patience
    assert one.outcomes_to_bytes() == other.outcomes_to_bytes()
    assert one.readings_to_bytes() == other.readings_to_bytes()
    for mine, its in ((one.quality, other.quality), (one.readable, other.readable)):
        assert mine is not None
        assert its is not None
        np.testing.assert_array_equal(mine.sums.zy, its.sums.zy)
        np.testing.assert_array_equal(mine.posterior.mean, its.posterior.mean)
        assert mine.prior == its.prior


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_in_steps_between_which_anything_happens_it_learns_what_it_would_at_once(
    events: list[tuple[str, int, str, int]],
) -> None:
    """What falls due while it relearns is done by the steps that are running."""
    at_once, stepped = begun(Learner), begun(SteppedLearner)
    running: Iterator[None] | None = None
    for what, i, card, good in events:
        if what == "steps":
            for _ in range(i):
                if running is not None and next(running, "end") == "end":
                    running = None
        else:
            tell(at_once, what, i, card, good)
            tell(stepped, what, i, card, good)
        if running is None and stepped.due:
            running = stepped.steps()
            next(running)
    for _ in running or ():
        pass
    assert not stepped.due
    same(stepped, at_once)


def test_what_is_known_meanwhile_is_known_at_once_and_steps_that_are_left_change_nothing() -> None:
    stepped = begun(SteppedLearner)
    for i in range(1, 5):
        tell(stepped, "answer", i, "alpha", 1)
    assert stepped.due
    running = stepped.steps()
    next(running)
    signs, count = stepped.signs, stepped.judgements
    tell(stepped, "answer", 100, "alpha", 1)
    assert stepped.judgements == count + 1
    assert stepped.knows("q100", "alpha")
    with pytest.raises(RuntimeError, match="already"):
        next(stepped.steps())
    running.close()
    assert stepped.due
    assert stepped.signs == signs
    for _ in stepped.steps():
        pass
    assert not stepped.due
    assert stepped.signs != signs
