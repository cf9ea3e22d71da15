"""The judgements and readings that the running system keeps, to be learned again when topics or signs are made anew."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from shared.learn import signs
from shared.learn.live_patience import Table, tables
from shared.learn.signs import Signs


class _Of(msgspec.Struct, frozen=True, gc=False):
    """Of an answer to a query."""

    x: bytes
    """The query's features, float16."""

    @property
    def features(self) -> NDArray[Any]:
        return embedding(self.x)

    @property
    def width(self) -> int:
        """How many features they are."""
        return len(self.x) // 2


class Kept(_Of, frozen=True, gc=False):
    """One judgement that was learned from."""

    prior: float
    score: float
    weight: float = 1.0
    """What it counts by now."""
    sign: float = 1.0
    """Of the answer, as it was learned (`signs`)."""


class Heard(_Of, frozen=True, gc=False):
    """Whether one answer could be read, and how long it was."""

    readable: bool
    weight: float = 1.0
    tokens: int = 0
    """0 where that is not known."""
    limited: bool = False
    """It was to be cut off where it rambles (`live_patience`), so its length and its score may not be its own."""


K = TypeVar("K", Kept, Heard)


Outcomes = Mapping[tuple[str, str], Kept]
Readings = Mapping[tuple[str, str], Heard]


def learned_signs(heard: Readings, kept: Outcomes) -> Signs:
    """What the lengths of answers say, from those kept by query and card."""
    readable = {key: one.tokens for key, one in heard.items() if one.readable}
    judged = [(key[1], readable[key], one.score) for key, one in kept.items() if key in readable]
    return signs.learn(((card, tokens) for (_, card), tokens in readable.items()), judged)


def learned_tables(heard: Readings, kept: Outcomes) -> dict[str, Table]:
    """What cutting answers off would gain, by card."""
    return tables(scored(heard, kept))


def scored(heard: Readings, kept: Outcomes) -> dict[str, list[tuple[int, float, float]]]:
    """Answers with known scores, for `live_patience.tables`. Unreadable answers are known to be worth nothing, readable
    ones only where they were judged: so an unreadable one counts as much as the share of readable ones that are."""
    free = {key: one for key, one in heard.items() if one.tokens > 0 and not one.limited}
    counts: dict[str, list[int]] = {}
    for key, one in free.items():
        if one.readable:
            count = counts.setdefault(key[1], [0, 0])
            count[0] += 1
            count[1] += key in kept
    answers: dict[str, list[tuple[int, float, float]]] = {}
    for key, one in free.items():
        every, judged = counts.get(key[1], (0, 0))
        if one.readable and key in kept:
            answers.setdefault(key[1], []).append((one.tokens, kept[key].score, 1.0))
        elif not one.readable and judged:
            answers.setdefault(key[1], []).append((one.tokens, 0.0, judged / every))
    return answers


def encoded(records: Mapping[tuple[str, str], Any]) -> bytes:
    """Records by query and card, for the knowledge base."""
    return msgspec.msgpack.encode([(query_id, card, one) for (query_id, card), one in records.items()])


def decoded(data: bytes, kind: type[K], cards: Sequence[str], what: str) -> OrderedDict[tuple[str, str], K]:
    """What `encoded` gave, of these cards. Raises ValueError when these bytes are no such records."""
    try:
        found = msgspec.msgpack.decode(data, type=list[tuple[str, str, kind]])  # type: ignore[valid-type]
    except msgspec.MsgspecError as error:
        raise ValueError(f"no {what}: {error}") from None
    return OrderedDict(((query_id, card), one) for query_id, card, one in found if card in cards)


def weakened(records: OrderedDict[tuple[str, str], K], card: str, keep: float) -> None:
    """A card has changed: what is kept of it counts `keep` (0 to 1) of what it did."""
    for key in [key for key in records if key[1] == card]:
        records[key] = replace(records[key], weight=records[key].weight * keep)


def embedding(data: bytes) -> NDArray[Any]:
    """Features as they are kept, or a sentence embedding as `Route.embedding` carries it: little-endian float16."""
    return np.frombuffer(data, "<f2").astype(np.float64)


def compact(profile_embedding: bytes) -> bytes:
    """float32 to float16: half the bytes, and errors a hundred times below what tells two queries apart."""
    return np.frombuffer(profile_embedding, "<f4").astype("<f2").tobytes()


def pieces(data: bytes, size: int) -> list[bytes]:
    """`data` in pieces of at most `size` bytes; at least one."""
    return [data[i : i + size] for i in range(0, len(data), size)] or [b""]
