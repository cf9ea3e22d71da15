"""What the gateway knows of the fleet: live views of it, and figures that are asked for when somebody looks."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import nats.errors
from nats.aio.msg import Msg

from shared import codec, streams, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError
from shared.views import FleetView, ModelsView

T = TypeVar("T")

STALE_S = 3.5
"""A service that has said nothing for this long is gone."""
FRESH_S = 1.0
"""Figures are asked for at most this often, however many look."""
SHOWN = 12
"""Of the latest queries."""
_ASK_S = 2.0


@dataclass(frozen=True)
class Snapshot:
    """The fleet at one moment. What nobody answered for is None or empty."""

    services: list[m.Heartbeat] = field(default_factory=list)
    workers: list[m.WorkerState] = field(default_factory=list)
    cards: list[m.Card] = field(default_factory=list)
    queues: dict[str, int] = field(default_factory=dict)
    """Queries dispatched and not yet done, by artifact."""
    counts: m.Counts | None = None
    qos: m.Qos | None = None
    energy: m.EnergyReports | None = None
    at: float = 0.0


class Fleet:
    """Follows the fleet."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._workers = FleetView(bus)
        self._models = ModelsView(bus)
        self._beats: dict[tuple[str, str], tuple[float, m.Heartbeat]] = {}
        self._asked = asyncio.Lock()
        self._latest = Snapshot()
        self._recent: tuple[float, list[m.QueryRecord]] = (0.0, [])

    async def start(self) -> None:
        await self._bus.subscribe(subjects.health("*"), self._on_beat)
        await self._workers.start()
        await self._models.start()

    @property
    def cards(self) -> dict[str, m.Card]:
        return self._models.cards

    @property
    def policy(self) -> m.Policy | None:
        return self._models.policy

    @property
    def workers(self) -> list[m.WorkerState]:
        return self._workers.workers()

    def missing(self) -> str:
        """What is missing before a query can be answered; empty when nothing is."""
        if not self._bus.nc.is_connected:
            return "the broker is away"
        if not self.cards:
            return "the fleet's models are not known yet"
        if not any(not worker.draining for worker in self.workers):
            return "no worker is running"
        return ""

    async def snapshot(self) -> Snapshot:
        """The fleet as it is, its figures at most `FRESH_S` old."""
        async with self._asked:
            now = time.time()
            if now - self._latest.at > FRESH_S:
                counts, qos, energy, queues = await asyncio.gather(
                    self._knowledge("counts", m.Counts),
                    self._knowledge("qos", m.Qos),
                    self._knowledge("energy", m.EnergyReports),
                    self._queues(),
                )
                self._latest = Snapshot(queues=queues, counts=counts, qos=qos, energy=energy, at=now)
            latest = self._latest
        limit = time.monotonic() - STALE_S
        for key in [key for key, (heard, _) in self._beats.items() if heard < limit]:
            del self._beats[key]
        return Snapshot(
            services=[beat for _, (_, beat) in sorted(self._beats.items())],
            workers=self.workers,
            cards=[self.cards[name] for name in sorted(self.cards)],
            queues=latest.queues, counts=latest.counts, qos=latest.qos, energy=latest.energy, at=latest.at,
        )  # fmt: skip

    async def recent(self) -> list[m.QueryRecord]:
        """The latest queries, newest first, at most `FRESH_S` old; empty when nobody tells."""
        async with self._asked:
            at, records = self._recent
            if time.time() - at > FRESH_S:
                found = await self._knowledge("recent", m.QueryRecords, limit=SHOWN)
                records = found.records if found is not None else []
                self._recent = (time.time(), records)
        return records

    async def record(self, verb: str, kind: type[T], **request: Any) -> T:
        """Ask the knowledge base.

        Raises:
            CalmError: NotFound, or BusUnavailable when nobody answers.
        """
        return await self._bus.ask(subjects.knowledge(verb), m.KnowledgeRequest(**request), kind, _ASK_S)

    async def _knowledge(self, verb: str, kind: type[T], **request: Any) -> T | None:
        try:
            return await self.record(verb, kind, **request)
        except (CalmError, nats.errors.Error, OSError):
            return None

    async def _queues(self) -> dict[str, int]:
        try:
            return await streams.queued(self._bus.js)
        except (TimeoutError, OSError, nats.errors.Error):
            return {}

    async def _on_beat(self, message: Msg) -> None:
        try:
            beat = codec.unpack(message.data, m.Heartbeat)
        except (msgspec.ValidationError, msgspec.DecodeError):
            return
        self._beats[(beat.service, beat.instance)] = (time.monotonic(), beat)
