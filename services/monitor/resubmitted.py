"""Queries that a client sends again under an id of its own: answered with the recorded end, never run twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import nats.errors
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError, DeadlineExpired, NotReady
from shared.tasks import end


class Resubmitted:
    """Sends a query's one end to the further inboxes that ask for it."""

    def __init__(self, bus: Bus, clock: Callable[[], float]) -> None:
        self._bus = bus
        self._clock = clock
        self._tasks: dict[asyncio.Task[None], m.Accepted] = {}

    async def take(self, accepted: m.Accepted) -> bool:
        """When the query has ended already, send that end to this client. True when it has."""
        done = await self._bus.claimed(accepted.query_id)
        if done is not None:
            await self._send(accepted, done)
        return done is not None

    def follow(self, accepted: m.Accepted) -> None:
        """The query is on its way already, for another inbox: send its end to this one too."""
        task = asyncio.create_task(self._follow(accepted))
        self._tasks[task] = accepted
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def stop(self) -> None:
        """Tell those who still wait to ask again: another monitor can follow for them."""
        waiting = dict(self._tasks)
        await end(waiting)
        for accepted in waiting.values():
            stopping = NotReady("The monitor that waited for this query is stopping.", "Send it again, same id.")
            await self._fail(accepted, stopping)

    async def _follow(self, accepted: m.Accepted) -> None:
        ended: asyncio.Queue[Msg] = asyncio.Queue()

        async def on_end(message: Msg) -> None:
            ended.put_nowait(message)

        subscription = await self._bus.subscribe(subjects.done_of(accepted.query_id), on_end)
        try:
            if await self.take(accepted):  # it ended before the subscription was there
                return
            async with asyncio.timeout(max(accepted.deadline_at - self._clock(), 0.0)):
                last = await ended.get()
                await self._send(accepted, codec.unpack_done(last.data, last.headers))
        except TimeoutError:
            late = DeadlineExpired("This deadline passed first.", "Send the query again with a longer `deadline_s`.")
            await self._fail(accepted, late)
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def _send(self, accepted: m.Accepted, done: m.Done) -> None:
        final = done.answer or done.failure
        if accepted.reply and final is not None:
            await self._bus.reply(accepted.reply, final, accepted.encoding)

    async def _fail(self, accepted: m.Accepted, error: CalmError) -> None:
        if accepted.reply:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._bus.reply(accepted.reply, codec.failure_of(error, accepted.query_id), accepted.encoding)
