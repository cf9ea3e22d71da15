"""Supervision of queries: one entry per query that this executor carries, until its end is recorded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from shared import messages as m


@dataclass
class Supervised:
    """A planned query in this executor's hands. The planned message stays unacknowledged while it is here."""

    planned: m.Planned
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `calm.done.<query_id>` has been seen."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    attempt: int = 1
    rank: int = 0
    artifact: str = ""
    first_dispatched: float | None = None
    """Unix seconds; None before the first attempt."""
    unread: m.Done | None = None
    """How it ends with what was handed on so far: taken when nothing better comes in time."""
    sequence: int = 0
    """Of the work message, so that it can be withdrawn from the queue."""


class Supervision:
    """The queries in hand, and cancellations that came before their query did."""

    TOMBSTONES = 10_000

    def __init__(self) -> None:
        self._queries: dict[str, Supervised] = {}
        self._tombstones: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._queries)

    def take(self, planned: m.Planned) -> Supervised:
        query_id = planned.accepted.query_id
        entry = Supervised(planned)
        if query_id in self._tombstones:
            entry.cancelled.set()
        self._queries[query_id] = entry
        return entry

    def release(self, query_id: str) -> None:
        self._queries.pop(query_id, None)

    def get(self, query_id: str) -> Supervised | None:
        return self._queries.get(query_id)

    def on_artifact(self, artifact: str) -> list[Supervised]:
        return [s for s in self._queries.values() if s.artifact == artifact]

    def cancel(self, query_id: str) -> None:
        """Cancel now, or as soon as the query arrives."""
        entry = self._queries.get(query_id)
        if entry is not None:
            entry.cancelled.set()
        self._tombstones[query_id] = None
        while len(self._tombstones) > self.TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]

    def ended(self, query_id: str) -> None:
        entry = self._queries.get(query_id)
        if entry is not None:
            entry.ended.set()
        self._tombstones.pop(query_id, None)
