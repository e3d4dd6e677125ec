"""The coordinator's tables; `migrations/` brings an existing database to this form, and a test compares them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

_TASK, _DIGEST, _DEVICE = String(40), String(64), String(18)


def _task_key(**options: bool) -> Column[str]:
    return Column("task", _TASK, ForeignKey("tasks.name"), nullable=False, **options)


def _of_round() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["task", "number"], ["rounds.task", "rounds.number"])


tasks = Table(
    "tasks",
    metadata,
    Column("name", _TASK, primary_key=True),
    Column("definition", JSON, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("finished", Boolean, nullable=False),
    # the global student after the last completed round, a blob
    Column("student_state", _DIGEST),
    # when the operator stopped it before its last round
    Column("stopped_s", Double),
    # the round whose global student is the best on the validation images
    Column("best_round", Integer),
    # how many codes were issued
    Column("codes", Integer),
)

devices = Table(
    "devices",
    metadata,
    Column("name", _DEVICE, primary_key=True),
    _task_key(index=True),
    Column("token_hash", _DIGEST, nullable=False, unique=True),
    Column("info", JSON, nullable=False),
    Column("student", String(200)),
    Column("bundle", _DIGEST),
    Column("status", JSON, nullable=False),
    Column("enrolled_s", Double, nullable=False),
    Column("seen_s", Double, nullable=False),
    Column("stored_bytes", BigInteger, nullable=False),
    # that of the code with which it enrolled
    Column("number", Integer),
)

codes = Table(
    "codes",
    metadata,
    Column("code_hash", _DIGEST, primary_key=True),
    _task_key(),
    Column("expires_s", Double, nullable=False),
    Column("device", _DEVICE),
    # from 1, in the order in which the task's codes were issued
    Column("number", Integer),
)

rounds = Table(
    "rounds",
    metadata,
    _task_key(primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("phase", String(20), nullable=False),
    Column("opened_s", Double, nullable=False),
    Column("deadline_s", Double, nullable=False),
    # when its step 5 began
    Column("begun_s", Double),
    Column("closed_s", Double),
    Column("reason", Text),
    Column("published", _DIGEST),
    Column("published_bytes", BigInteger),
    Column("metrics", JSON, nullable=False),
    # one more with every transition, so that a replica knows whether what it remembers is still so
    Column("version", Integer, nullable=False),
    # when its uploads' blobs were deleted
    Column("swept_s", Double),
    # the global student after this round, a blob; those of the best and of the last completed round are kept
    Column("student_state", _DIGEST),
)

selections = Table(
    "selections",
    metadata,
    Column("task", _TASK, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("device", _DEVICE, ForeignKey("devices.name"), primary_key=True),
    Column("selected_s", Double, nullable=False),
    _of_round(),
)

uploads = Table(
    "uploads",
    metadata,
    Column("task", _TASK, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("device", _DEVICE, ForeignKey("devices.name"), primary_key=True),
    Column("digest", _DIGEST, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("content_encoding", String(10), nullable=False),
    Column("samples", BigInteger, nullable=False),
    Column("class_counts", JSON),
    Column("received_s", Double, nullable=False),
    _of_round(),
)

reports = Table(
    "reports",
    metadata,
    Column("task", _TASK, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("device", _DEVICE, ForeignKey("devices.name"), primary_key=True),
    Column("report", JSON, nullable=False),
    Column("received_s", Double, nullable=False),
    _of_round(),
)

refusals = Table(
    "refusals",
    metadata,
    # round 0: a refusal that belongs to no round of the task
    _task_key(primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(40), primary_key=True),
    Column("count", BigInteger, nullable=False),
)

changes = Table(
    "changes",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("task", _TASK, nullable=False),
    Column("number", Integer),
    Column("kind", String(20), nullable=False),
    Column("device", _DEVICE),
    Column("at_s", Double, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("task", _TASK, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("owner", String(40), nullable=False),
    Column("expires_s", Double, nullable=False),
    _of_round(),
)

# blobs that were to be deleted because nothing referred to them: whoever stores one anew looks whether it is there
orphans = Table(
    "orphans",
    metadata,
    Column("digest", _DIGEST, primary_key=True),
    Column("found_s", Double, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(20), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

Index("ix_uploads_device", uploads.c.device)
Index("ix_uploads_digest", uploads.c.digest)


def upsert(
    connection: Connection,
    table: Table,
    key: Mapping[str, Any],
    values: Mapping[str, Any],
    on_conflict: Mapping[str, Any] | None = None,
) -> None:
    """Inserts a row, or updates the one of the same key, with `on_conflict` where that differs from `values`."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    statement = insert(table).values(**key, **values)
    connection.execute(
        statement.on_conflict_do_update(index_elements=list(key), set_=dict(on_conflict or values))
    )
