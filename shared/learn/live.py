"""What the running system learns of its cards' quality: from judgements, and from whether answers could be read. Pure:
no clock, no files.

The knowledge owner keeps one `Learner`, feeds it, stores it and broadcasts it; planners read what they are sent. Topics
are clusters of the first `START` queries' embeddings, so nothing is learned before those have been seen, and are made
anew when `RENEW` have been: with them the outcomes kept are learned again. The latest `KEPT` outcomes are kept, by
query and card, so that a second judgement of an answer takes the place of the first.

Of answers that something was expected of, it is learned how often they can be read, from all of them, judged or not
(`readable`): what such a query may expect of a card is that chance times the quality, which judgements of readable
answers teach. A judgement of an unreadable answer teaches nothing further: such an answer is worth nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.bounded import put
from shared.learn import arrays
from shared.learn.quality import Outcome, QualityModel
from shared.learn.readable import READABLE, ReadableQuality

Array = NDArray[Any]
START = 40
"""Queries from whose embeddings topics are made."""
RENEW = (200, 1000)
"""Queries that must have been seen, since the start or a restart, for topics to be made anew from them."""
KEPT = 2000
"""Judgements, and as many readings, about 0.8 kB each."""
VERSION = "learner.v1"


class Kept(msgspec.Struct):
    """One judgement that was learned from."""

    x: bytes
    """Embedding, float16."""
    prior: float
    score: float
    weight: float = 1.0
    """What it counts by now."""

    @property
    def embedding(self) -> Array:
        return embedding(self.x)


class Heard(msgspec.Struct):
    """Whether one answer could be read."""

    x: bytes
    """Embedding, float16."""
    readable: bool
    weight: float = 1.0


class _Stored(msgspec.Struct, frozen=True):
    version: str
    cards: tuple[str, ...]
    judgements: int
    started: list[bytes]
    quality: bytes = b""
    topics_from: int = 0
    topics_version: int = 0
    readable: bytes = b""
    readings: int = 0


class Learner:
    """Learned quality of `cards`, relative to what each card promises."""

    def __init__(self, cards: Sequence[str]) -> None:
        self.cards = tuple(sorted(cards))
        self.judgements = 0
        """Taken in so far."""
        self.readings = 0
        """Answers of which it is known whether they could be read."""
        self.quality: QualityModel | None = None
        """Of answers that can be read, and of those that nothing was expected of."""
        self.readable: QualityModel | None = None
        """Chance that an answer can be read, less 1; there whenever `quality` is."""
        self.topics_from = 0
        """Queries that the present topics were made from."""
        self.topics_version = 0
        """How often topics were made."""
        self._recent: deque[Array] = deque(maxlen=RENEW[-1])
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self._heard: OrderedDict[tuple[str, str], Heard] = OrderedDict()

    @property
    def ready(self) -> bool:
        """Whether there is anything to tell planners: some answer has been learned from."""
        return self.quality is not None and self.judgements + self.readings > 0

    def seen(self, x: Array) -> Array | None:
        """A query's embedding [d]. Those seen [n, d] are returned when topics are to be made (anew) from them: to be
        given to `first_quality`, which takes a while, and what that returns to `begin`."""
        if self._recent and len(x) != len(self._recent[0]):
            return None
        self._recent.append(np.asarray(x, np.float32))
        due = next((n for n in (START, *RENEW) if n > self.topics_from), None)
        if due is None or len(self._recent) < due:
            return None
        self.topics_from = len(self._recent)  # and not asked for again while they are being made
        return np.stack(self._recent).astype(np.float64)

    def begin(self, quality: QualityModel) -> None:
        """Learn from now on with these topics; what is kept is learned again."""
        prior = self.quality.prior if self.quality is not None else quality.prior
        self.topics_version += 1
        believed = self.quality.believed if self.quality is not None else None
        fresh = QualityModel(self.cards, quality.topics, prior=prior, believed=believed)
        width = len(quality.topics.centre)
        self.quality = fresh.with_topics(quality.topics, self._outcomes(width))
        prior = self.readable.prior if self.readable is not None else READABLE
        fresh = QualityModel(self.cards, quality.topics, prior=prior, believed=READABLE)
        self.readable = fresh.with_topics(quality.topics, self._readings(width))

    def heard(self, card: str, x: Array, readable: bool, query_id: str) -> bool:
        """Whether a card's answer to a query could be read, once for each. False when it teaches nothing yet: before
        there are topics it is kept for them."""
        key = query_id, card
        if card not in self.cards or key in self._heard or not len(x):
            return False
        heard = Heard(np.asarray(x, "<f2").tobytes(), readable)
        put(self._heard, key, heard, KEPT)
        self.readings += 1
        if not readable and (before := self._kept.pop(key, None)) is not None:  # judged before this was known
            self._withdraw(card, before)
            self.judgements -= 1
        if self.quality is None or self.readable is None or len(x) != len(self.quality.topics.centre):
            return False
        both = ReadableQuality(self.readable, self.quality)
        both.heard(embedding(heard.x), self.cards.index(card), readable)
        return True

    def judged(
        self, card: str, x: Array, prior: float, score: float, query_id: str = "", *, readable: bool = True
    ) -> bool:
        """One judgement (0 to 1) of an answer; `prior` is what the card promised for the query. False when it could
        not be learned from, or teaches nothing since the answer was not `readable`. A further judgement of this card's
        answer to `query_id` takes the place of the last."""
        if self.quality is None or card not in self.cards or len(x) != len(self.quality.topics.centre):
            return False
        known = self._heard.get((query_id, card)) if query_id else None
        if not readable or (known is not None and not known.readable):
            return False
        index, before = self.cards.index(card), self._kept.pop((query_id, card), None)
        if before is not None:
            self._withdraw(card, before)
        kept = Kept(np.asarray(x, "<f2").tobytes(), prior, score)
        self.quality.update(kept.embedding, index, score, prior)
        self.judgements += before is None
        if query_id:
            put(self._kept, (query_id, card), kept, KEPT)
        return True

    def knows(self, query_id: str, card: str) -> bool:
        """Whether a judgement of this card's answer to the query is kept."""
        return (query_id, card) in self._kept

    def changed(self, card: str, keep: float) -> None:
        """A card answers differently from before: what is known of it counts `keep` (0 to 1) of what it did."""
        if self.quality is not None and card in self.cards:
            self.quality.forget(self.cards.index(card), keep)
            if self.readable is not None:
                self.readable.forget(self.cards.index(card), keep)
            for records in (self._kept, self._heard):
                for (_, name), kept in records.items():
                    if name == card:
                        kept.weight *= keep

    def use(self, cards: Sequence[str]) -> None:
        """The fleet has other cards now; what is known of those that stay is kept."""
        names = tuple(sorted(cards))
        if names == self.cards:
            return
        self.cards = names
        for records in (self._kept, self._heard):
            for key in [key for key in records if key[1] not in names]:
                del records[key]
        if self.quality is not None:
            self.quality = self.quality.with_models(names)
        if self.readable is not None:
            self.readable = self.readable.with_models(names)

    def outcomes_to_bytes(self) -> bytes:
        """What is kept, for the knowledge base: up to 2 MB, which planners do not need."""
        return msgspec.msgpack.encode([(query_id, card, kept) for (query_id, card), kept in self._kept.items()])

    def take_outcomes(self, data: bytes) -> None:
        """Take up what was kept. Raises ValueError when these bytes are not outcomes."""
        try:
            kept = msgspec.msgpack.decode(data, type=list[tuple[str, str, Kept]])
        except msgspec.MsgspecError as error:
            raise ValueError(f"no outcomes: {error}") from None
        self._kept = OrderedDict(((query_id, card), one) for query_id, card, one in kept if card in self.cards)

    def readings_to_bytes(self) -> bytes:
        """What is kept of readings, for the knowledge base: up to 2 MB, which planners do not need."""
        return msgspec.msgpack.encode([(query_id, card, heard) for (query_id, card), heard in self._heard.items()])

    def take_readings(self, data: bytes) -> None:
        """Take up what was kept of readings. Raises ValueError when these bytes are none."""
        try:
            heard = msgspec.msgpack.decode(data, type=list[tuple[str, str, Heard]])
        except msgspec.MsgspecError as error:
            raise ValueError(f"no readings: {error}") from None
        self._heard = OrderedDict(((query_id, card), one) for query_id, card, one in heard if card in self.cards)

    def to_bytes(self) -> bytes:
        """For the knowledge base and for planners; without the outcomes kept."""
        started = [] if self.quality is not None else [np.asarray(x, "<f4").tobytes() for x in self._recent]
        quality = self.quality.to_bytes() if self.quality is not None else b""
        readable = self.readable.to_bytes() if self.readable is not None and self.readings else b""
        return msgspec.msgpack.encode(
            _Stored(
                VERSION, self.cards, self.judgements, started, quality, self.topics_from, self.topics_version, readable,
                self.readings,
            )
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes) -> Learner:
        """Raises ValueError when these bytes are not a learner of this version."""
        stored = arrays.stored(data, _Stored, VERSION, "a learner")
        learner = cls(stored.cards)
        learner.judgements, learner.readings = stored.judgements, stored.readings
        learner.topics_version = stored.topics_version
        learner._recent.extend(np.frombuffer(x, "<f4") for x in stored.started)
        if stored.quality:
            learner.quality = QualityModel.from_bytes(stored.quality)
            learner.topics_from = stored.topics_from or START
            learner.readable = (
                QualityModel.from_bytes(stored.readable)
                if stored.readable
                else QualityModel(stored.cards, learner.quality.topics, prior=READABLE)
            )
        return learner

    def _withdraw(self, card: str, kept: Kept) -> None:
        if self.quality is not None and len(kept.embedding) == len(self.quality.topics.centre):
            self.quality.withdraw(kept.embedding, self.cards.index(card), kept.score, kept.prior, kept.weight)

    def _readings(self, width: int) -> list[Outcome]:
        """The readings kept of the present cards, against a chance of 1."""
        index = {card: i for i, card in enumerate(self.cards)}
        rows = [(embedding(h.x), card, h) for (_, card), h in self._heard.items() if card in index]
        return [(x, index[card], float(h.readable) - 1.0, h.weight) for x, card, h in rows if len(x) == width]

    def _outcomes(self, width: int) -> list[Outcome]:
        """What is kept of the present cards, for features of this width."""
        index = {card: i for i, card in enumerate(self.cards)}
        rows = [(kept.embedding, card, kept) for (_, card), kept in self._kept.items() if card in index]
        return [(x, index[card], kept.score - kept.prior, kept.weight) for x, card, kept in rows if len(x) == width]


def first_quality(cards: Sequence[str], first: Array) -> QualityModel:
    """A model that has learned nothing yet, with topics from queries' embeddings [n, d]. Tenths of a second of
    computing."""
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
