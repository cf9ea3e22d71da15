"""What was read in answers, and what earlier attempts took"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("completions", schema=None) as batch_op:
        batch_op.add_column(sa.Column("retried_j", sa.Float(), server_default=sa.text("0"), nullable=False))
        batch_op.add_column(sa.Column("readable", sa.Boolean(), nullable=True))
        batch_op.add_column(sa.Column("read", sa.String(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("completions", schema=None) as batch_op:
        batch_op.drop_column("read")
        batch_op.drop_column("readable")
        batch_op.drop_column("retried_j")
