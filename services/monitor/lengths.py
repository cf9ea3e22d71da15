"""Lengths of answers, learned from every answer: told to planners, stored, and taken up again after a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.monitor.keeper import Keeper
from services.monitor.writer import Writer
from shared import messages as m
from shared.bus import Bus
from shared.knowledge.store import Store
from shared.learn.kept import embedding
from shared.learn.live_length import Lengths, first_lengths
from shared.tasks import in_background
from shared.unread import taken


class LengthKeeper(Keeper):
    """The learned lengths, owned by the knowledge owner."""

    name = "length"
    unusable = "learned_lengths_unusable"
    not_told = "lengths_not_told"

    def __init__(self, bus: Bus, store: Store, writer: Writer, clock: Callable[[], float], log: Any) -> None:
        super().__init__(bus, store, writer, clock, log)
        self._lengths = Lengths(())

    @property
    def lengths(self) -> Lengths:
        return self._lengths

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

    async def _tell(self) -> None:
        if self._lengths.may_begin:
            await self._begin()
        await super()._tell()

    async def _begin(self) -> None:
        """Make the topics."""
        cards, first = self._lengths.cards, self._lengths.first()
        self._lengths.begin(await in_background(lambda: first_lengths(cards, first)))
        self._fresh = self._unstored = True

    def _take(self, stored: bytes) -> bool:
        self._lengths = Lengths.from_bytes(stored)
        return self._lengths.model is not None

    def _to_tell(self) -> bytes:
        return self._lengths.to_bytes()

    def _to_store(self) -> bytes:
        return self._lengths.to_bytes()
