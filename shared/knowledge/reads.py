"""What can be asked of the knowledge base."""

from __future__ import annotations

from sqlalchemy import Row, Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from shared import codec
from shared import messages as m
from shared.errors import InvalidQuery
from shared.knowledge import tables as t
from shared.knowledge.store import Store

RECENT_BYTES = 512 * 1024
"""A list of records is cut off at about this size, to stay below NATS's default payload limit of 1 MiB."""


async def query(store: Store, query_id: str) -> m.QueryRecord | None:
    """Everything known about one query."""
    async with store.read() as connection:
        row = (await connection.execute(_records().where(t.queries.c.query_id == query_id))).first()
        if row is None:
            return None
        where = t.decisions.c.query_id == query_id
        route = await connection.scalar(select(t.decisions.c.record).where(where))
        return _record(row, route)


async def recent(store: Store, limit: int) -> m.QueryRecords:
    """The latest queries, newest first, without their routes; fewer than `limit` when they are very large."""
    statement = _records().order_by(t.queries.c.received_at.desc()).limit(limit)
    records: list[m.QueryRecord] = []
    size = 0
    async with store.read() as connection:
        for row in await connection.execute(statement):
            size += len(row.query or b"") + len(row.done or b"")
            if records and size > RECENT_BYTES:
                break
            records.append(_record(row, None))
    return m.QueryRecords(records=records)


def _records() -> Select[tuple[str, float, bytes, bytes, float, str]]:
    return (
        select(
            t.queries.c.query_id,
            t.queries.c.received_at,
            t.queries.c.record.label("query"),
            t.completions.c.record.label("done"),
            t.feedback.c.score,
            t.feedback.c.label,
        )
        .outerjoin(t.completions, t.completions.c.query_id == t.queries.c.query_id)
        .outerjoin(t.feedback, t.feedback.c.query_id == t.queries.c.query_id)
    )


def _record(row: Row[tuple[str, float, bytes, bytes, float, str]], route: bytes | None) -> m.QueryRecord:
    done = codec.unpack(row.done, m.Done) if row.done else None
    judged = row.score is not None
    return m.QueryRecord(
        query_id=row.query_id,
        state="accepted" if done is None else "answered" if done.answer else "failed",
        query=codec.unpack(row.query, m.Query) if row.query else None,
        route=codec.unpack(route, m.Route) if route else None,
        done=done,
        feedback=[m.Feedback(query_id=row.query_id, score=row.score, label=row.label)] if judged else [],
        received_at=row.received_at,
    )


async def card_of(store: Store, query_id: str) -> str | None:
    """The card that ended a query, empty when it has not ended; None for an unknown query."""
    async with store.read() as connection:
        found = await connection.execute(
            select(t.queries.c.query_id, t.completions.c.card)
            .outerjoin(t.completions, t.completions.c.query_id == t.queries.c.query_id)
            .where(t.queries.c.query_id == query_id)
        )
        row = found.first()
        return None if row is None else row.card or ""


async def counts(store: Store) -> m.Counts:
    """Totals since the knowledge base was created."""
    by_name: dict[str, dict[str, int]] = {}
    async with store.read() as connection:
        for name, key, count in await connection.execute(select(t.tallies.c.name, t.tallies.c.key, t.tallies.c.count)):
            by_name.setdefault(name, {})[key] = int(count)
        rejected = await connection.scalar(select(func.sum(t.rejections.c.count)))

    def total(name: str) -> int:
        return sum(by_name.get(name, {}).values())

    accepted, answered, failed = total("accepted"), total("answered"), total("failed")
    return m.Counts(
        accepted=accepted,
        answered=answered,
        failed=failed,
        rejected=int(rejected or 0),
        in_flight=max(accepted - answered - failed, 0),
        feedback=total("feedback"),
        by_card=by_name.get("answered", {}),
        failures=by_name.get("failed", {}),
        loads=total("load"),
        evictions=total("evict"),
        lost=total("lost"),
        by_operation_reason=by_name.get("reason", {}),
    )


