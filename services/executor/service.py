"""The executor's shell: dispatches planned queries, supervises each to its end, and drives the workers."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg

from services.executor.commands import Commands
from services.executor.decide import attempts, breaker
from services.executor.supervisor import Supervised, Supervision
from shared import codec, subjects, unread
from shared import messages as m
from shared.errors import CalmError, Cancelled, DeadlineExpired, NoFeasibleModel
from shared.puller import Puller
from shared.runtime import Context
from shared.views import FleetView, ModelsView

GRACE_S = 0.25
"""The engine, which notices the deadline itself, is given this much longer to say so."""
LET_GO_AFTER_S = 0.02
"""A query is let go of a moment after its end is on record, out of the way of the answer that is just being sent."""
LIMIT = 10_000
"""Queries supervised at once."""


class Executor:
    """`calm.queries.planned` to `calm.work.*`; ends to `calm.done.*`; commands to workers."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bus = context.bus
        self._log = context.log
        self._clock = context.clock
        self._models = ModelsView(self._bus)
        self._fleet = FleetView(self._bus)
        self._supervision = Supervision()
        self._breakers: dict[str, breaker.Breaker] = {}
        self._commands = Commands(self._bus, self._clock, self._log)
        self._planned = self._make_puller("executor", subjects.PLANNED, self._on_planned, LIMIT)
        self._failed = self._make_puller("executor-failed", subjects.FAILED, self._on_failed, 64)
        context.health.in_flight = lambda: len(self._supervision)

    def _make_puller(self, durable: str, subject: str, handler: object, limit: int) -> Puller:
        return Puller(
            self._bus,
            stream=subjects.STREAM_QUERIES,
            durable=durable,
            subject=subject,
            handler=handler,  # type: ignore[arg-type]
            limit=limit,
            log=self._log,
        )

    async def start(self) -> None:
        await self._bus.subscribe(subjects.done_of("*"), self._on_done)
        await self._bus.subscribe(subjects.cancel("*"), self._on_cancel)
        await self._bus.subscribe(subjects.FAILED, self._on_failed_anywhere)
        await self._bus.subscribe(subjects.JOURNAL_OPERATION, self._on_operation)
        await self._models.start()
        await self._fleet.start()
        await self._commands.start()
        self._log.info("waiting_for_fleet")
        await self._models.ready.wait()
        self._rehearse()
        await self._failed.start()
        await self._planned.start()

    async def stop(self) -> None:
        await self._planned.stop_pulling()
        await self._failed.stop(self._context.settings.drain_s)
        await self._commands.stop(self._context.settings.drain_s)
        # Supervision is handed to another executor: the work itself goes on meanwhile.
        await self._planned.stop(0.0)

    def _rehearse(self) -> None:
        """Prepare some attempts of our own, so that the first query does not find everything cold."""
        accepted = m.Accepted(query=m.Query(prompt="rehearsal"), query_id="rehearsal", deadline_at=0.0)
        for name in [*self._models.cards] * 8:
            route = m.Route(query_id="rehearsal", order=[name], candidates=[], reason="rehearsal")
            planned = codec.unpack(codec.pack(m.Planned(accepted=accepted, route=route)), m.Planned)
            codec.pack(attempts.work(planned, self._models.cards, 0, 1, 0.0))

    # --- one query ---

    async def _on_planned(self, message: Msg) -> None:
        try:
            planned = codec.unpack(message.data, m.Planned)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            await self._bury(message, error)
            return
        query_id = planned.accepted.query_id
        entry = self._supervision.take(planned)
        try:
            with structlog.contextvars.bound_contextvars(query_id=query_id):
                await self._supervise(entry, redelivered=message.metadata.num_delivered > 1)
            await message.ack()
            self._context.health.handled += 1
        finally:
            self._supervision.release(query_id)

    async def _supervise(self, entry: Supervised, *, redelivered: bool) -> None:
        accepted = entry.planned.accepted
        if redelivered:
            done = await self._bus.claimed(accepted.query_id)
            if done is not None:
                # An executor that claimed a failure may have died before it told the client. An engine's
                # answer is the engine's to send again: its own message is redelivered in that case.
                ours = unread.SETTLED in done.stamps or (done.failure is not None and not done.worker)
                if ours:
                    await self._bus.deliver(done)
                return
        rank = attempts.next_rank(entry.planned.route, self._models.cards, 0, self._usable)
        if rank is None:
            error: CalmError = NoFeasibleModel("The models of its route have left the fleet.", "Send it again.")
            await self._finish(entry.planned, error, resend=redelivered)
            return
        if not entry.cancelled.is_set():
            await self._dispatch(entry, rank, attempt=1)
        deadline_s = accepted.deadline_at + GRACE_S - self._clock()
        ended, cancelled = (asyncio.create_task(e.wait()) for e in (entry.ended, entry.cancelled))
        try:
            await asyncio.wait({ended, cancelled}, timeout=max(deadline_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            cancelled.cancel()
        if entry.ended.is_set():
            return
        if entry.cancelled.is_set():
            await self._finish(entry.planned, Cancelled("The query was cancelled.", ""), resend=redelivered)
        elif entry.unread is not None:
            await self._settle(entry.unread, resend=redelivered)
        else:
            error = DeadlineExpired(
                f"No answer within {accepted.query.deadline_s:g} s.",
                "Raise `deadline_s`, ask for fewer `max_tokens`, or add workers.",
            )
            await self._finish(entry.planned, error, resend=redelivered)
        await self._withdraw(entry)

    async def _dispatch(self, entry: Supervised, rank: int, attempt: int) -> None:
        now = self._clock()
        work = attempts.work(
            entry.planned, self._models.cards, rank, attempt, now,
            first_dispatched=entry.first_dispatched, unread=entry.unread, retries=self._retries,
        )  # fmt: skip
        entry.first_dispatched = entry.first_dispatched or now
        entry.rank, entry.attempt, entry.artifact = rank, attempt, work.artifact
        entry.sequence = await self._send(work)

    async def _send(self, work: m.Work) -> int:
        subject = subjects.work(work.artifact, work.planned.accepted.query.priority)
        sequence = await self._bus.publish(subject, work, msg_id=f"{work.query_id}-work-{work.attempt}")
        self._log.info("dispatched", card=work.card, artifact=work.artifact, attempt=work.attempt)
        return sequence

    async def _finish(self, planned: m.Planned, error: CalmError, *, resend: bool = False, attempt: int = 0) -> None:
        accepted = planned.accepted
        failure = codec.failure_of(error, accepted.query_id)
        done = m.Done(
            query_id=accepted.query_id,
            failure=failure,
            reply=accepted.reply,
            encoding=accepted.encoding,
            attempt=attempt,
            stamps=accepted.stamps,
        )
        if await self._bus.finish(done, resend=resend):
            self._context.health.failed += 1
            self._log.info("ended", code=failure.code)

    async def _settle(self, done: m.Done, *, resend: bool) -> None:
        """End a query with an answer that had been handed on: nothing better has come."""
        now = self._clock()
        done = unread.settled(done, now)
        done = msgspec.structs.replace(done, stamps=m.stamp(done.stamps, **{unread.SETTLED: now}))
        if await self._bus.finish(done, resend=resend):
            self._log.info("ended", code="settled")

    @property
    def _retries(self) -> int:
        """The fleet's own number."""
        return self._models.policy.retries if self._models.policy is not None else 0

    async def _withdraw(self, entry: Supervised) -> None:
        """Take the work out of the queue, and stop it where it runs."""
        if entry.sequence:
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):  # it may be gone already
                await self._bus.js.delete_msg(subjects.STREAM_WORK, entry.sequence)
        await self._bus.nc.publish(subjects.cancel(entry.planned.accepted.query_id), b"")

    # --- events ---

    async def _on_done(self, message: Msg) -> None:
        query_id = subjects.query_of_done(message.subject)
        asyncio.get_running_loop().call_later(LET_GO_AFTER_S, self._supervision.ended, query_id)
        if self._breakers:
            done = codec.unpack_done(message.data, message.headers)
            if done.answer is not None:
                self._breakers.pop(done.artifact, None)

    async def _on_cancel(self, message: Msg) -> None:
        query_id = message.subject.split(".", 2)[2]
        self._supervision.cancel(query_id)
        if message.reply:
            await self._bus.reply(message.reply, m.Ok(message="cancelling"), "json")

    async def _on_failed(self, message: Msg) -> None:
        try:
            failed = codec.unpack(message.data, m.AttemptFailed)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            await self._bury(message, error)
            return
        work = failed.work
        with structlog.contextvars.bound_contextvars(query_id=work.query_id):
            self._log.warning("attempt_failed", card=work.card, code=failed.failure.code, attempt=failed.attempt)
            if failed.unread is not None:
                self._breakers.pop(work.artifact, None)  # it works
            elif failed.failure.code != "context_exceeded":
                await self._count_failure(work.artifact)
            await self._fall_back(failed, resend=message.metadata.num_delivered > 1)
            await message.ack()

    async def _on_failed_anywhere(self, message: Msg) -> None:
        """Every executor hears of an answer that is handed on: one of them supervises its query."""
        with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError):  # `_on_failed` buries it
            failed = codec.unpack(message.data, m.AttemptFailed)
            if failed.unread is not None and (entry := self._supervision.get(failed.work.query_id)) is not None:
                entry.unread = failed.unread

    async def _fall_back(self, failed: m.AttemptFailed, *, resend: bool) -> None:
        work = failed.work
        now = self._clock()
        rank = attempts.after_failure(failed, self._models.cards, self._usable, now)
        if rank is not None:
            next_work = attempts.after(failed, self._models.cards, rank, now, self._retries)
            sequence = await self._send(next_work)
            entry = self._supervision.get(work.query_id)
            if entry is not None:
                entry.rank, entry.attempt = rank, next_work.attempt
                entry.artifact, entry.sequence = next_work.artifact, sequence
            return
        if (done := failed.unread or work.unread) is not None:
            await self._settle(done, resend=resend)
            return
        error = CalmError(failed.failure.message, failed.failure.remedy)
        error.code, error.retryable = failed.failure.code, failed.failure.retryable
        await self._finish(work.planned, error, resend=resend, attempt=failed.attempt)
        reason = f"{failed.failure.code}: {failed.failure.message}"
        subject = subjects.work(work.artifact, work.planned.accepted.query.priority)
        await self._bus.dead(subject, codec.pack(work), reason, service="executor", at=self._clock())

    async def _on_operation(self, message: Msg) -> None:
        """A load that failed: queries that wait for it fall back, if no other worker holds the artifact."""
        operation = codec.unpack(message.data, m.Operation)
        if operation.kind != "load" or operation.ok or operation.failure is None:
            return
        await self._count_failure(operation.artifact)
        held = any(
            e.artifact == operation.artifact and e.state in ("ready", "loading")
            for w in self._fleet.workers()
            for e in w.engines
        )
        if held:
            return
        for entry in self._supervision.on_artifact(operation.artifact):
            rank = attempts.next_rank(
                entry.planned.route, self._models.cards, entry.rank + 1, self._usable, operation.artifact
            )
            if rank is None or entry.ended.is_set():
                continue  # the planner tries the load again; the deadline bounds the wait
            sequence = entry.sequence
            await self._dispatch(entry, rank, entry.attempt + 1)
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
                await self._bus.js.delete_msg(subjects.STREAM_WORK, sequence)

    async def _count_failure(self, artifact: str) -> None:
        now = self._clock()
        old = self._breakers.get(artifact, breaker.Breaker())
        new = breaker.failed(old, now)
        self._breakers[artifact] = new
        if new.opened > old.opened:
            symptom = m.Symptom(
                kind="breaker_open",
                subject=artifact,
                detail=f"failed {breaker.LIMIT} times in a row; rests {new.open_until - now:.0f} s",
                value=float(new.opened),
                at=now,
            )
            await self._bus.send(subjects.symptom(symptom.kind), symptom)
            self._log.warning("breaker_open", artifact=artifact, rest_s=round(new.open_until - now, 1))

    def _usable(self, artifact: str) -> bool:
        return breaker.usable(self._breakers.get(artifact, breaker.Breaker()), self._clock())

    async def _bury(self, message: Msg, error: Exception) -> None:
        await self._bus.dead(message.subject, message.data, str(error), service="executor", at=self._clock())
        await message.term()
