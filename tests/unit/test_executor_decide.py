"""Attempts, fallbacks and circuit breakers."""

from __future__ import annotations

from services.executor.decide import attempts, breaker
from services.executor.decide.breaker import Breaker
from services.executor.supervisor import Supervision
from shared import messages as m
from tests.samples import card, spec

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
