"""When a round's step 5 began, and which blobs were deleted because nothing referred to them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("begun_s", sa.Double(), nullable=True))
    # what is being aggregated has begun
    op.execute("UPDATE rounds SET begun_s = opened_s WHERE phase = 'aggregating'")
    op.create_table(
        "orphans",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("found_s", sa.Double(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("orphans")
    op.drop_column("rounds", "begun_s")
