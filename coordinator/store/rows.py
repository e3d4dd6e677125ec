"""Rows of the store: as records, and put in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, Table

from edgestill.coordinator.rounds.round import Round
from edgestill.coordinator.store.records import DeviceRecord, RoundRecord, TaskRecord, UploadRecord
from edgestill.coordinator.task.task import parse_task


def task_record(row: Row[Any]) -> TaskRecord:
    return TaskRecord(
        row.name,
        parse_task(row.definition),
        row.created_s,
        row.finished,
        row.student_state,
        row.stopped_s,
    )


def device_record(row: Row[Any]) -> DeviceRecord:
    return DeviceRecord(
        row.name,
        row.task,
        json_object(row.info),
        json_object(row.status),
        row.student,
        row.bundle,
        row.enrolled_s,
        row.seen_s,
        row.stored_bytes,
    )


def round_record(row: Row[Any]) -> RoundRecord:
    round = Round(
        row.number,
        row.phase,
        row.opened_s,
        row.deadline_s,
        begun_s=row.begun_s,
        reason=row.reason,
        published=row.published,
    )
    return RoundRecord(
        row.task, round, row.closed_s, row.published_bytes, json_object(row.metrics), row.version
    )


def upload_record(row: Row[Any]) -> UploadRecord:
    counts = None if row.class_counts is None else tuple(row.class_counts)
    return UploadRecord(
        row.device, row.digest, row.size_bytes, row.content_encoding, row.samples, counts, row.received_s
    )


def json_object(value: Any) -> dict[str, Any]:
    return dict(value or {})


def put_row(
    connection: Connection,
    table: Table,
    key: Mapping[str, Any],
    values: Mapping[str, Any],
    on_conflict: Mapping[str, Any] | None = None,
) -> None:
    """Inserts a row, or updates the one of the same key, with `on_conflict` where that differs from `values`."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as upsert
    else:
        from sqlalchemy.dialects.sqlite import insert as upsert  # type: ignore[assignment]
    statement = upsert(table).values(**key, **values)
    connection.execute(
        statement.on_conflict_do_update(index_elements=list(key), set_=dict(on_conflict or values))
    )
