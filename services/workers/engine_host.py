"""The engine's side of NATS: pulls work for its artifact, runs it in the engine thread, streams, claims, acks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil
import structlog
from nats.aio.msg import Msg

from services.workers import timings
from services.workers.engine.batcher import Batcher, Delta, Event, Failed, Finished, Request
from services.workers.engine.energy import AttributedMeter
from services.workers.engine.handover import Handover
from services.workers.protocol import Start, State
from shared import codec, subjects, tasks, unread
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError, DeadlineExpired, EngineFailed
from shared.processes import yield_to_others
from shared.puller import Puller
from shared.settings import Settings

ACK_WAIT_S = 3.0
"""Work of an engine that has died is delivered again this long after its last sign of life."""
MAX_DELIVERIES = 6
"""Work delivered more often than this has ended its engine each time, and is given up."""
HELD = 2
"""Both priorities may ask for the last slot at once; what arrives beyond it waits here for the next one."""
REPORT_S = 0.25
"""A change is reported this much later, with those that follow it: at the moment of the change a query is on its way,
and the report wakes five processes."""
REHEARSALS = 32
TURNS_TO_FLUSH = 3
"""Turns of the event loop from an event's arrival at its query until what that publishes is on the socket: the query's
task runs, the client's flusher runs, and the transport has written."""
SETTLE_AFTER_S = 0.001
"""Work is acknowledged a moment after its answer has been sent: the broker hands on nothing of what it reads at once
before it has worked on all of it, and removing work from its queue took it 0.4 ms."""
PAUSE_S = 0.003
"""After an answer has ended, generation waits at most this long for it to be claimed and sent: the event loop then has
the interpreter to itself. Beside the next step, writing the claim took 0.3 to 1 ms and reading its reply 0.3."""


@dataclass
class _Job:
    """One piece of work in this engine's hands."""

    work: m.Work
    attempt: int
    pulled_at: float
    slot_open_at: float
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


