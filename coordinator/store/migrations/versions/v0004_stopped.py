"""When the operator stopped a task."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("stopped_s", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("tasks", "stopped_s")
