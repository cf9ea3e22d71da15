"""The knowledge owner: opens the knowledge base while this process holds the lease, and closes it after."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from sqlalchemy.exc import SQLAlchemyError

from services.monitor.answers import Answers
from services.monitor.confidences import ConfidenceKeeper
from services.monitor.ends import Ends
from services.monitor.learning import Learning
from services.monitor.lengths import LengthKeeper
from services.monitor.probing import Probing
from services.monitor.recorder import Recorder
from services.monitor.registry import Registry
from services.monitor.trust import Trust
from services.monitor.writer import Writer
from shared import codec, subjects
from shared import messages as m
from shared.knowledge import rows
from shared.knowledge.store import Store
from shared.lease import Lease
from shared.runtime import Context
from shared.tasks import end
from shared.views import FleetView

SAMPLE_S = 10.0
"""Between two samples of a worker that are kept."""
RETENTION_S = 3600.0
RETRY_S = 1.0
_DAY_S = 86400.0
_LEAST_DAYS = 2.0
"""The streams keep a day: a row forgotten sooner would be counted again if its message came again."""


class Base:
    """The parts that work on one open knowledge base."""

    def __init__(self, context: Context, registry: Registry, workers: Callable[[], Sequence[m.WorkerState]]) -> None:
        self._context = context
        self._bus = context.bus
        self._registry = registry
        self._store = Store(context.settings.database_url)
        self._writer = Writer(self._store)
        self._learning = Learning(self._bus, self._store, self._writer, context.clock)
        self._confidences = ConfidenceKeeper(self._bus, self._store, self._writer, context.clock, context.log)
        self._trust = Trust(self._bus, self._store, self._writer, context.clock, context.log, self._confidences)
        self._lengths = LengthKeeper(self._bus, self._store, self._writer, context.clock, context.log)
        self._ends = Ends(self._on_answered)
        self._probing = Probing(
            self._bus, self._writer, self._trust, registry.probes, lambda: list(registry.cards or {}), workers,
            context.clock, context.log,
        )  # fmt: skip
        self._recorder = Recorder(
            self._bus,
            self._writer,
            on_done=self._on_done,
            on_operation=self._learning.on_operation,
            on_route=self._on_route,
            device_class=self._learning.device_class,
            clock=context.clock,
            log=context.log,
        )
        self._answers = Answers(
            self._bus,
            self._store,
            self._writer,
            self._learning,
            self._trust,
            context.clock,
            context.log,
            self._probing.on_judged,
        )
        self._sampled: dict[str, float] = {}
        self._telemetry: list[Subscription] = []
        self._stopping = asyncio.Event()
        self._retention: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        return self._recorder.in_flight

    async def start(self) -> None:
        await self._store.open()
        self._writer.start()
        await self._learning.start()
        await self._confidences.start()
        await self._trust.start()
        await self._lengths.start()
        await self._recorder.start()
        self._telemetry.append(await self._bus.subscribe(subjects.symptom(">"), self._on_symptom))
        self._telemetry.append(await self._bus.subscribe(subjects.energy("*"), self._on_energy))
        await self._answers.start()
        self._probing.start()
        self.note_cards()
        self._retention = asyncio.create_task(self._forget())

    async def stop(self) -> None:
        """Finish what is in hand, commit it, and close the database."""
        timeout_s = self._context.settings.drain_s
        self._stopping.set()
        if self._retention is not None:
            await self._retention  # cancelled in the middle of a statement it would leave its connection open
        async with contextlib.AsyncExitStack() as last:  # each is called, last first, though one before it fails
            last.push_async_callback(self._store.close)
            last.push_async_callback(self._writer.stop)
            last.push_async_callback(self._learning.stop)
            last.push_async_callback(self._lengths.stop)
            last.push_async_callback(self._confidences.stop)
            last.push_async_callback(self._trust.stop)
            last.push_async_callback(self._recorder.stop, timeout_s)
            last.push_async_callback(self._answers.stop, timeout_s)
            last.push_async_callback(self._probing.stop)
            for subscription in self._telemetry:
                with contextlib.suppress(Exception):
                    await subscription.unsubscribe()

    def note_cards(self) -> None:
        """Keep the cards as published."""
        self._trust.use(list(self._registry.cards or {}))
        self._lengths.use(list(self._registry.cards or {}))
        self._confidences.use(list(self._registry.cards or {}))
        for card in (self._registry.cards or {}).values():
            self._writer.note("models", rows.card(card, self._context.clock()))

    def note_worker(self, state: m.WorkerState) -> None:
        """Keep what a worker says of itself, every `SAMPLE_S`."""
        self._learning.on_worker(state)
        if state.at - self._sampled.get(state.worker, 0.0) >= SAMPLE_S:
            self._sampled[state.worker] = state.at
            self._writer.note("workers", rows.worker(state))
            self._writer.note("device_samples", rows.sample(state))

    def _on_done(self, done: m.Done) -> None:
        self._learning.on_done(done)
        self._trust.on_done(done)
        self._confidences.on_done(done)
        self._ends.on_done(done)

    def _on_answered(self, done: m.Done, embedding: bytes, form: bytes) -> None:
        self._lengths.on_answered(done, embedding)
        self._trust.on_answered(done, embedding, form)

    def _on_route(self, route: m.Route) -> None:
        self._trust.on_route(route)
        self._ends.on_route(route)
        self._probing.on_route(route)

    async def _on_symptom(self, message: Msg) -> None:
        self._writer.note("symptoms", rows.symptom(codec.unpack(message.data, m.Symptom)))

    async def _on_energy(self, message: Msg) -> None:
        for row in rows.energy(codec.unpack(message.data, m.EnergyReport)):
            self._writer.note("energy", row)

    async def _forget(self) -> None:
        while not self._stopping.is_set():
            try:
                days = max(self._context.settings.retention_days, _LEAST_DAYS)
                before = self._context.clock() - days * _DAY_S
                if deleted := await self._store.forget(before):
                    self._context.log.info("forgotten", rows=deleted)
            except SQLAlchemyError as error:
                self._context.log.warning("retention_failed", error=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETENTION_S):
                    await self._stopping.wait()


class Owner:
    """Wants the lease `knowledge`; has a `Base` while it holds it."""

    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._log: Any = context.log
        self._registry = registry
        self._changed = asyncio.Event()
        self._lease = Lease(
            context.bus, "knowledge", context.instance, on_gain=self._changed.set, on_loss=self._changed.set
        )
        self._fleet = FleetView(context.bus, self._on_worker)
        self._base: Base | None = None
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        registry.on_publish(self._on_publish)

    @property
    def owns(self) -> bool:
        return self._base is not None

    @property
    def in_flight(self) -> int:
        return self._base.in_flight if self._base else 0

    async def start(self) -> None:
        await self._fleet.start()
        await self._lease.start()
        if self._lease.held:
            await self._open()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Close the knowledge base, then release the lease for another monitor to take at once."""
        self._stopping = True
        self._changed.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._context.settings.drain_s)
            await end([self._task])
        await self._close()
        await self._lease.stop()

    async def _run(self) -> None:
        while not self._stopping:
            if self._lease.held and self._base is None:
                if not await self._open():
                    await asyncio.sleep(RETRY_S)  # what ails a database announces no end
                    continue
            elif not self._lease.held and self._base is not None:
                self._log.warning("knowledge_lease_lost")
                await self._close()
            await self._changed.wait()
            self._changed.clear()

    async def _open(self) -> bool:
        base = Base(self._context, self._registry, self._fleet.workers)
        try:
            await base.start()
        except (SQLAlchemyError, OSError) as error:
            url = self._context.settings.database_url
            self._log.error("knowledge_not_opened", url=url, error=str(error), remedy="Check CALM_HOME.")
            await base.stop()
            return False
        except asyncio.CancelledError:
            await base.stop()
            raise
        self._base = base
        for state in self._fleet.workers():
            base.note_worker(state)
        self._log.info("knowledge_opened", url=self._context.settings.database_url)
        return True

    async def _close(self) -> None:
        base, self._base = self._base, None
        if base is not None:
            await base.stop()

    def _on_worker(self, state: m.WorkerState | None) -> None:
        if state is not None and self._base is not None:
            self._base.note_worker(state)

    def _on_publish(self) -> None:
        if self._base is not None:
            self._base.note_cards()
