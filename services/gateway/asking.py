"""Queries over the bus: one subscription for all replies, and cancellation of those that nobody waits for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import nats.errors
from nats.aio.msg import Msg

from shared import codec, subjects, tasks
from shared import messages as m
from shared.bus import Bus
from shared.errors import BusUnavailable, CalmError, DeadlineExpired, NotReady, Overloaded, PromptTooLarge

Reply = m.Chunk | m.Answer | m.Failure

AT_ONCE = 4096
"""Requests in flight; more are refused."""
MARGIN_S = 3.0
"""After its deadline a query's end is waited for so long: it is the executor that says so, not we."""
FEEDBACK_S = 10.0


class Replies:
    """What comes back on one query."""

    def __init__(self, query: m.Query, asking: Asking, *, keep: bool) -> None:
        self._query = query
        self.keep = keep
        """Not cancelled when nobody waits for it any more."""
        self._asking = asking
        self._queue: asyncio.Queue[Reply] = asyncio.Queue()
        self._ends_at = asyncio.get_running_loop().time() + query.deadline_s + MARGIN_S
        self.ended = False

    @property
    def query_id(self) -> str:
        return self._query.id or ""

    def put(self, reply: Reply) -> None:
        self._queue.put_nowait(reply)

    async def next(self, patience_s: float | None = None) -> Reply | None:
        """The next reply; None when there is none within `patience_s`. A reply that is no chunk is the last."""
        loop = asyncio.get_running_loop()
        until = self._ends_at if patience_s is None else min(self._ends_at, loop.time() + patience_s)
        try:
            if self._queue.empty():
                async with asyncio.timeout_at(until):
                    reply = await self._queue.get()
            else:
                reply = self._queue.get_nowait()
        except TimeoutError:
            if loop.time() < self._ends_at:
                return None
            reply = await self._asking.look_up(self.query_id) or codec.failure_of(
                DeadlineExpired(
                    f"No answer within {self._query.deadline_s:g} s.",
                    "Raise `calm.deadline_s`, ask for fewer `max_tokens`, or add workers.",
                ),
                self.query_id,
            )
        self.ended = not isinstance(reply, m.Chunk)
        return reply


class Asking:
    """Publishes queries and hands what comes back to those who asked."""

    def __init__(self, bus: Bus, log: Any) -> None:
        self._bus = bus
        self._log = log
        self._inbox = bus.nc.new_inbox()
        self._waiting: dict[str, Replies] = {}
        self._tokens = itertools.count()
        self._idle = asyncio.Event()
        self._stopping = False
        self._looking: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    async def start(self) -> None:
        await self._bus.subscribe(f"{self._inbox}.*", self._on_reply)
        self._bus.on_reconnect(self._on_reconnect)

    async def stop(self, timeout_s: float) -> None:
        """Take no more; wait for those in flight, and tell those that are not done in time to ask another gateway."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._waiting:
                    self._idle.clear()
                    await self._idle.wait()
        for replies in [*self._waiting.values()]:
            replies.put(codec.failure_of(_stopping(), replies.query_id))
            await self._cancel(replies)
        await tasks.end([self._looking])

    @contextlib.asynccontextmanager
    async def ask(self, query: m.Query, *, keep: bool) -> AsyncIterator[Replies]:
        """Publish a query that has an id. One whose end was not waited for is cancelled, unless it is to be kept.

        Raises:
            CalmError: BusUnavailable, Overloaded or PromptTooLarge: it was not sent.
        """
        if self._stopping:
            raise _stopping()
        if not self._bus.nc.is_connected:
            raise BusUnavailable("The broker is away.", "Send the request again in a moment.")
        if len(self._waiting) >= AT_ONCE:
            raise Overloaded(f"{AT_ONCE} requests are in flight here.", "Try again later, or add gateways.")
        token = str(next(self._tokens))
        replies = Replies(query, self, keep=keep)
        self._waiting[token] = replies
        try:
            try:
                await self._bus.nc.publish(subjects.QUERY, codec.to_json(query), reply=f"{self._inbox}.{token}")
            except nats.errors.MaxPayloadError:
                raise PromptTooLarge(
                    f"The broker takes {self._bus.nc.max_payload} bytes at most.", "Shorten the request."
                ) from None
            except (nats.errors.Error, OSError) as error:
                raise BusUnavailable(f"The broker is away ({error}).", "Send the request again in a moment.") from None
            yield replies
        finally:
            del self._waiting[token]
            self._idle.set()
            if not replies.ended:
                await self._cancel(replies)

    async def _cancel(self, replies: Replies) -> None:
        if not replies.keep:
            self._log.info("abandoned", query_id=replies.query_id)
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._bus.nc.publish(subjects.cancel(replies.query_id), b"")

    async def judge(self, feedback: m.Feedback) -> m.Ok:
        """Hand feedback over.

        Raises:
            CalmError: NotFound for a query that there is not; BusUnavailable.
        """
        return await self._bus.ask(subjects.FEEDBACK, feedback, m.Ok, FEEDBACK_S)

    async def look_up(self, query_id: str) -> m.Answer | m.Failure | None:
        """The recorded end of a query; None when there is none, or when that cannot be known."""
        try:
            done = await self._bus.claimed(query_id)
        except (TimeoutError, OSError, nats.errors.Error):
            return None
        return (done.answer or done.failure) if done is not None else None

    async def _on_reply(self, message: Msg) -> None:
        replies = self._waiting.get(message.subject.rpartition(".")[2])
        if replies is None:
            return
        if not message.data and (message.headers or {}).get("Status") == "503":
            away = BusUnavailable("CALM's monitor is not running on this broker.", "Start the system: calm up")
            replies.put(codec.failure_of(away, replies.query_id))
            return
        try:
            replies.put(codec.from_json(message.data, cast("type[Reply]", Reply)))
        except (msgspec.ValidationError, msgspec.DecodeError) as error:  # of a newer version
            self._log.error("unknown_reply", query_id=replies.query_id, error=str(error))
            unread = CalmError("A reply could not be understood.", "Do all services have the same version?")
            replies.put(codec.failure_of(unread, replies.query_id))

    def _on_reconnect(self) -> None:
        self._looking = asyncio.create_task(self._look_for_missed())

    async def _look_for_missed(self) -> None:
        """Queries that ended while the broker was away from here: their replies went nowhere."""
        for replies in [*self._waiting.values()]:
            end = await self.look_up(replies.query_id)
            if end is not None:
                replies.put(end)


def _stopping() -> NotReady:
    return NotReady("The gateway is stopping.", "Send the request again: another one, or this one anew, takes it.")
