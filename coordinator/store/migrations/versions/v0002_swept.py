"""Rounds whose uploads' blobs were deleted, and who else has sent the same bytes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("swept_s", sa.Double(), nullable=True))
    op.create_index("ix_uploads_digest", "uploads", ["digest"])


def downgrade() -> None:
    op.drop_index("ix_uploads_digest", table_name="uploads")
    op.drop_column("rounds", "swept_s")
