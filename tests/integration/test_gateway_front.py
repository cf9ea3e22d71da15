"""A gateway in this process, with a real broker and a monitor that the test plays: what rarely happens."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import structlog.testing
from aiohttp import ClientSession
from nats.aio.msg import Msg

from services.gateway import asking, completions, front
from services.gateway.service import Gateway, known_keys
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import SettingsInvalid
from shared.runtime import Context, Health
from shared.settings import Settings
from tests.integration.monitor_parts import until
from tests.samples import card, worker

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.fixture
async def gateway(bus: Bus, settings: Settings) -> AsyncIterator[Gateway]:
    """It listens, and its fleet has one card and one worker."""
    settings = dataclasses.replace(settings, http="127.0.0.1:0", drain_s=0.1)
    context = Context(settings, bus, structlog.get_logger(), Health(), "g")
    await bus.kv_put(subjects.BUCKET_MODELS, subjects.POLICY_KEY, m.Policy(fleet="f"))
    await bus.kv_put(subjects.BUCKET_MODELS, "c", card("c"))
    await bus.kv_put(subjects.BUCKET_FLEET, subjects.fleet_key("w1"), worker())
    started = Gateway(context)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[ClientSession]:
    async with ClientSession(gateway.url) as session:
        yield session


@pytest.fixture
async def queries(bus: Bus) -> asyncio.Queue[Msg]:
    """What the monitor would take in."""
    taken: asyncio.Queue[Msg] = asyncio.Queue()

    async def on_query(message: Msg) -> None:
        taken.put_nowait(message)

    await bus.subscribe(subjects.QUERY, on_query)
    await bus.nc.flush()
    return taken


def ended(query_id: str, text: str) -> m.Answer:
    return m.Answer(
        id=query_id, text=text, model="c", artifact="a-int8", worker="w1", attempt=1, why="", finish_reason="stop",
        usage=m.Usage(tokens_in=1, tokens_out=1), energy=m.Energy(joules=0.0, source="model"),
        timings=m.Timings(queue_s=0.0, load_s=0.0, prefill_s=0.0, decode_s=0.0, overhead_s=0.0, total_s=0.0),
        confidence=m.Confidence(mean_logprob=0.0, min_logprob=0.0, mean_entropy=0.0),
    )  # fmt: skip


async def test_while_there_is_nothing_to_say_a_stream_is_kept_alive(
    bus: Bus, http: ClientSession, queries: asyncio.Queue[Msg], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers without a first text after a while, then comments, which are no events; then the answer."""
    monkeypatch.setattr(completions, "HEADERS_AFTER_S", 0.01)
    monkeypatch.setattr(completions, "COMMENT_EACH_S", 0.01)
    async with http.post(CHAT, json=ASKED) as response:
        assert response.status == 200
        message = await queries.get()
        assert await response.content.readline() == b": waiting\n"
        await bus.reply(message.reply, ended(codec.from_json(message.data, m.Query).id or "", "yes"), "json")
        lines = [line async for line in response.content if line.startswith(b"data: ")]
    assert json.loads(lines[0].removeprefix(b"data: "))["choices"][0]["delta"]["content"] == "yes"
    assert lines[-1] == b"data: [DONE]\n"


async def test_a_query_that_fails_after_some_text_ends_its_stream_with_an_event(
    bus: Bus, http: ClientSession, queries: asyncio.Queue[Msg]
) -> None:
    """The status is sent by then; before the first text it is the failure's own."""
    failure = m.Failure(code="engine_failed", message="It broke.", remedy="Again.", retryable=True)
    asked = asyncio.create_task(http.post(CHAT, json=ASKED))
    await bus.reply((await queries.get()).reply, failure, "json")
    async with await asked as response:
        assert (response.status, (await response.json())["error"]["code"]) == (502, "engine_failed")
    async with http.get("/metrics") as response:
        assert 'calm_http_errors_total{code="engine_failed"} 1' in await response.text()
    asked = asyncio.create_task(http.post(CHAT, json=ASKED))
    message = await queries.get()
    await bus.reply(message.reply, m.Chunk(id="q", seq=0, attempt=1, text="so ", model="c"), "json")
    await bus.reply(message.reply, failure, "json")
    async with await asked as response:
        assert (response.status, response.headers["x-calm-model"]) == (200, "c")
        lines = [line async for line in response.content if line.startswith(b"data: ")]
    assert json.loads(lines[-1].removeprefix(b"data: "))["error"]["message"] == "It broke. Again."
    async with http.get("/metrics") as response:
        assert 'calm_http_errors_total{code="engine_failed"} 2' in await response.text()


async def test_a_body_that_does_not_arrive_is_given_up(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """408 once the time for it is over."""
    monkeypatch.setattr(front, "BODY_S", 0.01)
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    )
    writer.write(head.encode())
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
    writer.close()
    await writer.wait_closed()


async def test_what_is_no_http_is_refused_and_logged_in_a_line(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    """400, and no trace in the log that anybody who reaches the port could fill it with."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    with structlog.testing.capture_logs() as logged:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nBad: \x00\r\n\r\n")
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"HTTP/1.0 400 ")
            await reader.read()
        writer.close()
        await writer.wait_closed()
    assert [line["event"] for line in logged] == ["http_server"]
    assert "header value" in logged[0]["error"]
    assert "Traceback" not in capsys.readouterr().err


async def test_what_fails_inside_is_logged_and_not_told(
    gateway: Gateway, http: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 with the id under which the log has it."""

    async def broken() -> None:
        raise RuntimeError("SECRET")

    monkeypatch.setattr(gateway.fleet, "snapshot", broken)
    async with http.get("/metrics") as response:
        text = await response.text()
        assert response.status == 500
        assert response.headers["x-request-id"]
    assert "SECRET" not in text
    assert json.loads(text)["error"]["code"] == "internal"


async def test_more_than_it_can_hold_is_refused(http: ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 at once, with when to come again."""
    monkeypatch.setattr(asking, "AT_ONCE", 0)
    async with http.post(CHAT, json=ASKED) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "overloaded")
        assert response.headers["Retry-After"] == "1"


async def test_a_request_that_fails_is_counted_as_in_flight_no_longer(
    bus: Bus, gateway: Gateway, http: ClientSession, queries: asyncio.Queue[Msg]
) -> None:
    """Whatever becomes of requests, none stays in the count: here a client that leaves."""
    cancelled = asyncio.Event()

    async def on_cancel(_message: Msg) -> None:
        cancelled.set()

    await bus.subscribe(subjects.cancel("*"), on_cancel)
    asked = asyncio.create_task(http.post(CHAT, json=ASKED))
    await queries.get()
    assert gateway.in_flight == 1
    asked.cancel()
    async with asyncio.timeout(20):
        await cancelled.wait()

    async def none_left() -> bool | None:
        return gateway.in_flight == 0 or None

    await until(none_left)
    async with http.get("/metrics") as response:
        assert f'calm_http_disconnects_total{{route="{CHAT}"}} 1' in await response.text()


def test_keys_that_cannot_be_read_stop_the_gateway(tmp_path: Path) -> None:
    """A file that is not there, and a setting without a key in it, must not leave the door open."""
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    assert len(known_keys(Settings(api_keys="three", api_keys_file=str(file)))) == 3
    assert known_keys(Settings()) == frozenset()
    for settings in (Settings(api_keys_file=str(tmp_path / "none")), Settings(api_keys=" , ")):
        with pytest.raises(SettingsInvalid, match="CALM_API_KEYS"):
            known_keys(settings)
