"""Which sequence occupies which row of the KV cache, and what the next step runs. Pure: no arrays, no clock.

A row is *free*, or it belongs to a sequence that is *reading* its prompt or *decoding*. A free row keeps the tokens of
whoever had it last, so that a prompt that begins like them need not be read again (the prefix cache):

1. Order: urgent before others, then the older; what is not urgent becomes so after `PATIENCE_S`. A sequence that reads
   or decodes is never taken off its row; one that reads pauses while a more pressing one reads.
2. Admission: a sequence gets a row when fewer than `slots` are taken and its tokens (prompt and longest answer) fit
   into the capacity; free rows give up their content for it, least recently used first. While the most pressing one
   does not fit, nobody overtakes it: it would wait for ever.
3. Reuse: the row, free or not, with the longest common beginning of at least `min_shared` tokens.
   a. A free row that the prompt continues to its end is taken over.
   b. Of any other the common tokens are copied.
   c. What the new sequence would overwrite is first moved to a free row of less worth, if there is one.
4. Compact rows (CPUs): decoding rows are 0..d-1. One that begins to decode changes places with row d; when one ends,
   the last decoding one changes places with it.
5. Otherwise (GPUs, where a sequence stays on its row) a step runs all rows up to the last decoding one, and those that
   lie between attend to what they keep: so whoever comes gets a row below the last taken one, or else the lowest, and
   a prefix that lies higher is copied down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PATIENCE_S = 5.0
MIN_SHARED = 16
"""Fewer common tokens than this are not worth a copy: reading them takes no longer."""


@dataclass(frozen=True)
class Copy:
    """Copy the first `length` tokens of row `source` over row `target`; the same row twice cuts it to `length`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Swap:
    """Exchange the first `length` tokens of row `source` and the first `back` tokens of row `target`."""

    source: int
    target: int
    length: int
    back: int


@dataclass(frozen=True)
class Release:
    """Memory of the row behind its first `keep` tokens is no longer needed."""

    row: int
    keep: int


Move = Copy | Swap | Release


@dataclass
class Row:
    """`tokens` are those whose keys and values lie in the row; `reserve` is how many its owner may come to hold."""

    tokens: list[int] = field(default_factory=list)
    owner: str | None = None
    reading: bool = False
    reserve: int = 0
    used: int = 0


@dataclass(frozen=True)
class _Entry:
    prompt: list[int]
    reserve: int
    urgent: bool
    since_s: float
    number: int


