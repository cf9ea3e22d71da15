"""Durable publishing: a message with its acknowledgement, by one inbox for all of a connection's acknowledgements.

What nats-py's `js.publish` does, at half its cost: that makes a token of random bytes, a waiter and a dictionary of
each acknowledgement, and every query waits for six of them, one after the other.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg


class Ack(msgspec.Struct):
    """The broker's acknowledgement: the message is stored as `seq` of its stream."""

    seq: int = 0
    duplicate: bool = False
    """It had been stored before, by its message id."""
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(Ack).decode


class Durable:
    """Publishes over one connection. `start` it once the connection is there."""

    def __init__(self, nc: Client, timeout_s: float) -> None:
        """`timeout_s`: how long to wait for an acknowledgement."""
        self._nc = nc
        self._timeout_s = timeout_s
        self._prefix = ""
        self._count = 0
        self._waiting: dict[str, asyncio.Future[Msg]] = {}

    async def start(self) -> None:
        self._prefix = f"{self._nc.new_inbox()}."
        await self._nc.subscribe(f"{self._prefix}*", cb=self._on_ack)

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> Ack:
        """Raises what nats-py's `js.publish` raises:

        nats.errors.TimeoutError: no acknowledgement came.
        nats.js.errors.NoStreamResponseError: no stream takes the subject.
        nats.js.errors.APIError: the stream refused it.
        """
        self._count += 1
        token = str(self._count)
        future = self._waiting[token] = asyncio.get_running_loop().create_future()
        try:
            await self._nc.publish(subject, data, self._prefix + token, headers)
            async with asyncio.timeout(self._timeout_s):
                message = await future
        except TimeoutError:
            raise nats.errors.TimeoutError from None
        finally:
            del self._waiting[token]
        if not message.data and (message.headers or {}).get("Status") == "503":
            raise nats.js.errors.NoStreamResponseError
        ack = _decode(message.data)
        if ack.error is not None:
            raise nats.js.errors.APIError.from_error(ack.error)
        return ack

    async def _on_ack(self, message: Msg) -> None:
        future = self._waiting.get(message.subject.rsplit(".", 1)[1])
        if future is not None and not future.done():
            future.set_result(message)
