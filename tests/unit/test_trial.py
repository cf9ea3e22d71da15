"""Weights on trial: what they would choose, exact propensities, how a trial ends, and what it is judged to be worth."""

from __future__ import annotations

import argparse

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli import options, policy
from services.cli import trial as shown
from services.planner.decide import objectives, routing, trial
from services.planner.decide.routing import Chance, State
from shared import messages as m
from shared.errors import InvalidObjective
from shared.learn import trial as core
from tests.samples import analyzed, card, engine, spec, worker

POLICY = m.Policy(fleet="f", w_quality=1.0, w_latency=0.3, w_energy=0.1, latency_slo_s=5.0, energy_ref_j=50.0)
CARDS = (
    card("small", spec("small-int8", weights=10**8), quality=0.4),
    card("middle", spec("middle-int8", weights=2 * 10**8), quality=0.5),
    card("large", spec("large-int8", weights=4 * 10**8), quality=0.62),
)
weight = st.floats(0.0, 3.0)


def _state(tried: m.Trial | None, policy: m.Policy = POLICY) -> State:
    return State(
        cards={c.name: c for c in CARDS}, policy=policy, workers=[worker(engines=[engine(c.artifact) for c in CARDS])],
        trial=tried,
    )  # fmt: skip


def _chance(uniform: float) -> Chance:
    return Chance(np.zeros((4, len(CARDS))), uniform)


def _try(**more: object) -> m.Control:
    values = {"w_latency": 2.0, **more}
    return m.Control(action="try", objectives=m.Objectives(**values), share=0.25)  # type: ignore[arg-type]


@given(weight, weight, weight)
def test_weights_on_trial_choose_what_they_would_choose_in_force(w_q: float, w_l: float, w_e: float) -> None:
    """What is noted as the candidate's choice is what routing chooses once they are promoted."""
    tried = m.Trial(version=1, w_quality=w_q, w_latency=w_l, w_energy=w_e)
    noted = routing.decide(analyzed(), _state(tried), 0.0, _chance(0.5)).trial
    assert noted is not None
    then = routing.decide(analyzed(), _state(None, objectives.own(POLICY, tried)), 0.0)
    best = {c.card for c in then.candidates if c.utility >= max(x.utility for x in then.candidates) - 1e-6}
    assert noted.candidate in best
    assert noted.present == routing.decide(analyzed(), _state(None), 0.0).order[0]


@given(st.floats(0.0, 0.9), st.floats(0.0, 0.999999))
def test_a_share_of_the_queries_is_routed_by_them(share: float, uniform: float) -> None:
    """Of uniform numbers, `share` lead to the candidate's choice, and propensities say so exactly."""
    tried = m.Trial(version=3, share=share, w_quality=1.0, w_latency=50.0, w_energy=0.1)
    route = routing.decide(analyzed(), _state(tried), 0.0, _chance(uniform))
    assert route.trial == m.Tried(version=3, present="large", candidate="small")
    assert sorted(route.order) == ["large", "middle", "small"]
    if route.order[0] == "small":
        assert (route.reason, route.propensity) == ("trial", pytest.approx(share))
    else:
        assert (route.order[0], route.reason, route.propensity) == ("large", "best_utility", pytest.approx(1.0 - share))


def test_a_query_with_weights_of_its_own_keeps_them() -> None:
    """Where a query says how much latency weighs, weights on trial do not."""
    tried = m.Trial(version=1, share=0.5, w_latency=50.0)
    own = m.Query(prompt="x", preference=m.Preference(latency=0.3))
    route = routing.decide(analyzed(own), _state(tried), 0.0, _chance(0.1))
    assert route.trial == m.Tried(version=1, present="large", candidate="large")
    asked = routing.decide(analyzed(m.Query(prompt="x", model="middle")), _state(tried), 0.0, _chance(0.1))
    assert asked.trial is None


def test_a_trial_begins_is_promoted_and_versions_grow() -> None:
    first = trial.begin(None, _try(), 10.0)
    assert (first.version, first.share, first.w_latency, first.w_quality, first.at) == (1, 0.25, 2.0, None, 10.0)
    assert trial.begin(msgspec.structs.replace(first, ended=True), _try(), 11.0).version == 2
    before = m.InForce(objectives=m.Objectives(latency_p95_s=3.0, w_energy=0.5), version=4)
    after = trial.promoted(before, first, m.Control(action="promote", by="ann"), [], 12.0)
    assert after.objectives == m.Objectives(latency_p95_s=3.0, w_energy=0.5, w_latency=2.0)
    assert (after.version, after.action, after.by) == (5, "promote", "ann")
    assert objectives.own(POLICY, after.objectives).w_latency == objectives.own(POLICY, first).w_latency


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (m.Control(action="try"), "Give one of"),
        (m.Control(action="try", objectives=m.Objectives(latency_p95_s=2.0)), "only weights"),
        (m.Control(action="try", objectives=m.Objectives(w_quality=0.0, w_latency=0.0, w_energy=0.0)), "above 0"),
    ],
)
def test_what_cannot_be_tried_is_refused(asked: m.Control, says: str) -> None:
    with pytest.raises(InvalidObjective) as caught:
        trial.begin(None, asked, 0.0)
    assert says in f"{caught.value} {caught.value.remedy}"


