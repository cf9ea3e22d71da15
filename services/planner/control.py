"""Objectives at run time: every planner answers `calm.control`; the placement leader runs the dual controller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg

from services.planner.decide import dual, objectives
from services.planner.decide import trial as trials
from shared import codec, subjects, tasks
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError, InvalidObjective, NotReady
from shared.views import ControlView, ModelsView

TICK_S = 0.5
"""The controller looks at what came in and at what became late this often."""
TELL_S = 1.0
"""Weights are told at most this often,"""
SHOW_S = 2.0
"""and with them figures and the controller's memory this often, while anything comes in."""
KEEP_S = 10.0
"""They are recorded at most this often."""
OPEN_S = 3600.0
"""A routed query of which nothing more was heard for this long is forgotten."""
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_ATTEMPTS = 5
T = TypeVar("T", bound=msgspec.Struct)


class Control:
    """Answers `calm.control`, keeps the policy that routing uses, and, where `leads()`, moves its weights."""

    def __init__(
        self,
        bus: Bus,
        models: ModelsView,
        view: ControlView,
        planner: str,
        leads: Callable[[], bool],
        clock: Callable[[], float],
        log: Any,
    ) -> None:
        self._bus = bus
        self._models = models
        self._view = view
        self._planner = planner
        self._leads = leads
        self._clock = clock
        self._log = log
        self._state: dual.State | None = None
        self._version = -1
        self._fresh = 0
        self._told: m.Policy | None = None
        self._told_at = self._kept_at = 0.0
        self._open: dict[str, tuple[dual.Decided, bool]] = {}
        """Routed queries that have not ended, with whether they were counted as late, in order of routing."""
        self._heard = asyncio.Event()
        self.listening = False
        """Whether it hears of ended queries: as soon as there are objectives."""
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._bus.subscribe(subjects.CONTROL, self._on_control, subjects.CONTROL_QUEUE)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._listen())]

    def heard(self, key: str) -> None:
        """An entry of the control bucket has changed."""
        if key == subjects.OBJECTIVES_KEY:
            self._heard.set()

    async def _listen(self) -> None:
        """Hear of ended queries once there are objectives: without any, each end would wake this process for nothing,
        at the very moment at which its answer is on the way."""
        if self._view.in_force is None:
            await self._heard.wait()
        await self._bus.subscribe(subjects.done_of("*"), self._on_done)
        self.listening = True

    async def stop(self) -> None:
        await tasks.end(self._tasks)
        if self._state is not None and self._leads() and self._fresh:
            with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
                await self._tell(self._clock())

    @property
    def version(self) -> int:
        """Of the objectives in force; 0 when none were ever set."""
        return self._view.in_force.version if self._view.in_force else 0

    # --- calm.control ---

    async def _on_control(self, message: Msg) -> None:
        encoding = "json"
        try:
            encoding = codec.encoding_of(message.headers)
            asked = codec.decode_public(message.data, m.Control, encoding) if message.data else m.Control()
            result: msgspec.Struct = await self._answer(asked)
        except CalmError as error:
            result = codec.failure_of(error)
        if message.reply:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._bus.reply(message.reply, result, encoding)

    async def _answer(self, asked: m.Control) -> m.ControlState:
        if asked.action == "show":
            return objectives.shown(self._models.policy, self._view.in_force, self._view.moved, self._view.trial)
        if not self._models.cards:
            raise NotReady("The fleet's cards are not known yet.", "Ask again when `calm status` shows models.")
        now = self._clock()
        if asked.action == "try":
            self._view.trial = await self._put(subjects.TRIAL_KEY, m.Trial, lambda old: trials.begin(old, asked, now))
            return await self._changed(asked, now)
        if asked.action == "drop":
            await self._end_trial(asked)
            return await self._changed(asked, now)
        if asked.action == "promote":
            trial, _ = await self._entry(subjects.TRIAL_KEY, m.Trial)
            wanted = trials.meant(trial, asked)
            await self._set(lambda old: trials.promoted(old, wanted, asked, self._models.cards, now))
            await self._end_trial(msgspec.structs.replace(asked, trial=wanted.version))
        else:
            await self._set(lambda old: objectives.change(old, asked, self._models.cards, now))
        return await self._changed(asked, now)

    async def _set(self, change: Callable[[m.InForce | None], m.InForce]) -> None:
        self._view.in_force = await self._put(subjects.OBJECTIVES_KEY, m.InForce, change)
        self._heard.set()

    async def _end_trial(self, asked: m.Control) -> None:
        def ended(old: m.Trial | None) -> m.Trial:
            return msgspec.structs.replace(trials.meant(old, asked), ended=True)

        await self._put(subjects.TRIAL_KEY, m.Trial, ended)
        self._view.trial = None

    async def _changed(self, asked: m.Control, at: float) -> m.ControlState:
        """Write a change to the record; how things stand after it."""
        state = objectives.shown(self._models.policy, self._view.in_force, self._view.moved, self._view.trial)
        record = msgspec.structs.replace(state, event=asked.action, changed_at=at, changed_by=asked.by)
        await self._bus.publish(subjects.DECISION_CONTROL, record, msg_id=f"control-{state.version}-{at}")
        self._log.info("objectives_changed", version=state.version, action=asked.action, by=asked.by)
        return state

    async def _entry(self, key: str, kind: type[T]) -> tuple[T | None, int]:
        """An entry of the control bucket as it is now, and its revision."""
        subject = subjects.kv(subjects.BUCKET_CONTROL, key)
        try:
            entry = await self._bus.js.get_last_msg(f"KV_{subjects.BUCKET_CONTROL}", subject, direct=True)
        except nats.js.errors.NotFoundError:
            return None, 0
        return codec.unpack(entry.data, kind) if entry.data else None, entry.seq or 0

    async def _put(self, key: str, kind: type[T], change: Callable[[T | None], T]) -> T:
        """Change an entry as it is in the bucket, or start over when another replica changed it meanwhile. Others hear
        of it through the bucket."""
        for _ in range(_ATTEMPTS):
            now, revision = await self._entry(key, kind)
            new = change(now)
            subject = subjects.kv(subjects.BUCKET_CONTROL, key)
            try:
                await self._bus.js.publish(subject, codec.pack(new), headers={_EXPECTED: str(revision)})
            except nats.js.errors.APIError:
                continue
            except (TimeoutError, nats.errors.Error):
                raise NotReady("The broker did not take the change.", "Ask again.") from None
            return new
        raise InvalidObjective("Others change the objectives at the same time.", "Look at them, and ask again.")

    # --- the controller ---

    def routed(self, route: m.Route) -> None:
        """A planner, this one or another, has decided."""
        if self._view.in_force is None:
            return
        chosen = next((c for c in route.candidates if route.order and c.card == route.order[0]), None)
        if chosen is None:
            return
        wanted = self._view.in_force.objectives.reference
        reference = next((c.quality for c in route.candidates if c.card == wanted and c.quality > 0.0), None)
        decided = dual.Decided(route.decided_at, chosen.latency_s, chosen.energy_j, chosen.quality, reference)
        self._open[route.query_id] = (decided, False)
        if self._leads() and (state := self._current()) is not None:
            self._state = dual.decided(state, self._view.in_force.objectives, decided)
            self._fresh += 1

    async def _on_done(self, message: Msg) -> None:
        done = codec.unpack_done(message.data, message.headers)
        known = self._open.pop(done.query_id, None)
        if known is None or done.answer is None or self._view.in_force is None:
            return
        if self._leads() and (state := self._current()) is not None:
            decided, late = known
            ended = dual.Ended(done.answer.timings.total_s, done.answer.energy.joules, decided, known_late=late)
            self._state = dual.ended(state, self._view.in_force.objectives, ended)
            self._fresh += 1

    def _current(self) -> dual.State | None:
        """The controller's memory for the objectives in force: as this planner has it, as the last leader stored it,
        or a new one. None while there is nothing to hold."""
        in_force, policy = self._view.in_force, self._models.policy
        if in_force is None or policy is None:
            return None
        if self._state is None or self._version != in_force.version:
            self._state, self._version, self._told = None, in_force.version, None
            moved = self._view.moved
            if moved is not None and moved.version == in_force.version and moved.state:
                with contextlib.suppress(msgspec.MsgspecError):
                    self._state = msgspec.msgpack.decode(moved.state, type=dual.State)
            if self._state is None:
                self._state = dual.start(objectives.own(policy, in_force.objectives))
        return self._state

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            self._become_late(now)
            if not self._leads():
                # Another leads: what it stores is the truth to begin from, should this planner take over.
                self._state = None
                continue
            state, in_force, policy = self._current(), self._view.in_force, self._models.policy
            if state is None or in_force is None or policy is None or not self._fresh:
                continue
            weighed = dual.weights(state, in_force.objectives, objectives.own(policy, in_force.objectives))
            due = now - self._told_at >= SHOW_S
            if due or (now - self._told_at >= TELL_S and dual.told(self._told, weighed)):
                with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
                    await self._tell(now)

    async def _tell(self, now: float) -> None:
        state, in_force, policy = self._current(), self._view.in_force, self._models.policy
        if state is None or in_force is None or policy is None:
            return
        weighed = dual.weights(state, in_force.objectives, objectives.own(policy, in_force.objectives))
        stands = dual.held(state, in_force.objectives)
        names = ("w_quality", "w_latency", "w_energy", "latency_slo_s", "energy_ref_j")
        moved = m.Moved(
            version=in_force.version,
            fleet=policy.fleet,
            weights={name: getattr(weighed, name) for name in names},
            at=now,
            controller=self._planner,
            count=stands.count,
            latency_p95_s=stands.latency_p95_s,
            energy_j_mean=stands.energy_j_mean,
            energy_j_per_hour=stands.energy_j_per_hour,
            infeasible=list(stands.infeasible),
            state=msgspec.msgpack.encode(state),
        )
        if now - self._kept_at >= KEEP_S:
            record = msgspec.structs.replace(objectives.shown(policy, in_force, moved), event="moved")
            await self._bus.publish(subjects.DECISION_CONTROL, record, msg_id=f"moved-{in_force.version}-{now}")
            self._kept_at = now
        await self._bus.kv_put(subjects.BUCKET_CONTROL, subjects.WEIGHTS_KEY, moved)
        self._told, self._told_at, self._fresh = weighed, now, 0

    def _become_late(self, now: float) -> None:
        in_force = self._view.in_force
        limit = in_force.objectives.latency_p95_s if in_force is not None else None
        for query_id, (decided, late) in list(self._open.items()):
            if now - decided.at >= OPEN_S:
                del self._open[query_id]
            elif in_force is not None and limit is not None and not late and now - decided.at > limit:
                self._open[query_id] = (decided, True)
                if self._leads() and (state := self._current()) is not None:
                    self._state = dual.late(state, in_force.objectives, decided)
                    self._fresh += 1
