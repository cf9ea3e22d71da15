"""How long the running system waits for a card's answer: what cutting it off would gain, by number of tokens.

The recorded form of this is `patience`. Live, what another model would have said instead is not known, and what a token
costs is the planner's to say: so the knowledge owner learns a `Table` for each card, and a planner prices it. What
another card would be worth where this one rambles is its mean, lowered by half of what this one is below its own mean
there: what one model gets wrong others do too (`KINSHIP`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.learn.patience import RAMBLING

Array = NDArray[Any]
KINSHIP = 0.5
"""llama-3.1-8b's answers beyond three medians are right in 0.14, against 0.45 on average; other small models' answers
to the same questions in 0.24, against 0.42: 0.58 of what it loses they lose too."""
ANSWERS = 50.0
"""Least number of answers of a card with known scores."""
BEYOND = 8.0
"""Least number of them beyond a limit."""
LIMITS = 12


class Table(msgspec.Struct, frozen=True):
    """For each limit, per answer of the card, cut or not."""

    tokens: tuple[int, ...] = ()
    """The limits."""
    gained: tuple[float, ...] = ()
    """Score that another card's answers have over those that are cut off; negative where they have less."""
    saved: tuple[float, ...] = ()
    """Tokens that are not written."""
    cut: tuple[float, ...] = ()
    """Share of answers that are cut off."""

    def limit(self, token_price: float, other_price: float) -> int | None:
        """The best limit, None where none gains anything: at this price of a token of the card, and of another card's
        answer, in units of score."""
        if not self.tokens:
            return None
        gain = np.array(self.gained) + token_price * np.array(self.saved) - other_price * np.array(self.cut)
        best = int(gain.argmax())
        return self.tokens[best] if gain[best] > 0.0 else None


def tables(answers: Mapping[str, Sequence[tuple[int, float, float]]]) -> dict[str, Table]:
    """By card, from its answers: tokens, score, and how many answers each stands for."""
    known = {card: np.array(rows, np.float64).T for card, rows in answers.items() if len(rows)}
    known = {card: rows for card, rows in known.items() if rows[2].sum() >= ANSWERS}
    mean = {card: float(np.average(score, weights=weight)) for card, (_, score, weight) in known.items()}
    return {
        card: found
        for card, rows in known.items()
        if (others := [value for name, value in mean.items() if name != card])
        and (found := _table(rows[0], rows[1], rows[2], mean[card], max(others))).tokens
    }


def _table(tokens: Array, score: Array, weight: Array, own: float, other: float) -> Table:
    middle = float(np.median(np.repeat(tokens, np.maximum(np.rint(weight), 1).astype(int))))
    beyond = np.sort(tokens[tokens > RAMBLING * max(middle, 1.0)])
    if not len(beyond):
        return Table()
    total, columns = float(weight.sum()), []
    for limit in np.unique(np.append(np.quantile(beyond, np.linspace(0.0, 0.9, LIMITS)), RAMBLING * middle)):
        cut = tokens > limit
        share = float(weight[cut].sum())
        if share < BEYOND:
            continue
        there = float(np.average(score[cut], weights=weight[cut]))
        elsewhere = max(other - KINSHIP * max(own - there, 0.0), 0.0)
        saved = float((weight * np.maximum(tokens - limit, 0.0)).sum()) / total
        columns.append((int(limit), (elsewhere - there) * share / total, saved, share / total))
    return Table(*(tuple(column) for column in zip(*columns, strict=True))) if columns else Table()
