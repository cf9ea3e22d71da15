"""The knowledge base: migrations, writing twice, counts, retention, reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from msgspec.structs import replace
from sqlalchemy import Connection, create_engine, func, select, text

from shared import messages as m
from shared.errors import SettingsInvalid
from shared.knowledge import migrate, reads, rows
from shared.knowledge import tables as t
from shared.knowledge.store import Batch, Store
from tests.unit.monitor_records import accepted, done, failed, operation, route

AT = 1_700_000_000.0
DAY = 86400.0


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(f"sqlite+aiosqlite:///{tmp_path}/deep/knowledge.db")
    await opened.open()
    yield opened
    await opened.close()


def _difference(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    return list(compare_metadata(context, t.metadata))


def test_migrations_make_exactly_the_tables(tmp_path: Path) -> None:
    """A database brought up by the migrations has the schema that the code declares, and nothing else."""
    engine = create_engine(f"sqlite:///{tmp_path}/k.db")
    with engine.begin() as connection:
        migrate.upgrade(connection)
    with engine.connect() as connection:
        assert _difference(connection) == []
    engine.dispose()


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    """A second start finds the schema as it is."""
    engine = create_engine(f"sqlite:///{tmp_path}/k.db")
    for _ in range(2):
        with engine.begin() as connection:
            migrate.upgrade(connection)
    with engine.connect() as connection:
        assert connection.scalar(text("select count(*) from alembic_version")) == 1
    engine.dispose()


def test_another_database_is_refused_with_a_remedy() -> None:
    """The knowledge base is SQLite; another URL is refused before anything is opened."""
    with pytest.raises(SettingsInvalid) as caught:
        Store("postgresql+asyncpg://host/db")
    assert "sqlite+aiosqlite" in caught.value.remedy


async def test_the_database_runs_with_a_write_ahead_log(store: Store) -> None:
    """Readers do not wait for the writer."""
    async with store.read() as connection:
        assert await connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert await connection.scalar(text("PRAGMA synchronous")) == 1


def _everything() -> Batch:
    return Batch(
        queries=[rows.query(accepted("q1"), AT), rows.query(accepted("q2"), AT), rows.query(accepted("q3"), AT)],
        decisions=[rows.decision(route("q1"), AT)],
        completions=[rows.completion(done("q1"), AT), rows.completion(failed("q2"), AT)],
        operations=[
            rows.operation(operation("o1"), AT, "cpu-2t"),
            rows.operation(operation("o2", "evict", reason="idle"), AT, "cpu-2t"),
            rows.operation(operation("o3", "lost", ok=False, reason="crash"), AT, "cpu-2t"),
            rows.operation(operation("o4", ok=False), AT, "cpu-2t"),
        ],
        feedback=[{"query_id": "q1", "score": 0.25, "label": None, "card": "alpha", "at": AT}],
    )


EXPECTED = m.Counts(
    accepted=3,
    answered=1,
    failed=1,
    in_flight=1,
    feedback=1,
    by_card={"alpha": 1},
    failures={"engine_failed": 1},
    loads=1,
    evictions=1,
    lost=1,
    by_operation_reason={"demand": 1, "idle": 1, "crash": 1},
)


async def test_counts_add_up(store: Store) -> None:
    """Counts follow what was written, by card, error code and reason."""
    await store.commit(_everything())
    assert await reads.counts(store) == EXPECTED


async def test_written_twice_counts_once(store: Store) -> None:
    """A redelivered batch changes neither rows nor counts nor sums, and brings nothing new."""
    first = await store.commit(_everything())
    assert first.completions == {"q1", "q2"}
    again = await store.commit(_everything())
    assert not again.queries
    assert not again.completions
    assert not again.operations
    assert await reads.counts(store) == EXPECTED
    async with store.read() as connection:
        daily = (await connection.execute(select(t.daily))).mappings().all()
    assert [dict(r) for r in daily] == [
        {
            "day": "2023-11-14", "card": "alpha", "answered": 1, "failed": 1,
            "tokens_in": 10, "tokens_out": 11, "total_s": 3.5, "energy_j": 6.0,
        }
    ]  # fmt: skip


async def test_the_same_row_twice_in_one_batch_counts_once(store: Store) -> None:
    """A message delivered twice within one batch is one row."""
    row = rows.completion(done("q"), AT)
    await store.commit(Batch(completions=[row, row]))
    assert (await reads.counts(store)).answered == 1


async def test_an_end_recorded_before_its_acceptance_is_completed_later(store: Store) -> None:
    """The two streams arrive in any order; the query is counted once and its text is filled in."""
    await store.commit(Batch(completions=[rows.completion(done("q"), AT)]))
    record = await reads.query(store, "q")
    assert record is not None
    assert record.query is None
    assert record.received_at == pytest.approx(AT - 3.5)
    await store.commit(Batch(queries=[rows.query(accepted("q", AT - 4), AT)]))
    record = await reads.query(store, "q")
    assert record is not None
    assert record.query == accepted("q").query
    assert record.received_at == AT - 4
    counts = await reads.counts(store)
    assert (counts.accepted, counts.answered, counts.in_flight) == (1, 1, 0)


async def test_a_record_holds_everything_about_a_query(store: Store) -> None:
    """Query, route with all candidates, end and feedback come back as they were."""
    await store.commit(_everything())
    record = await reads.query(store, "q1")
    assert record is not None
    assert record == m.QueryRecord(
        query_id="q1",
        state="answered",
        query=accepted("q1").query,
        route=route("q1"),
        done=done("q1"),
        feedback=[m.Feedback(query_id="q1", score=0.25)],
        received_at=1000.0,
    )
    assert await reads.query(store, "unknown") is None


async def test_what_was_read_is_on_record_and_can_be_searched(store: Store) -> None:
    """NULL where nothing was expected; joules of attempts that were not taken are in no answer's account."""
    read, unread = m.Reading(value="B" * 300, why="alone"), m.Reading(value=None, why="nothing")
    ends = []
    for name, reading in (("q1", read), ("q2", unread), ("q3", None)):
        ended = done(name)
        assert ended.answer is not None
        energy = m.Energy(joules=8.0, source="model", retried_j=2.0)
        ends.append(replace(ended, answer=replace(ended.answer, reading=reading, energy=energy)))
    report = m.EnergyReport(worker="w1", at=AT + 9, accounts=[m.EnergyAccount(artifact="small-int8", active_j=30.0)])
    await store.commit(Batch(completions=[rows.completion(end, AT) for end in ends], energy=rows.energy(report)))
    table = t.completions.c
    async with store.read() as connection:
        found = await connection.execute(select(table.readable, table.read).order_by(table.query_id))
        assert [tuple(row) for row in found] == [(True, "B" * 200), (False, None), (None, None)]
    assert (await reads.energy(store)).workers[0].accounts[0].answers_j == pytest.approx(3 * 6.0)


