"""What is learned from ends, loads and judgements: restored at start, broadcast each second, stored each minute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.monitor.decide.qos import LOADS, WINDOW, Windows
from services.monitor.writer import Writer
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.knowledge import reads
from shared.knowledge.store import Store
from shared.tasks import end

PUBLISH_S = 1.0
REPEAT_S = 5.0
"""An unchanged state is broadcast again after this long, for those that came late."""
STORE_S = 60.0
_NAME = "qos"


class Learning:
    """The QoS windows of the knowledge owner."""

    def __init__(self, bus: Bus, store: Store, writer: Writer, clock: Callable[[], float]) -> None:
        self._bus = bus
        self._store = store
        self._writer = writer
        self._clock = clock
        self._windows = Windows()
        self._devices: dict[str, str] = {}
        self._seen = -1
        self._version = 0
        self._stored = (0, clock())
        self._task: asyncio.Task[None] | None = None
        self.qos = m.Qos()

    async def start(self) -> None:
        """Rebuild the windows from the knowledge base and begin to broadcast."""
        self._devices.update(await reads.device_classes(self._store))
        for done in await reads.last_ends(self._store, WINDOW):
            self._windows.observe(done)
        for device_class, load in await reads.last_loads(self._store, LOADS):
            self._windows.observe_load(load.artifact, device_class, load.seconds)
        for card, query_id, score in await reads.last_feedback(self._store, WINDOW):
            self._windows.observe_feedback(card, query_id, score)
        async with self._store.read() as connection:
            newest = await reads.latest_parameter(connection, _NAME)
        self._version = newest[0] if newest else 0
        self.refresh()
        self._stored = (self._version, self._clock())
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            await end([self._task])
            self._keep()

    # --- what happened ---

    def on_done(self, done: m.Done) -> None:
        self._windows.observe(done)

    def on_operation(self, operation: m.Operation) -> None:
        if operation.kind == "load" and operation.ok:
            self._windows.observe_load(operation.artifact, self.device_class(operation.worker), operation.seconds)

    def on_feedback(self, card: str, given: m.Feedback) -> None:
        self._windows.observe_feedback(card, given.query_id, given.score)

    def on_worker(self, state: m.WorkerState) -> None:
        self._devices[state.worker] = state.device.device_class

    def device_class(self, worker: str) -> str:
        """What kind of device a worker has, or had; empty for a worker never seen."""
        return self._devices.get(worker, "")

    # --- what is known ---

    def refresh(self) -> m.Qos:
        """The present state; its version grows when something was observed, across restarts too."""
        if self._windows.changes != self._seen:
            self._seen = self._windows.changes
            # Seconds, so that a version is never given twice even when the last ones were not stored.
            self._version = max(self._version + 1, int(self._clock()))
            self.qos = self._windows.snapshot(self._version, self._clock())
        return self.qos

    async def _run(self) -> None:
        sent_version, sent_at = -1, 0.0
        while True:
            qos, now = self.refresh(), self._clock()
            if qos.version != sent_version or now - sent_at >= REPEAT_S:
                await self._bus.send(subjects.QOS, qos)
                sent_version, sent_at = qos.version, now
            if now - self._stored[1] >= STORE_S:
                self._keep()
            await asyncio.sleep(PUBLISH_S)

    def _keep(self) -> None:
        """Store the state, so that the version a decision names can be looked up later."""
        qos, now = self.refresh(), self._clock()
        if qos.version != self._stored[0]:
            row = {"name": _NAME, "version": qos.version, "at": now, "record": codec.pack(qos)}
            self._writer.note("parameters", row)
        self._stored = (qos.version, now)
