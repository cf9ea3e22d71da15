"""Attempts, fallbacks and circuit breakers."""

from __future__ import annotations

import pytest

from services.executor.decide import attempts, breaker
from services.executor.decide.breaker import Breaker
from services.executor.supervisor import Supervision
from shared import messages as m
from shared import unread as ends
from tests.samples import card, spec
from tests.unit.monitor_records import done as done_of

ONE, TWO = card("one", spec("x-int8")), card("two", spec("y-int8"), system_prompt="Be brief.", max_tokens=9)
SAME = card("same", spec("x-int8"))
CARDS = {c.name: c for c in (ONE, TWO, SAME)}


def _planned(query: m.Query | None = None, order: tuple[str, ...] = ("one", "same", "two")) -> m.Planned:
    accepted = m.Accepted(query=query or m.Query(prompt="hi"), query_id="q", deadline_at=9.0, stamps={"received": 1.0})
    return m.Planned(accepted=accepted, route=m.Route(query_id="q", order=list(order), candidates=[], reason="r"))


def _failed(code: str, rank: int = 0) -> m.AttemptFailed:
    work = attempts.work(_planned(), CARDS, rank, 1, 2.0)
    return m.AttemptFailed(work=work, failure=m.Failure(code=code, message=""), worker="w", attempt=1, at=0.0)


def test_an_attempt_is_complete_in_itself() -> None:
    """Work carries the card's system prompt and defaults, the query's own settings over them, and its stamps."""
    work = attempts.work(_planned(m.Query(prompt="hi", temperature=0.7, seed=3)), CARDS, 2, 1, 5.0)
    assert [(t.role, t.content) for t in work.messages] == [("system", "Be brief."), ("user", "hi")]
    assert (work.sampling.max_tokens, work.sampling.temperature, work.sampling.seed) == (9, 0.7, 3)
    assert work.stamps == {"received": 1.0, "dispatched": 5.0}
    assert work.artifact == "y-int8"


def test_a_query_s_own_system_prompt_stands() -> None:
    """The card's system prompt is left out when the conversation brings one."""
    turns = [m.ChatMessage(role="system", content="mine"), m.ChatMessage(role="user", content="hi")]
    assert attempts.conversation(m.Query(messages=turns), TWO) == turns


def test_fallback_goes_to_the_next_card_on_another_artifact() -> None:
    """After an engine failed, the next rank on a different artifact is tried, and then no more."""
    assert attempts.after_failure(_failed("engine_failed"), CARDS, lambda _a: True, 0.0) == 2
    assert attempts.after_failure(_failed("engine_failed", rank=2), CARDS, lambda _a: True, 0.0) is None


def test_failures_that_another_model_would_share_are_final() -> None:
    """An expired deadline is not tried elsewhere; a context too short is, where there is a longer one."""
    assert attempts.after_failure(_failed("deadline_expired"), CARDS, lambda _a: True, 0.0) is None
    assert attempts.after_failure(_failed("context_exceeded"), CARDS, lambda _a: True, 0.0) is None
    longer = {**CARDS, "two": card("two", spec("y-int8", context=9000))}
    assert attempts.after_failure(_failed("context_exceeded"), longer, lambda _a: True, 0.0) == 2


def test_resting_artifacts_are_passed_over_while_there_is_another() -> None:
    """An open breaker moves the query on; when all rest, a try beats a refusal."""
    route = _planned().route
    assert attempts.next_rank(route, CARDS, 0, lambda a: a != "x-int8") == 2
    assert attempts.next_rank(route, CARDS, 0, lambda _a: False) == 0
    assert attempts.next_rank(route, {}, 0, lambda _a: True) is None


def test_a_breaker_opens_rests_longer_each_time_and_closes_on_success() -> None:
    """Three failures open it; one failure after the rest opens it for twice as long; success forgets all."""
    state = Breaker()
    for _ in range(breaker.LIMIT - 1):
        state = breaker.failed(state, 0.0)
        assert breaker.usable(state, 0.0)
    state = breaker.failed(state, 0.0)
    assert not breaker.usable(state, breaker.REST_S - 0.1)
    assert breaker.usable(state, breaker.REST_S)
    again = breaker.failed(state, 10.0)
    assert again.open_until == 10.0 + 2 * breaker.REST_S
    assert breaker.succeeded(again) == Breaker()


def test_a_cancellation_may_come_before_its_query() -> None:
    """A cancelled id is remembered until the query arrives, and then cancels it at once."""
    supervision = Supervision()
    supervision.cancel("q")
    assert supervision.take(_planned()).cancelled.is_set()
    supervision.ended("q")
    supervision.release("q")
    assert not supervision.take(_planned()).cancelled.is_set()


