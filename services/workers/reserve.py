"""Engine processes to be had at once: forked ones, spares that have loaded nothing, standbys with their model."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from services.workers.children import Child
from services.workers.cradle import Cradle
from shared.errors import CalmError, NotReady
from shared.messages import ArtifactSpec


class Reserve:
    """Where engines can be forked (`cradle`) a new one takes milliseconds; elsewhere spares make a load cheaper by a
    process start. A standby, of the same artifact, makes it cheaper by the load itself.

    Standbys hold host memory beside the worker's budget, up to a budget of their own; the one parked longest ago goes
    first. On a GPU they would hold device memory, so that none are kept there.
    """

    def __init__(self, *, spares: int, standby_bytes: int, log: Any, cradle: Cradle | None = None) -> None:
        self._wanted = spares
        self._cradle = cradle
        self._forks = cradle is not None
        self._budget = standby_bytes
        self._log = log
        self._spares: list[Child] = []
        self._standbys: OrderedDict[str, tuple[ArtifactSpec, Child, int]] = OrderedDict()
        self._filling: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def standbys(self) -> list[str]:
        """Artifacts in standby."""
        return sorted(self._standbys)

    @property
    def standby_bytes(self) -> int:
        """Measured memory of all standbys."""
        return sum(size for _, _, size in self._standbys.values())

    def children(self) -> Iterator[tuple[str, Child]]:
        """Standbys by artifact: their energy is still accounted for."""
        for name, (_, child, _) in self._standbys.items():
            yield name, child

    def fill(self) -> None:
        """In the background see that engines can be forked, or start spares until there are as many as wanted."""
        if not self._closed and (self._filling is None or self._filling.done()):
            self._filling = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        if self._cradle is not None and self._forks:
            try:
                await self._cradle.connect()
            except NotReady as error:
                self._unforked(error)
            else:
                return
        self._spares = [child for child in self._spares if not child.ended.is_set()]
        while len(self._spares) < self._wanted:
            self._spares.append(await Child.spawn(background=True))

    async def take(self, spec: ArtifactSpec) -> Child:
        """A process for an artifact: its standby, else a spare, else a new one."""
        kept = self._standbys.pop(spec.name, None)
        if kept is not None:
            if kept[0] == spec and not kept[1].ended.is_set():
                return kept[1]
            await kept[1].drain(0.0)  # of another number of slots, or another context
        while self._spares:
            child = self._spares.pop()
            if not child.ended.is_set():
                return child
        return await self._fresh(spec.model)

    async def _fresh(self, model: str) -> Child:
        if self._cradle is not None and self._forks:
            try:
                return await Child.fork(self._cradle, model)
            except NotReady as error:
                self._unforked(error)
        return await Child.spawn()

    def _unforked(self, error: NotReady) -> None:
        """Go on with processes of their own, for good."""
        self._log.warning("engines_are_not_forked", error=str(error))
        self._forks = False

    async def put(self, spec: ArtifactSpec, child: Child, timeout_s: float) -> int:
        """Drain an engine and keep it as a standby when that fits the budget, else end it; the bytes it still holds."""
        if self._budget <= 0 or self._closed:
            await child.drain(timeout_s)
            return 0
        try:
            size = await child.park(timeout_s)
        except CalmError:
            await child.drain(0.0)
            return 0
        while self._standbys and self.standby_bytes + size > self._budget:
            name, (_, oldest, _) = self._standbys.popitem(last=False)
            self._log.info("standby_ended", artifact=name, reason="standby_memory")
            await oldest.drain(0.0)
        if size > self._budget or child.ended.is_set():
            await child.drain(0.0)
            return 0
        self._standbys[spec.name] = (spec, child, size)
        self._log.info("standby", artifact=spec.name, bytes=size, standby_bytes=self.standby_bytes)
        return size

    async def close(self) -> None:
        """End them all."""
        self._closed = True
        if self._filling is not None:
            await asyncio.gather(self._filling, return_exceptions=True)
        held = [*self._spares, *(child for _, child, _ in self._standbys.values())]
        self._spares, self._standbys = [], OrderedDict()
        await asyncio.gather(*(child.drain(0.0) for child in held))
        if self._cradle is not None:
            self._cradle.close()
