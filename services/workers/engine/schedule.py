"""Which sequence occupies which row of the KV cache, and what the next step runs. Pure: no arrays, no clock.

Rows 0..d-1 are decoding. At most one sequence is being prefilled: it lies in row d (compact) or in any free row.
When a row becomes free and the rows must stay compact, the last decoding row moves into it, and then the row under
prefill moves down behind the decoding ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """Copy the first `length` tokens of row `source` over row `target`."""

    source: int
    target: int
    length: int


class Schedule:
    """Rows by sequence id. `lengths` are the tokens each sequence has in the cache."""

    def __init__(self, slots: int, *, compact: bool) -> None:
        self._compact = compact
        self.rows: list[str | None] = [None] * slots
        self.waiting: deque[str] = deque()
        self.prefilling: str | None = None
        self.lengths: dict[str, int] = {}

    @property
    def occupied(self) -> int:
        return sum(row is not None for row in self.rows)

    @property
    def free(self) -> int:
        """Sequences that could still be taken in."""
        return len(self.rows) - self.occupied - len(self.waiting)

    @property
    def decoding(self) -> list[str]:
        """Decoding sequences in the order of their rows."""
        return [s for s in self.rows if s is not None and s != self.prefilling]

    @property
    def span(self) -> int:
        """Rows that a decode step must run: up to the last decoding one."""
        last = -1
        for row, sequence in enumerate(self.rows):
            if sequence is not None and sequence != self.prefilling:
                last = row
        return last + 1

    def row_of(self, sequence: str) -> int:
        return self.rows.index(sequence)

    def add(self, sequence: str) -> None:
        self.waiting.append(sequence)

    def next_prefill(self) -> str | None:
        """The sequence to prefill now: the one under way, else the oldest waiting one that finds a row."""
        if self.prefilling is None and self.waiting and None in self.rows:
            sequence = self.waiting.popleft()
            self.rows[self.rows.index(None)] = sequence
            self.lengths[sequence] = 0
            self.prefilling = sequence
        return self.prefilling

    def prefilled(self, sequence: str) -> None:
        """Its prompt is in the cache: from now on it decodes."""
        if self.prefilling == sequence:
            self.prefilling = None

    def remove(self, sequence: str) -> list[Move]:
        """Take a sequence out, wherever it is; the moves that keep the rows compact, in order."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return []
        row = self.row_of(sequence)
        self.rows[row] = None
        self.lengths.pop(sequence)
        if self.prefilling == sequence:
            self.prefilling = None
        if not self._compact:
            return []
        moves = []
        last = max((r for r, s in enumerate(self.rows) if s is not None and s != self.prefilling), default=-1)
        if last > row:
            moves.append(self._move(last, row))
        if self.prefilling is not None:
            here, wanted = self.row_of(self.prefilling), len(self.decoding)
            if here != wanted:
                moves.append(self._move(here, wanted))
        return moves

    def _move(self, source: int, target: int) -> Move:
        sequence = self.rows[source]
        assert sequence is not None
        self.rows[source], self.rows[target] = None, sequence
        return Move(source, target, self.lengths[sequence])