LETTER = m.ExpectChoice(of=["A", "B"])


def _unread(query: m.Query, *, rank: int = 0, attempt: int = 1, unread: m.Done | None = None) -> m.AttemptFailed:
    """An attempt, dispatched at 2, whose answer ended at 3 and cannot be read."""
    planned = _planned(query)
    work = attempts.work(planned, CARDS, rank, attempt, 2.0, unread=unread)
    done = ends.ended(work, done_of("q", work.card, stamps={**work.stamps, "generated": 3.0}))
    return ends.failed(work, done, 3.0)


def test_an_answer_that_cannot_be_read_is_followed_by_the_next_model_as_often_as_was_allowed() -> None:
    """The end so far is carried along; when it is used up, or the route is, that end is taken."""
    query = m.Query(prompt="hi", expect=LETTER, retries=1)
    failed = _unread(query)
    assert failed.failure.code == "unreadable"
    assert failed.work.retries == 1
    rank = attempts.after_failure(failed, CARDS, lambda _a: True, 3.0)
    assert rank == 2  # `same` has the same model and would say the same
    work = attempts.after(failed, CARDS, rank, 3.5)
    assert (work.card, work.attempt, work.retries) == ("two", 2, 0)
    assert work.unread == failed.unread
    assert work.stamps["first_dispatched"] == 2.0
    last = _unread(query, rank=2, attempt=2, unread=work.unread)
    assert attempts.after_failure(last, CARDS, lambda _a: True, 4.0) is None
    assert last.unread is not None
    assert [(one.card, one.seconds) for one in last.unread.unread] == [("one", 1.0)]


def test_nobody_is_asked_again_who_rests_or_when_there_is_no_time_for_it() -> None:
    failed = _unread(m.Query(prompt="hi", expect=LETTER, retries=3))
    assert attempts.after_failure(failed, CARDS, lambda a: a != "y-int8", 3.0) is None
    assert attempts.after_failure(failed, CARDS, lambda _a: True, 8.0) == 2  # the deadline is at 9, and it took 1 s
    assert attempts.after_failure(failed, CARDS, lambda _a: True, 8.1) is None
    assert attempts.after_failure(_unread(m.Query(prompt="hi", expect=LETTER)), CARDS, lambda _a: True, 3.0) is None


def test_the_fleet_s_number_of_retries_and_the_card_s_expectation_hold_where_a_query_says_nothing() -> None:
    cards = {**CARDS, "one": card("one", spec("x-int8"), expect=LETTER)}
    work = attempts.work(_planned(), cards, 0, 1, 2.0, retries=2)
    assert (work.expect, work.retries) == (LETTER, 2)
    assert attempts.work(_planned(m.Query(prompt="hi", retries=0)), cards, 0, 1, 2.0, retries=2).retries == 0
    own = m.ExpectNumber()
    assert attempts.work(_planned(m.Query(prompt="hi", expect=own)), cards, 0, 1, 2.0).expect == own


def test_what_earlier_attempts_took_is_part_of_the_answer_and_told_apart() -> None:
    first = _unread(m.Query(prompt="hi", expect=LETTER, retries=1))
    work = attempts.after(first, CARDS, 2, 3.5)
    done = ends.ended(work, done_of("q", "two", text="The answer is B."))
    assert done.answer is not None
    assert done.answer.reading == m.Reading(value="B", why="announced")
    assert done.answer.energy.retried_j == pytest.approx(6.0)
    assert done.answer.energy.joules == pytest.approx(12.0)
    assert ends.taken(done) == [("one", 11, False, False), ("two", 11, False, True)]


def test_an_answer_taken_after_all_counts_the_time_that_was_lost_after_it() -> None:
    done = _unread(m.Query(prompt="hi", expect=LETTER)).unread
    assert done is not None
    assert done.answer is not None
    late = ends.settled(done, 5.0).answer
    assert late is not None
    assert late.timings.retried_s == pytest.approx(2.0)
    assert late.timings.total_s == pytest.approx(done.answer.timings.total_s + 2.0)


def test_nothing_is_read_where_nothing_is_expected() -> None:
    work = attempts.work(_planned(), CARDS, 0, 1, 2.0)
    done = ends.ended(work, done_of("q", "one"))
    assert done.answer is not None
    assert done.answer.reading is None
    assert not ends.may_go_on(work, done)
    assert ends.taken(done) == [("one", 11, False, None)]
