"""What the running system learns of its cards' quality: from judgements, and from whether answers could be read. Pure:
no clock, no files.

The knowledge owner keeps one `Learner`, feeds it, stores it and broadcasts it; planners read what they are sent. Topics
are clusters of the first `START` queries' embeddings, so nothing is learned before those have been seen, and are made
anew when `RENEW` have been: with them the outcomes kept are learned again. The latest `KEPT` outcomes are kept, by
query and card, so that a second judgement of an answer takes the place of the first.

Of answers that something was expected of, the sign is learned (`signs`: can they be read, and how long are they), from
all of them, judged or not: what such a query may expect of a card is the expected sign times the quality, which
judgements of readable answers teach. A judgement of an unreadable answer teaches nothing further: it is worth nothing.
Every `RESIGN` judgements signs are learned anew, and as long as all answers are kept what follows from them too: at
once, or in steps between which the learner goes on (`live_relearn`).

Features of a query are its embedding and plain facts about its text (`features.joined`), or an embedding alone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.bounded import put
from shared.learn import arrays, relearned
from shared.learn.kept import Heard, Kept, decoded, encoded, weakened
from shared.learn.live_patience import Table
from shared.learn.quality import QualityModel
from shared.learn.readable import READABLE, ReadableQuality, beyond
from shared.learn.signs import Signs
from shared.learn.topics import NESTED

Array = NDArray[Any]
START = 40
"""Queries from whose embeddings topics are made."""
RENEW = (200, 1000)
"""Queries that must have been seen, since the start or a restart, for topics to be made anew from them."""
KEPT = 2000
"""Judgements, and as many readings, about 0.8 kB each."""
RESIGN = 100
"""Judgements between two times that signs are learned."""
TOPICS = 4
"""By what queries are about, beside those by form (`topics.KINDS`) where facts about the text are known."""
VERSION = "learner.v2"


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
    signs: Signs = Signs()
    patience: dict[str, Table] = {}


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
        """Sign of an answer, less 1; there whenever `quality` is."""
        self.topics_from = 0
        """Queries that the present topics were made from."""
        self.topics_version = 0
        """How often topics were made."""
        self.signs = Signs()
        self.patience: dict[str, Table] = {}
        """What cutting off the answers of a card would gain, where that is known."""
        self.stepped = False
        """What falls due is seen to by others, in steps."""
        self._resigned = 0
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
        for _ in self.relearning(quality):
            pass

    @property
    def due(self) -> bool:
        """Whether signs are to be learned anew."""
        return self.quality is not None and self.judgements >= self._resigned + RESIGN

    def heard(
        self, card: str, x: Array, readable: bool, query_id: str, tokens: int = 0, *, limited: bool = False
    ) -> bool:
        """Whether a card's answer to a query could be read, how long it is (0: not known), and whether it was `limited`
        (`live_patience`), once for each. False when it teaches nothing yet: before there are topics it is kept."""
        key = query_id, card
        if card not in self.cards or key in self._heard or not len(x):
            return False
        heard = Heard(np.asarray(x, "<f2").tobytes(), readable, tokens=tokens, limited=limited)
        put(self._heard, key, heard, KEPT)
        self.readings += 1
        if not readable and (before := self._kept.pop(key, None)) is not None:  # judged before this was known
            self._withdraw(card, before)
            self.judgements -= 1
        if self.quality is None or self.readable is None or len(x) != len(self.quality.topics.centre):
            return False
        sign = self.signs.of(card, tokens, readable=readable)
        ReadableQuality(self.readable, self.quality).heard(heard.features, self.cards.index(card), sign)
        return True

    def judged(
        self, card: str, x: Array, prior: float, score: float, query_id: str = "", *, readable: bool = True
    ) -> bool:
        """One judgement (0 to 1) of an answer; `prior` is what the card promised for the query. False when it could
        not be learned from yet (before there are topics it is kept for them), or teaches nothing since the answer was
        not `readable`. A further judgement of this card's answer to `query_id` takes the place of the last."""
        if card not in self.cards or not len(x):
            return False
        heard = self._heard.get((query_id, card)) if query_id else None
        if not readable or (heard is not None and not heard.readable):
            return False
        sign = self.signs.of(card, heard.tokens if heard is not None else 0)
        kept = Kept(np.asarray(x, "<f2").tobytes(), prior, score, sign=sign)
        if self.quality is None or self.readable is None:
            if query_id and not self.knows(query_id, card):
                self.judgements += 1
            if query_id:
                put(self._kept, (query_id, card), kept, KEPT)
            return False
        if len(x) != len(self.quality.topics.centre):
            return False
        before = self._kept.pop((query_id, card), None)
        if before is not None:
            self._withdraw(card, before)
        both = ReadableQuality(self.readable, self.quality)
        both.judged(kept.features, self.cards.index(card), score, prior, sign)
        self.judgements += before is None
        if query_id:
            put(self._kept, (query_id, card), kept, KEPT)
        if self.due and not self.stepped:
            for _ in self.relearning():
                pass
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
            weakened(self._kept, card, keep)
            weakened(self._heard, card, keep)

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
        return encoded(self._kept)

    def take_outcomes(self, data: bytes) -> None:
        """Take up what was kept. Raises ValueError when these bytes are not outcomes."""
        self._kept = decoded(data, Kept, self.cards, "outcomes")

    def readings_to_bytes(self) -> bytes:
        """What is kept of readings, for the knowledge base: up to 2 MB, which planners do not need."""
        return encoded(self._heard)

    def take_readings(self, data: bytes) -> None:
        """Take up what was kept of readings. Raises ValueError when these bytes are none."""
        self._heard = decoded(data, Heard, self.cards, "readings")

    def to_bytes(self) -> bytes:
        """For the knowledge base and for planners; without the outcomes kept."""
        started = [] if self.quality is not None else [np.asarray(x, "<f4").tobytes() for x in self._recent]
        quality = self.quality.to_bytes() if self.quality is not None else b""
        readable = self.readable.to_bytes() if self.readable is not None and self.readings else b""
        return msgspec.msgpack.encode(
            _Stored(
                VERSION, self.cards, self.judgements, started, quality, self.topics_from, self.topics_version, readable,
                self.readings, self.signs, self.patience,
            )
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ValueError when these bytes are not a learner of this version."""
        stored = arrays.stored(data, _Stored, VERSION, "a learner")
        learner = cls(stored.cards)
        learner.judgements, learner.readings = stored.judgements, stored.readings
        learner.topics_version, learner.signs = stored.topics_version, stored.signs
        learner.patience, learner._resigned = stored.patience, stored.judgements
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

    def copy(self) -> Learner:
        """The same knowledge but for the queries seen, in a learner that leaves alone what falls due."""
        other = Learner(self.cards)
        other.take(self)
        other.quality, other.readable = deepcopy(self.quality), deepcopy(self.readable)
        other._kept, other._heard = self._kept.copy(), self._heard.copy()
        other.stepped = True
        return other

    def take(self, other: Learner) -> None:
        """Know what another learner does, which is not told anything from now on."""
        self.cards, self.quality, self.readable = other.cards, other.quality, other.readable
        self.judgements, self.readings, self._resigned = other.judgements, other.readings, other._resigned
        self.topics_version, self.signs, self.patience = other.topics_version, other.signs, other.patience
        self._kept, self._heard = other._kept, other._heard

    def relearning(self, topics: QualityModel | None = None) -> Iterator[None]:
        """Signs learned anew from what is kept, and then all the rest of it, by these topics or, while everything is
        kept, the present ones: in steps of a millisecond, between which the learner is to be left alone."""
        self.topics_version += topics is not None
        self._resigned = self.judgements
        self.signs, self.patience = yield from relearned.signs_and_tables(self._heard, self._kept)
        whole = self.readings == len(self._heard) and self.judgements == len(self._kept)
        if topics is None and not (whole and self.quality is not None):
            return
        about, old = topics or self.quality, self.quality
        if about is None:
            return
        prior, believed = (about.prior, None) if old is None else (old.prior, old.believed)
        fresh = QualityModel(self.cards, about.topics, prior=prior, believed=believed)
        worth, self._kept = yield from relearned.outcomes(fresh, self._kept, self._heard, self.signs)
        prior = self.readable.prior if self.readable is not None else READABLE
        fresh = QualityModel(self.cards, about.topics, prior=prior, believed=READABLE)
        self.readable = yield from relearned.readings(fresh, self._heard, self.signs)
        self.quality = worth

    def _withdraw(self, card: str, kept: Kept) -> None:
        if self.quality is not None and kept.width == len(self.quality.topics.centre):
            over, weight = beyond(kept.score, kept.prior, kept.sign)
            self.quality.withdraw(kept.features, self.cards.index(card), over, weight=weight * kept.weight)


def first_quality(cards: Sequence[str], first: Array, form: int = 0) -> QualityModel:
    """A model that has learned nothing yet, with topics from queries' features [n, d], of which the last `form` are
    facts about the text. Tenths of a second of computing."""
    return QualityModel.start(cards, first, TOPICS if form else NESTED, form=form)
