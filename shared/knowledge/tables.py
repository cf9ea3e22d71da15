"""Tables of the knowledge base. Whole messages are kept as MessagePack beside the columns that are searched.

Times are Unix seconds, durations seconds (`_s`), energy joules (`_j`). Raw rows go after `retention_days`;
`daily`, `tallies` and `rejections` stay.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, text
from sqlalchemy.types import TypeEngine

metadata = MetaData(
    naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(table_name)s_%(column_0_name)s"},
)


def _number(name: str, kind: type[TypeEngine[Any]] = Float) -> Column[Any]:
    return Column(name, kind, nullable=False, server_default=text("0"))


def _text(name: str) -> Column[str]:
    return Column(name, String, nullable=False, server_default=text("''"))


models = Table(
    "models",
    metadata,
    Column("card", String, primary_key=True),
    _text("artifact"),
    _number("first_seen"),
    _number("last_seen"),
    Column("record", LargeBinary, nullable=False),
)
"""Cards as last published (`card.v1`)."""

workers = Table(
    "workers",
    metadata,
    Column("worker", String, primary_key=True),
    _text("host"),
    _text("device_kind"),
    _text("device_name"),
    _text("device_class"),
    _number("budget_bytes", Integer),
    _number("first_seen"),
    _number("last_seen"),
)
"""Workers as last seen."""

queries = Table(
    "queries",
    metadata,
    Column("query_id", String, primary_key=True),
    Column("received_at", Float, nullable=False, index=True),
    _number("deadline_at"),
    Column("record", LargeBinary),
)
"""Accepted queries (`query.v1`); `record` is NULL when only the end of the query has been seen so far."""

decisions = Table(
    "decisions",
    metadata,
    Column("query_id", String, primary_key=True),
    _text("chosen"),
    _text("reason"),
    _text("runner_up"),
    _number("margin"),
    _number("propensity"),
    _number("knowledge_version", Integer),
    Column("decided_at", Float, nullable=False, index=True),
    Column("record", LargeBinary, nullable=False),
)
"""Routing decisions (`route.v1`) with every candidate."""

completions = Table(
    "completions",
    metadata,
    Column("query_id", String, primary_key=True),
    Column("answered", Boolean, nullable=False),
    _text("code"),
    _text("card"),
    _text("artifact"),
    _text("worker"),
    _text("device_class"),
    _number("attempt", Integer),
    _number("tokens_in", Integer),
    _number("tokens_out", Integer),
    _number("queue_s"),
    _number("load_s"),
    _number("prefill_s"),
    _number("decode_s"),
    _number("overhead_s"),
    _number("total_s"),
    _number("energy_j"),
    _text("energy_source"),
    _number("batch_mean"),
    _number("retried_j"),
    Column("readable", Boolean),
    Column("read", String),
    Column("ended_at", Float, nullable=False, index=True),
    Column("record", LargeBinary, nullable=False),
    Index("ix_completions_artifact", "artifact", "device_class", "ended_at"),
    Index("ix_completions_card", "card", "ended_at"),
)
"""Ends of queries (`done.v1`); `code` is empty for an answer. `readable` is NULL where nothing was expected of it,
`read` where nothing was read in it. `retried_j` is the part of `energy_j` that went into earlier attempts."""

operations = Table(
    "operations",
    metadata,
    Column("op_id", String, primary_key=True),
    Column("kind", String, primary_key=True),
    _text("worker"),
    _text("artifact"),
    _text("device_class"),
    Column("ok", Boolean, nullable=False),
    _text("reason"),
    _number("seconds"),
    _number("bytes", Integer),
    Column("at", Float, nullable=False, index=True),
    Column("record", LargeBinary, nullable=False),
)
"""Loads, evictions and losses (`operation.v1`)."""

placements = Table(
    "placements",
    metadata,
    Column("id", String, primary_key=True),
    _text("reason"),
    Column("decided_at", Float, nullable=False, index=True),
    Column("record", LargeBinary, nullable=False),
)
"""Residency decisions (`placement.v1`)."""

feedback = Table(
    "feedback",
    metadata,
    Column("query_id", String, primary_key=True),
    _number("score"),
    Column("label", String),
    _text("card"),
    Column("at", Float, nullable=False, index=True),
    _text("source"),
)
"""The latest judgement of each query; `source` is empty for people's, `probe` for a golden probe."""

device_samples = Table(
    "device_samples",
    metadata,
    Column("worker", String, primary_key=True),
    Column("at", Float, primary_key=True, index=True),
    _number("budget_bytes", Integer),
    _number("used_bytes", Integer),
    _number("measured_bytes", Integer),
    _number("engines", Integer),
    _number("active", Integer),
    _number("held", Integer),
)
"""What each worker held, every few seconds."""

energy = Table(
    "energy",
    metadata,
    Column("worker", String, primary_key=True),
    Column("started_at", Float, primary_key=True),
    Column("artifact", String, primary_key=True),
    _text("host"),
    _text("device_class"),
    _text("source"),
    Column("at", Float, nullable=False, index=True),
    _number("elapsed_s"),
    _number("total_j"),
    _number("idle_j"),
    _number("other_j"),
    _number("active_j"),
    _number("load_j"),
    _number("loads", Integer),
    _number("busy_s"),
    _number("tokens_in", Integer),
    _number("tokens_out", Integer),
)
"""The energy ledger: sums per start of a worker. The empty artifact is the device, with total, idle and other."""

symptoms = Table(
    "symptoms",
    metadata,
    Column("id", Integer, primary_key=True),
    _text("kind"),
    _text("subject"),
    _text("detail"),
    _number("value"),
    _number("limit"),
    Column("at", Float, nullable=False, index=True),
)

controls = Table(
    "controls",
    metadata,
    Column("id", String, primary_key=True),
    _number("version", Integer),
    _text("event"),
    _text("changed_by"),
    _number("w_quality"),
    _number("w_latency"),
    _number("w_energy"),
    Column("at", Float, nullable=False, index=True),
    Column("record", LargeBinary, nullable=False),
)
"""Objectives as changed, and weights as the dual controller moved them (`control_state.v1`)."""

parameters = Table(
    "parameters",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("at", Float, nullable=False, index=True),
    Column("record", LargeBinary, nullable=False),
)
"""Learned parameters by version; the last version of each name is never deleted."""

daily = Table(
    "daily",
    metadata,
    Column("day", String, primary_key=True),
    Column("card", String, primary_key=True),
    _number("answered", Integer),
    _number("failed", Integer),
    _number("tokens_in", Integer),
    _number("tokens_out", Integer),
    _number("total_s"),
    _number("energy_j"),
)
"""Sums by day (UTC, `2026-01-31`) and card; the empty card is a query that no card took."""

tallies = Table(
    "tallies",
    metadata,
    Column("name", String, primary_key=True),
    Column("key", String, primary_key=True),
    _number("count", Integer),
)
"""Counts since the knowledge base was created, by name (`answered`, `failed`, `load` ...) and key."""

rejections = Table(
    "rejections",
    metadata,
    Column("day", String, primary_key=True),
    Column("code", String, primary_key=True),
    _number("count", Integer),
)
"""Bad input that was refused, by day (UTC) and error code."""
