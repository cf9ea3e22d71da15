"""The knowledge base: opens and migrates the database, and writes batches that may safely be written twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Table, bindparam, delete, event, func, select, text, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from shared.errors import SettingsInvalid
from shared.knowledge import migrate, rows
from shared.knowledge import tables as t
from shared.knowledge.rows import Row

_PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "foreign_keys=ON")


@dataclass
class Batch:
    """Rows to be written in one transaction, by table."""

    queries: list[Row] = field(default_factory=list)
    decisions: list[Row] = field(default_factory=list)
    completions: list[Row] = field(default_factory=list)
    operations: list[Row] = field(default_factory=list)
    placements: list[Row] = field(default_factory=list)
    controls: list[Row] = field(default_factory=list)
    feedback: list[Row] = field(default_factory=list)
    symptoms: list[Row] = field(default_factory=list)
    workers: list[Row] = field(default_factory=list)
    device_samples: list[Row] = field(default_factory=list)
    energy: list[Row] = field(default_factory=list)
    models: list[Row] = field(default_factory=list)
    parameters: list[Row] = field(default_factory=list)
    rejections: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Fresh:
    """What a batch brought that had not been written before."""

    queries: frozenset[str] = frozenset()
    completions: frozenset[str] = frozenset()
    operations: frozenset[tuple[str, str]] = frozenset()


class Store:
    """The database behind `url`. Writes are serialised; reads run beside them (WAL)."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        if self._url.get_backend_name() != "sqlite":
            raise SettingsInvalid(
                f"CALM_KNOWLEDGE_URL names the database {self._url.get_backend_name()!r}.",
                "Use SQLite: sqlite+aiosqlite:////path/to/knowledge.db, or unset it.",
            )
        self._url = self._url.set(drivername="sqlite+aiosqlite")
        self._engine: AsyncEngine = create_async_engine(self._url)
        event.listen(self._engine.sync_engine, "connect", _set_pragmas)
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        """Create the database when it is not there, and bring it to the newest schema."""
        if self._url.database:
            await asyncio.to_thread(Path(self._url.database).parent.mkdir, parents=True, exist_ok=True)
        async with self._writing, self._engine.begin() as connection:
            await connection.run_sync(migrate.upgrade)

    async def close(self) -> None:
        """Fold the write-ahead log into the database file and close."""
        async with self._writing:
            with contextlib.suppress(SQLAlchemyError):  # a reader elsewhere holds it; the next owner does it
                async with self._engine.connect() as connection:
                    await connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
            await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        async with self._engine.connect() as connection:
            yield connection

    async def commit(self, batch: Batch) -> Fresh:
        """Write a batch in one transaction. What was written before is left as it is and not counted again."""
        async with self._writing, self._engine.begin() as connection:
            return await _write(connection, batch)

    async def forget(self, before: float) -> int:
        """Delete raw rows older than `before` (Unix seconds); sums and counts stay. The number deleted."""
        deleted = 0
        async with self._writing, self._engine.begin() as connection:
            for table, column in (
                (t.queries, t.queries.c.received_at),
                (t.decisions, t.decisions.c.decided_at),
                (t.completions, t.completions.c.ended_at),
                (t.operations, t.operations.c.at),
                (t.placements, t.placements.c.decided_at),
                (t.controls, t.controls.c.at),
                (t.feedback, t.feedback.c.at),
                (t.device_samples, t.device_samples.c.at),
                (t.energy, t.energy.c.at),
                (t.symptoms, t.symptoms.c.at),
            ):
                deleted += (await connection.execute(delete(table).where(column < before))).rowcount
            other = t.parameters.alias()
            newest = select(func.max(other.c.version)).where(other.c.name == t.parameters.c.name).scalar_subquery()
            old = delete(t.parameters).where(t.parameters.c.at < before, t.parameters.c.version < newest)
            deleted += (await connection.execute(old)).rowcount
        return deleted


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


