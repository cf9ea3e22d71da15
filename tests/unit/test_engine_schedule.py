"""Rows of the KV cache: who gets one, what is reused, what is kept, how much is read at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.workers.engine.pace import ALONE_S, BESIDE, LEAST, SHARED_S, STALL, Pace
from services.workers.engine.schedule import PATIENCE_S, Copy, Move, Release, Schedule, Swap, common

SLOTS, ROWS, LENGTH = 3, 4, 12


class Cache:
    """What a runner's cache holds: each row a list of tokens, moved as the schedule says."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]

    def apply(self, moves: list[Move]) -> None:
        for move in moves:
            match move:
                case Copy(source, target, length):
                    assert len(self.rows[source]) >= length
                    self.rows[target] = self.rows[source][:length]
                case Swap(source, target, length, back):
                    one, other = self.rows[source][:length], self.rows[target][:back]
                    assert (len(one), len(other)) == (length, back)
                    self.rows[source], self.rows[target] = other, one
                case Release(row, keep):
                    self.rows[row] = self.rows[row][:keep]


def check(schedule: Schedule, cache: Cache, present: set[str], *, compact: bool, capacity: int | None) -> None:
    owned = [row.owner for row in schedule.rows if row.owner is not None]
    assert len(owned) == len(set(owned)) <= SLOTS
    assert set(owned) | set(schedule.waiting) == present
    for index, row in enumerate(schedule.rows):
        assert cache.rows[index][: len(row.tokens)] == row.tokens
        if row.owner is not None:
            assert schedule.row_of(row.owner) == index
    if compact:
        assert [row.owner for row in schedule.rows[: len(schedule.decoding)]] == schedule.decoding
        assert schedule.span == len(schedule.decoding)
    if capacity is not None:
        assert schedule.held_tokens <= capacity


actions = st.lists(
    st.tuples(
        st.sampled_from(["add", "lo", "read", "read", "decode", "remove", "forget"]),
        st.integers(0, 9),
        st.lists(st.integers(0, 1), min_size=1, max_size=8),
    ),
    max_size=80,
)


@given(actions, st.booleans(), st.sampled_from([None, LENGTH, 2 * LENGTH, 3 * LENGTH]), st.sampled_from([1, 3]))
def test_rows_hold_what_the_schedule_says_under_any_order_of_events(
    events: list[tuple[str, int, list[int]]], compact: bool, capacity: int | None, min_shared: int
) -> None:
    """Moves keep every row's tokens true, owners on one row each, compact rows without holes, memory in bounds."""
    schedule = Schedule(
        SLOTS, compact=compact, extra_rows=ROWS - SLOTS, capacity_tokens=capacity, min_shared=min_shared
    )
    cache = Cache(ROWS)
    prompts: dict[str, list[int]] = {}
    for number, (kind, pick, prompt) in enumerate(events):
        if kind in ("add", "lo") and schedule.free > 0:
            prompts[f"s{number}"] = prompt
            schedule.add(f"s{number}", prompt, reserve=LENGTH, urgent=kind == "add")
        elif kind == "read":
            sequence, moves = schedule.next_prefill()
            cache.apply(moves)
            if sequence is not None:
                held, whole = schedule.tokens(sequence), prompts[sequence]
                assert held == whole[: len(held)]
                assert len(held) < len(whole)
                piece = whole[len(held) : len(held) + 1 + pick]
                row = schedule.row_of(sequence)
                cache.rows[row] = [*held, *piece]
                held += piece
                if held == whole:
                    cache.apply(schedule.prefilled(sequence))
        elif kind == "decode":
            for sequence in schedule.decoding:
                if len(schedule.tokens(sequence)) < LENGTH:
                    schedule.tokens(sequence).append(pick % 2)
                    cache.rows[schedule.row_of(sequence)] = list(schedule.tokens(sequence))
        elif kind == "remove" and prompts:
            sequence = sorted(prompts)[pick % len(prompts)]
            del prompts[sequence]
            cache.apply(schedule.remove(sequence))
        elif kind == "forget":
            cache.apply(schedule.forget())
            assert all(row.owner is not None or not row.tokens for row in schedule.rows)
        check(schedule, cache, set(prompts), compact=compact, capacity=capacity)


