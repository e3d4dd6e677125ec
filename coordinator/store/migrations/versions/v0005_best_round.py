"""The global student after each round, which round is the best on validation images, and the numbers of codes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
_OLD_FIELDS = (
    "name", "students", "transfer", "exchange", "mode", "global_student", "test", "latent_size", "classes",
    "aggregation", "local", "distil", "precision", "rounds", "goal", "over_selection", "minimum", "deadline_s",
    "parameter_shapes",
)  # fmt: skip


def upgrade() -> None:
    op.add_column("rounds", sa.Column("student_state", sa.String(64), nullable=True))
    op.add_column("tasks", sa.Column("best_round", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("codes", sa.Integer(), nullable=True))
    op.add_column("codes", sa.Column("number", sa.Integer(), nullable=True))
    op.add_column("devices", sa.Column("number", sa.Integer(), nullable=True))


def downgrade() -> None:
    connection, tasks = op.get_bind(), sa.table("tasks", sa.column("name"), sa.column("definition", sa.JSON()))
    for name, definition in connection.execute(sa.select(tasks.c.name, tasks.c.definition)).all():
        # an older program refuses a task with fields that it does not know
        known = {field: value for field, value in definition.items() if field in _OLD_FIELDS}
        for samples in ("transfer", "test"):
            if known.get(samples) is not None:
                known[samples] = {field: value for field, value in known[samples].items() if field != "labels"}
        connection.execute(tasks.update().where(tasks.c.name == name).values(definition=known))
    op.drop_column("devices", "number")
    op.drop_column("codes", "number")
    op.drop_column("tasks", "codes")
    op.drop_column("tasks", "best_round")
    op.drop_column("rounds", "student_state")
