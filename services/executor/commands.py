"""Carries load and evict commands out against workers, to completion, verifies and records how each ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError, OperationTimeout
from shared.puller import Puller
from shared.views import FleetView

VERIFY_S = 3.0
"""A worker publishes its state before it replies; it may arrive a little later."""


class Commands:
    """`calm.command.load.*` and `.evict.*` to `calm.worker.<id>.*`; outcomes to `calm.journal.operation`."""

    def __init__(self, bus: Bus, clock: Callable[[], float], log: Any) -> None:
        self._bus = bus
        self._clock = clock
        self._log = log
        self._moved = asyncio.Event()
        self._fleet = FleetView(bus, lambda _state: self._moved.set())
        self._puller = Puller(
            bus,
            stream=subjects.STREAM_COMMANDS,
            durable="executor",
            subject="calm.command.>",
            handler=self._on_command,
            limit=64,
            log=log,
        )

    async def start(self) -> None:
        await self._fleet.start()
        await self._puller.start()

    async def stop(self, timeout_s: float) -> None:
        await self._puller.stop(timeout_s)

    async def _on_command(self, message: Msg) -> None:
        kind = message.subject.split(".")[2]
        try:
            command: m.Load | m.Evict = (
                codec.unpack(message.data, m.Load) if kind == "load" else codec.unpack(message.data, m.Evict)
            )
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            await self._bus.dead(message.subject, message.data, str(error), service="executor", at=self._clock())
            await message.term()
            return
        with structlog.contextvars.bound_contextvars(op_id=command.op_id):
            operation = await self._carry_out(command)
            await self._bus.publish(subjects.JOURNAL_OPERATION, operation, msg_id=f"{command.op_id}-outcome")
            await message.ack()
            self._log.info(
                "operation",
                kind=operation.kind,
                worker=operation.worker,
                artifact=operation.artifact,
                ok=operation.ok,
                reason=operation.reason,
                seconds=round(operation.seconds, 3),
                failure=operation.failure.message if operation.failure else None,
            )

    async def _carry_out(self, command: m.Load | m.Evict) -> m.Operation:
        load = isinstance(command, m.Load)
        artifact = command.spec.name if isinstance(command, m.Load) else command.artifact
        failure: m.Failure | None = None
        reply = m.WorkerReply(op_id=command.op_id, ok=False)
        left_s = command.expires_at - self._clock()
        try:
            if left_s <= 0:
                raise OperationTimeout("The command had expired before it was carried out.", "It is planned anew.")
            reply = await self._bus.ask(
                subjects.worker_request(command.worker, "load" if load else "evict"),
                command,
                m.WorkerReply,
                left_s,
            )
            failure = reply.failure
            if reply.ok:
                await self._verify(command.worker, artifact, resident=load)
        except CalmError as error:
            failure = codec.failure_of(error)
        return m.Operation(
            op_id=command.op_id,
            kind="load" if load else "evict",
            worker=command.worker,
            artifact=artifact,
            ok=failure is None,
            reason=command.reason,
            failure=failure,
            seconds=reply.seconds,
            bytes=reply.bytes,
            held_bytes=reply.held_bytes,
            freed_bytes=reply.freed_bytes,
            at=self._clock(),
        )

    async def _verify(self, worker: str, artifact: str, *, resident: bool) -> None:
        """Wait until the worker's own state agrees.

        Raises:
            OperationTimeout: it does not within `VERIFY_S`.
        """
        try:
            async with asyncio.timeout(VERIFY_S):
                while self._is_resident(worker, artifact) != resident:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            raise OperationTimeout(
                f"{worker} reported success, but its state does not show {artifact}"
                f" {'resident' if resident else 'gone'}.",
                "See `calm status`; the planner decides again from what it sees.",
            ) from None

    def _is_resident(self, worker: str, artifact: str) -> bool:
        state = self._fleet.worker(worker)
        return state is not None and any(
            e.artifact == artifact and e.state in ("ready", "draining") for e in state.engines
        )
