"""How much of a prompt to read in one step, from how long reading and decoding have taken. Pure.

A stream's gap between two tokens is one step: reading, then decoding. A step that reads may take `STALL` times as long
as one that only decodes, so that a long prompt makes the streams beside it slower by a bounded factor and never stops
them. Decoding beside reading is itself slower (what it reads has left the caches), and that counts.
"""

from __future__ import annotations

STALL = 2.6
"""A step that reads over one that only decodes. Measured (7 streams, 1,500 tokens, 2 cores): docs/decisions/0018."""
BESIDE = 1.25
"""Decoding beside reading is taken to be slower by no more than this: what is known of decoding alone grows old."""
ALONE_S = 0.25
"""Nothing decodes: a step is bounded all the same, for whoever wants to cancel or to come first."""
SHARED_S = 0.05
"""Other engines wait for this device: none holds it longer than this."""
LEAST = 8
"""Fewer tokens at once cost hardly less time."""
_WEIGHT = 0.5


class Pace:
    """Moving averages of what this engine was measured to take; all times in seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._per_token_s = 0.0
        self._decode_s: dict[int, float] = {}
        self._alone_s: dict[int, float] = {}
        """Of steps that read nothing."""
        self._reading = False

    def budget_s(self, rows: int, *, contended: bool) -> float:
        """Reading time of one step beside `rows` decoding sequences."""
        limit = SHARED_S if contended else ALONE_S
        if rows == 0:
            return limit
        decoding_s = self._decoding_s(rows)
        alone_s = max(self._alone_s.get(rows, 0.0), decoding_s / BESIDE)
        return min(limit, STALL * alone_s - decoding_s)

    def chunk(self, budget_s: float) -> int:
        """Prompt tokens that can be read in `budget_s`, `LEAST` at least."""
        if not self._per_token_s:
            return min(self._most, 4 * LEAST)
        return max(1, min(self._most, max(LEAST, int(budget_s / self._per_token_s))))

    def enough(self, left_s: float) -> bool:
        """Time is left for another piece of some size: the least piece costs a whole pass over the weights."""
        return left_s > 2 * LEAST * self._per_token_s

    def has_read(self, tokens: int, seconds: float) -> None:
        self._per_token_s = _mean(self._per_token_s, seconds / tokens)
        self._reading = True

    def has_decoded(self, rows: int, seconds: float) -> None:
        self._decode_s[rows] = _mean(self._decode_s.get(rows, 0.0), seconds)
        if not self._reading:
            self._alone_s[rows] = _mean(self._alone_s.get(rows, 0.0), seconds)
        self._reading = False

    def _decoding_s(self, rows: int) -> float:
        """Of as many rows, or of the nearest number known; nothing known is the least that reads anything."""
        if not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda known: abs(known - rows))
        return self._decode_s[nearest]


def _mean(old: float, new: float) -> float:
    """The moving average; one step that something else held up moves it by half at most."""
    return new if not old else (1 - _WEIGHT) * old + _WEIGHT * min(new, 2 * old)
