"""Which cards to ask, one after the other, and below what chance of being right an answer is handed on. Pure.

Once a card has answered, its confidence says how likely the answer is to be right (`confidence`); the answer is taken,
or another card is asked at its price, and in the end the likeliest answer is given. To ask the next card is worth it
while

    w_q E[max(P_next - p, 0)] > price of the next attempt,       p = the best chance so far

whose left side falls as p rises: so there is a chance below which an answer is handed on, and it is the next card's
reservation value. Asking in the order of these values, and stopping once the best is above the next, is optimal search
with recall where cards err independently (Weitzman 1979). They do not: what one model gets wrong others do too. So the
next card's quality is lowered by `KINSHIP` of what the answer is below its own card's, as in `live_patience`.

`cascade.Cascade` plans with lines for what every model is worth after every other, from recorded outcomes in which all
models answered all queries. Live there are none: what is known is each card's quality, and what its confidence says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.chance import NEAR
from shared.learn.live_patience import KINSHIP

Array = NDArray[Any]
MOST = 3
"""Attempts. A fourth is asked for when three cards were unsure, and then mostly nobody knows."""
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
_GRID = np.linspace(0.0, 1.0, 51)


@dataclass(frozen=True)
class Offers:
    """k cards that may be asked; every array [k]."""

    quality: Array
    """Predicted chance of a readable answer to be right."""
    readable: Array
    """Predicted chance that an answer can be read."""
    level: Array
    """As in `confidence.Line`,"""
    slope: Array
    """per standard deviation of confidence."""
    latency_s: Array
    price: Array
    """Of an attempt, in units of utility, but for its latency."""
    alike: NDArray[np.bool_] | None = None
    """[k, k]: two cards would say the same. None where no two would."""


@dataclass(frozen=True)
class Step:
    """One card of a plan."""

    index: int
    below: float
    """While the best chance so far is lower than this, the next one is asked; 0 for the last."""
    chance: float
    """Expected of its answer before it is asked."""
    reached: float
    """Probability that it is asked."""


@dataclass(frozen=True)
class Plan:
    worth: float
    """Expected utility: w_q x the chance of the answer given, less all that is spent."""
    steps: tuple[Step, ...]


def plan(
    offers: Offers, w_q: float, delay: Callable[[float], float], *, left_s: float = np.inf, joules: Array | None = None,
    most_j: float = np.inf, first: int | None = None,
) -> Plan:  # fmt: skip
    """The best plan.

    Args:
        offers: the cards.
        w_q: weight of quality.
        delay: the price of a query's seconds: 0 for none, and growing.
        left_s: what all attempts together may take.
        joules: [k] energy of an attempt; together at most `most_j`.
        most_j: see `joules`.
        first: index of the card to ask first; the best one when left out.
    """
    spent = np.zeros(len(offers.quality)) if joules is None else joules
    firsts = range(len(offers.quality)) if first is None else [first]
    chains = [_chain(offers, w_q, delay, one, left_s, spent, most_j) for one in firsts]
    # Each step of a chain is worth its cost by itself; all of it may be worth less than its first answer.
    chains += [(chain[:1], [0.0]) for chain, _ in chains if len(chain) > 1]
    return max((_worth(offers, *chain, w_q, delay) for chain in chains), key=lambda found: found.worth)


def _chain(
    offers: Offers, w_q: float, delay: Callable[[float], float], first: int, left_s: float, spent: Array, most_j: float
) -> tuple[list[int], list[float]]:
    """The cards in order of what is worth asking next, and below which chance each is followed by the next."""
    chain, below = [first], []
    elapsed, used_j = float(offers.latency_s[first]), float(spent[first])
    may = np.ones(len(offers.quality), bool)
    while len(chain) < min(MOST, len(offers.quality)):
        may[chain[-1]] = False
        if offers.alike is not None:
            may &= ~offers.alike[chain[-1]]
        open_ = np.flatnonzero(may & (elapsed + offers.latency_s <= left_s) & (used_j + spent <= most_j))
        if not len(open_):
            break
        cost = offers.price[open_] + [delay(elapsed + s) - delay(elapsed) for s in offers.latency_s[open_].tolist()]
        value = _below(offers, chain[-1], open_, cost, w_q)
        best = int(value.argmax())
        if value[best] <= 0.0:
            break
        below.append(float(value[best]))
        chain.append(int(open_[best]))
        elapsed += float(offers.latency_s[chain[-1]])
        used_j += float(spent[chain[-1]])
    return chain, [*below, 0.0]


def _below(offers: Offers, after: int, then: NDArray[np.int64], cost: Array, w_q: float) -> Array:
    """[t] for each of these cards: the chance of the answer at hand up to which asking it is worth its cost."""
    shift = KINSHIP * np.maximum(offers.quality[after] - _GRID, 0.0)
    p, weight = _answers(offers, then, np.broadcast_to(shift, (len(then), len(_GRID))))
    gain = w_q * (np.maximum(p - _GRID[None, :, None], 0.0) * weight[:, None, :]).sum(-1) - cost[:, None]
    last = len(_GRID) - 1 - (gain > 0.0)[:, ::-1].argmax(1)  # the highest chance at which it gains
    return np.where((gain > 0.0).any(1), _GRID[last], 0.0)


def _answers(offers: Offers, cards: NDArray[np.int64], shift: Array) -> tuple[Array, Array]:
    """Chances [t, s, m] of answers of cards [t] whose quality is lower by `shift` [t, s], and their weights [t, m]; the
    last is of an answer that cannot be read."""
    q = np.clip(offers.quality[cards, None] - shift, NEAR, 1.0 - NEAR)
    at = np.log(q / (1.0 - q)) + offers.level[cards, None]
    p = 1.0 / (1.0 + np.exp(-(at[..., None] + offers.slope[cards, None, None] * _NODES)))
    r = offers.readable[cards, None]
    return (
        np.concatenate([p, np.zeros((*p.shape[:-1], 1))], axis=-1),
        np.concatenate([r * _WEIGHTS, 1.0 - r], axis=-1),
    )


def _worth(offers: Offers, chain: list[int], below: list[float], w_q: float, delay: Callable[[float], float]) -> Plan:
    """What a chain of cards comes to, over all that may be heard."""
    best, weight, shift = np.zeros(1), np.ones(1), np.zeros(1)
    worth, elapsed, steps = 0.0, 0.0, []
    for card, limit in zip(chain, below, strict=True):
        reached = min(float(weight.sum()), 1.0)
        total = elapsed + float(offers.latency_s[card])
        worth -= reached * (float(offers.price[card]) + delay(total) - delay(elapsed))
        elapsed = total
        p, share = (one[0] for one in _answers(offers, np.array([card]), shift[None, :]))
        chance = float((weight[:, None] * p * share).sum()) / reached if reached else 0.0
        steps.append(Step(card, limit, chance, reached))
        now = weight[:, None] * share
        best, weight = np.maximum(best[:, None], p).ravel(), now.ravel()
        shift = (KINSHIP * np.maximum(offers.quality[card] - p, 0.0)).ravel()
        on = best < limit
        worth += w_q * float((weight * best)[~on].sum())
        best, weight, shift = best[on], weight[on], shift[on]
    return Plan(worth, tuple(steps))
