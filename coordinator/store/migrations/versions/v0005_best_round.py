"""The global student after each round, which round is the best on validation images, and the numbers of codes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("student_state", sa.String(64), nullable=True))
    op.add_column("tasks", sa.Column("best_round", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("codes", sa.Integer(), nullable=True))
    op.add_column("codes", sa.Column("number", sa.Integer(), nullable=True))
    op.add_column("devices", sa.Column("number", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "number")
    op.drop_column("codes", "number")
    op.drop_column("tasks", "codes")
    op.drop_column("tasks", "best_round")
    op.drop_column("rounds", "student_state")
