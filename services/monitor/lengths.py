"""Lengths of answers, learned from every answer: told to planners, stored, and taken up again after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import nats.errors

from services.monitor.telling import tell
from services.monitor.writer import Writer
from shared import messages as m
from shared.bus import Bus
from shared.knowledge import reads
from shared.knowledge.store import Store
from shared.learn.kept import embedding
from shared.learn.live_length import Lengths, first_lengths
from shared.tasks import end, in_background
from shared.unread import taken

TELL_S = 5.0
"""Between two versions: each answer changes it a little."""
STORE_S = 60.0
NAME: Final = "length"


class LengthKeeper:
    """The learned lengths, owned by the knowledge owner."""

    def __init__(self, bus: Bus, store: Store, writer: Writer, clock: Callable[[], float], log: Any) -> None:
        self._bus = bus
        self._store = store
        self._writer = writer
        self._clock = clock
        self._log = log
        self._lengths = Lengths(())
        self._version = 0
        self._fresh = self._unstored = False
        self._stored_at = clock()
        self._task: asyncio.Task[None] | None = None

    @property
    def lengths(self) -> Lengths:
        return self._lengths

    async def start(self) -> None:
        """Take up what was stored last, tell it, and go on."""
        async with self._store.read() as connection:
            stored = await reads.latest_parameter(connection, NAME)
        if stored is not None:
            self._version = stored[0]
            try:
                self._lengths = Lengths.from_bytes(stored[1])
                self._fresh = self._lengths.model is not None
            except ValueError as error:
                self._log.warning("learned_lengths_unusable", error=str(error), remedy="They are learned anew.")
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            await end([self._task])
            self._keep()

    def use(self, cards: list[str]) -> None:
        """The fleet's cards."""
        if cards:
            self._lengths.use(cards)

    def on_answered(self, done: m.Done, features: bytes) -> None:
        """A query has been answered; `features` is its embedding. Answers that were not taken count as well: those
        that ramble are among them."""
        for card, tokens_out, cut, _ in taken(done):
            learned = self._lengths.answered(card, embedding(features), tokens_out, cut=cut)
            self._unstored |= learned
            self._fresh |= learned and self._lengths.model is not None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            if self._lengths.may_begin:
                await self._begin()
            try:
                await self._tell()
            except (TimeoutError, OSError, nats.errors.Error) as error:
                self._log.warning("lengths_not_told", error=str(error) or type(error).__name__)
            if self._clock() - self._stored_at >= STORE_S:
                self._keep()

    async def _begin(self) -> None:
        """Make the topics."""
        cards, first = self._lengths.cards, self._lengths.first()
        self._lengths.begin(await in_background(lambda: first_lengths(cards, first)))
        self._fresh = self._unstored = True

    async def _tell(self) -> None:
        if not self._fresh:
            return
        self._version = max(self._version + 1, int(self._clock()))
        await tell(self._bus, NAME, self._version, self._lengths.to_bytes())
        self._fresh = False

    def _keep(self) -> None:
        """Store them under a version of their own."""
        now = self._clock()
        self._stored_at = now
        if not self._unstored:
            return
        self._version += 1
        row = {"name": NAME, "version": self._version, "at": now, "record": self._lengths.to_bytes()}
        self._writer.note("parameters", row)
        self._unstored = False
