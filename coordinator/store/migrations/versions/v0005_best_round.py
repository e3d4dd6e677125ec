"""The global student after each round, which round is the best on validation images, and the numbers of codes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from edgestill.coordinator.store.migrations.definitions import take_away

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
_DISPENSABLE = ("class_names", "ca_cert", "common_head", "seed", "validation", "test.labels")
_NEEDED = ("transfer.labels", "local.clip_norm", "distil.clip_norm")


def upgrade() -> None:
    op.add_column("rounds", sa.Column("student_state", sa.String(64), nullable=True))
    # the model of the last completed round is there already: it is the one that the next round goes on from
    op.execute(
        "UPDATE rounds SET student_state = (SELECT tasks.student_state FROM tasks WHERE tasks.name = rounds.task) "
        "WHERE number = (SELECT max(ended.number) FROM rounds AS ended "
        "WHERE ended.task = rounds.task AND ended.published IS NOT NULL)"
    )
    op.add_column("tasks", sa.Column("best_round", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("codes", sa.Integer(), nullable=True))
    op.add_column("codes", sa.Column("number", sa.Integer(), nullable=True))
    op.add_column("devices", sa.Column("number", sa.Integer(), nullable=True))


def downgrade() -> None:
    take_away(op.get_bind(), _DISPENSABLE, _NEEDED)
    op.drop_column("devices", "number")
    op.drop_column("codes", "number")
    op.drop_column("tasks", "codes")
    op.drop_column("tasks", "best_round")
    op.drop_column("rounds", "student_state")
