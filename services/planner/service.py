"""The planner's shell: each analysed query gets a route; the placement leader decides residency."""

from __future__ import annotations

import time
from dataclasses import replace

import msgspec
import numpy as np
import structlog
from nats.aio.msg import Msg

from services.planner.control import Control
from services.planner.decide import explaining, routing
from services.planner.decide import learned as learning
from services.planner.knowledge import Knowledge
from services.planner.placement import Placement
from shared import codec, subjects
from shared import messages as m
from shared.errors import DeadlineExpired
from shared.learn.kept import compact
from shared.puller import Puller
from shared.runtime import Context

RETRY_S = 0.25
"""A query that meets no worker at all goes back to the queue for this long."""
REHEARSALS = 32


class Planner:
    """`calm.queries.analyzed` to `calm.queries.planned`; decisions to `calm.decision.*`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bus = context.bus
        self._log = context.log
        self._knowledge = Knowledge(self._bus, context.instance, context.clock, self._on_change, self._on_control)
        self._placement = Placement(self._bus, self._knowledge, context.instance, context.clock, self._log)
        self._random = np.random.default_rng()
        self._control = Control(
            self._bus,
            self._knowledge.models,
            self._knowledge.control,
            context.instance,
            lambda: self._placement.leads,
            context.clock,
            self._log,
        )
        self._puller = Puller(
            self._bus,
            stream=subjects.STREAM_QUERIES,
            durable="planner",
            subject=subjects.ANALYZED,
            handler=self._on_query,
            limit=64,
            log=self._log,
        )
        context.health.in_flight = lambda: self._puller.in_flight
        context.health.detail = lambda: "places models" if self._placement.leads else ""

    async def start(self) -> None:
        await self._knowledge.start()
        await self._placement.start()
        await self._control.start()
        await self._bus.subscribe(subjects.DECISION_ROUTE, self._on_decision)
        self._log.info("waiting_for_fleet")
        await self._knowledge.models.ready.wait()
        self._rehearse()
        await self._puller.start()

    async def stop(self) -> None:
        await self._puller.stop(self._context.settings.drain_s)
        await self._control.stop()
        await self._placement.stop()

    def _rehearse(self) -> None:
        """Route some queries of our own over a worker of our own, so that the first query does not find all cold."""
        state = self._knowledge.state()
        if state is None:
            return
        device = m.Device(kind="cpu", name="rehearsal", memory_bytes=2**40)
        worker = m.WorkerState(worker="rehearsal", host="", device=device, budget_bytes=2**40)
        state, now = replace(state, workers=[worker]), self._context.clock()
        accepted = m.Accepted(query=m.Query(prompt="rehearsal"), query_id="rehearsal", deadline_at=now + 60.0)
        for _ in range(REHEARSALS):
            analyzed = codec.unpack(codec.pack(m.Analyzed(accepted=accepted, profile=m.Profile())), m.Analyzed)
            codec.pack(m.Planned(accepted=accepted, route=routing.decide(analyzed, state, now)))

    def _on_change(self) -> None:
        self._placement.wake()

    def _on_control(self, key: str) -> None:
        self._control.heard(key)

    async def _on_decision(self, message: Msg) -> None:
        route = codec.unpack(message.data, m.Route)
        if route.planner != self._context.instance:  # our own are counted when they are made
            self._count(route)

    def _count(self, route: m.Route) -> None:
        self._knowledge.routed(route)
        self._control.routed(route)

    async def _on_query(self, message: Msg) -> None:
        try:
            analyzed = codec.unpack(message.data, m.Analyzed)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            now = self._context.clock()
            await self._bus.dead(message.subject, message.data, str(error), service="planner", at=now)
            await message.term()
            return
        with structlog.contextvars.bound_contextvars(query_id=analyzed.accepted.query_id):
            await self._route(message, analyzed)

    async def _route(self, message: Msg, analyzed: m.Analyzed) -> None:
        accepted, now = analyzed.accepted, self._context.clock()
        redelivered = message.metadata.num_delivered > 1
        state = self._knowledge.state()
        if now >= accepted.deadline_at:
            error = DeadlineExpired(
                "The deadline passed before the query could be planned.",
                "Raise `deadline_s`, or look at `calm status` for what is missing.",
            )
            await self._refuse(accepted, codec.failure_of(error, accepted.query_id), redelivered=redelivered)
            await message.ack()
            return
        if state is None or not any(not w.draining for w in state.workers):
            self._log.info("no_worker_yet")
            await message.nak(delay=RETRY_S)
            return
        began = time.perf_counter()
        shape = learning.normals(state.learned, len(state.cards))
        chance = routing.Chance(self._random.standard_normal(shape), self._random.random())
        choice = routing.choose(analyzed, state, now, chance)
        route = msgspec.structs.replace(
            choice.route,
            decided_in_s=time.perf_counter() - began,
            objectives_version=self._control.version,
            embedding=compact(analyzed.profile.embedding),
            form=analyzed.profile.form,
        )
        decision = f"{accepted.query_id}-route"
        if route.order:
            stamped = msgspec.structs.replace(accepted, stamps=m.stamp(accepted.stamps, planned=self._context.clock()))
            chosen = choice.candidates.of(choice.order[0])
            planned = m.Planned(
                accepted=stamped, route=_to_carry_out(route), tokens_out=chosen.terms.get("tokens_out", 128.0)
            )
            await self._bus.publish(subjects.PLANNED, planned, msg_id=f"{accepted.query_id}-planned")
            route = msgspec.structs.replace(route, candidates=choice.candidates.all())  # nobody waits for those
            wanted = not self._knowledge.holds(route)
            if wanted:  # a load may be due at once
                self._count(route)
            await self._bus.journal(subjects.DECISION_ROUTE, route, msg_id=decision)
            if not wanted:  # out of the way of those that came with it
                self._count(route)
            self._log.info("routed", card=route.order[0], reason=route.reason, margin=round(route.margin, 4))
        else:
            route = msgspec.structs.replace(route, candidates=choice.candidates.all())
            failure = codec.failure_of(explaining.refusal(route, analyzed, state.cards), accepted.query_id)
            await self._bus.publish(subjects.DECISION_ROUTE, route, msg_id=decision)
            await self._refuse(accepted, failure, redelivered=redelivered)
            self._log.info("refused", code=failure.code)
        await message.ack()
        self._context.health.handled += 1

    async def _refuse(self, accepted: m.Accepted, failure: m.Failure, *, redelivered: bool) -> None:
        done = m.Done(
            query_id=accepted.query_id,
            failure=failure,
            reply=accepted.reply,
            encoding=accepted.encoding,
            stamps=accepted.stamps,
        )
        await self._bus.finish(done, resend=redelivered)
        self._context.health.failed += 1


def _to_carry_out(route: m.Route) -> m.Route:
    """What executor and engine need of a decision; they carry it with the query through two more queues."""
    return msgspec.structs.replace(route, candidates=[], weights={}, domains={}, embedding=b"", form=b"", flip="")
