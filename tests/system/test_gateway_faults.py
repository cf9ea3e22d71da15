"""Clients that leave, deadlines that pass, workers that are lost, and a gateway that stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from tests.processes import running
from tests.system import web
from tests.system.conftest import System

pytestmark = pytest.mark.system


@pytest.fixture
async def http(system: System) -> AsyncIterator[ClientSession]:
    async with web.front(system) as (_, client):
        yield client


async def test_a_client_that_leaves_cancels_its_query(system: System, http: ClientSession) -> None:
    """In the middle of a stream, and while it waits for a whole answer; a query with an id of the client's own goes
    on, and the client may come back for its answer."""
    await system.add_worker("w1")
    await web.ready(http)
    assert (await web.chat(http, model="plain"))[0] == 200
    accepted: asyncio.Queue[str] = asyncio.Queue()
    cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def on_accepted(message: Msg) -> None:
        accepted.put_nowait(codec.unpack(message.data, m.Accepted).query_id)

    async def on_cancel(message: Msg) -> None:
        cancelled.put_nowait(message.subject.rpartition(".")[2])

    async def cancelling(query_id: str) -> None:
        while await cancelled.get() != query_id:  # the executor says it again, of the one before
            pass

    await system.bus.subscribe(subjects.cancel("*"), on_cancel)
    async with web.halted(system, http, "w1") as (response, _, _, engines):  # it cannot end before its client has left
        query_id = response.headers["x-request-id"]
        response.close()
        async with asyncio.timeout(20):
            await cancelling(query_id)
        web.go_on(engines)
    assert (await web.ended(system, query_id))["done"]["failure"]["code"] == "cancelled"

    await system.bus.subscribe(subjects.NEW, on_accepted)
    engines = await web.freeze(system, "w1")
    waiting = asyncio.create_task(http.post(web.CHAT, json={**web.LONG, "stream": False}))
    async with asyncio.timeout(20):
        query_id = await accepted.get()
        waiting.cancel()
        await cancelling(query_id)
    web.go_on(engines)
    assert (await web.ended(system, query_id))["done"]["failure"]["code"] == "cancelled"

    own = {**web.LONG, "max_tokens": 40, "calm": {"id": "mine"}}
    async with http.post(web.CHAT, json=own) as response:
        assert response.headers["x-request-id"] == "mine"
        response.close()
    status, body = await web.chat(http, calm={"id": "mine"})
    assert (status, body["id"]) == (200, "mine")
    assert body["usage"]["completion_tokens"] > 16  # of the first request: the card's own limit is 16


async def test_a_deadline_that_passes_is_a_time_out(system: System, http: ClientSession) -> None:
    """504, and no client is to repeat it by itself."""
    await system.add_worker("w1")
    await web.ready(http)
    assert (await web.chat(http, model="plain"))[0] == 200
    frozen = await web.freeze(system, "w1")
    assert frozen
    body = {**web.LONG, "stream": False, "calm": {"deadline_s": 0.5}}
    async with http.post(web.CHAT, json=body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (504, "deadline_expired", "timeout_error")
        assert response.headers["x-should-retry"] == "false"
    web.go_on(frozen)


@pytest.mark.parametrize("temperature", [0.0, 3.0])
async def test_a_worker_that_is_lost_in_a_stream_goes_unnoticed_or_ends_it_with_an_error(
    system: System, http: ClientSession, temperature: float
) -> None:
    """SIGKILL in the middle. Greedy decoding says the same again, and the client reads one attempt's text from first
    to last word; what was drawn by chance comes out otherwise, and the stream ends with a typed error."""
    first = await system.add_worker("w1")
    await web.ready(http)
    assert (await web.chat(http, model="plain"))[0] == 200
    async with web.halted(system, http, "w1", temperature=temperature) as (response, stream, told, _):
        await first.kill()
        await system.add_worker("w2")
        told += [event async for event in stream]
    last, end = told[-2:]
    if temperature:
        assert isinstance(end, dict)
        assert (end["error"]["code"], end["error"]["retryable"]) == ("restarted", True)
        query = await web.ended(system, response.headers["x-request-id"])
        assert query["state"] in ("failed", "answered")  # cancelled, unless it had ended by then
        return
    assert end == "[DONE]"
    assert isinstance(last, dict)
    assert (last["calm"]["attempt"], last["calm"]["worker"]) == (2, "w2")
    pieces = [event["choices"][0]["delta"].get("content", "") for event in told if isinstance(event, dict)]
    _, whole = await web.chat(http, "hi", model="plain", max_tokens=3000)
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]


async def test_it_lets_clients_have_their_answers_before_it_leaves(system: System) -> None:
    """SIGTERM while a stream runs: the stream ends as it should, new connections are refused, the status is 0. What
    takes longer than the drain time is told so, and its query is cancelled."""
    await system.add_worker("w1")
    async with web.front(system, CALM_DRAIN_S="20") as (gateway, http):
        await web.ready(http)
        async with http.post(web.CHAT, json=web.LONG) as response:
            leaving: asyncio.Task[int] | None = None
            told = []
            async for event in web.events(response):
                leaving = leaving or asyncio.create_task(gateway.stop())
                told.append(event)
        assert told[-1] == "[DONE]"
        assert leaving is not None
        assert await leaving == 0, gateway.log.read_text()[-3000:]
    async with web.front(system, CALM_DRAIN_S="0.2") as (gateway, http):
        await web.ready(http)
        async with web.halted(system, http, "w1") as (response, stream, told, frozen):
            leaving = asyncio.create_task(gateway.stop())
            told += [event async for event in stream]
        assert isinstance(told[-1], dict)
        assert told[-1]["error"]["code"] == "not_ready"
        assert await leaving == 0
        assert "Traceback" not in gateway.log.read_text()
    web.go_on(frozen)
    record = await web.ended(system, response.headers["x-request-id"])
    assert record["done"]["failure"]["code"] == "cancelled"


async def test_a_port_in_use_is_told_with_what_to_change(system: System) -> None:
    """The second gateway at one address ends with status 2 and says which setting to change."""
    async with web.front(system) as (gateway, http):
        taken = f"{http._base_url.host}:{http._base_url.port}"  # type: ignore[union-attr]
        with pytest.raises(AssertionError, match=r"another program listens there.*CALM_HTTP"):
            async with running("gateway", system.settings, system.bus, CALM_HTTP=taken):
                pass
        assert gateway.process.returncode is None
