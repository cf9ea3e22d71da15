"""Intake of `calm.query`: every message gets an answer at once when it is bad, and is stored durably when not."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from services.monitor.decide import admission
from services.monitor.resubmitted import Resubmitted
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import BusUnavailable, CalmError, NotReady, Overloaded
from shared.runtime import Health
from shared.tasks import end

REHEARSALS = 32
AT_ONCE = 256
"""Queries being stored at the same time; 64 saturate the broker's file storage (43 k/s measured)."""
BACKLOG_MESSAGES = 20_000
BACKLOG_BYTES = 64 * 2**20
"""More than this waiting unread is refused; the NATS client would drop messages silently at twice as much."""


class Intake:
    """Takes queries from the queue group. `cards` gives the fleet's cards, None while they are unknown; `on_refusal`
    is told the error code of everything refused."""

    def __init__(
        self,
        bus: Bus,
        *,
        cards: Callable[[], Mapping[str, m.Card] | None],
        on_refusal: Callable[[str], None],
        max_bytes: int,
        clock: Callable[[], float],
        health: Health,
        log: Any,
    ) -> None:
        self._bus = bus
        self._cards = cards
        self._on_refusal = on_refusal
        self._max_bytes = max_bytes
        self._clock = clock
        self._health = health
        self._log = log
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._resubmitted = Resubmitted(bus, clock)

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def start(self) -> None:
        self._rehearse()
        self._subscription = await self._bus.subscribe(subjects.QUERY, self._on_query, subjects.INTAKE_QUEUE)

    async def stop(self, timeout_s: float) -> None:
        """Leave the queue group, deal with what had arrived, and wait for it to be stored or refused."""
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
                await asyncio.wait_for(self._subscription.drain(), timeout_s)  # type: ignore[no-untyped-call]
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        await end(self._tasks)
        await self._resubmitted.stop()

    def _rehearse(self) -> None:
        """Admit some queries of our own, so that the first one does not find everything cold."""
        data, now = codec.to_json(m.Query(prompt="rehearsal")), self._clock()
        for _ in range(REHEARSALS):
            query = codec.decode_public(data, m.Query, "json")
            with contextlib.suppress(NotReady):
                accepted = admission.admit(
                    query, cards=self._cards(), new_id="rehearsal", reply="", encoding="json", received_at=now,
                    accepted_at=now,
                )  # fmt: skip
                codec.pack(accepted)

    async def _on_query(self, message: Msg) -> None:
        received_at = self._clock()
        waiting = self._subscription
        if waiting and (waiting.pending_msgs > BACKLOG_MESSAGES or waiting.pending_bytes > BACKLOG_BYTES):
            busy = Overloaded("More queries arrive than can be stored.", "Send it again in a moment.")
            await self._refuse(message, busy, "json")
            return
        await self._room.acquire()
        task = asyncio.create_task(self._take(message, received_at))
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        await asyncio.sleep(0)  # it is on its way before the next is looked at, so that the stages work side by side

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._health.failed += 1
            self._log.error("intake_failed", exc_info=error)

    async def _take(self, message: Msg, received_at: float) -> None:
        encoding: Literal["json", "msgpack"] = "json"
        try:
            encoding = cast("Literal['json', 'msgpack']", codec.encoding_of(message.headers))
            admission.check_size(len(message.data), self._max_bytes)
            admission.check_reply(message.reply)
            query = codec.decode_public(message.data, m.Query, encoding)
            accepted = admission.admit(
                query,
                cards=self._cards(),
                new_id=uuid.uuid4().hex,
                reply=message.reply,
                encoding=encoding,
                received_at=received_at,
                accepted_at=self._clock(),
            )
            is_new = await self._accept(accepted)
        except CalmError as error:
            await self._refuse(message, error, encoding)
            return
        except (TimeoutError, OSError, nats.errors.Error) as error:
            away = BusUnavailable(f"The broker did not answer ({type(error).__name__}).", "Send it again.")
            await self._refuse(message, away, encoding)
            return
        if is_new:
            self._health.handled += 1
            self._log.debug("accepted", query_id=accepted.query_id)
            await self._bus.journal(subjects.JOURNAL_ACCEPTED, accepted, msg_id=f"{accepted.query_id}-accepted")

    async def _accept(self, accepted: m.Accepted) -> bool:
        """Store the query; only the broker's acknowledgement makes it accepted. False for one that is known."""
        if accepted.query.id is not None and await self._resubmitted.take(accepted):
            return False
        is_new = await self._bus.publish_new(subjects.NEW, accepted, msg_id=f"{accepted.query_id}-new")
        if not is_new:
            self._resubmitted.follow(accepted)
        return is_new

    async def _refuse(self, message: Msg, error: CalmError, encoding: str) -> None:
        self._on_refusal(error.code)
        self._health.failed += 1
        self._log.info("rejected", code=error.code, message=error.message)
        if message.reply and not admission.reserved(message.reply):
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._bus.reply(message.reply, codec.failure_of(error), encoding)
