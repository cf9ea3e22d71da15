"""What weights on trial would make of quality, latency and energy, from decisions logged with propensities. Pure.

Doubly robust, and paired with the policy in force, so that what the two have in common cancels (`offpolicy.gain`). What
is not certain yet is said so: a normal interval means nothing while the candidate's own choices have hardly been taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.learn.offpolicy import Estimate, Logged, doubly_robust, gain

LEAST_TAKEN = 50.0
"""Decisions, after weighting, in which what the candidate alone would have chosen was taken: below that, no verdict."""
MOST_QUALITY_LOST = 0.01
"""A candidate that loses no more than this for certain may take over for what it gains in latency or energy."""
CHOSEN, PRESENT, CANDIDATE = 0, 1, 2


@dataclass(frozen=True)
class Figure:
    """One quantity under both policies."""

    name: str
    known: int
    """Decisions of which it is known."""
    taken: float
    """Of these, those in which the candidate's own choice was taken, after weighting (Kish 1965)."""
    present: Estimate
    candidate: Estimate
    difference: Estimate
    """Candidate less present."""


@dataclass(frozen=True)
class Report:
    decisions: int
    differ: float
    """Share of decisions in which the two would choose differently."""
    figures: tuple[Figure, ...]
    promote: bool
    reason: str


def figure(
    name: str, cards: NDArray[Any], propensity: NDArray[Any], predicted: NDArray[Any], what: NDArray[Any]
) -> Figure:
    """One quantity.

    Args:
        name: of the quantity.
        cards: [n, 3] the chosen card, that of the policy in force, that of the candidate.
        propensity: [n] chance of the chosen one.
        predicted: [n, 3] the quantity as predicted for each of the three before it was known.
        what: [n] as it came, NaN where it is not known.
    """
    known = ~np.isnan(what)
    cards, propensity, predicted, what = cards[known], propensity[known], predicted[known], what[known]
    # Each row's own three alternatives; a card that stands twice must be one column, the first.
    first = np.argmax(cards[:, :, None] == cards[:, None, :], axis=2)
    rows = np.arange(len(what))
    present, candidate = np.zeros((len(what), 3)), np.zeros((len(what), 3))
    present[rows, first[:, PRESENT]] = 1.0
    candidate[rows, first[:, CANDIDATE]] = 1.0
    logged = Logged(np.zeros(len(what), np.int64), propensity, what)
    own = (cards[:, CHOSEN] == cards[:, CANDIDATE]) & (cards[:, CANDIDATE] != cards[:, PRESENT])
    weight = 1.0 / np.maximum(propensity[own], 1e-12)
    taken = float(weight.sum() ** 2 / (weight**2).sum()) if len(weight) else 0.0
    return Figure(
        name, len(what), taken, doubly_robust(logged, present, predicted), doubly_robust(logged, candidate, predicted),
        gain(logged, candidate, present, predicted),
    )  # fmt: skip


def report(
    cards: NDArray[Any], propensity: NDArray[Any], predicted: NDArray[Any], came: NDArray[Any],
    most_lost: float = MOST_QUALITY_LOST,
) -> Report:  # fmt: skip
    """All three quantities, and whether the candidate should take over.

    It should where quality is not certain to lose more than `most_lost`, that is where the whole interval lies above
    -`most_lost`, and quality is certainly higher, or latency or energy certainly lower.

    Args:
        cards: [n, 3] as in `figure`.
        propensity: [n].
        predicted: [n, 3, 3] for each of the three cards quality, latency (s) and energy (J).
        came: [n, 3] quality (judged, 0 to 1), latency and energy as they came; NaN where not known.
    """
    differ = float((cards[:, PRESENT] != cards[:, CANDIDATE]).mean()) if len(cards) else 0.0
    figures = tuple(
        figure(name, cards, propensity, predicted[:, :, i], came[:, i])
        for i, name in enumerate(("quality", "latency_s", "energy_j"))
    )
    if len(cards):
        promote, reason = _verdict(differ, figures, most_lost)
    else:
        promote, reason = False, "nothing has been decided under it yet"
    return Report(len(cards), differ, figures, promote, reason)


def _verdict(differ: float, figures: tuple[Figure, ...], most_lost: float) -> tuple[bool, str]:
    quality, latency, energy = figures
    if not differ:
        return False, "it has chosen as the weights in force do, every time"
    if quality.taken < LEAST_TAKEN:
        return False, (
            f"its own choices were taken and judged {quality.taken:.0f} times, after weighting, and {LEAST_TAKEN:.0f}"
            " are needed: wait, give feedback, or try it on a larger share"
        )
    if quality.difference.low < -most_lost:
        return False, f"quality may fall by {-quality.difference.low:.3f}, more than the {most_lost:g} allowed"
    better = [
        text
        for sure, text in (
            (quality.difference.low > 0.0, f"quality rises by {quality.difference.low:.3f} at least"),
            (_less(latency), f"latency falls by {-latency.difference.high:.2f} s at least"),
            (_less(energy), f"energy falls by {-energy.difference.high:.1f} J a query at least"),
        )
        if sure
    ]
    if not better:
        return False, "nothing is certain to get better"
    return True, ", ".join(better)


def _less(found: Figure) -> bool:
    return found.taken >= LEAST_TAKEN and found.difference.high < 0.0