async def _write(connection: AsyncConnection, batch: Batch) -> Fresh:
    queries = await _add(connection, t.queries, batch.queries)
    known = [
        {
            "at_id": r["query_id"],
            "at_received": r["received_at"],
            "at_deadline": r["deadline_at"],
            "at_record": r["record"],
        }
        for r in batch.queries
        if (r["query_id"],) not in queries
    ]
    if known:  # the end was recorded first: the two streams are read independently
        fill = (
            update(t.queries)
            .where(t.queries.c.query_id == bindparam("at_id"), t.queries.c.record.is_(None))
            .values(
                received_at=bindparam("at_received"),
                deadline_at=bindparam("at_deadline"),
                record=bindparam("at_record"),
            )
        )
        await connection.execute(fill, known)
    completions = await _add(connection, t.completions, batch.completions)
    ended = _only(batch.completions, ("query_id",), completions)
    queries |= await _add(
        connection, t.queries, [{"query_id": r["query_id"], "received_at": r["ended_at"] - r["total_s"]} for r in ended]
    )
    operations = await _add(connection, t.operations, batch.operations)
    await _add(connection, t.decisions, batch.decisions)
    await _add(connection, t.placements, batch.placements)
    await _add(connection, t.controls, batch.controls)
    await _add(connection, t.device_samples, batch.device_samples)
    await _add(connection, t.parameters, batch.parameters)
    judged = await _judge(connection, batch.feedback)
    if batch.symptoms:
        await connection.execute(insert(t.symptoms), batch.symptoms)
    await _put(connection, t.workers, batch.workers, keep=("first_seen",))
    await _put(connection, t.energy, batch.energy)
    await _put(connection, t.models, batch.models, keep=("first_seen",))
    started = _only(batch.operations, ("op_id", "kind"), operations)
    await _sum(connection, t.tallies, rows.tallies(ended, started, len(queries), judged))
    await _sum(connection, t.daily, rows.daily(ended))
    await _sum(connection, t.rejections, batch.rejections)
    return Fresh(
        queries=frozenset(key[0] for key in queries),
        completions=frozenset(key[0] for key in completions),
        operations=frozenset((key[0], key[1]) for key in operations),
    )


def _only(candidates: Iterable[Row], columns: tuple[str, ...], keys: set[tuple[str, ...]]) -> list[Row]:
    """The rows whose key is in `keys`, the first of each."""
    found: dict[tuple[str, ...], Row] = {}
    for row in candidates:
        key = tuple(row[c] for c in columns)
        if key in keys:
            found.setdefault(key, row)
    return list(found.values())


async def _add(connection: AsyncConnection, table: Table, new: list[Row]) -> set[tuple[str, ...]]:
    """Insert what is not there yet; the primary keys of what was inserted."""
    if not new:
        return set()
    statement = insert(table).on_conflict_do_nothing().returning(*table.primary_key.columns)
    return {tuple(row) for row in await connection.execute(statement, new)}


async def _put(connection: AsyncConnection, table: Table, new: list[Row], *, keep: tuple[str, ...] = ()) -> None:
    """Insert or replace, leaving the columns `keep` of a row that is there as they are."""
    if new:
        await connection.execute(_upsert(table, new, lambda _old, given: given, keep), new)


async def _sum(connection: AsyncConnection, table: Table, new: list[Row]) -> None:
    """Insert, or add to the numbers that are there."""
    if new:
        await connection.execute(_upsert(table, new, lambda old, given: old + given), new)


def _upsert(table: Table, new: list[Row], merge: Callable[[Any, Any], Any], keep: tuple[str, ...] = ()) -> Any:
    statement = insert(table)
    keys = {column.name for column in table.primary_key.columns}
    changed = [name for name in new[0] if name not in keys and name not in keep]
    return statement.on_conflict_do_update(
        index_elements=list(table.primary_key.columns),
        set_={name: merge(table.c[name], statement.excluded[name]) for name in changed},
    )


async def _judge(connection: AsyncConnection, given: list[Row]) -> int:
    """Write feedback, the latest for each query; how many queries had none before."""
    added = await _add(connection, t.feedback, given)
    await _put(connection, t.feedback, given)
    return len(added)
