"""Change detection, and how a model stands after it."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sim.drift import Change, returned
from services.monitor.decide import probes
from services.monitor.decide.probes import Watched
from services.monitor.decide.signals import Signals
from shared import messages as m
from shared.learn import edetect, standing
from shared.learn.standing import Standing
from tests.unit.monitor_records import done

share = st.floats(0.0, 1.0)


def play(
    count: int, factor: float, seed: int, before: Standing | None = None, *, mean: float = 0.55
) -> tuple[Standing, list[tuple[int, str]]]:
    """Judgements of answers that are right with `factor` times the predicted probability."""
    draw = random.Random(seed)
    now, events = before or Standing(), list[tuple[int, str]]()
    for i in range(count):
        predicted = min(max(draw.gauss(mean, 0.12), 0.05), 0.95)
        now, event = standing.judged(now, predicted, float(draw.random() < factor * predicted))
        if event:
            events.append((i, event))
    return now, events


def test_no_alarm_in_4000_judgements_of_a_model_that_does_not_change() -> None:
    """20,000 queries of which a fifth are judged; the bound is one false alarm in 200,000 judgements."""
    for seed in range(5):
        assert play(4000, 1.0, seed)[1] == []


def test_halved_accuracy_is_noticed_within_150_judgements() -> None:
    for seed in range(10):
        before, events = play(800, 1.0, seed)
        assert events == []
        after, events = play(150, 0.5, seed + 100, before)
        assert events
        assert events[0][1] == "drift"
        assert after.state == "quarantined"


def test_harder_queries_are_not_taken_for_a_worse_model() -> None:
    """Predicted quality falls from 0.7 to 0.35 with the mix of queries; the model earns what is predicted."""
    before, _ = play(600, 1.0, 1, mean=0.7)
    assert play(1500, 1.0, 2, before, mean=0.35)[1] == []


def test_predictions_that_are_a_little_too_high_from_the_start_are_calibrated_and_raise_no_alarm() -> None:
    for seed in range(4):
        assert play(3000, 0.9, seed)[1] == []


def test_a_model_that_recovers_is_restored_and_one_that_does_not_is_taken_back_at_its_new_level() -> None:
    before, _ = play(800, 1.0, 3)
    bad, events = play(150, 0.4, 4, before)
    assert bad.state == "quarantined"
    assert events == [(events[0][0], "drift")]
    well, events = play(200, 1.0, 5, bad)
    assert events[0][1] == "restored"
    assert (well.state, well.scale) == ("healthy", 1.0)
    worse, events = play(standing.PATIENCE, 0.5, 6, bad)
    assert events[0][1] == "rebased"
    assert worse.state == "healthy"
    assert worse.scale == pytest.approx(0.5, abs=0.12)
    assert play(1500, worse.scale, 7, worse)[1] == []  # its new level is what is expected now


def test_a_change_of_latency_is_noticed_and_its_direction_is_told() -> None:
    draw = random.Random(0)
    state = edetect.Ranks()
    for _ in range(3000):
        state = edetect.ranked(state, draw.gauss(0.0, 1.0))
    assert state.evidence < edetect.THRESHOLD
    for _ in range(200):
        state = edetect.ranked(state, draw.gauss(1.0, 1.0))
    assert state.evidence >= edetect.THRESHOLD
    assert state.rising


def test_a_change_of_the_mix_of_queries_is_noticed_and_names_the_domain_that_grew() -> None:
    draw = random.Random(0)
    names = [f"d{i}" for i in range(10)]
    state = edetect.Mix()
    for _ in range(4000):
        chosen = draw.choice(names)
        state = edetect.mixed(state, [(n, float(n == chosen)) for n in names])
    assert state.evidence < edetect.THRESHOLD
    for _ in range(150):
        chosen = draw.choice(names[:2])
        state = edetect.mixed(state, [(n, float(n == chosen)) for n in names])
    assert state.evidence >= edetect.THRESHOLD
    assert state.growing in names[:2]


@given(share, st.floats(0.02, 0.98))
def test_bets_cost_nothing_on_average_while_nothing_changes(score: float, expected: float) -> None:
    """Linear in the score, 1 at the expected one, and never negative: an e-value for any score from 0 to 1."""
    for one, zero, at in zip(
        edetect.fallen(1.0, expected), edetect.fallen(0.0, expected), edetect.fallen(expected, expected), strict=True
    ):
        assert at == pytest.approx(1.0)
        assert expected * one + (1.0 - expected) * zero == pytest.approx(1.0)
        assert 0.0 <= one <= 1.0 <= zero
    for value in edetect.risen(score, expected, (1.25, 2.0)):
        assert value >= 0.0


@given(st.lists(st.tuples(share, share), max_size=80))
def test_the_same_judgements_give_the_same_standing_and_calibration_stays_within_bounds(
    judgements: list[tuple[float, float]],
) -> None:
    def run() -> Standing:
        now = Standing()
        for predicted, score in judgements:
            now, _ = standing.judged(now, predicted, score)
        return now

    assert run() == run()
    assert standing.CALIBRATION[0] <= run().calibration <= standing.CALIBRATION[1]
    assert run().evidence >= 0.0


def test_quarantined_and_suspected_cards_are_probed_often_and_others_seldom_the_longest_unjudged_first() -> None:
    calm = [Watched("a", idle=5), Watched("b", idle=90)]
    asked = [probes.choose(calm, i) for i in range(1, 401)]
    assert [name for name in asked if name] == ["b", "b"]
    worried = [Watched("a", idle=5, quarantined=True), Watched("b", idle=90), Watched("c", idle=7, warning=True)]
    asked = [probes.choose(worried, i) for i in range(1, 41)]
    assert [name for name in asked if name] == ["c", "c"]
    assert probes.choose([], 20) is None


def test_signals_tell_a_slower_model_and_a_changed_mix_once() -> None:
    draw = random.Random(1)
    signals = Signals()
    told: list[m.Symptom] = []

    def serve(i: int, slowdown: float, domains: list[str]) -> None:
        candidate = m.Candidate(
            card="alpha", artifact="small-int8", terms={"prefill_s": 1.0, "decode_s": 2.0, "active_j": 6.0}
        )
        chosen = draw.choice(domains)
        route = m.Route(
            query_id=f"q{i}", order=["alpha"], candidates=[candidate], reason="best_utility",
            domains={name: float(name == chosen) for name in ("a", "b", "c", "d", "e", "f")},
        )  # fmt: skip
        ended = done(f"q{i}")
        assert ended.answer is not None
        noise = draw.lognormvariate(0.0, 0.2) * slowdown
        timings = msgspec.structs.replace(ended.answer.timings, prefill_s=noise, decode_s=2.0 * noise)
        ended = msgspec.structs.replace(ended, answer=msgspec.structs.replace(ended.answer, timings=timings))
        told.extend(signals.routed(route, float(i)))
        told.extend(signals.ended(ended, route, float(i)))

    every = ["a", "b", "c", "d", "e", "f"]
    for i in range(2500):
        serve(i, 1.0, every)
    assert told == []
    for i in range(150):
        serve(2500 + i, 1.5, every)
    assert [(s.kind, s.subject) for s in told] == [("drift", "alpha")]
    assert "latency" in told[0].detail
    assert "higher" in told[0].detail
    for i in range(100):
        serve(3000 + i, 1.5, ["a"])
    assert [s.subject for s in told] == ["alpha", "queries"]
    assert "more of a" in told[1].detail


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ([(2100, 1, "drift"), (6200, 1, "restored")], (False, 200)),
        ([(2100, 1, "drift"), (4000, 1, "restored")], (True, 0)),
        ([(2100, 1, "drift"), (4000, 1, "restored"), (4500, 1, "drift"), (6050, 1, "restored")], (False, 50)),
        ([(2100, 1, "drift"), (6100, 0, "restored")], (False, None)),
        ([(2100, 1, "drift"), (3000, 1, "rebased")], (False, None)),
    ],
)
def test_a_card_that_came_back_too_early_and_stayed_is_back(
    events: list[tuple[int, int, str]], found: tuple[bool, int | None]
) -> None:
    """The bench's count of restored cards: neither another card's return counts, nor one that did not last."""
    log = [{"query": at, "model": model, "event": event} for at, model, event in events]
    assert returned(log, Change(1, 2000, 6000)) == found
