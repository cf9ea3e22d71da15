"""First schema"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "completions",
        sa.Column("query_id", sa.String(), nullable=False),
        sa.Column("answered", sa.Boolean(), nullable=False),
        sa.Column("code", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("card", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("artifact", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("worker", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("device_class", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("tokens_in", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("tokens_out", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queue_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("load_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("prefill_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("decode_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("overhead_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("total_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("energy_j", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("energy_source", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("batch_mean", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("query_id", name=op.f("pk_completions")),
    )
    with op.batch_alter_table("completions", schema=None) as batch_op:
        batch_op.create_index("ix_completions_artifact", ["artifact", "device_class", "ended_at"], unique=False)
        batch_op.create_index("ix_completions_card", ["card", "ended_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_completions_ended_at"), ["ended_at"], unique=False)

    op.create_table(
        "daily",
        sa.Column("day", sa.String(), nullable=False),
        sa.Column("card", sa.String(), nullable=False),
        sa.Column("answered", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failed", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("tokens_in", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("tokens_out", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("total_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("energy_j", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("day", "card", name=op.f("pk_daily")),
    )
    op.create_table(
        "decisions",
        sa.Column("query_id", sa.String(), nullable=False),
        sa.Column("chosen", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("reason", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("runner_up", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("margin", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("propensity", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("knowledge_version", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("decided_at", sa.Float(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("query_id", name=op.f("pk_decisions")),
    )
    with op.batch_alter_table("decisions", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_decisions_decided_at"), ["decided_at"], unique=False)

    op.create_table(
        "device_samples",
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("budget_bytes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("used_bytes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("measured_bytes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("engines", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("active", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("held", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("worker", "at", name=op.f("pk_device_samples")),
    )
    with op.batch_alter_table("device_samples", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_device_samples_at"), ["at"], unique=False)

    op.create_table(
        "feedback",
        sa.Column("query_id", sa.String(), nullable=False),
        sa.Column("score", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("label", sa.String(), nullable=True),
        sa.Column("card", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("query_id", name=op.f("pk_feedback")),
    )
    with op.batch_alter_table("feedback", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_feedback_at"), ["at"], unique=False)

    op.create_table(
        "models",
        sa.Column("card", sa.String(), nullable=False),
        sa.Column("artifact", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("first_seen", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_seen", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("card", name=op.f("pk_models")),
    )
    op.create_table(
        "operations",
        sa.Column("op_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("worker", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("artifact", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("device_class", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("ok", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("seconds", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("bytes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("op_id", "kind", name=op.f("pk_operations")),
    )
    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_operations_at"), ["at"], unique=False)

    op.create_table(
        "parameters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", "version", name=op.f("pk_parameters")),
    )
    with op.batch_alter_table("parameters", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_parameters_at"), ["at"], unique=False)

    op.create_table(
        "placements",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("decided_at", sa.Float(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_placements")),
    )
    with op.batch_alter_table("placements", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_placements_decided_at"), ["decided_at"], unique=False)

    op.create_table(
        "queries",
        sa.Column("query_id", sa.String(), nullable=False),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.Column("deadline_at", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("query_id", name=op.f("pk_queries")),
    )
    with op.batch_alter_table("queries", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_queries_received_at"), ["received_at"], unique=False)

    op.create_table(
        "rejections",
        sa.Column("day", sa.String(), nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("day", "code", name=op.f("pk_rejections")),
    )
    op.create_table(
        "symptoms",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("subject", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("detail", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("value", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("limit", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_symptoms")),
    )
    with op.batch_alter_table("symptoms", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_symptoms_at"), ["at"], unique=False)

    op.create_table(
        "tallies",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("name", "key", name=op.f("pk_tallies")),
    )
    op.create_table(
        "workers",
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("host", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("device_kind", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("device_name", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("device_class", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.Column("budget_bytes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("first_seen", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_seen", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("worker", name=op.f("pk_workers")),
    )


def downgrade() -> None:

    op.drop_table("workers")
    op.drop_table("tallies")
    with op.batch_alter_table("symptoms", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_symptoms_at"))

    op.drop_table("symptoms")
    op.drop_table("rejections")
    with op.batch_alter_table("queries", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_queries_received_at"))

    op.drop_table("queries")
    with op.batch_alter_table("placements", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_placements_decided_at"))

    op.drop_table("placements")
    with op.batch_alter_table("parameters", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_parameters_at"))

    op.drop_table("parameters")
    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_operations_at"))

    op.drop_table("operations")
    op.drop_table("models")
    with op.batch_alter_table("feedback", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_feedback_at"))

    op.drop_table("feedback")
    with op.batch_alter_table("device_samples", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_device_samples_at"))

    op.drop_table("device_samples")
    with op.batch_alter_table("decisions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_decisions_decided_at"))

    op.drop_table("decisions")
    op.drop_table("daily")
    with op.batch_alter_table("completions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_completions_ended_at"))
        batch_op.drop_index("ix_completions_card")
        batch_op.drop_index("ix_completions_artifact")

    op.drop_table("completions")
