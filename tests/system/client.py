"""A plain NATS client for tests, which knows nothing of CALM's code."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg


@dataclass
class Conversation:
    """A query that was sent, and everything that came back."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    finals: list[dict[str, Any]] = field(default_factory=list)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the first message of whatever kind."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def final(self, timeout_s: float = 60.0) -> dict[str, Any]:
        async with asyncio.timeout(timeout_s):
            await self.ended.wait()
        return self.finals[0]

    @property
    def text(self) -> str:
        """The streamed text of the last attempt."""
        last = max((c["attempt"] for c in self.chunks), default=0)
        return "".join(c["text"] for c in self.chunks if c["attempt"] == last)


async def ask(nc: Client, **query: Any) -> dict[str, Any]:
    """Request and reply."""
    reply = await nc.request("calm.query", json.dumps(query).encode(), timeout=60)
    result: dict[str, Any] = json.loads(reply.data)
    return result


async def converse(nc: Client, **query: Any) -> Conversation:
    """Publish with an inbox of its own; the conversation fills by itself."""
    talk = Conversation()

    async def on_message(message: Msg) -> None:
        body = json.loads(message.data)
        if body["type"] == "chunk.v1":
            talk.chunks.append(body)
        else:
            talk.finals.append(body)
            talk.ended.set()
        talk.first.set()

    inbox = nc.new_inbox()
    await nc.subscribe(inbox, cb=on_message)
    await nc.publish("calm.query", json.dumps(query).encode(), reply=inbox)
    return talk


async def knowledge(nc: Client, verb: str, **request: Any) -> dict[str, Any]:
    reply = await nc.request(f"calm.knowledge.{verb}", json.dumps(request).encode(), timeout=10)
    result: dict[str, Any] = json.loads(reply.data)
    return result