async def test_recent_is_newest_first_and_limited(store: Store) -> None:
    """The latest queries come first, whatever their state."""
    await store.commit(Batch(queries=[rows.query(accepted(f"q{n}", AT + n), AT) for n in range(5)]))
    found = (await reads.recent(store, 3)).records
    assert [r.query_id for r in found] == ["q4", "q3", "q2"]
    assert {r.state for r in found} == {"accepted"}


async def test_feedback_is_the_latest_of_each_query(store: Store) -> None:
    """A second judgement replaces the first and is not counted again."""
    for score in (0.0, 1.0):
        await store.commit(Batch(feedback=[{"query_id": "q", "score": score, "label": "l", "card": "alpha", "at": AT}]))
    assert (await reads.counts(store)).feedback == 1
    assert await reads.last_feedback(store, 10) == [("alpha", "q", 1.0)]


async def test_retention_deletes_rows_and_keeps_sums(store: Store) -> None:
    """Raw rows older than the limit go; counts and daily sums stay; newer rows stay."""
    await store.commit(_everything())
    await store.commit(
        Batch(queries=[rows.query(accepted("new", AT + 9), AT)], completions=[rows.completion(done("new"), AT + 9)])
    )
    assert await store.forget(AT + 5) > 0
    counts = await reads.counts(store)
    assert (counts.accepted, counts.answered) == (4, 2)
    assert [r.query_id for r in (await reads.recent(store, 10)).records] == ["new"]
    async with store.read() as connection:
        assert await connection.scalar(select(func.sum(t.daily.c.answered))) == 2
        assert await connection.scalar(select(func.count()).select_from(t.completions)) == 1


async def test_the_newest_parameters_outlive_retention(store: Store) -> None:
    """Old versions of learned parameters go; the newest of each name stays however old."""
    await store.commit(
        Batch(parameters=[{"name": "qos", "version": v, "at": AT + v, "record": b"%d" % v} for v in (1, 2, 3)])
    )
    await store.forget(AT + DAY)
    async with store.read() as connection:
        assert await reads.latest_parameter(connection, "qos") == (3, b"3")
        assert await connection.scalar(select(func.count()).select_from(t.parameters)) == 1


async def test_the_last_ends_are_found_per_group(store: Store) -> None:
    """The last N of every artifact and of every card come back, oldest first."""
    ends = [done(f"a{n}", "alpha") for n in range(5)] + [done("b", "beta", artifact="other-int8")]
    await store.commit(Batch(completions=[rows.completion(end, AT + n) for n, end in enumerate(ends)]))
    assert [end.query_id for end in await reads.last_ends(store, 2)] == ["a3", "a4", "b"]


async def test_operations_are_newest_first(store: Store) -> None:
    """The latest operations come first, within the limit."""
    ops = [operation(f"o{n}", at=AT + n) for n in range(4)]
    await store.commit(Batch(operations=[rows.operation(op, AT, "cpu-2t") for op in ops]))
    assert (await reads.operations(store, 2)).operations == [ops[3], ops[2]]
    assert [op.op_id for _, op in await reads.last_loads(store, 3)] == ["o1", "o2", "o3"]


async def test_workers_and_rejections_accumulate(store: Store) -> None:
    """A worker keeps its first sighting; rejections add up by day and code."""
    state = m.WorkerState(worker="w", host="h", device=m.Device(kind="cpu", name="c"), budget_bytes=1, at=AT)
    for at in (AT, AT + 60):
        row = {**rows.worker(state), "first_seen": at, "last_seen": at}
        await store.commit(
            Batch(workers=[row], rejections=[{"day": rows.day(at), "code": "invalid_query", "count": 2}])
        )
    async with store.read() as connection:
        worker = (await connection.execute(select(t.workers))).mappings().one()
    assert (worker["first_seen"], worker["last_seen"]) == (AT, AT + 60)
    assert (await reads.counts(store)).rejected == 4
    assert await reads.device_classes(store) == {"w": "cpu-1t"}


async def test_a_reopened_database_has_everything(tmp_path: Path) -> None:
    """What was committed is there after closing, in one file without a log beside it."""
    url = f"sqlite+aiosqlite:///{tmp_path}/k.db"
    store = Store(url)
    await store.open()
    await store.commit(_everything())
    await store.close()
    assert [p.name for p in tmp_path.iterdir()] == ["k.db"]
    again = Store(url)
    await again.open()
    assert await reads.counts(again) == EXPECTED
    await again.close()
