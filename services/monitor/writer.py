"""One task writes everything: rows from all sides are committed together, and each learns of its commit."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from shared.knowledge.rows import Row
from shared.knowledge.store import Batch, Fresh, Store

BATCH_ROWS = 500
BATCH_S = 0.05
"""A batch is closed at this many rows or after this long: 254 k rows/s against 2.8 k at one row a commit."""


class Unwritable(Exception):
    """This row can never be written; the database is well."""


@dataclass
class _Item:
    table: str
    row: Row
    written: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Writer:
    """Batches writes to a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: asyncio.Queue[_Item | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Commit what is queued, then end."""
        self._queue.put_nowait(None)
        if self._task is not None:
            await self._task

    async def write(self, table: str, row: Row) -> bool:
        """Write a row; returns when it is committed. False when it had been written before.

        Raises:
            Unwritable: this row can never be written.
            SQLAlchemyError: the database cannot be written now.
        """
        item = _Item(table, row)
        self._queue.put_nowait(item)
        return await item.written

    def note(self, table: str, row: Row) -> None:
        """Write a row with the next batch and let nobody wait for it (telemetry)."""
        item = _Item(table, row)
        item.written.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._queue.put_nowait(item)

    async def _run(self) -> None:
        ended = False
        while not ended:
            first = await self._queue.get()
            if first is None:
                break
            items = [first]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BATCH_S):
                    while len(items) < BATCH_ROWS:
                        item = await self._queue.get()
                        if item is None:
                            ended = True
                            break
                        items.append(item)
            await self._commit(items)
        while not self._queue.empty():
            late = self._queue.get_nowait()
            if late is not None:
                late.written.cancel()

    async def _commit(self, items: list[_Item]) -> None:
        batch = Batch()
        for item in items:
            getattr(batch, item.table).append(item.row)
        try:
            fresh = await self._store.commit(batch)
        except (OperationalError, InterfaceError) as error:  # locked, full or gone: as true of every row
            _fail(items, error)
        except (SQLAlchemyError, ValueError, OverflowError) as error:
            if len(items) == 1:
                _fail(items, Unwritable(str(error)))
                return
            for item in items:  # one row spoils the batch: find it by writing each alone
                await self._commit([item])
        else:
            _settle(items, fresh)


def _fail(items: list[_Item], error: Exception) -> None:
    for item in items:
        if not item.written.done():
            item.written.set_exception(error)


def _settle(items: list[_Item], fresh: Fresh) -> None:
    new: set[object] = {*fresh.queries, *(("completions", key) for key in fresh.completions)}
    new |= {("operations", *key) for key in fresh.operations}
    for item in items:
        key: object
        if item.table == "completions":
            key = ("completions", item.row["query_id"])
        elif item.table == "operations":
            key = ("operations", item.row["op_id"], item.row["kind"])
        else:
            key = item.row.get("query_id", "")
        is_new = key in new
        new.discard(key)  # the same row twice in a batch is new once
        if not item.written.done():
            item.written.set_result(is_new)
