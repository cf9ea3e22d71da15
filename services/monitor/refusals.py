"""Reports of refused input, from every intake to the knowledge owner."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable

from shared import messages as m
from shared import subjects
from shared.bus import Bus
from shared.errors import CalmError

REPORT_S = 1.0
_REPLY_S = 5.0


class Refusals:
    """Counts by error code, handed over once a second; kept while there is no owner to take them."""

    def __init__(self, bus: Bus, clock: Callable[[], float]) -> None:
        self._bus = bus
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, code: str) -> None:
        self._counts[code] += 1

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Hand over what is left."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def report(self) -> None:
        """Hand over what has been counted."""
        if not self._counts:
            return
        counts, self._counts = self._counts, Counter()
        report = m.Rejections(counts=dict(counts), at=self._clock())
        try:
            await self._bus.ask(subjects.REJECTED, report, m.Ok, _REPLY_S)
        except CalmError:
            self._counts += counts

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._stopping.wait()
            await self.report()