def run(schedule: Schedule, sequence: str, prompt: list[int], answer: list[int]) -> list[Move]:
    """One sequence from beginning to end; the moves that its admission took."""
    schedule.add(sequence, prompt, reserve=len(prompt) + len(answer))
    admitted, moves = schedule.next_prefill()
    assert admitted == sequence
    held = schedule.tokens(sequence)
    held += prompt[len(held) :]
    schedule.prefilled(sequence)
    held += answer
    schedule.remove(sequence)
    return moves


def test_a_conversation_goes_on_where_its_row_left_off() -> None:
    """The next turn reads only what is new, whatever ran on other rows in between."""
    for compact in (True, False):
        schedule = Schedule(2, compact=compact, extra_rows=1)
        first = list(range(100))
        run(schedule, "turn1", first, [7] * 20)
        run(schedule, "other", list(range(500, 560)), [])
        schedule.add("turn2", [*first, *[7] * 20, 1, 2, 3], reserve=200)
        schedule.next_prefill()
        assert schedule.reused["turn2"] == 120


def test_a_shared_beginning_is_copied_from_a_running_sequence_and_stays_where_it_was() -> None:
    """A system prompt is read once; its first user is not disturbed, later ones find it again."""
    schedule = Schedule(3, compact=True)
    system = list(range(50))
    schedule.add("a", [*system, 1, 2], reserve=80)
    schedule.next_prefill()
    schedule.tokens("a").extend([*system, 1, 2])
    schedule.prefilled("a")
    schedule.add("b", [*system, 3], reserve=80)
    _, moves = schedule.next_prefill()
    assert Copy(0, 1, 50) in moves
    assert schedule.reused["b"] == 50
    assert schedule.tokens("a") == [*system, 1, 2]


def test_urgent_prompts_are_read_first_and_the_others_are_not_forgotten() -> None:
    """An urgent one overtakes one that is being read; after `PATIENCE_S` age alone decides."""
    schedule = Schedule(3, compact=True)
    schedule.add("lo", [1] * 40, reserve=50, urgent=False, now_s=0.0)
    assert schedule.next_prefill(0.0)[0] == "lo"
    schedule.add("hi", [2] * 40, reserve=50, now_s=0.1)
    assert schedule.next_prefill(0.1)[0] == "hi"
    assert schedule.next_prefill(0.2)[0] == "hi"
    assert schedule.next_prefill(PATIENCE_S)[0] == "lo"


def test_a_sequence_waits_until_its_tokens_fit() -> None:
    """Rows may be free and memory not; what ends makes room, and kept prefixes stay where both fit."""
    schedule = Schedule(3, compact=True, capacity_tokens=100)
    schedule.add("a", [1] * 20, reserve=60)
    assert schedule.next_prefill()[0] == "a"
    schedule.tokens("a").extend([1] * 20)
    schedule.prefilled("a")
    schedule.add("b", [2] * 20, reserve=60)
    assert schedule.next_prefill()[0] is None
    short = [schedule.short_of_memory]
    schedule.remove("a")
    sequence, moves = schedule.next_prefill()
    assert (sequence, schedule.held_tokens) == ("b", 60 + 20)
    assert [*short, schedule.short_of_memory] == [True, False]
    assert Copy(0, 1, 20) in moves
    schedule.remove("b")
    schedule.add("c", [3] * 20, reserve=90)
    sequence, moves = schedule.next_prefill()
    assert (sequence, schedule.held_tokens) == ("c", 90)
    assert not any(isinstance(move, Copy) for move in moves)


