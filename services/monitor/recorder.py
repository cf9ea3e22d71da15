"""The recorder: durable consumers of everything worth keeping; a message is acknowledged once it is committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from nats.aio.msg import Msg
from sqlalchemy.exc import SQLAlchemyError

from services.monitor.writer import Unwritable, Writer
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.knowledge import rows
from shared.puller import Puller

IN_HAND = 1000
"""Messages held uncommitted per stream: two full batches."""
GATHER_S = 0.25
"""Recording waits this long for more, so that it keeps out of the way of the queries themselves."""


class Recorder:
    """Writes what CALM_DONE and CALM_JOURNAL carry; tells `on_done` and `on_operation` of what is new."""

    def __init__(
        self,
        bus: Bus,
        writer: Writer,
        *,
        on_done: Callable[[m.Done], None],
        on_operation: Callable[[m.Operation], None],
        on_route: Callable[[m.Route], None],
        device_class: Callable[[str], str],
        clock: Callable[[], float],
        log: Any,
    ) -> None:
        self._bus = bus
        self._writer = writer
        self._on_done = on_done
        self._on_operation = on_operation
        self._on_route = on_route
        self._device_class = device_class
        self._clock = clock
        self._log = log
        self._pullers = [
            self._puller(subjects.STREAM_DONE, subjects.done_of("*"), self._done),
            self._puller(subjects.STREAM_JOURNAL, ">", self._journal),
        ]

    def _puller(self, stream: str, subject: str, take: Callable[[Msg], Any]) -> Puller:
        async def handle(message: Msg) -> None:
            await self._record(message, take)

        return Puller(
            self._bus,
            stream=stream,
            durable="recorder",
            subject=subject,
            handler=handle,
            limit=IN_HAND,
            gather_s=GATHER_S,
            log=self._log,
        )

    @property
    def in_flight(self) -> int:
        return sum(puller.in_flight for puller in self._pullers)

    async def start(self) -> None:
        for puller in self._pullers:
            await puller.start()

    async def stop(self, timeout_s: float) -> None:
        """Take nothing new, and wait for what is in hand to be committed."""
        for puller in self._pullers:
            await puller.stop(timeout_s)

    async def _record(self, message: Msg, take: Callable[[Msg], Any]) -> None:
        try:
            await take(message)
        except (msgspec.ValidationError, msgspec.DecodeError, Unwritable) as error:
            # Tried again it would fail again: keep it where people can look at it.
            self._log.warning("unrecordable", subject=message.subject, error=str(error))
            await self._bus.dead(message.subject, message.data, str(error), service="monitor", at=self._clock())
            await message.term()
        except SQLAlchemyError as error:
            self._log.error("knowledge_not_written", error=str(error))
            await message.nak(delay=1)
        else:
            await message.ack()

    async def _done(self, message: Msg) -> None:
        done = codec.unpack_done(message.data, message.headers)
        at = message.metadata.timestamp.timestamp()
        if done.rejected:
            code = done.failure.code if done.failure else "unknown"
            await self._writer.write("rejections", {"day": rows.day(at), "code": code, "count": 1})
        elif await self._writer.write("completions", rows.completion(done, at)):
            self._on_done(done)

    async def _journal(self, message: Msg) -> None:
        subject, data, at = message.subject, message.data, message.metadata.timestamp.timestamp()
        if subject == subjects.JOURNAL_ACCEPTED:
            accepted = codec.unpack(data, m.Accepted)
            await self._writer.write("queries", rows.query(accepted, at))
        elif subject == subjects.DECISION_ROUTE:
            route = codec.unpack(data, m.Route)
            await self._writer.write("decisions", rows.decision(route, at))
            self._on_route(route)
        elif subject == subjects.DECISION_PLACEMENT:
            await self._writer.write("placements", rows.placement(codec.unpack(data, m.Placement), at))
        elif subject == subjects.DECISION_CONTROL:
            await self._writer.write("controls", rows.control(codec.unpack(data, m.ControlState), at))
        elif subject == subjects.JOURNAL_OPERATION:
            operation = codec.unpack(data, m.Operation)
            row = rows.operation(operation, at, self._device_class(operation.worker))
            if await self._writer.write("operations", row):
                self._on_operation(operation)
        else:
            raise msgspec.ValidationError(f"{subject} is not a subject of the journal that this version knows")
