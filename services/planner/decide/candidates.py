"""All cards as a decision saw them. A candidate with its terms is made when it is asked for: most are never looked at
before the query has gone on its way. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from services.planner.decide.scoring import Array, Scores
from services.planner.decide.standing import Standing
from services.planner.decide.terms import Terms
from shared import messages as m

COLUMNS = (
    "utility", "worker", "latency_s", "energy_j", "queue_s", "load_s", "prefill_s", "decode_s", "active_j", "load_j",
    "u_quality", "u_latency", "u_energy", "u_crowding", "u_burden",
)  # fmt: skip
UTILITY, WORKER, LATENCY, ENERGY, LOAD, PREFILL = 0, 1, 2, 3, 5, 6


class Candidates:
    """k cards, from the arrays of a decision."""

    def __init__(
        self,
        standing: Standing,
        outside: Sequence[str | None],
        quality: Array,
        terms: Terms,
        scores: Scores | None,
        tokens_in: Array,
        tokens_out: Array,
        limits: m.Constraints,
        left_s: float,
    ) -> None:
        """`outside`: why a card was out before scoring, None where it was not. `terms`: those of quality.
        `scores`: None without any worker. `left_s`: until the deadline."""
        self._standing = standing
        self._outside = outside
        self._quality: list[float] = quality.tolist()
        self._terms = terms
        self._tokens_in: list[float] = tokens_in.tolist()
        self._tokens_out: list[float] = tokens_out.tolist()
        self._made: dict[int, m.Candidate] = {}
        self._noted: dict[int, dict[str, float]] = {}
        self._rows: list[tuple[float, ...]] | None = None
        self.excluded: list[str | None] = [reason or "no_worker" for reason in outside]
        """[k] why a card does not stand; None for those that do."""
        self.order: list[int] = []
        """Of those that stand, the best first."""
        if scores is not None:
            columns = [getattr(scores, name) for name in COLUMNS]
            self._rows = list(zip(*(column.tolist() for column in columns), strict=True))
            self.excluded = self._judged(limits, left_s)
            ranked = np.lexsort((columns[LATENCY], -columns[UTILITY])).tolist()  # of equals the first by name
            self.order = [k for k in ranked if self.excluded[k] is None]

    def utilities(self, order: Sequence[int]) -> Array:
        """Of these cards."""
        assert self._rows is not None
        return np.array([self._rows[k][UTILITY] for k in order])

    def name(self, k: int) -> str:
        return self._standing.cards[k].name

    def note(self, k: int, **terms: float) -> None:
        """Add terms to a card's own."""
        self._noted[k] = terms
        self._made.pop(k, None)

    def of(self, k: int) -> m.Candidate:
        """One card with every term."""
        made = self._made.get(k)
        if made is None:
            made = self._made[k] = self._make(k)
        return made

    def all(self) -> list[m.Candidate]:
        return [self.of(k) for k in range(len(self.excluded))]

    def _judged(self, limits: m.Constraints, left_s: float) -> list[str | None]:
        assert self._rows is not None
        limited = limits.min_quality is not None or limits.max_latency_s is not None or limits.max_energy_j is not None
        found: list[str | None] = []
        for k, row in enumerate(self._rows):
            reason, first_s = self._outside[k], row[LOAD] + row[PREFILL]
            if reason is None and row[UTILITY] == -math.inf:
                reason = "no_worker"
            elif reason is None and (limited or first_s > left_s):  # 5
                reason = _over_limit(limits, self._quality[k], row[LATENCY], row[ENERGY], first_s, left_s)
            found.append(reason)
        return found

    def _make(self, k: int) -> m.Candidate:
        card, excluded = self._standing.cards[k], self.excluded[k]
        name, artifact = card.name, card.artifact.name
        if self._outside[k]:
            return m.Candidate(card=name, artifact=artifact, excluded=excluded)
        if self._rows is None or self._rows[k][UTILITY] == -math.inf:
            return m.Candidate(card=name, artifact=artifact, excluded=excluded, quality=self._quality[k])
        (u, worker, latency, energy, queue, load, prefill, decode, active_j, load_j,
         u_quality, u_latency, u_energy, u_crowding, u_burden) = self._rows[k]  # fmt: skip
        return m.Candidate(
            card=name, artifact=artifact, worker=self._standing.workers[int(worker)], excluded=excluded,
            quality=self._quality[k], latency_s=latency, energy_j=energy, utility=u,
            terms={
                **self._terms.of(k), "tokens_in": self._tokens_in[k], "tokens_out": self._tokens_out[k],
                "queue_s": queue,
                "load_s": load, "prefill_s": prefill, "decode_s": decode, "active_j": active_j, "load_j": load_j,
                "u_quality": u_quality, "u_latency": u_latency, "u_energy": u_energy,
                "u_crowding": u_crowding, "u_burden": u_burden, **self._noted.get(k, {}),
            },
        )  # fmt: skip


def _over_limit(
    limits: m.Constraints, q: float, latency_s: float, energy_j: float, first_s: float, left_s: float
) -> str | None:
    if limits.min_quality is not None and q < limits.min_quality:
        return "below_min_quality"
    if limits.max_latency_s is not None and latency_s > limits.max_latency_s:
        return "over_max_latency"
    if limits.max_energy_j is not None and energy_j > limits.max_energy_j:
        return "over_max_energy"
    if first_s > left_s:
        return "misses_deadline"
    return None