class EngineHost:
    """Connects one `Batcher` to the work queue of its artifact."""

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        start: Start,
        batcher: Batcher,
        meter: AttributedMeter,
        priority: str,
        report: Callable[[State], None],
        log: Any,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._start = start
        self._batcher = batcher
        self._meter = meter
        self._priority = priority
        self._report = report
        self._log = log
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[str, _Job] = {}
        self._taken = 0
        self._cancelled: dict[str, None] = {}
        self._wanted = threading.Condition()
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._incoming: list[Request] = []
        self._outgoing: list[str] = []
        self._handover = Handover(self._streamed)
        self._halt = False
        self._unsent = 0
        self._sent = threading.Event()
        self._thread = threading.Thread(target=self._generate, name="engine", daemon=True)
        self._ready_at = clock()
        self._open_since = clock()
        self.tokens_in = 0
        """Prompt tokens of all answers so far."""
        self.tokens_out = 0
        self._tpot_s = 0.0
        self._last_used = 0.0
        self._process = psutil.Process()
        self._background: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        spec = start.spec
        self._at_once = spec.at_once(start.device)
        self._short = False
        """Somebody here waits for KV memory: more work is left to others."""
        self._pullers = [
            Puller(
                bus,
                stream=subjects.STREAM_WORK,
                durable=subjects.work_durable(spec.name, priority),
                subject=subjects.work(spec.name, priority),
                handler=self._on_work,
                limit=2 * self._at_once,  # `room` decides; those that are being settled hold no slot
                room=self._room if priority == "hi" else self._room_for_one,
                slack=HELD,
                ack_wait_s=ACK_WAIT_S,
                log=log,
            )
            for priority in subjects.PRIORITIES
        ]

    async def start(self) -> None:
        """Begin to pull."""
        self._thread.start()
        await self._rehearse()
        await self._bus.subscribe(subjects.cancel("*"), self._on_cancel)
        for puller in self._pullers:
            await puller.prepare()
        self._open_since = self._ready_at = self._clock()
        for puller in self._pullers:
            await puller.start()
        self._background = [
            asyncio.create_task(self._report_changes()),
            asyncio.create_task(self._distribute()),
        ]

    async def stop(self, timeout_s: float) -> None:
        """Take nothing new, finish what is in hand within `timeout_s`, hand back the rest."""
        for puller in self._pullers:
            await puller.stop_pulling()
        await asyncio.gather(*(puller.stop(timeout_s) for puller in self._pullers))
        with self._wanted:
            self._halt = True
            self._wanted.notify()
        self._thread.join(timeout=5)
        await tasks.end(self._background)

    async def _rehearse(self) -> None:
        """Carry some work of our own to and fro, so that the first query does not find everything cold."""
        accepted = m.Accepted(query=m.Query(prompt="rehearsal"), query_id="rehearsal", deadline_at=0.0)
        route = m.Route(query_id="rehearsal", order=["rehearsal"], candidates=[], reason="rehearsal")
        work = m.Work(
            query_id="rehearsal", attempt=1, rank=0, card="rehearsal", artifact="rehearsal", messages=[],
            sampling=m.Sampling(), planned=m.Planned(accepted=accepted, route=route),
        )  # fmt: skip
        for _ in range(REHEARSALS):
            codec.unpack(codec.pack(work), m.Work)
        await self._bus.rehearse()

    # --- the engine thread ---

    def _generate(self) -> None:
        """Runs steps while there is anything to do, and sleeps on a condition otherwise."""
        yield_to_others(self._priority)
        while True:
            with self._wanted:
                while not (self._halt or self._incoming or self._outgoing or self._batcher.active):
                    self._wanted.wait()
                if self._halt:
                    return
                incoming, self._incoming = self._incoming, []
                outgoing, self._outgoing = self._outgoing, []
            events: list[Event] = []
            for query_id in outgoing:
                self._batcher.cancel(query_id)
                self._handover.forget(query_id)
            for request in incoming:
                try:
                    self._batcher.add(request)
                except CalmError as error:
                    events.append(Failed(request.id, error))
            try:
                events += self._batcher.step(self._tell)
            except Exception as error:  # noqa: BLE001 a step that fails takes its sequences with it, not the fleet
                failure = EngineFailed(f"The engine failed: {error!r}.", "See the worker's log.")
                ids = self._batcher.clear()
                events += [Failed(query_id, failure) for query_id in ids]
            self._tell(events)
            if self._batcher.short_of_memory != self._short:
                self._short = not self._short
                self._loop.call_soon_threadsafe(self._wake)

    def _tell(self, events: list[Event]) -> None:
        """Hand events to the event loop; when answers are among them, wait until they have gone."""
        passed = self._handover.pass_on(events)
        if not passed:
            return
        self._unsent = sum(isinstance(event, Finished) for event in passed)
        self._sent.clear()
        self._loop.call_soon_threadsafe(self._events.put_nowait, passed)
        if self._unsent:
            self._sent.wait(PAUSE_S)

    def _streamed(self, query_id: str) -> bool:
        """Its client wants the text as it grows."""
        job = self._jobs.get(query_id)
        return job is not None and job.work.planned.accepted.query.stream

    async def _distribute(self) -> None:
        """Hand each step's events to the queries they belong to: those that ended first, and their claims are on
        their way to the broker before the chunks of the others are written."""
        while True:
            events = await self._events.get()
            ended = {e.id for e in events if not isinstance(e, Delta)}
            self._hand_out(e for e in events if e.id in ended)
            if ended and len(ended) < len(events):
                for _ in range(TURNS_TO_FLUSH):
                    await asyncio.sleep(0)
            self._hand_out(e for e in events if e.id not in ended)

    def _hand_out(self, events: Iterable[Event]) -> None:
        for event in events:
            job = self._jobs.get(event.id)
            if job is not None:
                job.events.put_nowait(event)

    def _submit(self, request: Request) -> None:
        with self._wanted:
            self._incoming.append(request)
            self._wanted.notify()

    def _withdraw(self, query_id: str) -> None:
        with self._wanted:
            self._outgoing.append(query_id)
            self._wanted.notify()

    # --- one piece of work ---

    def _wake(self) -> None:
        for puller in self._pullers:
            puller.wake()

    def _room(self) -> int:
        return 0 if self._short else self._at_once - self._taken

    def _room_for_one(self) -> int:
        """Low priority asks for one at a time, so that it takes a free slot and never many."""
        return min(1, self._room())

    async def _on_work(self, message: Msg) -> None:
        try:
            work = codec.unpack(message.data, m.Work)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            await self._bus.dead(message.subject, message.data, str(error), service="worker", at=self._clock())
            await message.term()
            return
        pulled_at, open_since = self._clock(), self._open_since
        self._taken += 1
        self._changed.set()
        try:
            with structlog.contextvars.bound_contextvars(query_id=work.query_id):
                ended = await self._serve(message, work, pulled_at, open_since)
        finally:
            if self._taken == self._at_once:
                self._open_since = self._clock()
            self._taken -= 1
            self._last_used = self._clock()
            self._changed.set()
            self._wake()
        if ended:
            await asyncio.sleep(SETTLE_AFTER_S)
            await message.ack()  # lost with the broker, it is delivered again, and the claim makes that harmless

    async def _serve(self, message: Msg, work: m.Work, pulled_at: float, slot_open_at: float) -> bool:
        """Whether the work has come to its end here, and is to be settled."""
        deliveries = message.metadata.num_delivered
        attempt = work.attempt + deliveries - 1
        job = _Job(work, attempt, pulled_at, slot_open_at)
        if work.query_id in self._cancelled:
            await message.ack()
            return False
        if work.query_id in self._jobs:  # delivered again although it is being generated here
            await message.nak(delay=1)
            return False
        if deliveries > MAX_DELIVERIES:
            error = EngineFailed(f"It was delivered {deliveries} times and never finished.", "See calm.dead.")
            await self._give_up(job, error)
            await message.ack()
            return False
        self._jobs[work.query_id] = job
        try:
            request = Request(
                work.query_id, work.messages, work.sampling, work.planned.accepted.deadline_at,
                urgent=work.planned.accepted.query.priority == "hi", adapter=work.adapter,
                streamed=work.planned.accepted.query.stream, prompt_lookup=work.prompt_lookup,
            )  # fmt: skip
            self._submit(request)
            end, rest = await self._stream(job)
        except asyncio.CancelledError:
            self._withdraw(work.query_id)
            raise
        finally:
            self._jobs.pop(work.query_id, None)
        if isinstance(end, Finished):
            await self._finish(job, end, rest, resend=deliveries > 1)
            self._unsent -= 1
            if self._unsent <= 0:
                self._sent.set()
        elif isinstance(end, Failed):
            await self._give_up(job, end.error, resend=deliveries > 1)
        return True

    async def _stream(self, job: _Job) -> tuple[Finished | Failed | None, m.Chunk | None]:
        """Send chunks as they come; the event that ended the sequence, None when it was cancelled, and the last chunk,
        which is still to be sent."""
        accepted = job.work.planned.accepted
        wanted = accepted.query.stream and accepted.reply
        sequence = 0
        while True:
            text = ""
            event = await job.events.get()
            while True:
                if isinstance(event, Delta):
                    text += event.text
                    if event.id in self._cancelled:
                        return None, None
                if isinstance(event, (Finished, Failed)) or job.events.empty():
                    break
                event = job.events.get_nowait()
            chunk = None
            if text and wanted:
                chunk = m.Chunk(
                    id=job.work.query_id, seq=sequence, attempt=job.attempt, text=text,
                    restarted=sequence == 0 and job.attempt > 1, model="" if sequence else job.work.card,
                )  # fmt: skip
                sequence += 1
            if isinstance(event, (Finished, Failed)):
                return event, chunk
            if chunk is not None:
                await self._bus.reply(accepted.reply, chunk, accepted.encoding)

    async def _finish(self, job: _Job, end: Finished, rest: m.Chunk | None, *, resend: bool) -> None:
        work, accepted = job.work, job.work.planned.accepted
        times = timings.split(
            {**work.stamps, "pulled": job.pulled_at},
            engine_ready_at=self._ready_at,
            slot_open_at=job.slot_open_at,
            admitted_at=end.admitted_at,
            first_token_at=end.first_token_at,
            ended_at=end.ended_at,
        )
        answer = m.Answer(
            id=work.query_id,
            text=end.text,
            model=work.card,
            artifact=work.artifact,
            worker=self._start.worker,
            finish_reason=end.reason,
            usage=m.Usage(tokens_in=end.tokens_in, tokens_out=end.tokens_out, tokens_cached=end.tokens_cached),
            timings=times,
            energy=m.Energy(joules=end.energy_in_j + end.energy_out_j, source=self._meter.source),
            confidence=m.Confidence(
                mean_logprob=end.mean_logprob, min_logprob=end.min_logprob, mean_entropy=end.mean_entropy
            ),
            attempt=job.attempt,
            why=_why(work),
        )
        done = m.Done(
            query_id=work.query_id,
            answer=answer,
            reply=accepted.reply,
            encoding=accepted.encoding,
            attempt=job.attempt,
            stamps=m.stamp(
                work.stamps,
                pulled=job.pulled_at,
                admitted=end.admitted_at,
                first_token=end.first_token_at,
                generated=end.ended_at,
            ),
            card=work.card,
            artifact=work.artifact,
            worker=self._start.worker,
            device_class=self._start.device.device_class,
            batch_mean=end.batch_mean,
            energy_in_j=end.energy_in_j,
            energy_out_j=end.energy_out_j,
            tokens_drafted=end.tokens_drafted,
            tokens_accepted=end.tokens_accepted,
        )
        if work.expect is None and work.unread is None and work.cascade is None:
            await self._bus.finish(done, resend=resend, chunk=rest)
        else:
            await self._end_read(job, unread.ended(work, done), rest, resend=resend)
        self.tokens_in += end.tokens_in
        self.tokens_out += end.tokens_out
        if end.tokens_out > 1:
            tpot = times.decode_s / (end.tokens_out - 1)
            self._tpot_s = tpot if not self._tpot_s else 0.8 * self._tpot_s + 0.2 * tpot
        self._log.info(
            "answered",
            card=work.card,
            tokens_out=end.tokens_out,
            total_s=round(times.total_s, 3),
            overhead_s=round(times.overhead_s, 4),
        )

    async def _end_read(self, job: _Job, done: m.Done, rest: m.Chunk | None, *, resend: bool) -> None:
        """The end of an answer that was to be read, or may be handed on: then an executor may ask another model."""
        ended = resend and await self._bus.claimed(done.query_id) is not None
        if ended or not unread.may_go_on(job.work, done):
            if done.answer is not None and done.answer.model != job.work.card:  # an earlier one is likelier right
                done, rest = unread.settled(done, self._clock()), None
            await self._bus.finish(done, resend=resend, chunk=rest)
            return
        failed = unread.failed(job.work, done, self._clock(), job.attempt)
        await self._bus.publish(subjects.FAILED, failed, msg_id=f"{done.query_id}-failed-{job.attempt}")

    async def _give_up(self, job: _Job, error: CalmError, *, resend: bool = False) -> None:
        """A deadline ends the query here; for any other failure an executor decides what follows."""
        work, accepted = job.work, job.work.planned.accepted
        failure = codec.failure_of(error, work.query_id)
        self._log.warning("attempt_failed", code=error.code, error=str(error))
        if isinstance(error, DeadlineExpired):
            done = m.Done(
                query_id=work.query_id, failure=failure, reply=accepted.reply, encoding=accepted.encoding,
                attempt=job.attempt, stamps=work.stamps, card=work.card, artifact=work.artifact,
                worker=self._start.worker, device_class=self._start.device.device_class,
            )  # fmt: skip
            if work.unread is not None:
                done = unread.settled(work.unread, self._clock())
            await self._bus.finish(done, resend=resend)
            return
        failed = m.AttemptFailed(
            work=work, failure=failure, worker=self._start.worker, attempt=job.attempt, at=self._clock()
        )
        await self._bus.publish(subjects.FAILED, failed, msg_id=f"{work.query_id}-failed-{job.attempt}")

    async def _on_cancel(self, message: Msg) -> None:
        query_id = message.subject.split(".", 2)[2]
        self._cancelled[query_id] = None
        while len(self._cancelled) > 10_000:
            del self._cancelled[next(iter(self._cancelled))]
        job = self._jobs.get(query_id)
        if job is not None:
            self._withdraw(query_id)
            job.events.put_nowait(Delta(query_id, ""))

    # --- reports ---

    async def _report_changes(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(REPORT_S)
            self._changed.clear()
            self._report(
                State(
                    active=self._taken,
                    held=max(0, self._taken - self._at_once),
                    tokens_out=self.tokens_out,
                    tpot_s=self._tpot_s,
                    last_used_at=self._last_used,
                    measured_bytes=self._process.memory_info().rss,
                )
            )


def _why(work: m.Work) -> str:
    route = work.planned.route
    if work.rank == 0:
        return route.why
    if work.unread is not None:
        what = "gave nothing readable" if work.unread.answer and unread.unreadable(work.unread.answer) else "was unsure"
        return f"{work.card} took over after {work.unread.card} {what}; {route.why}"
    return f"{work.card} took over after {route.order[work.rank - 1]} failed; {route.why}"
