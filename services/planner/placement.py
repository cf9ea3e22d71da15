"""The placement leader: plans residency whenever something changed, and publishes load and evict commands."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nats.aio.msg import Msg

from services.planner.decide import residency
from services.planner.decide.rooms import Pending
from services.planner.knowledge import Knowledge
from shared import codec, subjects, tasks
from shared import messages as m
from shared.bus import Bus
from shared.lease import Lease

TICK_S = 0.5
"""Longest time between two passes; minimum residence and idle time pass without an event."""
COUNT_BUSY_S = 0.25
"""How often the queues are counted while queries are waiting or running."""
COMMAND_TTL_S = 60.0
"""A command not carried out by then is void, and planned anew if it is still wanted."""
HOLD_BACK_S = 5.0
"""After a failed load, the same load is not tried again for this long."""


@dataclass(frozen=True)
class _Issued:
    op_id: str
    at: float
    pending: Pending


class Placement:
    """Runs in every planner; only the holder of the lease acts."""

    def __init__(self, bus: Bus, knowledge: Knowledge, planner: str, clock: Callable[[], float], log: Any) -> None:
        self._bus = bus
        self._knowledge = knowledge
        self._planner = planner
        self._clock = clock
        self._log = log
        self._lease = Lease(bus, "placement", planner)
        self._changed = asyncio.Event()
        self._issued: dict[tuple[str, str], _Issued] = {}
        self._held_back: dict[tuple[str, str], float] = {}
        self._blocked: dict[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def leads(self) -> bool:
        return self._lease.held

    def wake(self) -> None:
        """Something changed: plan now."""
        self._changed.set()

    async def start(self) -> None:
        await self._bus.subscribe(subjects.JOURNAL_OPERATION, self._on_operation)
        await self._lease.start()
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._count())]

    async def stop(self) -> None:
        await tasks.end(self._tasks)
        await self._lease.stop()

    async def _count(self) -> None:
        while True:
            await self._knowledge.count_queues()
            self._knowledge.reckon()
            busy = any(d.waiting for d in self._knowledge.demand.values())
            if busy:
                self._changed.set()
            await asyncio.sleep(COUNT_BUSY_S if busy else TICK_S)  # a stream announces no change of its length

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            self._changed.clear()
            if self._lease.held:
                await self._pass()

    async def _pass(self) -> None:
        state, now = self._knowledge.state(), self._clock()
        if state is None:
            return
        self._forget(now)
        plan = residency.plan(
            workers=state.workers,
            specs=self._knowledge.specs(),
            pinned=self._knowledge.pinned(),
            popularity=self._knowledge.popularity(),
            demand=self._knowledge.demand,
            load_s=self._knowledge.load_s(),
            pending=[issued.pending for issued in self._issued.values()],
            held_back=frozenset(self._held_back),
            policy=state.policy,
            now=now,
            forecast=self._knowledge.forecast(),
        )
        for artifact, obstacle in plan.blocked.items():
            if self._blocked.get(artifact) != obstacle:
                self._log.info("load_blocked", artifact=artifact, reason=obstacle)
        self._blocked = dict(plan.blocked)
        if plan.actions:
            await self._command(plan, now)

    async def _command(self, plan: residency.Plan, now: float) -> None:
        specs = self._knowledge.specs()
        loads: list[m.Load] = []
        evicts: list[m.Evict] = []
        for action in plan.actions:
            key = (action.worker, action.artifact)
            op_id = uuid.uuid4().hex
            if action.kind == "evict":
                evicts.append(
                    m.Evict(
                        op_id=op_id, worker=action.worker, artifact=action.artifact, reason=action.reason,
                        issued_at=now, expires_at=now + COMMAND_TTL_S,
                    )
                )  # fmt: skip
            else:
                after = [
                    self._issued[(action.worker, artifact)].op_id
                    for artifact in action.after
                    if (action.worker, artifact) in self._issued
                ]
                loads.append(
                    m.Load(
                        op_id=op_id, worker=action.worker, spec=specs[action.artifact], reason=action.reason,
                        after=after, issued_at=now, expires_at=now + COMMAND_TTL_S,
                    )
                )  # fmt: skip
            size = specs[action.artifact].footprint_bytes if action.artifact in specs else 0
            pending = Pending(action.kind, action.worker, action.artifact, size)
            self._issued[key] = _Issued(op_id, now, pending)
            self._log.info(
                "placement",
                action=action.kind,
                worker=action.worker,
                artifact=action.artifact,
                reason=action.reason,
            )
        decision = m.Placement(
            id=uuid.uuid4().hex,
            loads=loads,
            evicts=evicts,
            reason=",".join(dict.fromkeys(a.reason for a in plan.actions)),
            demand={a: d.waiting for a, d in self._knowledge.demand.items() if d.waiting},
            values=dict(plan.values),
            decided_at=now,
            planner=self._planner,
        )
        # Journal first, then send: a crash in between repeats a command, which its id makes harmless.
        await self._bus.publish(subjects.DECISION_PLACEMENT, decision, msg_id=decision.id)
        for evict in evicts:
            await self._bus.publish(subjects.evict(evict.worker), evict, msg_id=evict.op_id)
        for load in loads:
            await self._bus.publish(subjects.load(load.worker), load, msg_id=load.op_id)

    async def _on_operation(self, message: Msg) -> None:
        operation = codec.unpack(message.data, m.Operation)
        key = (operation.worker, operation.artifact)
        issued = self._issued.get(key)
        if issued is not None and issued.op_id == operation.op_id:
            del self._issued[key]
            if operation.kind == "load" and not operation.ok:
                self._held_back[key] = self._clock() + HOLD_BACK_S
        self._changed.set()

    def _forget(self, now: float) -> None:
        """Drop commands that have expired, and loads that may be tried again."""
        self._issued = {k: i for k, i in self._issued.items() if now - i.at < COMMAND_TTL_S}
        self._held_back = {k: until for k, until in self._held_back.items() if until > now}
