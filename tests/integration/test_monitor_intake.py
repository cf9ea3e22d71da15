"""Intake and registry of the monitor, against a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import nats.errors
import pytest
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.settings import Settings
from tests.integration.monitor_parts import Running, Store, ready, reply, start_monitor, until


@pytest.fixture
async def monitor(settings: Settings, bus: Bus) -> AsyncIterator[Running]:
    running = await start_monitor(settings, Store("small"))
    try:
        await ready(bus)
        yield running
    finally:
        await running.stop()


async def _new(bus: Bus, query_id: str) -> m.Accepted | None:
    """The query with that id in the stream, if it is there."""
    info = await bus.js.stream_info(subjects.STREAM_QUERIES)
    for sequence in range(max(info.state.first_seq, 1), info.state.last_seq + 1):
        raw = await bus.js.get_msg(subjects.STREAM_QUERIES, sequence)
        accepted = codec.unpack(raw.data or b"", m.Accepted)
        if accepted.query_id == query_id:
            return accepted
    return None


async def _count(bus: Bus) -> int:
    return (await bus.js.stream_info(subjects.STREAM_QUERIES)).state.messages


async def test_a_valid_query_is_stored_with_its_inbox(bus: Bus, monitor: Running) -> None:
    """A valid query appears on `calm.queries.new`, whole, with the client's inbox and its deadline."""
    query = m.Query(prompt="What is law?", id="mine", deadline_s=7.0, metadata={"a": "b"})
    await bus.nc.publish(subjects.QUERY, codec.to_json(query), reply="_INBOX.client")
    accepted = await until(lambda: _new(bus, "mine"))
    assert accepted.query == query
    assert accepted.reply == "_INBOX.client"
    assert accepted.encoding == "json"
    assert accepted.deadline_at == accepted.stamps["received"] + 7.0
    assert accepted.stamps["accepted"] >= accepted.stamps["received"]


async def test_messagepack_and_missing_inbox_are_taken(bus: Bus, monitor: Running) -> None:
    """A MessagePack query without a reply inbox is accepted; the header decides the encoding."""
    data = codec.pack(m.Query(prompt="x", id="packed"))
    await bus.nc.publish(subjects.QUERY, data, headers={"Content-Type": "application/msgpack"})
    accepted = await until(lambda: _new(bus, "packed"))
    assert accepted.encoding == "msgpack"
    assert not accepted.reply


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_query"),
        (b"\xff\xfe", "invalid_query"),
        (b"[1]", "invalid_query"),
        (b"{}", "invalid_query"),
        (b'{"prompt": "   "}', "invalid_query"),
        (b'{"prompt": "x", "messages": []}', "invalid_query"),
        (b'{"prompt": "x", "typo": 1}', "invalid_query"),
        (b'{"prompt": "x", "id": "a.b"}', "invalid_query"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "invalid_query"),
        (b'{"prompt": "x", "constraints": {"tags": ["nowhere"]}}', "invalid_query"),
        (b'{"prompt": "x", "model": "alhpa"}', "unknown_model"),
        (b'{"prompt": "x", "constraints": {"exclude": ["gamma"]}}', "unknown_model"),
        (b'{"prompt": "' + b"x" * 1_000_001 + b'"}', "prompt_too_large"),
    ],
)
async def test_bad_input_is_refused_with_a_remedy(bus: Bus, monitor: Running, data: bytes, code: str) -> None:
    """Every kind of bad input gets a typed error with a remedy at once, and nothing is stored."""
    failure = await reply(bus, data)
    assert isinstance(failure, m.Failure)
    assert failure.code == code
    assert failure.remedy
    assert not failure.retryable
    assert await _count(bus) == 0


async def test_a_refusal_uses_the_clients_encoding(bus: Bus, monitor: Running) -> None:
    """A MessagePack client is refused in MessagePack; an unknown content type is refused in JSON."""
    packed = await bus.nc.request(
        subjects.QUERY, codec.pack(m.Query(prompt="")), headers={"Content-Type": "application/msgpack"}
    )
    assert codec.unpack(packed.data, m.Failure).code == "invalid_query"
    xml = await bus.nc.request(subjects.QUERY, b"<q/>", headers={"Content-Type": "application/xml"})
    assert "application/json" in codec.from_json(xml.data, m.Failure).remedy


async def test_a_reply_subject_of_the_system_is_refused(bus: Bus, monitor: Running) -> None:
    """A query whose reply subject is one of ours is refused, so answers cannot be smuggled into the system."""
    await bus.nc.publish(subjects.QUERY, b'{"prompt": "x", "id": "evil"}', reply=subjects.NEW)
    await bus.nc.publish(subjects.QUERY, b'{"prompt": "x", "id": "good"}')
    await until(lambda: _new(bus, "good"))
    assert await _new(bus, "evil") is None


