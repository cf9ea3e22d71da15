"""What the knowledge owner learns along the way: taken up after a restart, told to planners, stored."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import nats.errors

from services.monitor.telling import tell
from services.monitor.writer import Writer
from shared.bus import Bus
from shared.knowledge import reads
from shared.knowledge.store import Store
from shared.tasks import end

TELL_S = 5.0
"""Between two versions: each answer or judgement changes it a little."""
STORE_S = 60.0


class Keeper(abc.ABC):
    """One kind of learned parameters. Set `_fresh` when there is something to tell, `_unstored` when to store."""

    name: ClassVar[Literal["length", "confidence"]]
    unusable: ClassVar[str]
    """The event that is logged when what was stored cannot be used, and"""
    not_told: ClassVar[str]
    """when it could not be told."""

    def __init__(self, bus: Bus, store: Store, writer: Writer, clock: Callable[[], float], log: Any) -> None:
        self._bus = bus
        self._store = store
        self._writer = writer
        self._clock = clock
        self._log = log
        self._version = 0
        self._fresh = self._unstored = False
        self._stored_at = clock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what was stored last, tell it, and go on."""
        async with self._store.read() as connection:
            stored = await reads.latest_parameter(connection, self.name)
        if stored is not None:
            self._version = stored[0]
            try:
                self._fresh = self._take(stored[1])
            except ValueError as error:
                self._log.warning(self.unusable, error=str(error), remedy="They are learned anew.")
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            await end([self._task])
            self._keep()

    @abc.abstractmethod
    def _take(self, stored: bytes) -> bool:
        """Know what was stored; whether there is something to tell. Raises ValueError when it cannot be used."""

    @abc.abstractmethod
    def _to_tell(self) -> bytes:
        """As planners are told it."""

    @abc.abstractmethod
    def _to_store(self) -> bytes:
        """As it is stored."""

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            try:
                await self._tell()
            except (TimeoutError, OSError, nats.errors.Error) as error:
                self._log.warning(self.not_told, error=str(error) or type(error).__name__)
            if self._clock() - self._stored_at >= STORE_S:
                self._keep()

    async def _tell(self) -> None:
        if not self._fresh:
            return
        self._version = max(self._version + 1, int(self._clock()))
        await tell(self._bus, self.name, self._version, self._to_tell())
        self._fresh = False

    def _keep(self) -> None:
        """Store it under a version of its own."""
        now = self._clock()
        self._stored_at = now
        if not self._unstored:
            return
        self._version += 1
        row = {"name": self.name, "version": self._version, "at": now, "record": self._to_store()}
        self._writer.note("parameters", row)
        self._unstored = False
