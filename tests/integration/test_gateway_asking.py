"""The gateway's way over the bus, with a real broker and a monitor that the test plays."""

from __future__ import annotations

import asyncio

import pytest
import structlog
from nats.aio.msg import Msg

from services.gateway.asking import Asking
from services.gateway.fleet import Fleet
from shared import codec, subjects
from shared import messages as m
from shared.broker import Broker
from shared.bus import Bus
from shared.errors import NotFound, NotReady
from shared.settings import Settings
from tests.integration.monitor_parts import until
from tests.samples import card, worker

LOG = structlog.get_logger()


def query(query_id: str = "q1", **more: object) -> m.Query:
    return m.Query(prompt="x", id=query_id, **more)  # type: ignore[arg-type]


async def heard(bus: Bus, subject: str) -> asyncio.Queue[Msg]:
    """What is published on a subject from now on."""
    messages: asyncio.Queue[Msg] = asyncio.Queue()

    async def on_message(message: Msg) -> None:
        messages.put_nowait(message)

    await bus.subscribe(subject, on_message)
    await bus.nc.flush()
    return messages


@pytest.fixture
async def asking(bus: Bus) -> Asking:
    started = Asking(bus, LOG)
    await started.start()
    return started


async def test_replies_reach_the_one_who_asked(bus: Bus, asking: Asking) -> None:
    """Two queries at once, each with chunks and an end of its own; nothing is cancelled."""
    taken = await heard(bus, subjects.QUERY)
    cancelled = await heard(bus, subjects.cancel("*"))
    async with asking.ask(query("a"), keep=False) as first, asking.ask(query("b"), keep=False) as second:
        for _ in range(2):
            message = await taken.get()
            name = codec.from_json(message.data, m.Query).id or ""
            await bus.reply(message.reply, m.Chunk(id=name, seq=0, attempt=1, text=name), "json")
            await bus.reply(message.reply, m.Failure(code="cancelled", message=name, id=name), "json")
        for replies, name in ((second, "b"), (first, "a")):
            assert await replies.next() == m.Chunk(id=name, seq=0, attempt=1, text=name)
            assert await replies.next() == m.Failure(code="cancelled", message=name, id=name)
        assert asking.in_flight == 2
    assert asking.in_flight == 0
    await bus.nc.flush()
    assert cancelled.empty()


async def test_nobody_listening_is_told_at_once(asking: Asking) -> None:
    """A broker without a monitor."""
    async with asking.ask(query(), keep=False) as replies:
        reply = await replies.next()
    assert isinstance(reply, m.Failure)
    assert (reply.code, reply.retryable) == ("bus_unavailable", True)


@pytest.mark.parametrize("keep", [False, True])
async def test_a_query_that_nobody_waits_for_is_cancelled_unless_it_is_to_be_kept(
    bus: Bus, asking: Asking, keep: bool
) -> None:
    """Left in the middle of its stream, as by a client that is gone."""
    taken, cancelled = await heard(bus, subjects.QUERY), await heard(bus, subjects.cancel("*"))
    with pytest.raises(ConnectionResetError):
        async with asking.ask(query(), keep=keep) as replies:
            await bus.reply((await taken.get()).reply, m.Chunk(id="q1", seq=0, attempt=1, text="x"), "json")
            await replies.next()
            raise ConnectionResetError
    await bus.nc.publish(subjects.cancel("marker"), b"")
    first = await cancelled.get()
    assert first.subject == subjects.cancel("marker" if keep else "q1")


async def test_an_end_that_was_missed_is_looked_up_when_its_time_is_over(
    bus: Bus, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is asked before a client is told that there was no answer; without one it is the deadline."""
    monkeypatch.setattr("services.gateway.asking.MARGIN_S", 0.0)
    await heard(bus, subjects.QUERY)
    end = m.Failure(code="engine_failed", message="recorded", id="q1")
    await bus.claim(m.Done(query_id="q1", failure=end))
    async with asking.ask(query(deadline_s=0.01), keep=False) as replies:
        assert await replies.next() == end
    async with asking.ask(query("q2", deadline_s=0.01), keep=False) as replies:
        late = await replies.next()
    assert isinstance(late, m.Failure)
    assert late.code == "deadline_expired"


async def test_an_end_that_came_while_the_broker_was_away_is_looked_up_when_it_is_back(
    bus: Bus, asking: Asking, broker: Broker, settings: Settings
) -> None:
    """What the broker handed on while nobody was connected is lost; its record is not."""
    await heard(bus, subjects.QUERY)
    end = m.Failure(code="engine_failed", message="recorded", id="q1")
    async with asking.ask(query(), keep=False) as replies:
        await bus.claim(m.Done(query_id="q1", failure=end))  # without a reply subject: it is handed to nobody
        await broker.kill()
        again = await Broker.start(settings.home / "nats", port=broker.port)
        try:
            async with asyncio.timeout(20):
                assert await replies.next() == end
        finally:
            await asking.stop(0.0)
            await bus.close()
            await again.stop()


async def test_stopping_takes_no_more_and_tells_those_that_wait(bus: Bus, asking: Asking) -> None:
    """What does not end in time is told to come again, and cancelled."""
    await heard(bus, subjects.QUERY)
    cancelled = await heard(bus, subjects.cancel("*"))
    async with asking.ask(query(), keep=False) as replies:
        stopping = asyncio.create_task(asking.stop(0.0))
        reply = await replies.next()
        await stopping
        assert isinstance(reply, m.Failure)
        assert reply.code == "not_ready"
        with pytest.raises(NotReady):
            async with asking.ask(query("q2"), keep=False):
                pass
    assert (await cancelled.get()).subject == subjects.cancel("q1")


async def test_feedback_that_fits_no_query_comes_back_as_its_error(bus: Bus, asking: Asking) -> None:
    """The monitor's own error, with its code."""

    async def on_feedback(message: Msg) -> None:
        given = codec.unpack(message.data, m.Feedback)
        error = codec.failure_of(NotFound(f"No {given.query_id}.", "Give another."))
        await bus.nc.publish(message.reply, codec.pack(error))

    await bus.subscribe(subjects.FEEDBACK, on_feedback)
    with pytest.raises(NotFound, match=r"No q9\."):
        await asking.judge(m.Feedback(query_id="q9", score=1.0))


async def test_what_the_fleet_lacks_is_named(bus: Bus) -> None:
    """First its models, then its workers, of which those that leave do not count; the figures that nobody gives are
    left out."""
    fleet = Fleet(bus)
    await fleet.start()
    assert "models" in fleet.missing()
    await bus.kv_put(subjects.BUCKET_MODELS, subjects.POLICY_KEY, m.Policy(fleet="f"))
    await bus.kv_put(subjects.BUCKET_MODELS, "c", card("c"))

    async def lacks_workers() -> bool | None:
        return "worker" in fleet.missing() or None

    await until(lacks_workers)
    await bus.kv_put(subjects.BUCKET_FLEET, subjects.fleet_key("w1"), worker(draining=True))

    async def has_worker() -> bool | None:
        return bool(fleet.workers) or None

    await until(has_worker)
    assert "worker" in fleet.missing()
    await bus.kv_put(subjects.BUCKET_FLEET, subjects.fleet_key("w2"), worker("w2"))

    async def complete() -> bool | None:
        return not fleet.missing() or None

    await until(complete)
    snapshot = await fleet.snapshot()
    assert (snapshot.counts, snapshot.qos, snapshot.energy, snapshot.queues) == (None, None, None, {})
    assert [card.name for card in snapshot.cards] == ["c"]
