"""What the running system learns of the lengths of its cards' answers, from every answer. Pure: no clock, no files.

The knowledge owner keeps one `Lengths`, feeds it, stores it and tells planners. No judgement is needed: each answer has
a length. One that was cut off at its limit says only that it would have been at least as long: it counts as the longer
of its length and what was expected (one step of the EM algorithm for censored data; Dempster, Laird and Rubin, 1977).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.learn import arrays
from shared.learn.length import LengthModel

Array = NDArray[Any]
START = 60
"""Answered queries from whose embeddings topics are made; they are then learned from."""
MOST = 500
"""Kept at most until the topics are made."""
TRUSTED_FROM = 10
"""Answers of a card from which on what was learned of it is used."""
VERSION = "lengths.v1"


class _First(msgspec.Struct, frozen=True, array_like=True):
    card: str
    tokens: int
    cut: bool
    x: bytes


class _Stored(msgspec.Struct, frozen=True):
    version: str
    cards: tuple[str, ...]
    answers: int
    first: list[_First]
    model: bytes = b""


class Lengths:
    """Learned output tokens of `cards`."""

    def __init__(self, cards: Sequence[str]) -> None:
        self.cards = tuple(sorted(cards))
        self.answers = 0
        """Learned from so far."""
        self.model: LengthModel | None = None
        self._first: list[_First] = []

    def answered(self, card: str, x: Array, tokens: int, *, cut: bool) -> bool:
        """One answer of a card to a query with embedding `x` [d]; `cut`: it ended at its limit. True when it was
        learned from or kept for the beginning."""
        if card not in self.cards or tokens < 1 or not len(x):
            return False
        if self.model is None:
            if len(self._first) >= MOST or (self._first and len(self._first[0].x) != 4 * len(x)):
                return False
            self._first.append(_First(card, tokens, cut, np.asarray(x, "<f4").tobytes()))
            return True
        return self._learn(card, np.asarray(x, np.float64), tokens, cut=cut)

    @property
    def may_begin(self) -> bool:
        """There are queries enough to make topics of."""
        return self.model is None and len(self._first) >= START

    def first(self) -> Array:
        """[n, d] embeddings, for `first_lengths`, which takes tenths of a second."""
        return np.stack([np.frombuffer(one.x, "<f4").astype(np.float64) for one in self._first])

    def begin(self, model: LengthModel) -> None:
        """Learn from now on with these topics, first of all from the answers kept."""
        self.model = model.with_models(self.cards)
        kept, self._first = self._first, []
        for one in kept:
            self._learn(one.card, np.frombuffer(one.x, "<f4").astype(np.float64), one.tokens, cut=one.cut)

    def expected(self, x: Array, cards: Sequence[str]) -> Array:
        """[k] output tokens of each card for a query with embedding `x` [d]; NaN where little is known."""
        found = np.full(len(cards), np.nan)
        if self.model is None or not self._fits(x):
            return found
        row = {name: i for i, name in enumerate(self.cards) if self.model.seen(i) >= TRUSTED_FROM}
        known = [i for i, name in enumerate(cards) if name in row]
        if known:
            found[known] = self.model.expected_one(x)[[row[cards[i]] for i in known]]
        return found

    def use(self, cards: Sequence[str]) -> None:
        """The fleet has other cards now; what is known of those that stay is kept."""
        names = tuple(sorted(cards))
        if names == self.cards:
            return
        self.cards = names
        self._first = [one for one in self._first if one.card in names]
        if self.model is not None:
            self.model = self.model.with_models(names)

    def to_bytes(self) -> bytes:
        """For the knowledge base and for planners."""
        model = self.model.to_bytes() if self.model is not None else b""
        return msgspec.msgpack.encode(_Stored(VERSION, self.cards, self.answers, self._first, model))

    @classmethod
    def from_bytes(cls, data: bytes) -> Lengths:
        """Raises ValueError when these bytes are not learned lengths of this version."""
        stored = arrays.stored(data, _Stored, VERSION, "learned lengths")
        lengths = cls(stored.cards)
        lengths.answers = stored.answers
        lengths._first = stored.first
        if stored.model:
            lengths.model = LengthModel.from_bytes(stored.model)
        return lengths

    def _learn(self, card: str, x: Array, tokens: int, *, cut: bool) -> bool:
        if self.model is None or not self._fits(x):
            return False
        index = self.cards.index(card)
        told = float(tokens)
        if cut:
            told = max(told, float(self.model.predict(x[None, :]).mean[0, index]))
        self.model.update(x, index, told)
        self.answers += 1
        return True

    def _fits(self, x: Array) -> bool:
        return self.model is not None and len(x) == self.model.width


def first_lengths(cards: Sequence[str], first: Array) -> LengthModel:
    """A model that has learned nothing yet, with topics from the first queries' embeddings [n, d]."""
    return LengthModel.start(cards, first)
