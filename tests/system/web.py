"""A plain HTTP client for tests, and the gateway that it speaks to."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientResponse, ClientSession, ClientTimeout
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from tests.integration.monitor_parts import until
from tests.processes import Process, engines_of, running
from tests.system.client import knowledge
from tests.system.conftest import System

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": "plain", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3000, "stream": True
}  # fmt: skip
"""The tiny model writes a fifth of a second on this."""


async def address(gateway: Process, bus: Bus) -> str:
    """Where a gateway listens, as its heartbeat says."""
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_beat(message: Msg) -> None:
        beat = codec.unpack(message.data, m.Heartbeat)
        if beat.pid == gateway.pid and beat.detail and not found.done():
            found.set_result(beat.detail)

    subscription = await bus.subscribe(subjects.health("gateway"), on_beat)
    async with asyncio.timeout(10):
        url = await found
    await subscription.unsubscribe()
    return url


async def events(response: ClientResponse) -> AsyncIterator[dict[str, Any] | str]:
    """The data of each server-sent event: JSON decoded, anything else as it is."""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield json.loads(data) if data.startswith("{") else data


async def chat(http: ClientSession, content: str = "hello there", **more: Any) -> tuple[int, dict[str, Any]]:
    """One chat completion that is not streamed: status and body."""
    body = {"model": "calm", "messages": [{"role": "user", "content": content}], **more}
    data = io.BytesIO(json.dumps(body).encode())
    async with http.post("/v1/chat/completions", data=data, headers={"Content-Type": "application/json"}) as response:
        return response.status, await response.json()


@contextlib.asynccontextmanager
async def front(system: System, **more: str) -> AsyncIterator[tuple[Process, ClientSession]]:
    """A gateway of this system, and a client of it."""
    async with running("gateway", system.settings, system.bus, **more) as gateway:
        url = await address(gateway, system.bus)
        async with ClientSession(url, timeout=ClientTimeout(total=60)) as http:
            yield gateway, http


async def ready(http: ClientSession) -> None:
    """Wait until the gateway has seen what it needs."""

    async def is_ready() -> bool | None:
        async with http.get("/ready") as response:
            return response.status == 200 or None

    await until(is_ready)


async def ended(system: System, query_id: str) -> dict[str, Any]:
    """The record of a query, once it has ended."""

    async def found() -> dict[str, Any] | None:
        record = await knowledge(system.bus.nc, "query", id=query_id)
        return record if record.get("state") in ("answered", "failed") else None

    return await until(found)


async def freeze(system: System, worker: str) -> list[int]:
    """Stop a worker's engines where they are; their processes."""
    found = await engines_of(worker, system.bus)
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return found


def go_on(engines: list[int]) -> None:
    """Let stopped engines go on."""
    for pid in engines:
        os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def halted(
    system: System, http: ClientSession, worker: str, **more: Any
) -> AsyncIterator[tuple[ClientResponse, AsyncIterator[dict[str, Any] | str], list[dict[str, Any] | str], list[int]]]:
    """A long answer whose worker's engines have been stopped in its middle: the response, the events to come, those
    that came, and the engines. An answer may have ended by then (what is drawn by chance ends by chance): then another
    is asked for."""
    engines = await engines_of(worker, system.bus)
    assert engines
    async with contextlib.AsyncExitStack() as asked:
        for _ in range(50):
            response = await asked.enter_async_context(http.post(CHAT, json={**LONG, **more}))
            stream = events(response)
            told = [await anext(stream)]
            for pid in engines:
                os.kill(pid, signal.SIGSTOP)
            if await system.bus.claimed(response.headers["x-request-id"]) is None:
                yield response, stream, told, engines
                return
            go_on(engines)
        raise AssertionError("every answer had ended before its worker was stopped")