async def operations(store: Store, limit: int) -> m.Operations:
    """The latest loads, evictions and losses, newest first."""
    statement = select(t.operations.c.record).order_by(t.operations.c.at.desc()).limit(limit)
    async with store.read() as connection:
        found = (await connection.scalars(statement)).all()
    return m.Operations(operations=[codec.unpack(record, m.Operation) for record in found])


async def controls(store: Store, limit: int) -> m.ControlStates:
    """The latest changes of objectives and moves of weights, newest first."""
    statement = select(t.controls.c.record).order_by(t.controls.c.at.desc()).limit(limit)
    async with store.read() as connection:
        found = (await connection.scalars(statement)).all()
    return m.ControlStates(states=[codec.unpack(record, m.ControlState) for record in found])


async def trial(store: Store, asked: m.KnowledgeRequest) -> m.TrialRows:
    """At most `limit` decisions, later than `after`, that were taken under the trial of version `id`, oldest first.

    Raises:
        InvalidQuery: `id` is no number.
    """
    if not asked.id.isdigit():
        raise InvalidQuery(f"`{asked.id}` is no trial.", "Give its version as `id`, see `calm policy show`.")
    version = int(asked.id)
    columns = (
        t.decisions.c.record, t.decisions.c.decided_at, t.feedback.c.score, t.completions.c.answered,
        t.completions.c.total_s, t.completions.c.energy_j,
    )  # fmt: skip
    statement = (
        select(*columns)
        .outerjoin(t.completions, t.completions.c.query_id == t.decisions.c.query_id)
        .outerjoin(t.feedback, t.feedback.c.query_id == t.decisions.c.query_id)
        .where(t.decisions.c.decided_at > asked.after)
        .order_by(t.decisions.c.decided_at)
    )
    found: list[m.TrialRow] = []
    async with store.read() as connection:
        rows = await connection.stream(statement)
        async for record, at, score, answered, total_s, energy_j in rows:
            route = codec.unpack(record, m.Route)
            if route.trial is None or route.trial.version != version:
                continue
            if len(found) == asked.limit:
                return m.TrialRows(rows=found, more=True)
            found.append(_trial_row(route, route.trial, at, score, (total_s, energy_j) if answered else None))
    return m.TrialRows(rows=found)


def _trial_row(
    route: m.Route, tried: m.Tried, at: float, score: float | None, took: tuple[float, float] | None
) -> m.TrialRow:
    known = {c.card: [c.quality, c.latency_s, c.energy_j] for c in route.candidates}
    cards = (route.order[0], tried.present, tried.candidate)
    latency_s, energy_j = took if took is not None else (None, None)
    return m.TrialRow(
        at=at, chosen=cards[0], present=cards[1], candidate=cards[2], propensity=route.propensity,
        predicted=[known[card] for card in cards], score=score, latency_s=latency_s, energy_j=energy_j,
    )  # fmt: skip


async def placement(store: Store, placement_id: str = "") -> m.Placement | None:
    """One residency decision by id, or the latest."""
    statement = select(t.placements.c.record).order_by(t.placements.c.decided_at.desc()).limit(1)
    if placement_id:
        statement = statement.where(t.placements.c.id == placement_id)
    async with store.read() as connection:
        record = await connection.scalar(statement)
    return codec.unpack(record, m.Placement) if record else None


async def last_ends(store: Store, count: int) -> list[m.Done]:
    """The last `count` ends of every (artifact, device class) and of every card, oldest first."""
    ends: dict[str, tuple[float, bytes]] = {}
    table = t.completions
    async with store.read() as connection:
        for columns in ((table.c.artifact, table.c.device_class), (table.c.card,)):
            for group in (await connection.execute(select(*columns).distinct())).all():
                statement = (
                    select(table.c.query_id, table.c.ended_at, table.c.record)
                    .where(*(column == value for column, value in zip(columns, group, strict=True)))
                    .order_by(table.c.ended_at.desc())
                    .limit(count)
                )
                for query_id, ended_at, record in await connection.execute(statement):
                    ends[query_id] = (ended_at, record)
    return [codec.unpack(record, m.Done) for _, record in sorted(ends.values(), key=lambda end: end[0])]