class Schedule:
    """Rows by sequence id. There may be more rows than `slots`: the others only keep prefixes.

    `capacity_tokens` bounds what all rows together hold memory for, each counted in whole `granule`s of tokens (pages
    of memory); without it every row may be full.
    """

    def __init__(
        self,
        slots: int,
        *,
        compact: bool,
        extra_rows: int = 0,
        capacity_tokens: int | None = None,
        granule: int = 1,
        min_shared: int = MIN_SHARED,
    ) -> None:
        self.slots = slots
        self.rows = [Row() for _ in range(slots + extra_rows)]
        self.waiting: dict[str, _Entry] = {}
        self.reused: dict[str, int] = {}
        """Tokens that each sequence on a row did not have to read."""
        self._compact = compact
        self._capacity = capacity_tokens
        self._granule = granule
        self._min_shared = min_shared
        self._row_of: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._number = 0

    # --- what is ---

    @property
    def free(self) -> int:
        """Sequences that could still be taken in."""
        return self.slots - len(self._row_of) - len(self.waiting)

    @property
    def decoding(self) -> list[str]:
        """Decoding sequences in the order of their rows."""
        return [row.owner for row in self.rows if row.owner is not None and not row.reading]

    @property
    def span(self) -> int:
        """Rows that a decode step must run: up to the last decoding one."""
        return max((i + 1 for i, row in enumerate(self.rows) if row.owner is not None and not row.reading), default=0)

    @property
    def held_tokens(self) -> int:
        """What all rows together hold memory for."""
        return sum(self._cost(row) for row in self.rows)

    @property
    def short_of_memory(self) -> bool:
        """Somebody waits although there is a row: what is running holds too much of the capacity."""
        return len(self._row_of) < self.slots and not all(map(self._fits, self.waiting.values()))

    def row_of(self, sequence: str) -> int:
        return self._row_of[sequence]

    def tokens(self, sequence: str) -> list[int]:
        """Those of a sequence that lie in its row; a step that computes more appends them."""
        return self.rows[self._row_of[sequence]].tokens

    # --- what changes ---

    def add(self, sequence: str, prompt: list[int], *, reserve: int, urgent: bool = True, now_s: float = 0.0) -> None:
        """Let a sequence wait for a row; prompt and answer may come to `reserve` tokens."""
        self._number += 1
        self.waiting[sequence] = _Entry(prompt, reserve, urgent, now_s, self._number)

    def next_prefill(self, now_s: float = 0.0) -> tuple[str | None, list[Move]]:
        """The sequence whose prompt to read on now, and the moves that must come first."""

        def pressing(item: tuple[str, _Entry]) -> tuple[bool, int]:
            entry = item[1]
            return (not entry.urgent and now_s - entry.since_s < PATIENCE_S, entry.number)

        reading = min(((s, e) for s, e in self._entries.items() if self.rows[self._row_of[s]].reading),
                      key=pressing, default=None)  # fmt: skip
        waiting = min(self.waiting.items(), key=pressing, default=None)
        if (
            waiting is not None
            and (reading is None or pressing(waiting) < pressing(reading))
            and self._fits(waiting[1])
        ):
            return waiting[0], self._admit(*waiting)
        return (reading[0] if reading else None), []

    def prefilled(self, sequence: str) -> list[Move]:
        """Its prompt is in the cache: from now on it decodes."""
        here, wanted = self._row_of[sequence], len(self.decoding)
        self.rows[here].reading = False
        return self._swap(here, wanted) if self._compact and here != wanted else []

    def remove(self, sequence: str) -> list[Move]:
        """Take a sequence out, wherever it is; its row keeps its tokens."""
        if self.waiting.pop(sequence, None) is not None:
            return []
        here = self._row_of.pop(sequence)
        row = self.rows[here]
        decoding = not row.reading
        del self._entries[sequence], self.reused[sequence]
        row.owner, row.reading, row.reserve = None, False, 0
        self._touch(row)
        last = self.span - 1
        return self._swap(here, last) if self._compact and decoding and last > here else []

    def forget(self) -> list[Move]:
        """Drop what free rows keep."""
        return [self._release(i) for i in self._free_rows()]

    # --- inside ---

    def _cost(self, row: Row) -> int:
        """Tokens that a row holds memory for."""
        return self._whole(len(row.tokens) if row.owner is None else row.reserve)

    def _whole(self, tokens: int) -> int:
        return -(-tokens // self._granule) * self._granule

    def _touch(self, row: Row) -> None:
        self._number += 1
        row.used = self._number

    def _free_rows(self) -> list[int]:
        """Free rows, that of least worth first."""
        return sorted((i for i, row in enumerate(self.rows) if row.owner is None), key=self._worth)

    @property
    def _top(self) -> int:
        """Rows up to the last one that is taken."""
        return max((i + 1 for i, row in enumerate(self.rows) if row.owner is not None), default=0)

    def _low(self, free: list[int], source: int | None) -> int:
        """A free row that makes steps no longer than they are, of least worth; else the lowest; rather not `source`."""
        top = self._top
        within = [i for i in free if i < top and i != source]
        others = [i for i in free if i != source]
        return within[0] if within else min(others, default=free[0])

    def _worth(self, index: int) -> tuple[bool, int]:
        row = self.rows[index]
        return (len(row.tokens) >= self._min_shared, row.used)

    def _fits(self, entry: _Entry) -> bool:
        if len(self._row_of) >= self.slots:
            return False
        if self._capacity is None or not self._row_of:
            return True
        taken = sum(self._cost(row) for row in self.rows if row.owner is not None)
        return taken + self._whole(entry.reserve) <= self._capacity

    def _admit(self, sequence: str, entry: _Entry) -> list[Move]:
        del self.waiting[sequence]
        target, moves = self._place(entry)
        row = self.rows[target]
        row.owner, row.reading, row.reserve = sequence, True, entry.reserve
        self._row_of[sequence], self._entries[sequence] = target, entry
        self.reused[sequence] = len(row.tokens)
        self._touch(row)
        return moves

    def _place(self, entry: _Entry) -> tuple[int, list[Move]]:
        """Choose a row, bring what can be reused into it, and save what would be lost."""
        source, shared = self._best_source(entry.prompt)
        free = self._free_rows()
        # Compact: the free row that decoding will want next.
        target = min(free) if self._compact else self._low(free, source)
        content = self.rows[source] if source is not None else Row()
        tight = self._capacity is not None
        taken_over = content.owner is None and source is not None and (
            source == target or tight or len(content.tokens) - shared < self._min_shared
        )  # fmt: skip
        if taken_over and not self._compact:
            assert source is not None
            if tight or source <= target or source < self._top:
                target = source
            else:  # what it keeps is copied down, and goes on there
                taken_over = False
        replaced = source if taken_over and source is not None else target
        reserve = self._whole(entry.reserve)
        moves: list[Move] = self._make_room(reserve, replaced) if tight else []
        before = len(self.rows[target].tokens)
        if source is None:
            moves += self._save(target, 0, None, reserve)
        elif taken_over:
            moves += [] if source == target else self._swap(source, target)
            moves += self._save(target, shared, None, reserve)
            moves.append(Copy(target, target, shared))
        else:
            moves += self._save(target, 0, source, reserve)
            moves.append(Copy(source, target, shared))
            self.rows[target].tokens = content.tokens[:shared]
            if content.owner is None and len(content.tokens) - shared < self._min_shared and not self._compact:
                content.tokens = []
            else:
                self._touch(content)
        if tight and max(before, len(self.rows[target].tokens)) > reserve:
            moves.append(Release(target, reserve))
        del self.rows[target].tokens[shared:]
        return target, moves

    def _best_source(self, prompt: list[int]) -> tuple[int | None, int]:
        """The row with the longest common beginning, a free one rather, and its length; one token is left."""
        most, _, best = max(
            (common(prompt, row.tokens, len(prompt) - 1), row.owner is None, i) for i, row in enumerate(self.rows)
        )
        return (best, most) if most >= self._min_shared else (None, 0)

    def _make_room(self, reserve: int, replaced: int) -> list[Move]:
        """Release free rows, but not the one that is about to be replaced, until `reserve` more tokens fit."""
        assert self._capacity is not None
        moves: list[Move] = []
        for index in self._free_rows():
            if self.held_tokens - self._cost(self.rows[replaced]) + reserve <= self._capacity:
                break
            if index != replaced:
                moves.append(self._release(index))
        return moves

    def _save(self, target: int, keep: int, source: int | None, reserve: int) -> list[Move]:
        """Copy the content of a free row that is about to lose more than `keep` tokens of it to a row of less worth, if
        both that and the `reserve` of whoever comes fit."""
        row = self.rows[target]
        if len(row.tokens) - keep < self._min_shared:
            return []
        victim = next((i for i in self._free_rows() if i not in (target, source)), None)
        if victim is None or self._worth(victim) >= self._worth(target):
            return []
        before = self._cost(self.rows[victim])
        if self._capacity is not None and self.held_tokens - before + reserve > self._capacity:
            return []
        self.rows[victim] = Row(tokens=list(row.tokens), used=row.used)
        less = self._capacity is not None and self._cost(self.rows[victim]) < before
        return [Copy(target, victim, len(row.tokens)), *([Release(victim, len(row.tokens))] if less else [])]

    def _release(self, index: int) -> Move:
        self.rows[index].tokens = []
        return Release(index, 0)

    def _swap(self, source: int, target: int) -> list[Move]:
        """Exchange two rows; where memory is counted, what each then holds beyond its need is released."""
        rows = self.rows
        before = (self._cost(rows[source]), self._cost(rows[target]))
        moves: list[Move] = [Swap(source, target, len(rows[source].tokens), len(rows[target].tokens))]
        rows[source], rows[target] = rows[target], rows[source]
        for index, cost in zip((source, target), before, strict=True):
            owner = rows[index].owner
            if owner is not None:
                self._row_of[owner] = index
            if self._capacity is not None and self._cost(rows[index]) < cost:
                moves.append(Release(index, self._cost(rows[index])))
        return moves


def common(one: list[int], other: list[int], limit: int) -> int:
    """Length of the common beginning, at most `limit`; halves, because comparing slices is quick."""
    low, high = 0, min(limit, len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