async def test_nobody_listens_when_nothing_runs(bus: Bus) -> None:
    """Without a monitor a query fails at once with no responders."""
    with pytest.raises(nats.errors.NoRespondersError):
        await bus.nc.request(subjects.QUERY, b'{"prompt": "x"}', timeout=5)


async def test_a_stopped_monitor_leaves_the_queue_group(bus: Bus, settings: Settings) -> None:
    """After stop, queries meet no responders instead of silence."""
    running = await start_monitor(settings, Store("small"))
    await ready(bus)
    await running.stop()
    with pytest.raises(nats.errors.NoRespondersError):
        await bus.nc.request(subjects.QUERY, b'{"prompt": "x"}', timeout=5)


async def test_missing_models_give_a_retryable_error_until_they_are_there(bus: Bus, settings: Settings) -> None:
    """While the store lacks a model, queries get `not_ready`; once it is pulled, they are taken."""
    store = Store()
    running = await start_monitor(settings, store)
    failure = await reply(bus, b'{"prompt": "x"}')
    assert isinstance(failure, m.Failure)
    assert failure.code == "not_ready"
    assert failure.retryable
    assert "calm models pull" in failure.remedy
    store.models.update(Store("small").models)
    await ready(bus)
    await running.stop()


async def test_the_registry_equals_the_fleet_file(bus: Bus, settings: Settings) -> None:
    """Cards and policy are published, and a card that the fleet no longer has is deleted."""
    spec = m.ArtifactSpec(
        name="old-int8", model="old", variant="int8", weights_bytes=1, kv_bytes_per_token=1, slots=1, context=1
    )
    await bus.kv_put(subjects.BUCKET_MODELS, "old", m.Card(name="old", artifact=spec, description="d"))
    running = await start_monitor(settings, Store("small"))
    await ready(bus)
    values = await bus.kv_all(subjects.BUCKET_MODELS)
    assert set(values) == {"alpha", "beta", subjects.POLICY_KEY}
    card = codec.unpack(values["beta"], m.Card)
    assert card.artifact.name == "small-int8"
    assert card.artifact.context == 512
    assert card.domains == {"law": 0.7}
    assert codec.unpack(values[subjects.POLICY_KEY], m.Policy).fleet == "pair"
    await running.stop()


async def test_an_ended_query_sent_again_gets_its_recorded_end(bus: Bus, monitor: Running) -> None:
    """A client that sends its own id again after the end gets that end, and nothing runs twice."""
    await bus.claim(m.Done(query_id="again", failure=m.Failure(code="cancelled", message="first", id="again")))
    failure = await reply(bus, codec.to_json(m.Query(prompt="x", id="again")))
    assert isinstance(failure, m.Failure)
    assert failure.message == "first"
    assert await _count(bus) == 0


async def test_a_running_query_sent_again_answers_both_inboxes(bus: Bus, monitor: Running) -> None:
    """A client that lost its connection sends its id again while the query runs, and gets its end too."""
    await bus.nc.publish(subjects.QUERY, codec.to_json(m.Query(prompt="x", id="twice")), reply="_INBOX.lost")
    await until(lambda: _new(bus, "twice"))
    inbox = bus.nc.new_inbox()
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def collect(message: Msg) -> None:
        got.put_nowait(message.data)

    await bus.subscribe(inbox, collect)
    before = (await bus.js.stream_info(subjects.STREAM_QUERIES)).state.last_seq
    await bus.nc.publish(subjects.QUERY, codec.to_json(m.Query(prompt="x", id="twice")), reply=inbox)
    await bus.nc.flush()
    await bus.finish(m.Done(query_id="twice", reply="_INBOX.lost", failure=m.Failure(code="cancelled", message="e")))
    async with asyncio.timeout(5):
        assert codec.from_json(await got.get(), m.Failure).message == "e"
    assert (await bus.js.stream_info(subjects.STREAM_QUERIES)).state.last_seq == before


async def test_many_queries_at_once_are_all_stored(bus: Bus, monitor: Running) -> None:
    """A burst larger than the intake stores at a time loses none."""
    for number in range(600):
        await bus.nc.publish(subjects.QUERY, msgspec.json.encode({"prompt": str(number)}))

    async def all_there() -> bool | None:
        return True if await _count(bus) == 600 else None

    assert await until(all_there)