def test_memory_is_counted_in_whole_pages() -> None:
    """17 tokens are two pages of 16, for whoever runs and for what is kept."""
    schedule = Schedule(3, compact=True, capacity_tokens=96, granule=16)
    for name in "ab":
        schedule.add(name, [ord(name)] * 16, reserve=33)
    assert schedule.next_prefill()[0] == "a"
    schedule.tokens("a").extend([ord("a")] * 16)
    schedule.prefilled("a")
    assert schedule.held_tokens == 48
    assert schedule.next_prefill()[0] == "b"
    assert schedule.held_tokens == 96
    schedule.tokens("a").append(1)
    schedule.remove("a")
    assert schedule.held_tokens == 32 + 48


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20), st.integers(0, 20))
def test_common_is_the_longest_common_beginning(one: list[int], other: list[int], limit: int) -> None:
    """As counted one by one."""
    limit = min(limit, len(one))
    count = 0
    while count < min(limit, len(other)) and one[count] == other[count]:
        count += 1
    assert common(one, other, limit) == count


def test_reading_beside_running_streams_is_bounded_by_what_decoding_takes() -> None:
    """The piece follows the measured rates; alone it is bounded by time; when others wait for the device, by less."""
    pace = Pace(512)
    assert pace.chunk(ALONE_S) <= 64  # nothing is known yet
    for _ in range(30):
        pace.has_read(100, 0.1)  # 1 ms a token
        pace.has_decoded(8, 0.02)
    budget_s = pace.budget_s(8, contended=False)
    assert abs(budget_s + 0.02 - STALL * 0.02 / BESIDE) < 1e-6  # decoding alone has not been seen
    for _ in range(30):
        pace.has_decoded(8, 0.018)
    for _ in range(3):
        pace.has_read(20, 0.02)
        pace.has_decoded(8, 0.02)
    budget_s = pace.budget_s(8, contended=False)
    assert 0.018 * STALL - 0.02 <= budget_s < 0.018 * (STALL - 1)  # the two together: so many times decoding alone
    assert abs(pace.chunk(budget_s) - budget_s * 1000) <= 1
    assert pace.chunk(pace.budget_s(0, contended=False)) == 250
    assert pace.chunk(pace.budget_s(0, contended=True)) == round(SHARED_S * 1000)
    assert pace.chunk(0.0) == LEAST


def lone(schedule: Schedule, cache: Cache, name: str, prompt: list[int]) -> int:
    """A sequence that comes alone, is read, decodes and ends: what it reused. Its step never runs a second row."""
    schedule.add(name, prompt, reserve=len(prompt) + 4)
    _, moves = schedule.next_prefill()
    cache.apply(moves)
    reused = schedule.reused[name]
    row = schedule.row_of(name)
    schedule.tokens(name).extend(prompt[reused:])
    cache.rows[row] = list(prompt)
    cache.apply(schedule.prefilled(name))
    assert schedule.span == 1
    cache.apply(schedule.remove(name))
    return reused


def test_on_a_gpu_a_sequence_alone_runs_one_row_whatever_other_rows_keep() -> None:
    """Conversations take turns over rows that stay where they are: each is found again, wherever it was kept."""
    schedule, cache = Schedule(8, compact=False), Cache(8)
    talks = {name: list(range(100 * name, 100 * name + 40)) for name in range(1, 6)}
    for turn in range(4):
        for name, talk in talks.items():
            talk += [1000 * name + 10 * turn + more for more in range(10)]
            assert lone(schedule, cache, f"{name}-{turn}", talk) == (len(talk) - 10 if turn else 0)


def test_on_a_gpu_who_comes_fills_the_gaps_below_the_last_row_that_is_taken() -> None:
    """Of three running sequences the middle one ends: the next one takes its row, not a fourth."""
    schedule = Schedule(8, compact=False)
    for name in ("a", "b", "c"):
        schedule.add(name, [ord(name)] * 20, reserve=30)
        schedule.next_prefill()
        schedule.tokens(name).extend([ord(name)] * 20)
        schedule.prefilled(name)
    schedule.remove("b")
    schedule.add("d", [1] * 20, reserve=30)
    schedule.next_prefill()
    schedule.prefilled("d")
    assert (schedule.row_of("d"), schedule.span) == (1, 3)
