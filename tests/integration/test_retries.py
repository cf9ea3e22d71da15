"""Answers that cannot be read: the executor asks the next model, and a query still ends in exactly one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import structlog
from nats.aio.msg import Msg

from services.executor.service import Executor
from shared import codec, subjects, unread
from shared import messages as m
from shared.bus import Bus
from shared.runtime import Context, Health
from shared.settings import Settings
from tests.samples import card, spec
from tests.unit.monitor_records import done as done_of

CARDS = [card("plain", spec("x-int8")), card("other", spec("y-int8")), card("third", spec("z-int8"))]
LETTER = m.ExpectChoice(of=["A", "B"])
Answers = Callable[[m.Work], str | None]


@pytest.fixture
async def executor(settings: Settings, bus: Bus) -> AsyncIterator[Executor]:
    for one in CARDS:
        await bus.kv_put(subjects.BUCKET_MODELS, one.name, one)
    await bus.kv_put(subjects.BUCKET_MODELS, subjects.POLICY_KEY, m.Policy(fleet="f"))
    own = await Bus.connect(settings, "executor")
    service = Executor(Context(settings, own, structlog.get_logger(), Health(), "one"))
    await service.start()
    yield service
    await service.stop()
    await own.close()


class Fleet:
    """Plays the engines: `answers` gives the text for a piece of work, "!" for an engine that fails, None for one that
    never ends; and the client, to whom everything in `replies` came."""

    def __init__(self, bus: Bus, answers: Answers) -> None:
        self.bus = bus
        self.answers = answers
        self.confidence: Callable[[m.Work], float] = lambda _work: -0.1
        self.works: list[m.Work] = []
        self.replies: list[m.Answer | m.Failure] = []
        self.ended = asyncio.Event()

    async def on_work(self, message: Msg) -> None:
        work = codec.unpack(message.data, m.Work)
        self.works.append(work)
        text = self.answers(work)
        if text is None:
            return
        now = time.time()
        if text == "!":
            failure = m.Failure(code="engine_failed", message="The engine failed.")
            failed = m.AttemptFailed(work=work, failure=failure, worker="w1", attempt=work.attempt, at=now)
            await self.bus.publish(subjects.FAILED, failed, msg_id=f"{work.query_id}-failed-{work.attempt}")
            return
        accepted = work.planned.accepted
        ended = done_of(
            work.query_id, work.card, text=text, artifact=work.artifact, attempt=work.attempt, reply=accepted.reply,
            stamps={**work.stamps, "generated": now},
        )  # fmt: skip
        assert ended.answer is not None
        sure = msgspec.structs.replace(ended.answer.confidence, mean_logprob=self.confidence(work))
        answer = msgspec.structs.replace(ended.answer, confidence=sure, attempt=work.attempt)
        done = unread.ended(work, msgspec.structs.replace(ended, answer=answer))
        if unread.may_go_on(work, done):
            failed = unread.failed(work, done, now, work.attempt)
            await self.bus.publish(subjects.FAILED, failed, msg_id=f"{work.query_id}-failed-{work.attempt}")
        else:
            await self.bus.finish(done)

    async def on_reply(self, message: Msg) -> None:
        self.replies.append(codec.from_json(message.data, m.Answer | m.Failure))  # type: ignore[arg-type]
        self.ended.set()

    async def ask(
        self, *, deadline_s: float = 20.0, patience: dict[str, int] | None = None, below: tuple[float, ...] = (),
        **query: object,
    ) -> m.Answer:  # fmt: skip
        """Send a planned query through the executor; its one answer."""
        await self.bus.subscribe("calm.work.>", self.on_work)
        inbox = self.bus.nc.new_inbox()
        await self.bus.subscribe(inbox, self.on_reply)
        now = time.time()
        asked = m.Query(prompt="Which?", expect=LETTER, **query)  # type: ignore[arg-type]
        accepted = m.Accepted(
            query=asked, query_id="q1", reply=inbox, deadline_at=now + deadline_s, stamps={"received": now}
        )
        route = m.Route(
            query_id="q1", order=[c.name for c in CARDS], candidates=[], reason="best_utility", why="best",
            patience=patience or {}, cascade=[m.CascadeStep(level=2.0, slope=5.0, below=limit) for limit in below],
        )  # fmt: skip
        await self.bus.publish(subjects.PLANNED, m.Planned(accepted=accepted, route=route), msg_id="q1-planned")
        async with asyncio.timeout(20):
            await self.ended.wait()
        await self.bus.nc.flush()
        assert len(self.replies) == 1
        assert isinstance(self.replies[0], m.Answer), self.replies
        return self.replies[0]


@pytest.mark.usefixtures("executor")
async def test_the_next_model_is_asked_when_nothing_can_be_read_and_the_end_tells_of_both(bus: Bus) -> None:
    fleet = Fleet(bus, lambda work: "I cannot say." if work.card == "plain" else "The answer is (B).")
    answer = await fleet.ask(retries=1)
    assert (answer.model, answer.reading) == ("other", m.Reading(value="B", why="announced"))
    assert answer.energy.retried_j > 0.0
    done = await bus.claimed("q1")
    assert done is not None
    assert done.attempt == 2
    assert [(one.card, one.text) for one in done.unread] == [("plain", "I cannot say.")]


@pytest.mark.usefixtures("executor")
async def test_an_attempt_that_another_may_follow_is_cut_off_where_the_route_says(bus: Bus) -> None:
    """The last that may be asked is given all the tokens that the query allows."""
    fleet = Fleet(bus, lambda work: "I cannot" if work.sampling.max_tokens == 20 else "The answer is (B).")
    answer = await fleet.ask(retries=1, max_tokens=200, patience={"plain": 20, "other": 20})
    assert answer.model == "other"
    assert [work.sampling.max_tokens for work in fleet.works] == [20, 200]


@pytest.mark.usefixtures("executor")
async def test_without_retries_the_answer_is_given_as_it_is(bus: Bus) -> None:
    fleet = Fleet(bus, lambda _work: "I cannot say.")
    answer = await fleet.ask()
    assert (answer.model, answer.text) == ("plain", "I cannot say.")
    assert answer.reading == m.Reading(value=None, why="nothing")
    assert len(fleet.works) == 1


@pytest.mark.usefixtures("executor")
async def test_no_more_models_are_asked_than_was_allowed(bus: Bus) -> None:
    fleet = Fleet(bus, lambda work: f"I, {work.card}, cannot say.")
    answer = await fleet.ask(retries=1)
    assert answer.text == "I, other, cannot say."
    assert answer.reading is not None
    assert answer.reading.value is None
    assert [work.card for work in fleet.works] == ["plain", "other"]


@pytest.mark.usefixtures("executor")
async def test_an_engine_that_fails_on_the_way_is_passed_over_and_the_answer_so_far_is_kept(bus: Bus) -> None:
    """`other` fails and `third` is asked in its place; when that fails too, an unreadable answer is given."""
    fleet = Fleet(bus, lambda work: "I cannot say." if work.card == "plain" else "!")
    answer = await fleet.ask(retries=1)
    assert [work.card for work in fleet.works] == ["plain", "other", "third"]
    assert (answer.model, answer.text) == ("plain", "I cannot say.")


@pytest.mark.usefixtures("executor")
async def test_at_the_deadline_the_answer_so_far_is_given(bus: Bus) -> None:
    """The second model does not answer in time."""
    fleet = Fleet(bus, lambda work: "I cannot say." if work.card == "plain" else None)
    answer = await fleet.ask(retries=1, deadline_s=1.0)
    assert (answer.model, answer.text) == ("plain", "I cannot say.")
    assert answer.timings.retried_s > 0.5
    assert len(fleet.works) == 2


@pytest.mark.usefixtures("executor")
async def test_an_answer_that_is_likely_wrong_is_handed_on_and_the_likelier_of_two_is_given(bus: Bus) -> None:
    fleet = Fleet(bus, lambda work: "The answer is (A)." if work.card == "plain" else "The answer is (B).")
    fleet.confidence = lambda work: -0.5 if work.card == "plain" else -0.2
    answer = await fleet.ask(below=(0.6, 0.0), cascade=True)
    assert (answer.model, answer.attempt) == ("other", 2)
    assert answer.chance == pytest.approx(0.731, abs=0.001)
    assert [(one.model, one.why) for one in answer.passed_over] == [("plain", "unsure")]
    assert answer.energy.retried_j > 0.0
    assert [work.card for work in fleet.works] == ["plain", "other"]


@pytest.mark.usefixtures("executor")
async def test_an_answer_that_is_likely_right_is_not_handed_on(bus: Bus) -> None:
    fleet = Fleet(bus, lambda _work: "The answer is (A).")
    answer = await fleet.ask(below=(0.6, 0.0), cascade=True)
    assert (answer.model, answer.passed_over) == ("plain", [])
    assert [work.card for work in fleet.works] == ["plain"]


@pytest.mark.usefixtures("executor")
async def test_the_likeliest_answer_so_far_is_given_when_the_next_model_fails_or_comes_too_late(bus: Bus) -> None:
    """`other` is less sure than `plain` was; `third` never ends."""
    fleet = Fleet(bus, lambda work: None if work.card == "third" else f"The answer is ({'AB'[work.rank]}).")
    fleet.confidence = lambda work: -0.3 if work.card == "plain" else -0.9
    answer = await fleet.ask(below=(0.9, 0.9, 0.0), cascade=True, deadline_s=1.5)
    assert [work.card for work in fleet.works] == ["plain", "other", "third"]
    assert (answer.model, answer.attempt) == ("plain", 1)
    assert [one.model for one in answer.passed_over] == ["other"]
    assert answer.timings.retried_s > 0.5


@pytest.mark.usefixtures("executor")
async def test_an_engine_that_fails_after_an_unsure_answer_leaves_that_answer(bus: Bus) -> None:
    fleet = Fleet(bus, lambda work: "The answer is (A)." if work.card == "plain" else "!")
    fleet.confidence = lambda _work: -0.5
    answer = await fleet.ask(below=(0.9, 0.0), cascade=True)
    assert (answer.model, answer.text) == ("plain", "The answer is (A).")


@pytest.mark.parametrize("inbox", ["_INBOX.client.1", "elsewhere.1"])
async def test_an_executor_that_died_between_claim_and_reply_leaves_the_answer_to_the_next_one(
    executor: Executor, bus: Bus, inbox: str
) -> None:
    """The end is on record, settled by an executor, and the planned query is delivered again: the client gets it, from
    the broker or from the next executor, and once."""
    stamps = {unread.SETTLED: 1.0}
    done = done_of("q1", "plain", text="I cannot say.", stamps=stamps)
    sent: list[m.Answer] = []

    async def on_reply(message: Msg) -> None:
        sent.append(codec.from_json(message.data, m.Answer))

    await bus.subscribe(inbox, on_reply)
    assert await bus.claim(msgspec.structs.replace(done, reply=inbox))
    accepted = m.Accepted(
        query=m.Query(prompt="x", expect=LETTER), query_id="q1", reply=inbox, deadline_at=time.time() + 9.0
    )
    route = m.Route(query_id="q1", order=["plain"], candidates=[], reason="r")
    entry = executor._supervision.take(m.Planned(accepted=accepted, route=route))
    await executor._supervise(entry, redelivered=True)
    await executor._bus.nc.flush()
    await bus.nc.flush()
    assert [answer.text for answer in sent] == ["I cannot say."]
