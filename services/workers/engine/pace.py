"""How much of a prompt to read in one step, from how long reading and decoding have taken. Pure.

A stream's gap between two tokens is one step. A step that reads may take `STALL` times as long as one that only
decodes, so that a long prompt makes the streams beside it slower by a bounded factor and never stops them.

Reading and decoding either *join* in one pass over the weights, or follow each other; decoding beside reading is then
itself slower (what it reads has left the caches), and that counts.
"""

from __future__ import annotations

import statistics
from collections import deque

STALL = 2.6
"""A step that reads over one that only decodes, whether it reads first or does both in one pass. Measured: 7 streams
and 1,500 tokens apart, docs/decisions/0018; 1 to 7 streams and 100 tokens in one pass, docs/decisions/0030."""
JOINED = 2.1
"""The same of a step that does both in one pass, beside a long prompt, where steps grow with what has been read:
docs/decisions/0022."""
BESIDE = 1.25
"""Decoding beside reading is taken to be slower by no more than this: what is known of decoding alone grows old."""
ALONE_S = 0.25
"""Nothing decodes: a step is bounded all the same, for whoever wants to cancel or to come first."""
SHARED_S = 0.05
"""Other engines wait for this device: none holds it longer than this."""
LEAST = 8
"""Fewer tokens at once cost hardly less time."""
LEAST_JOINED = 5
_PASS = 4
"""What a joined piece costs beside its tokens, in tokens: its attention reads the row once (measured: 3 at the
beginning of a row, 6 behind 1,400 tokens)."""
ROW = 0.15
"""What a further row adds to a step of one, as a share of it: while prompts keep coming, a step that only decodes as
many may never have been seen. Measured for int8 0.17 to 0.3, for fp32 0.07 (`profiles/cpu.toml`)."""
_WEIGHT = 0.5
_RECENT = 16


class Pace:
    """Averages of what this engine was measured to take; all times in seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._per_token_s = 0.0
        self._joined_s = 0.0
        """What a token adds to a pass that decodes."""
        self._decode_s: dict[int, float] = {}
        self._alone_s: dict[int, deque[float]] = {}
        """Of steps that read nothing, the latest of each number of rows."""
        self._reading = False

    def budget_s(self, rows: int, *, contended: bool) -> float:
        """Reading time of one step before `rows` sequences decode."""
        limit = SHARED_S if contended else ALONE_S
        if rows == 0:
            return limit
        decoding_s = self._decoding_s(rows)
        alone_s = max(self._decoding_alone_s(rows), decoding_s / BESIDE)
        return min(limit, STALL * alone_s - decoding_s)

    def chunk(self, budget_s: float) -> int:
        """Prompt tokens that can be read in `budget_s`, `LEAST` at least."""
        if not self._per_token_s:
            return min(self._most, 4 * LEAST)
        return max(1, min(self._most, max(LEAST, int(budget_s / self._per_token_s))))

    def joined(self, rows: int, *, contended: bool, first: bool, stall: float = JOINED) -> int:
        """Prompt tokens to read in one pass with `rows` sequences that decode, which may take `stall` times as long as
        decoding alone. Of a prompt's `first` piece nothing is known yet, where it begins behind a long kept beginning
        least of all: half as many."""
        alone_s = self._decoding_alone_s(rows) or self._decoding_s(rows)
        added_s = min((stall - 1) * alone_s, SHARED_S if contended else ALONE_S)
        per_token_s = self._joined_s or self._per_token_s
        tokens = int(added_s / per_token_s) - _PASS if per_token_s else LEAST
        return min(self._most, max(LEAST_JOINED, tokens // 2 if first else tokens))

    def enough(self, left_s: float) -> bool:
        """Time is left for another piece of some size: the least piece costs a whole pass over the weights."""
        return left_s > 2 * LEAST * self._per_token_s

    def has_read(self, tokens: int, seconds: float) -> None:
        self._per_token_s = _mean(self._per_token_s, seconds / tokens)
        self._reading = True

    def has_decoded(self, rows: int, seconds: float) -> None:
        self._decode_s[rows] = _mean(self._decode_s.get(rows, 0.0), seconds)
        if not self._reading:
            if rows not in self._alone_s:
                self._alone_s[rows] = deque(maxlen=_RECENT)
            self._alone_s[rows].append(seconds)
        self._reading = False

    def has_joined(self, tokens: int, rows: int, seconds: float) -> None:
        alone_s = self._decoding_alone_s(rows) or self._decoding_s(rows)
        added_s = max(seconds - alone_s, 0.1 * seconds)
        self._joined_s = _mean(self._joined_s, added_s / (tokens + _PASS))
        self._reading = False

    def _decoding_s(self, rows: int) -> float:
        """Of as many rows, or of the nearest number known; nothing known is the least that reads anything."""
        if not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda known: abs(known - rows))]

    def _decoding_alone_s(self, rows: int) -> float:
        """The same of steps that read nothing, rather of fewer rows than of more: the median, which one that was held
        up does not move, and for each further row what one costs at least."""
        if not self._alone_s:
            return 0.0
        fewer = [known for known in self._alone_s if known <= rows]
        known = max(fewer) if fewer else min(self._alone_s)
        more = (1 + ROW * (rows - 1)) / (1 + ROW * (known - 1)) if rows > known else 1.0
        return statistics.median(self._alone_s[known]) * more


def _mean(old: float, new: float) -> float:
    """The moving average; one step that something else held up moves it by half at most."""
    return new if not old else (1 - _WEIGHT) * old + _WEIGHT * min(new, 2 * old)
