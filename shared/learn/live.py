"""What the running system learns of its cards' quality from judgements. Pure: no clock, no files.

The knowledge owner keeps one `Learner`, feeds it, stores it and broadcasts it; planners read what they are sent. Topics
are clusters of the first `START` queries' embeddings, so nothing is learned before those have been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.learn.quality import QualityModel

Array = NDArray[Any]
START = 40
"""Queries from whose embeddings topics are made."""
VERSION = "learner.v1"


class _Stored(msgspec.Struct, frozen=True):
    version: str
    cards: tuple[str, ...]
    judgements: int
    started: list[bytes]
    quality: bytes = b""


class Learner:
    """Learned quality of `cards`, relative to what each card promises."""

    def __init__(self, cards: Sequence[str]) -> None:
        self.cards = tuple(sorted(cards))
        self.judgements = 0
        """Taken in so far."""
        self.quality: QualityModel | None = None
        self._first: list[Array] = []

    @property
    def ready(self) -> bool:
        """Whether there is anything to tell planners: some judgement has been learned from."""
        return self.quality is not None and self.judgements > 0

    def seen(self, x: Array) -> Array | None:
        """A query's embedding [d]; the first of them make the topics. With the last of these, all of them [START, d]:
        to be given to `first_quality`, which takes a while, and what that returns to `begin`."""
        full = len(self._first) >= START
        if self.quality is not None or full or (self._first and len(x) != len(self._first[0])):
            return None
        self._first.append(np.asarray(x, np.float64))
        return np.stack(self._first) if len(self._first) >= START else None

    def begin(self, quality: QualityModel) -> None:
        """Learn from now on, with these topics."""
        self.quality = quality.with_models(self.cards)
        self._first = []

    def judged(self, card: str, x: Array, prior: float, score: float) -> bool:
        """One judgement (0 to 1) of an answer; `prior` is what the card promised for the query. False when it could
        not be learned from."""
        if self.quality is None or card not in self.cards or len(x) != len(self.quality.topics.centre):
            return False
        self.quality.update(np.asarray(x, np.float64), self.cards.index(card), score, prior)
        self.judgements += 1
        return True

    def changed(self, card: str, keep: float) -> None:
        """A card answers differently from before: what is known of it counts `keep` (0 to 1) of what it did."""
        if self.quality is not None and card in self.cards:
            self.quality.forget(self.cards.index(card), keep)

    def use(self, cards: Sequence[str]) -> None:
        """The fleet has other cards now; what is known of those that stay is kept."""
        names = tuple(sorted(cards))
        if names == self.cards:
            return
        self.cards = names
        if self.quality is not None:
            self.quality = self.quality.with_models(names)

    def to_bytes(self) -> bytes:
        """For the knowledge base and for planners."""
        first = [np.asarray(x, "<f4").tobytes() for x in self._first]
        quality = self.quality.to_bytes() if self.quality is not None else b""
        return msgspec.msgpack.encode(_Stored(VERSION, self.cards, self.judgements, first, quality))

    @classmethod
    def from_bytes(cls, data: bytes) -> Learner:
        """Raises ValueError when these bytes are not a learner of this version."""
        try:
            stored = msgspec.msgpack.decode(data, type=_Stored)
        except msgspec.MsgspecError as error:
            raise ValueError(f"no learner: {error}") from None
        if stored.version != VERSION:
            raise ValueError(f"a learner of version {stored.version!r}, where {VERSION!r} was expected")
        learner = cls(stored.cards)
        learner.judgements = stored.judgements
        learner._first = [np.frombuffer(x, "<f4").astype(np.float64) for x in stored.started]
        if stored.quality:
            learner.quality = QualityModel.from_bytes(stored.quality)
        return learner


def first_quality(cards: Sequence[str], first: Array) -> QualityModel:
    """A model that has learned nothing yet, with topics from the first queries' embeddings [n, d]. Tenths of a second
    of computing."""
    return QualityModel.start(cards, first)


def pieces(data: bytes, size: int) -> list[bytes]:
    """`data` in pieces of at most `size` bytes; at least one."""
    return [data[i : i + size] for i in range(0, len(data), size)] or [b""]


def embedding(data: bytes) -> Array:
    """A sentence embedding as `Route.embedding` carries it: little-endian float16."""
    return np.frombuffer(data, "<f2").astype(np.float64)


def compact(profile_embedding: bytes) -> bytes:
    """float32 to float16: half the bytes, and errors a hundred times below what tells two queries apart."""
    return np.frombuffer(profile_embedding, "<f4").astype("<f2").tobytes()