async def last_loads(store: Store, count: int) -> list[tuple[str, m.Operation]]:
    """The last `count` successful loads with the device class of each, oldest first."""
    table = t.operations
    statement = (
        select(table.c.device_class, table.c.record)
        .where(table.c.kind == "load", table.c.ok)
        .order_by(table.c.at.desc())
        .limit(count)
    )
    async with store.read() as connection:
        found = (await connection.execute(statement)).all()
    return [(device_class, codec.unpack(record, m.Operation)) for device_class, record in reversed(found)]


async def last_feedback(store: Store, count: int) -> list[tuple[str, str, float]]:
    """Card, query id and score of the last `count` judgements, oldest first."""
    table = t.feedback
    statement = (
        select(table.c.card, table.c.query_id, table.c.score)
        .where(table.c.card != "")
        .order_by(table.c.at.desc())
        .limit(count)
    )
    async with store.read() as connection:
        return [
            (card, query_id, score) for card, query_id, score in reversed((await connection.execute(statement)).all())
        ]


async def energy(store: Store) -> m.EnergyReports:
    """Each worker's energy ledger over all its starts, with what its answers' own figures add up to: of the answers
    that had ended when the ledger was last reported, so that both speak of the same time."""
    e, c = t.energy, t.completions
    names = ("elapsed_s", "total_j", "idle_j", "other_j", "active_j", "load_j", "loads", "busy_s", "tokens_in",
             "tokens_out")  # fmt: skip
    sums = (
        select(
            e.c.worker, e.c.artifact, func.max(e.c.host).label("host"), func.max(e.c.source).label("source"),
            func.max(e.c.device_class).label("device_class"), func.min(e.c.started_at).label("started_at"),
            func.max(e.c.at).label("at"), *(func.sum(e.c[name]).label(name) for name in names),
        )
        .group_by(e.c.worker, e.c.artifact)
        .order_by(e.c.worker, e.c.artifact)
    )  # fmt: skip
    reported = select(e.c.worker, func.max(e.c.at).label("at")).group_by(e.c.worker).subquery()
    answered = (
        select(c.c.worker, c.c.artifact, func.count(), func.sum(c.c.energy_j - c.c.retried_j))
        .join(reported, reported.c.worker == c.c.worker)
        .where(c.c.answered, c.c.ended_at <= reported.c.at)
        .group_by(c.c.worker, c.c.artifact)
    )
    async with store.read() as connection:
        answers = {(row[0], row[1]): row[2:] for row in await connection.execute(answered)}
        found = (await connection.execute(sums)).all()
    accounts: dict[str, list[m.EnergyAccount]] = {}
    for row in found:
        if row.artifact:
            count, joules = answers.get((row.worker, row.artifact), (0, 0.0))
            accounts.setdefault(row.worker, []).append(
                m.EnergyAccount(
                    artifact=row.artifact, active_j=row.active_j, load_j=row.load_j, loads=row.loads,
                    busy_s=row.busy_s, tokens_in=row.tokens_in, tokens_out=row.tokens_out, answers=count,
                    answers_j=joules,
                )
            )  # fmt: skip
    return m.EnergyReports(
        workers=[
            m.EnergyReport(
                worker=row.worker, host=row.host, device_class=row.device_class, source=row.source,
                started_at=row.started_at, at=row.at, elapsed_s=row.elapsed_s, total_j=row.total_j,
                idle_j=row.idle_j, other_j=row.other_j, accounts=accounts.get(row.worker, []),
            )
            for row in found
            if not row.artifact
        ]
    )  # fmt: skip


async def device_classes(store: Store) -> dict[str, str]:
    """Device class of every worker ever seen."""
    async with store.read() as connection:
        found = await connection.execute(select(t.workers.c.worker, t.workers.c.device_class))
        return {row.worker: row.device_class for row in found}


async def latest_parameter(connection: AsyncConnection, name: str) -> tuple[int, bytes] | None:
    """Version and record of the newest parameters of that name."""
    table = t.parameters
    statement = (
        select(table.c.version, table.c.record).where(table.c.name == name).order_by(table.c.version.desc()).limit(1)
    )
    row = (await connection.execute(statement)).first()
    return None if row is None else (row.version, row.record)
