"""The bus against a real nats-server: claims, queues that lose nothing, views."""

from __future__ import annotations

import asyncio

import pytest
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.broker import Broker
from shared.bus import Bus
from shared.puller import Puller
from shared.settings import Settings
from shared.views import FleetView, ModelsView


def _accepted(query_id: str) -> m.Accepted:
    return m.Accepted(query=m.Query(prompt="x"), query_id=query_id, deadline_at=0.0)


def _puller(bus: Bus, handler: object, **more: object) -> Puller:
    options: dict[str, object] = {
        "stream": subjects.STREAM_QUERIES,
        "durable": "analyzer",
        "subject": subjects.NEW,
        "handler": handler,
        "ack_wait_s": 2.0,
    }
    return Puller(bus, **{**options, **more})  # type: ignore[arg-type]


async def test_only_the_first_claim_wins(bus: Bus) -> None:
    """Of many claims for one query exactly one wins, and the winner's record stays."""
    claims = [m.Done(query_id="q1", attempt=n) for n in range(8)]
    won = await asyncio.gather(*(bus.claim(c) for c in claims))
    assert sum(won) == 1
    recorded = await bus.claimed("q1")
    assert recorded is not None
    assert recorded.attempt == won.index(True)
    assert await bus.claimed("other") is None


@pytest.mark.parametrize(("inbox", "times"), [("_INBOX.client.1", 1), ("elsewhere.1", 2)])
async def test_finish_sends_once_and_resends_the_recorded_end(bus: Bus, inbox: str, times: int) -> None:
    """The loser of a claim sends nothing. The broker itself hands the first to a client's inbox; to any other subject
    a redelivered holder sends it again, unchanged, for the winner may have died before it did."""
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def collect(message: Msg) -> None:
        got.put_nowait(message.data)

    await bus.subscribe(inbox, collect)
    first = m.Done(query_id="q", reply=inbox, failure=m.Failure(code="cancelled", message="first"))
    second = m.Done(query_id="q", reply=inbox, failure=m.Failure(code="cancelled", message="second"))
    assert await bus.finish(first)
    assert not await bus.finish(second)
    assert not await bus.finish(second, resend=True)
    await bus.nc.flush()
    async with asyncio.timeout(5):
        texts = [codec.from_json(await got.get(), m.Failure).message for _ in range(times)]
    assert texts == ["first"] * times
    assert got.empty()


async def test_publish_is_idempotent_by_message_id(bus: Bus) -> None:
    """The same message id published twice is stored once."""
    one = await bus.publish(subjects.NEW, _accepted("a"), msg_id="a-new")
    assert await bus.publish(subjects.NEW, _accepted("a"), msg_id="a-new") == one


async def test_puller_delivers_everything_once_within_its_limit(bus: Bus) -> None:
    """Two pullers on one consumer share 200 messages, each handled once, never more at a time than the limit."""
    seen: list[str] = []
    running = 0
    peak = 0
    all_seen = asyncio.Event()

    async def handle(message: Msg) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0)
        seen.append(codec.unpack(message.data, m.Accepted).query_id)
        await message.ack()
        running -= 1
        if len(seen) == 200:
            all_seen.set()

    pullers = [_puller(bus, handle, limit=4) for _ in range(2)]
    for puller in pullers:
        await puller.start()
    await asyncio.gather(*(bus.publish(subjects.NEW, _accepted(str(n))) for n in range(200)))
    async with asyncio.timeout(20):
        await all_seen.wait()
    for puller in pullers:
        await puller.stop(1)
    assert sorted(seen, key=int) == [str(n) for n in range(200)]
    assert peak <= 8


