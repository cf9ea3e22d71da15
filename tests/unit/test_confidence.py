"""What confidences say: learned from few judgements without going astray, kept, told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.chance import chance, logit
from shared.learn import confidence
from shared.learn.confidence import Confidences, Line, fit

JUDGED = st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 0), st.floats(0, 1)), max_size=30)


def taught(n: int, slope: float, seed: int = 0) -> Confidences:
    """Answers of two cards; alpha's confidence says something, beta's does not. Quality 0.6 throughout."""
    rng, found = np.random.default_rng(seed), Confidences(["alpha", "beta"])
    for i in range(n):
        c = float(rng.normal(-0.4, 0.2))
        right = rng.random() < chance(logit(0.6), slope, (c + 0.4) / 0.2)
        for card, score in (("alpha", float(right)), ("beta", float(rng.random() < 0.6))):
            found.heard(card, c)
            found.judged(card, 0.6, c, score, f"q{i}")
    return found


def test_what_confidence_says_is_learned_for_the_card_whose_it_is() -> None:
    found = taught(500, 1.2).lines
    assert found["alpha"].slope == pytest.approx(1.2, abs=0.3)
    assert found["beta"].slope < 0.25
    assert found["alpha"].chance(0.6, -0.8) < 0.25
    assert found["alpha"].chance(0.6, 0.0) > 0.8
    assert found["beta"].chance(0.6, -0.8) == pytest.approx(0.6, abs=0.15)


def test_chances_are_calibrated_on_answers_that_were_not_learned_from() -> None:
    """Mean predicted chance against the share that is right, in thirds of the answers by chance."""
    line, rng = taught(300, 1.0).lines["alpha"], np.random.default_rng(99)
    c = rng.normal(-0.4, 0.2, 6000)
    right = rng.random(6000) < [chance(logit(0.6), 1.0, (one + 0.4) / 0.2) for one in c]
    said = np.array([line.chance(0.6, float(one)) for one in c])
    for part in np.array_split(np.argsort(said), 3):
        assert said[part].mean() == pytest.approx(right[part].mean(), abs=0.08)


def test_before_judgements_the_chance_is_what_was_predicted_and_few_hardly_move_it() -> None:
    assert Line().chance(0.7, -3.0) == pytest.approx(0.7)
    assert Confidences(["alpha"]).lines == {}
    found = Confidences(["alpha"])
    for i, (c, score) in enumerate([(-0.1, 1.0), (-0.2, 1.0), (-0.9, 0.0)]):
        found.heard("alpha", c)
        found.judged("alpha", 0.7, c, score, f"q{i}")
    assert 0.35 < found.lines["alpha"].chance(0.7, -0.9) < 0.7


@given(JUDGED)
def test_a_higher_confidence_never_makes_an_answer_less_likely_right(judged: list[tuple[float, float, float]]) -> None:
    found = Confidences(["alpha"])
    for i, (quality, c, score) in enumerate(judged):
        found.heard("alpha", c)
        assert found.judged("alpha", quality, c, score, f"q{i}")
    for line in found.lines.values():
        said = [line.chance(0.5, c) for c in (-5.0, -2.0, -1.0, 0.0)]
        assert said == sorted(said)
        assert all(0.0 <= p <= 1.0 for p in said)


@given(st.integers(0, 2000), st.integers(1, 40))
def test_the_fit_is_the_most_probable_line(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    offset, z, score = rng.normal(0, 1.5, n), rng.normal(0, 3, n), rng.random(n)

    def value(level: float, slope: float) -> float:
        at = offset + level + slope * z
        prior = (level / confidence.LEVEL) ** 2 + (slope / confidence.SLOPE) ** 2
        return float((score * at - np.logaddexp(0, at)).sum() - 0.5 * prior)

    level, slope = fit(offset, z, score)
    assert slope >= 0.0
    for d_level, d_slope in rng.normal(0, 0.1, (20, 2)):
        if slope + d_slope >= 0.0:
            assert value(level, slope) >= value(level + d_level, slope + d_slope) - 1e-9


def test_a_second_judgement_takes_the_place_of_the_first_and_all_of_it_is_kept() -> None:
    found = taught(40, 1.0)
    found.judged("alpha", 0.6, -0.4, 0.0, "q1")
    found.judged("alpha", 0.6, -0.4, 1.0, "q1")
    assert found.judgements == 80
    again = Confidences.from_bytes(found.to_bytes())
    assert (again.lines, again.judgements) == (found.lines, 80)
    assert confidence.heard(confidence.told(found.lines)) == found.lines
    again.use(["beta", "gamma"])
    assert set(again.lines) == {"beta"}
    again.changed("beta")
    assert again.lines == {}
    assert not again.judged("alpha", 0.5, -0.1, 1.0, "q2")
    assert not again.judged("beta", 0.5, float("nan"), 1.0, "q2")
    for read in (Confidences.from_bytes, confidence.heard):
        with pytest.raises(ValueError, match="no"):
            read(b"nonsense")