def test_only_the_trial_that_is_meant_ends() -> None:
    running = m.Trial(version=2, w_latency=1.0)
    assert trial.meant(running, m.Control(action="drop")) is running
    assert trial.meant(running, m.Control(action="promote", trial=2)) is running
    for now, asked in (
        (None, m.Control(action="drop")),
        (msgspec.structs.replace(running, ended=True), m.Control(action="drop")),
        (running, m.Control(action="promote", trial=1)),
    ):
        with pytest.raises(InvalidObjective):
            trial.meant(now, asked)


# --- What it is worth -------------------------------------------------------------------------------

QUALITY = (0.70, 0.55, 0.40)
LATENCY = (3.0, 2.0, 1.0)


def _log(rng: np.random.Generator, n: int, share: float, *, differ: float = 0.5, harm: float = 0.0) -> list[np.ndarray]:
    """Decisions of a policy in force that takes card 0, and a candidate that takes card 2 in `differ` of the queries,
    of which `share` were taken. Predictions are wrong: they miss the truth by -0.2 and +0.1. `harm`: how much worse
    card 2 is than card 0."""
    apart = rng.random(n) < differ
    taken = apart & (rng.random(n) < share)
    cards = np.stack([np.where(taken, 2, 0), np.zeros(n, int), np.where(apart, 2, 0)], axis=1)
    propensity = np.where(~apart, 1.0, np.where(taken, share, 1.0 - share))
    quality = np.where(cards == 2, 0.6 - harm, 0.6)
    latency = np.where(cards == 2, LATENCY[2], LATENCY[0])
    predicted = np.stack([quality - 0.2, latency + 0.1, np.full_like(latency, 9.0)], axis=2)
    came = np.stack([
        rng.random(n) < quality[:, 0], latency[:, 0] + rng.normal(0, 0.2, n), np.full(n, 10.0) + rng.normal(0, 1, n)
    ], axis=1).astype(float)  # fmt: skip
    return [cards, propensity, predicted, came]


def test_the_truth_is_found_and_intervals_hold_it() -> None:
    """Over many logs: the mean estimate is the truth, and 95 % intervals hold it about so often."""
    rng = np.random.default_rng(7)
    held, means = 0, []
    for _ in range(200):
        found = core.report(*_log(rng, 1500, 0.3, harm=0.1))
        quality, latency, _energy = found.figures
        means.append(quality.difference.value)
        held += quality.difference.low <= -0.05 <= quality.difference.high
        assert abs(latency.difference.value + 1.0) < 0.1
        assert not found.promote
    assert abs(np.mean(means) + 0.05) < 0.005
    assert 180 <= held <= 199


def test_an_equally_good_and_faster_candidate_is_promoted() -> None:
    rng = np.random.default_rng(3)
    found = core.report(*_log(rng, 40_000, 0.3))
    assert found.promote, found.reason
    assert "latency falls" in found.reason
    assert 0.45 < found.differ < 0.55
    assert core.report(*_log(rng, 40_000, 0.3, harm=0.05)).promote is False


def test_nothing_is_certain_before_its_own_choices_were_taken() -> None:
    """However many decisions are known: a candidate whose own choices were never taken gets no verdict."""
    rng = np.random.default_rng(5)
    never = core.report(*_log(rng, 20_000, 0.0))
    assert not never.promote
    assert "taken and judged 0 times" in never.reason
    cards, propensity, predicted, came = _log(rng, 5000, 0.3)
    came[:, 0] = np.nan
    unjudged = core.report(cards, propensity, predicted, came)
    assert (unjudged.promote, unjudged.figures[0].known, unjudged.figures[1].known) == (False, 0, 5000)
    assert "every time" in core.report(*_log(rng, 500, 0.3, differ=0.0)).reason
    none = core.report(*(part[:0] for part in _log(rng, 10, 0.3)))
    assert (none.decisions, none.promote) == (0, False)
    assert "nothing has been decided" in none.reason


def test_rows_are_read_and_shown() -> None:
    """What the knowledge base answers becomes arrays, and a table."""
    rows = [
        m.TrialRow(
            at=float(i), chosen="a", present="a", candidate="b" if i % 2 else "a", propensity=0.9,
            predicted=[[0.5, 1.0, 9.0], [0.5, 1.0, 9.0], [0.4, 0.5, 8.0]], score=1.0 if i < 3 else None, latency_s=1.0,
            energy_j=9.0,
        )
        for i in range(4)
    ]  # fmt: skip
    cards, propensity, predicted, came = shown.arrays(rows)
    assert cards.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert (propensity == 0.9).all()
    assert predicted.shape == (4, 3, 3)
    assert np.isnan(came[3, 0])
    text = shown.render(m.Trial(version=2), core.report(cards, propensity, predicted, came))
    assert "trial 2: 4 decisions, another card by it in 50 % of them" in text.replace("50%", "50 %")
    assert "not to be promoted yet" in text
    assert shown.arrays([])[2].shape == (0, 3, 3)


def test_the_command_line_says_what_is_tried() -> None:
    given = options.parser().parse_args(["policy", "try", "--w-latency", "0.4", "--share", "0.2"])
    asked = policy.request_of(given)
    assert (asked.action, asked.share, asked.objectives) == ("try", 0.2, m.Objectives(w_latency=0.4))
    with pytest.raises(InvalidObjective, match="share"):
        policy.request_of(argparse.Namespace(action="try", share=1.5, w_latency=0.4))