async def test_puller_hands_back_what_it_cannot_finish(bus: Bus) -> None:
    """A message in hand when a puller stops reaches the next puller at once, not after the ack wait."""
    held = asyncio.Event()
    taken: asyncio.Queue[str] = asyncio.Queue()

    async def hang(_message: Msg) -> None:
        held.set()
        await asyncio.Event().wait()

    async def take(message: Msg) -> None:
        await message.ack()
        taken.put_nowait(codec.unpack(message.data, m.Accepted).query_id)

    first = _puller(bus, hang, ack_wait_s=60.0)
    await first.start()
    await bus.publish(subjects.NEW, _accepted("x"))
    async with asyncio.timeout(5):
        await held.wait()
    await first.stop(0.01)
    second = _puller(bus, take, ack_wait_s=60.0)
    await second.start()
    async with asyncio.timeout(5):
        assert await taken.get() == "x"
    await second.stop(1)


async def test_puller_without_room_leaves_messages_to_others(bus: Bus) -> None:
    """A puller whose room is gone takes nothing, and takes again once it is woken with room."""
    room = 0
    taken: asyncio.Queue[str] = asyncio.Queue()

    async def take(message: Msg) -> None:
        await message.ack()
        taken.put_nowait(codec.unpack(message.data, m.Accepted).query_id)

    puller = _puller(bus, take, room=lambda: room)
    await puller.start()
    await bus.publish(subjects.NEW, _accepted("x"))
    await bus.nc.flush()
    assert taken.empty()
    room = 1
    puller.wake()
    async with asyncio.timeout(5):
        assert await taken.get() == "x"
    await puller.stop(1)


async def test_puller_and_publish_survive_a_broker_restart(bus: Bus, broker: Broker, settings: Settings) -> None:
    """A broker killed and started again on its files delivers what was published before and after."""
    taken: asyncio.Queue[str] = asyncio.Queue()
    gate = asyncio.Event()

    async def take(message: Msg) -> None:
        await gate.wait()
        await message.ack()
        taken.put_nowait(codec.unpack(message.data, m.Accepted).query_id)

    puller = _puller(bus, take)
    await bus.publish(subjects.NEW, _accepted("before"))
    back = asyncio.Event()
    bus.on_reconnect(back.set)
    await broker.kill()
    again = await Broker.start(settings.home / "nats", port=broker.port)
    try:
        async with asyncio.timeout(20):
            await back.wait()
            await puller.start()
            gate.set()
            await bus.publish(subjects.NEW, _accepted("after"))
            assert {await taken.get(), await taken.get()} == {"before", "after"}
        await puller.stop(1)
    finally:
        await again.stop()


async def test_views_follow_the_buckets(bus: Bus) -> None:
    """A view holds what was there before it started and what comes after, and notices deletion."""
    spec = m.ArtifactSpec(
        name="a-int8", model="a", variant="int8", weights_bytes=1, kv_bytes_per_token=1, slots=1, context=1
    )
    await bus.kv_put(subjects.BUCKET_MODELS, "one", m.Card(name="one", artifact=spec, description="d"))
    await bus.kv_put(subjects.BUCKET_MODELS, subjects.POLICY_KEY, m.Policy(fleet="f"))
    changed = asyncio.Event()
    view = ModelsView(bus, changed.set)
    await view.start()
    assert set(view.cards) == {"one"}
    assert view.ready.is_set()
    changed.clear()
    await bus.kv_put(subjects.BUCKET_MODELS, "two", m.Card(name="two", artifact=spec, description="d"))
    async with asyncio.timeout(5):
        await changed.wait()
    assert set(view.cards) == {"one", "two"}

    heard: asyncio.Queue[m.WorkerState | None] = asyncio.Queue()
    fleet = FleetView(bus, heard.put_nowait)
    await fleet.start()
    state = m.WorkerState(worker="w1", host="h", device=m.Device(kind="cpu", name="c"), budget_bytes=10)
    await bus.kv_put(subjects.BUCKET_FLEET, subjects.fleet_key("w1"), state)
    async with asyncio.timeout(5):
        assert await heard.get() == state
    assert [w.worker for w in fleet.workers()] == ["w1"]
