"""What is kept of answers, learned again from the beginning: in steps of a millisecond or so, so that a service that
does it can answer between any two. Pure.

Steps and not a thread: what takes the time here is Python, and a thread holds the interpreter's lock while it runs
that. One of the idle scheduling class keeps it even while it is not let run: the service then waits longer than had it
done the work itself (docs/decisions/0032).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from shared.learn.hierarchy import Sums
from shared.learn.kept import Heard, Kept, Outcomes, Readings, learned_signs, scored
from shared.learn.live_patience import Table, tables
from shared.learn.quality import QualityModel
from shared.learn.readable import beyond
from shared.learn.signs import Signs

Array = NDArray[Any]
T = TypeVar("T")
Steps = Generator[None, None, T]
CHUNK = 100
"""Records learned in a step."""


def signs_and_tables(heard: Readings, kept: Outcomes) -> Steps[tuple[Signs, dict[str, Table]]]:
    """What lengths of answers say, and what cutting answers off would gain."""
    signs = learned_signs(heard, kept)
    yield
    answers = scored(heard, kept)
    yield
    return signs, tables(answers)


def outcomes(model: QualityModel, kept: Outcomes, heard: Readings, signs: Signs) -> Steps[tuple[QualityModel, Any]]:
    """The model with what judgements say under these signs and nothing else, and the judgements with their signs."""
    column = {card: i for i, card in enumerate(model.models)}
    sums, width = Sums.empty(len(model.models), model.topics.size), len(model.topics.centre)
    signed: OrderedDict[tuple[str, str], Kept] = OrderedDict(kept)
    for chunk in _chunks(kept):
        rows: list[tuple[int, float, float, Array]] = []
        for (query_id, card), one in chunk:
            if card not in column or one.width != width:
                continue
            reading = heard.get((query_id, card))
            sign = signs.of(card, reading.tokens if reading is not None else 0)
            signed[query_id, card] = replace(one, sign=sign)
            over, weight = beyond(one.score, one.prior, sign)
            rows.append((column[card], over, weight * one.weight, one.features))
        _add(model, sums, rows)
        yield
    return QualityModel(model.models, model.topics, sums, model.prior, believed=model.believed), signed


def readings(model: QualityModel, heard: Readings, signs: Signs) -> Steps[QualityModel]:
    """The model with the signs of the answers kept, against the usual one, and nothing else."""
    column = {card: i for i, card in enumerate(model.models)}
    sums, width = Sums.empty(len(model.models), model.topics.size), len(model.topics.centre)
    for chunk in _chunks(heard):
        rows = [
            (column[card], signs.of(card, one.tokens, readable=one.readable) - 1.0, one.weight, one.features)
            for (_, card), one in chunk
            if card in column and one.width == width
        ]
        _add(model, sums, rows)
        yield
    return QualityModel(model.models, model.topics, sums, model.prior, believed=model.believed)


K = TypeVar("K", Kept, Heard)


def _chunks(records: Mapping[tuple[str, str], K]) -> Iterator[list[tuple[tuple[str, str], K]]]:
    rows = iter(records.items())
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _add(model: QualityModel, sums: Sums, rows: list[tuple[int, float, float, Array]]) -> None:
    """Index of the model, outcome, weight and features of each."""
    if rows:
        index, over, weight, x = zip(*rows, strict=True)
        sums.add_rows(model.topics.encode(np.stack(x)), np.array(index), np.array(over), np.array(weight))
