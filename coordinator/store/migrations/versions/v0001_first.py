"""The first form of the store."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "changes",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=True),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("device", sa.String(length=18), nullable=True),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_changes")),
    )
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=20), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    op.create_table(
        "tasks",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("definition", sa.JSON(), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.Column("finished", sa.Boolean(), nullable=False),
        sa.Column("student_state", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tasks")),
    )
    op.create_table(
        "codes",
        sa.Column("code_hash", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("expires_s", sa.Double(), nullable=False),
        sa.Column("device", sa.String(length=18), nullable=True),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_codes_task")),
        sa.PrimaryKeyConstraint("code_hash", name=op.f("pk_codes")),
    )
    op.create_table(
        "devices",
        sa.Column("name", sa.String(length=18), nullable=False),
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
        sa.Column("student", sa.String(length=200), nullable=True),
        sa.Column("bundle", sa.String(length=64), nullable=True),
        sa.Column("status", sa.JSON(), nullable=False),
        sa.Column("enrolled_s", sa.Double(), nullable=False),
        sa.Column("seen_s", sa.Double(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_devices_task")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_devices")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_devices_token_hash")),
    )
    op.create_index(op.f("ix_devices_task"), "devices", ["task"], unique=False)
    op.create_table(
        "refusals",
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_refusals_task")),
        sa.PrimaryKeyConstraint("task", "number", "kind", name=op.f("pk_refusals")),
    )
    op.create_table(
        "rounds",
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("phase", sa.String(length=20), nullable=False),
        sa.Column("opened_s", sa.Double(), nullable=False),
        sa.Column("deadline_s", sa.Double(), nullable=False),
        sa.Column("closed_s", sa.Double(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("published", sa.String(length=64), nullable=True),
        sa.Column("published_bytes", sa.BigInteger(), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_rounds_task")),
        sa.PrimaryKeyConstraint("task", "number", name=op.f("pk_rounds")),
    )
    op.create_table(
        "leases",
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("owner", sa.String(length=40), nullable=False),
        sa.Column("expires_s", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task", "number"], ["rounds.task", "rounds.number"], name=op.f("fk_leases_task")
        ),
        sa.PrimaryKeyConstraint("task", "number", name=op.f("pk_leases")),
    )
    op.create_table(
        "reports",
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device", sa.String(length=18), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("received_s", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.name"], name=op.f("fk_reports_device")),
        sa.ForeignKeyConstraint(
            ["task", "number"], ["rounds.task", "rounds.number"], name=op.f("fk_reports_task")
        ),
        sa.PrimaryKeyConstraint("task", "number", "device", name=op.f("pk_reports")),
    )
    op.create_table(
        "selections",
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device", sa.String(length=18), nullable=False),
        sa.Column("selected_s", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.name"], name=op.f("fk_selections_device")),
        sa.ForeignKeyConstraint(
            ["task", "number"], ["rounds.task", "rounds.number"], name=op.f("fk_selections_task")
        ),
        sa.PrimaryKeyConstraint("task", "number", "device", name=op.f("pk_selections")),
    )
    op.create_table(
        "uploads",
        sa.Column("task", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device", sa.String(length=18), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("content_encoding", sa.String(length=10), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("class_counts", sa.JSON(), nullable=True),
        sa.Column("received_s", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.name"], name=op.f("fk_uploads_device")),
        sa.ForeignKeyConstraint(
            ["task", "number"], ["rounds.task", "rounds.number"], name=op.f("fk_uploads_task")
        ),
        sa.PrimaryKeyConstraint("task", "number", "device", name=op.f("pk_uploads")),
    )
    op.create_index("ix_uploads_device", "uploads", ["device"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_uploads_device", table_name="uploads")
    op.drop_table("uploads")
    op.drop_table("selections")
    op.drop_table("reports")
    op.drop_table("leases")
    op.drop_table("rounds")
    op.drop_table("refusals")
    op.drop_index(op.f("ix_devices_task"), table_name="devices")
    op.drop_table("devices")
    op.drop_table("codes")
    op.drop_table("tasks")
    op.drop_table("counters")
    op.drop_table("changes")
