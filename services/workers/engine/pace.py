"""How much of a prompt to read in one step, from how long reading and decoding have taken. Pure.

A stream's gap between two tokens is one step: reading, then decoding. Reading may take `STALL` times as long as
decoding, so that a long prompt makes the streams beside it slower by a bounded factor and never stops them.
"""

from __future__ import annotations

STALL = 1.75
"""Reading time of a step over its decoding time. Measured (7 streams, 1,500 tokens): gaps grow to 2.8 to 3.0 times on
average, the longest to 3.4 to 4.1; with 1.25 the longest were 3.1 to 4.1, and the first token came 1.3 times later."""
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

    def budget_s(self, rows: int, *, contended: bool) -> float:
        """Reading time of one step beside `rows` decoding sequences."""
        limit = SHARED_S if contended else ALONE_S
        if rows == 0:
            return limit
        return min(limit, STALL * self._decoding_s(rows))

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

    def has_decoded(self, rows: int, seconds: float) -> None:
        self._decode_s[rows] = _mean(self._decode_s.get(rows, 0.0), seconds)

    def _decoding_s(self, rows: int) -> float:
        """Of as many rows, or of the nearest number known; nothing known is the least that reads anything."""
        if not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda known: abs(known - rows))
        return self._decode_s[nearest]


def _mean(old: float, new: float) -> float:
    return new if not old else (1 - _WEIGHT) * old + _WEIGHT * new
