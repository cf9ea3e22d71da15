"""Queries whose answers may be handed on: the route says to whom and when, and an attempt's end obeys it."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from services.cli import ask, explain
from services.executor.decide import attempts
from services.planner.decide import routing
from services.planner.decide.learned import Learned
from shared import messages as m
from shared import unread
from shared.learn.confidence import Line
from tests import samples
from tests.unit.monitor_records import done as done_of

CARDS = {
    "cheap": samples.card("cheap", samples.spec("x-int8"), quality=0.6),
    "dear": samples.card("dear", samples.spec("y-int8", weights=4 * 10**9), quality=0.8),
    "third": samples.card("third", samples.spec("z-int8", weights=8 * 10**9), quality=0.8),
}
HEARD = st.tuples(st.floats(-3, 0), st.sampled_from(["The answer is (A).", "The answer is (B).", "Hm."]))
TELLING = Line(slope=1.5, mean=-0.4, deviation=0.2)
LETTER = m.ExpectChoice(of=["A", "B"])


def route(
    query: m.Query, *, fleet: bool = False, w_energy: float = 0.02, lines: dict[str, Line] | None = None
) -> m.Route:
    said = dict.fromkeys(CARDS, TELLING) if lines is None else lines
    worker = samples.worker(budget=2**36, engines=[samples.engine(c.artifact) for c in CARDS.values()])
    state = routing.State(
        cards=CARDS, policy=m.Policy(fleet="f", cascade=fleet, w_energy=w_energy, w_latency=0.1, energy_ref_j=100.0),
        workers=[worker], learned=Learned(lines=said, lines_version=7),
    )  # fmt: skip
    return routing.decide(samples.analyzed(query), state, 0.0)


def test_only_who_asks_for_it_gets_a_cascade_and_the_query_has_the_last_word() -> None:
    plain = route(m.Query(prompt="x"))
    assert plain.cascade == []
    assert plain.confidence_version == 0
    assert route(m.Query(prompt="x", cascade=False), fleet=True) == plain
    by_fleet = route(m.Query(prompt="x"), fleet=True)
    assert by_fleet == route(m.Query(prompt="x", cascade=True))
    assert by_fleet.confidence_version == 7
    assert sorted(by_fleet.order) == sorted(plain.order)


def test_the_cheap_card_comes_first_and_is_handed_on_below_a_chance_that_prices_move() -> None:
    found = route(m.Query(prompt="x", cascade=True))
    assert (found.order[0], found.reason) == ("cheap", "cascade")
    assert 2 <= len(found.cascade) <= 3
    assert 0.0 < found.cascade[0].below < 1.0
    assert found.cascade[-1].below == 0.0
    assert "handed on to" in found.why
    dearer = route(m.Query(prompt="x", cascade=True), w_energy=0.04)
    assert dearer.cascade[0].below < found.cascade[0].below
    text = explain.render(m.QueryRecord(query_id="q1", state="answered", route=found))
    assert f"below {found.cascade[0].below:.2f} (mean log-probability" in text


def test_without_judgements_no_confidence_hands_an_answer_on() -> None:
    found = route(m.Query(prompt="x", cascade=True), lines={})
    step = found.cascade[0]
    assert step.slope == 0.0
    assert not unread.may_go_on(work_of(found), ended(work_of(found), -9.0))


def work_of(planned_by: m.Route, rank: int = 0, before: m.Done | None = None, **query: object) -> m.Work:
    accepted = m.Accepted(query=m.Query(prompt="Which?", **query), query_id="q1", deadline_at=100.0)  # type: ignore[arg-type]
    return attempts.work(
        m.Planned(accepted=accepted, route=planned_by), CARDS, rank, rank + 1, 0.0, unread=before, first_dispatched=0.0
    )


def ended(work: m.Work, logprob: float, text: str = "The answer is (A).") -> m.Done:
    """The end of an attempt whose engine reports this confidence: 6 J, 2 s."""
    done = done_of(
        "q1", work.card, text=text, artifact=work.artifact, attempt=work.attempt,
        stamps={"dispatched": 2.0 * work.rank, "generated": 2.0 * work.rank + 2.0},
    )  # fmt: skip
    assert done.answer is not None
    confidence = m.Confidence(mean_logprob=logprob, min_logprob=logprob, mean_entropy=0.1)
    answer = msgspec.structs.replace(done.answer, confidence=confidence, attempt=work.attempt)
    return unread.ended(work, msgspec.structs.replace(done, answer=answer))


def planned(*below: float) -> m.Route:
    steps = [m.CascadeStep(level=2.0, slope=5.0, below=limit, latency_s=2.0) for limit in below]
    return m.Route(query_id="q1", order=list(CARDS), candidates=[], reason="cascade", cascade=steps)


@given(st.floats(-3, 0), st.floats(-3, 0), st.floats(0, 1), st.booleans())
def test_a_lower_confidence_never_keeps_an_answer_that_a_higher_one_hands_on(
    one: float, other: float, below: float, expects: bool
) -> None:
    query = {"expect": LETTER} if expects else {}
    low, high = sorted((one, other))
    work = work_of(planned(below, 0.0), **query)
    if unread.may_go_on(work, ended(work, high)):
        assert unread.may_go_on(work, ended(work, low))


@given(
    st.lists(HEARD, min_size=3, max_size=3),
    st.lists(st.floats(0, 1), min_size=0, max_size=3), st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_a_query_ends_once_with_the_likeliest_answer_and_no_more_attempts_than_its_route_has(
    heard: list[tuple[float, str]], limits: list[float], expects: bool, retries: int
) -> None:
    """Engine and executor by turns, as they decide; what every attempt took is accounted for once."""
    query: dict[str, object] = {"expect": LETTER, "retries": retries} if expects else {}
    found, before, rank, answers = planned(*limits), None, 0, []
    while True:
        work = work_of(found, rank, before, **query)
        done = ended(work, *heard[rank])
        answers.append(done)
        if not unread.may_go_on(work, done):
            break
        failed = unread.failed(work, done, 2.0 * rank + 2.0, work.attempt)
        assert failed.attempt == rank + 1
        following = attempts.after_failure(failed, CARDS, lambda _: True, 2.0 * rank + 2.0)
        if following is None:
            break
        assert following > rank
        rank, before = following, failed.unread
    assert len(answers) <= len(CARDS)
    final = done.answer
    assert final is not None
    assert len(done.unread) == len(final.passed_over) == len(answers) - 1
    assert {one.card for one in done.unread} | {final.model} == set(list(CARDS)[: len(answers)])
    assert abs(final.energy.joules - 6.0 * len(answers)) < 1e-9
    assert abs(final.energy.retried_j - 6.0 * (len(answers) - 1)) < 1e-9
    if len(limits) >= len(answers) and not expects:
        assert final.chance is not None
        assert all(one.chance is not None and one.chance <= final.chance for one in done.unread)
    if expects and any(one.readable for one in done.unread):
        assert final.reading is not None
        assert final.reading.value is not None
    assert [card for card, *_ in unread.taken(done)][-1] == final.model
    assert ask.others(final) or len(answers) == 1


def test_a_second_opinion_that_agrees_ends_it_and_one_that_differs_does_not() -> None:
    first = work_of(planned(0.9, 0.9, 0.0), expect=LETTER)
    before = ended(first, -0.5)
    assert unread.may_go_on(first, before)
    second = work_of(planned(0.9, 0.9, 0.0), 1, before, expect=LETTER)
    assert not unread.may_go_on(second, ended(second, -0.6))
    assert unread.may_go_on(second, ended(second, -0.6, "The answer is (B)."))


def test_of_three_the_answer_that_two_gave_is_taken_whatever_the_third_thought_of_its_own() -> None:
    found = planned(0.99, 0.99, 0.0)
    one = ended(work_of(found, expect=LETTER), -0.6)
    other = ended(work_of(found, 1, one, expect=LETTER), -0.2, "The answer is (B).")
    assert other.answer is not None
    assert other.answer.model == "dear"  # the likelier of the two
    last = ended(work_of(found, 2, other, expect=LETTER), -0.7)
    assert last.answer is not None
    assert last.answer.reading == m.Reading(value="A", why="announced")


def test_no_card_is_asked_for_whom_the_deadline_leaves_no_time_nor_one_without_a_step() -> None:
    work = work_of(planned(0.9, 0.0))
    failed = unread.failed(work, ended(work, -0.5), 2.0, 1)
    assert failed.failure.code == "unsure"
    assert attempts.after_failure(failed, CARDS, lambda _: True, 97.0) == 1
    assert attempts.after_failure(failed, CARDS, lambda _: True, 99.0) is None
    assert attempts.after_failure(failed, CARDS, lambda artifact: artifact != "y-int8", 2.0) is None


def test_an_earlier_answer_that_is_given_after_all_keeps_its_own_account() -> None:
    found = planned(0.99, 0.0)
    sure = ended(work_of(found), -0.3)
    last = ended(work_of(found, 1, sure), -1.5)
    assert (last.card, last.attempt) == ("cheap", 1)
    given_ = unread.settled(last, 4.0)
    assert given_.answer is not None
    assert (given_.answer.model, given_.answer.attempt) == ("cheap", 1)
    assert given_.answer.timings.retried_s == 2.0
    assert [(one.card, one.why, one.readable) for one in given_.unread] == [("dear", "unsure", None)]
    assert "passed over: dear (unsure, 0.00)" in ask.others(given_.answer)
