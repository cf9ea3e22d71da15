"""Limits of length: where they are set, and what cutting off does to recorded outcomes."""

from __future__ import annotations

import numpy as np
import pytest

from bench.sim.budget import Allowance
from bench.sim.data import Outcomes
from shared.learn import patience


def world(n: int = 2000, tail_right: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """[n, 1] tokens and scores: nine answers in ten are of 100 tokens or so and right in 0.6; the others go on."""
    rng = np.random.default_rng(3)
    rambles = rng.random(n) < 0.1
    tokens = np.where(rambles, rng.uniform(400, 2000, n), rng.uniform(60, 140, n))
    score = (rng.random(n) < np.where(rambles, tail_right, 0.6)).astype(float)
    return tokens[:, None], score[:, None]


def test_a_rambling_answer_is_cut_off_where_others_would_be_right_more_often() -> None:
    """At the least length that separates it from an ordinary one, for no ordinary answer ends beyond."""
    tokens, score = world()
    found = patience.limits(tokens, score, np.full(score.shape, 0.4), np.zeros(1))
    assert 3 * np.median(tokens) <= found[0] < 420


def test_nobody_is_cut_off_who_is_worth_waiting_for() -> None:
    """A long answer that is right is waited for, at no price; a price on tokens can change that."""
    tokens, score = world(tail_right=0.9)
    elsewhere = np.full(score.shape, 0.4)
    assert np.isinf(patience.limits(tokens, score, elsewhere, np.zeros(1))[0])
    assert np.isfinite(patience.limits(tokens, score, elsewhere, np.full(1, 0.001))[0])


def test_what_was_not_asked_or_has_no_alternative_says_nothing() -> None:
    """NaN rows are left out, a model without any other stays without a limit, and so does one without a tail."""
    tokens, score = world()
    wide = np.hstack([tokens, np.full_like(tokens, np.nan), np.full_like(tokens, 90.0)])
    scores = np.hstack([score, np.full_like(score, np.nan), score])
    found = patience.limits(wide, scores, np.full(scores.shape, 0.4), np.zeros(3))
    assert np.isfinite(found[0])
    assert np.isinf(found[1:]).all()
    assert np.isinf(patience.limits(tokens, score, np.full(score.shape, np.nan), np.zeros(1))).all()


def outcomes() -> Outcomes:
    answer = np.array([["A", "B"], ["C", ""], ["D", "A"]])
    return Outcomes(
        ids=("1", "2", "3"), prompts=("", "", ""), categories=(None, None, None), models=("x", "y"),
        score=np.array([[1, 1], [1, 0], [np.nan, 1]], np.float32), answer=answer, answered=answer != "",
        tokens_in=np.ones(3, np.float32), tokens_out=np.array([[10, 300], [50, 30], [np.nan, 40]], np.float32),
    )  # fmt: skip


def test_cutting_off_takes_the_answer_and_the_tokens_beyond() -> None:
    """What ends at the limit is whole; what would go on is unread, worth nothing, and has taken the limit's tokens."""
    cut = outcomes().cut_off(np.array([50.0, 100.0]))
    np.testing.assert_array_equal(cut.tokens_out, np.array([[10, 100], [50, 30], [np.nan, 40]], np.float32))
    np.testing.assert_array_equal(cut.score, np.array([[1, 0], [1, 0], [np.nan, 1]], np.float32))
    assert cut.answer is not None
    assert cut.answer.tolist() == [["A", ""], ["C", ""], ["D", "A"]]
    assert cut.answered is not None
    assert cut.answered.tolist() == [[True, False], [True, False], [True, True]]


@pytest.mark.parametrize("wrote", [400.0, 399.0])
def test_what_the_reference_would_have_written_is_not_what_it_was_cut_off_at(wrote: float) -> None:
    """Where it was cut off, its mean beyond the limit counts; one token earlier, what it wrote."""
    rng = np.random.default_rng(0)
    real = np.where(rng.random(3000) < 0.05, 2000.0, 100.0)
    said = np.full(3000, real.mean())
    allowance = Allowance.fit(
        said, real, said[:, None], np.minimum(real, 400.0)[:, None], np.ones((3000, 1), bool), 0,
        token_j=2.0, alone=said, predicted=said[:, None], count=3000, limit=400.0,
    )  # fmt: skip
    assert allowance.after(0, [0], np.array([wrote])) == pytest.approx(2.0 * (2000.0 if wrote >= 400.0 else wrote))
