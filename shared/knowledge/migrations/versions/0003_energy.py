"""The energy ledger"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_SUMS = ("elapsed_s", "total_j", "idle_j", "other_j", "active_j", "load_j", "busy_s")


def upgrade() -> None:
    op.create_table(
        "energy",
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("artifact", sa.String(), nullable=False),
        *(
            sa.Column(name, sa.String(), server_default=sa.text("''"), nullable=False)
            for name in ("host", "device_class", "source")
        ),
        sa.Column("at", sa.Float(), nullable=False),
        *(sa.Column(name, sa.Float(), server_default=sa.text("0"), nullable=False) for name in _SUMS),
        *(
            sa.Column(name, sa.Integer(), server_default=sa.text("0"), nullable=False)
            for name in ("loads", "tokens_in", "tokens_out")
        ),
        sa.PrimaryKeyConstraint("worker", "started_at", "artifact", name=op.f("pk_energy")),
    )
    op.create_index(op.f("ix_energy_at"), "energy", ["at"])


def downgrade() -> None:
    op.drop_table("energy")
