"""A plain HTTP client for tests: a gateway's address, and streams read event by event."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientResponse, ClientSession
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from tests.processes import Process


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
