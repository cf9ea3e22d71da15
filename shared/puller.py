"""A durable pull consumer kept busy: as many messages in hand as there is room for, and none lost on leaving.

nats-py's `fetch` binds one wait to one request, and cancelling it leaves the request open on the server, which
then delivers into the void until `ack_wait` has passed. Here pull requests stay open on one inbox of our own,
their number follows the free capacity, and leaving first withdraws the inbox (the server keeps messages whose
requester has gone) and hands back what arrived meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import APIError

from shared import streams, tasks
from shared.bus import Bus, Log

PULL_EXPIRES_S = 5.0
"""Life of a pull request on the server; it is renewed while there is room."""
REFILL_SHARE = 0.5
"""More is asked for once this share of the room is not covered by open requests: a request per message costs the
broker and this process as much as the message."""

ROUNDS = 16
"""A puller that gathers does so for this many rounds after the last message."""


@dataclass
class _Request:
    """A pull request: `left` messages may still arrive, until `until` (monotonic seconds)."""

    left: int
    until: float


class Puller:
    """Pulls from the durable consumer `durable` of `stream` and runs `handler` in a task per message.

    The handler settles its message itself (ack, nak or term). While it runs, the message is kept in progress.
    An exception that leaves the handler is logged and the message handed back after a second.

    `room` says how many more messages may be taken right now; call `wake` when it has grown. A message that
    arrives when there is no room, nor any of the `slack` for requests that crossed with it, is handed back at once,
    for another instance to take.

    `gather_s` is for work that nobody waits for: after the first message it leaves the others on the server for
    that long and then takes them together, out of the way of what people do wait for.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        stream: str,
        durable: str,
        subject: str,
        handler: Callable[[Msg], Awaitable[None]],
        limit: int = 64,
        room: Callable[[], int] | None = None,
        slack: int = 0,
        gather_s: float = 0.0,
        ack_wait_s: float = 10.0,
        max_ack_pending: int = 20_000,
        log: Log | None = None,
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._durable = durable
        self._subject = subject
        self._handler = handler
        self._limit = limit
        self._room = room
        self._slack = slack
        self._gather_s = gather_s
        self._ack_wait_s = ack_wait_s
        self._max_ack_pending = max_ack_pending
        self._log = log
        self._requests: deque[_Request] = deque()
        self._tasks: dict[asyncio.Task[None], Msg] = {}
        self._wake = asyncio.Event()
        self._loop_tasks: list[asyncio.Task[None]] = []
        self._subscription: Subscription | None = None
        self._prepared = self._stopping = False
        self._arrived = False
        """Whether a message has come since the last gathering."""
        self._rounds = 0
        """Gatherings until it has been quiet for long enough."""

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def prepare(self) -> None:
        """Make sure of the consumer."""
        await self._ensure_consumer()
        self._prepared = True

    async def start(self) -> None:
        """Make sure of the consumer and begin to pull."""
        if not self._prepared:
            await self.prepare()
        self._subscription = await self._bus.nc.subscribe(self._bus.nc.new_inbox(), cb=self._on_message)
        self._bus.on_reconnect(self._on_reconnect)
        self._loop_tasks = [asyncio.create_task(self._pull()), asyncio.create_task(self._keep_in_progress())]

    def wake(self) -> None:
        """There may be more room now."""
        self._wake.set()

    async def stop_pulling(self) -> None:
        """Take no new messages; those that are on their way are handed back."""
        if self._stopping:
            return
        self._stopping = True
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
                # Processes what the server sent before it saw that we left.
                await asyncio.wait_for(self._subscription.drain(), 2)  # type: ignore[no-untyped-call]

    async def stop(self, timeout_s: float) -> None:
        """Stop pulling, wait for running handlers, then cancel them and hand their messages back."""
        await self.stop_pulling()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task, message in list(self._tasks.items()):
            task.cancel()
            with contextlib.suppress(nats.errors.Error):
                await message.nak()
        await tasks.end([*self._tasks, *self._loop_tasks])

    # --- inside ---

    async def _ensure_consumer(self) -> None:
        config = ConsumerConfig(
            durable_name=self._durable,
            filter_subject=self._subject,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self._ack_wait_s,
            max_deliver=-1,
            max_ack_pending=self._max_ack_pending,
            max_waiting=512,
            # A work queue forgets what is acknowledged, so that its consumer's own state can be lost with the broker:
            # what remains is delivered again. Kept in a file, it is written ten times a second and consumer.
            mem_storage=True if self._stream in streams.WORK_QUEUES else None,
        )
        while True:
            try:
                await self._bus.js.add_consumer(self._stream, config)
            except (TimeoutError, nats.errors.Error) as error:
                if self._log:
                    self._log.warning("waiting_for_consumer", consumer=self._durable, error=str(error))
                if isinstance(error, APIError) and error.code == 404:
                    await self._bus.ensure()
                elif isinstance(error, APIError) and "storage type" in (error.description or ""):
                    # Made by an earlier version, with its state in a file. Nothing is lost: the stream keeps the work.
                    await self._bus.js.delete_consumer(self._stream, self._durable)
                await asyncio.sleep(0.25)  # no event announces that the stream is ready
            else:
                return

    def _on_reconnect(self) -> None:
        self._requests.clear()  # the server forgot them with the connection
        self._wake.set()

    def _free(self) -> int:
        free = self._limit - len(self._tasks)
        return min(free, self._room()) if self._room else free

    async def _pull(self) -> None:
        while not self._stopping:
            self._wake.clear()
            now = time.monotonic()
            while self._requests and (self._requests[0].until <= now or not self._requests[0].left):
                self._requests.popleft()
            asked, free = sum(r.left for r in self._requests), self._free()
            if self._gather_s:
                if not asked and free > 0:
                    await self._gather(free, now)
            elif free > asked and (free - asked >= free * REFILL_SHARE or not asked):
                await self._ask(free - asked, now)
            wait_s = self._requests[0].until - now if self._requests else PULL_EXPIRES_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(wait_s, 0.01)):
                    await self._wake.wait()

    async def _gather(self, free: int, now: float) -> None:
        """Take all that came while we waited; when nothing has come for a while, have the server tell of the next
        message by sending it. Were it asked to at once, it would do so amid the work that the message is about."""
        if self._arrived:
            self._arrived, self._rounds = False, ROUNDS
        if self._rounds:
            self._rounds -= 1
            await asyncio.sleep(self._gather_s)
            await self._ask(free, now + self._gather_s, wait=False)
        else:
            await self._ask(1, now)

    async def _ask(self, count: int, now: float, *, wait: bool = True) -> None:
        if not self._bus.nc.is_connected or self._subscription is None or self._stopping:
            return
        self._requests.append(_Request(count, now + PULL_EXPIRES_S))
        how = {"expires": int(PULL_EXPIRES_S * 1e9)} if wait else {"no_wait": True}
        await self._bus.nc.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}",
            json.dumps({"batch": count, **how}).encode(),
            reply=self._subscription.subject,
        )

    async def _on_message(self, message: Msg) -> None:
        status = (message.headers or {}).get("Status")
        if status is not None:
            await self._on_status(status)
            return
        self._arrived = True
        for request in self._requests:
            if request.left:
                request.left -= 1
                if not request.left:
                    self._wake.set()  # there may be room for more than was asked for
                break
        if self._stopping or self._free() + self._slack <= 0:
            await message.nak()
            return
        task = asyncio.create_task(self._handle(message))
        self._tasks[task] = message
        task.add_done_callback(self._on_handled)
        # Of several messages that came together each is handled, and what it sends is on its way, before the next:
        # the stages then work at the same time instead of one after the other.
        await asyncio.sleep(0)

    async def _on_status(self, status: str) -> None:
        if status in ("404", "408"):  # a request came to its end; our own clock drops it too
            if self._gather_s:
                self._requests.clear()
                self._wake.set()
            return
        if self._log and not self._stopping:
            self._log.warning("pull_refused", consumer=self._durable, status=status)
        if status == "503" or status == "409":  # consumer or stream gone, or too many requests
            self._requests.clear()
            if not self._stopping:
                await self._ensure_consumer()
                await asyncio.sleep(0.1)  # never spin on a refusal
                self._wake.set()

    async def _handle(self, message: Msg) -> None:
        try:
            await self._handler(message)
        except Exception as error:  # noqa: BLE001 the message goes back to the queue, and the reason to the log
            if self._log:
                self._log.warning("handler_failed", consumer=self._durable, error=repr(error), subject=message.subject)
            with contextlib.suppress(nats.errors.Error):
                await message.nak(delay=1)

    def _on_handled(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        self._wake.set()

    async def _keep_in_progress(self) -> None:
        while True:
            await asyncio.sleep(self._ack_wait_s / 3)
            for message in list(self._tasks.values()):
                with contextlib.suppress(nats.errors.Error):
                    await message.in_progress()
