"""Rows of the store as frozen dataclasses, one class a table; times are seconds since the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Row

from edgestill.coordinator.rounds.round import Accepted, Round
from edgestill.coordinator.task.task import Task, parse_task

REVOKED = "revoked "
"""Begins what stands in the place of a revoked device's token: nothing has that for its SHA-256."""


@dataclass(frozen=True)
class TaskRecord:
    """A task as it stands."""

    name: str
    task: Task
    created_s: float
    finished: bool
    student_state: str | None
    """Blob with the global student's state after the last completed round."""
    stopped_s: float | None = None
    """When the operator stopped it; it is finished, too, then."""
    best_round: int | None = None
    """Whose global model is the best on the validation images; None without such images, or before the first round."""

    @classmethod
    def from_row(cls, row: Row[Any]) -> TaskRecord:
        task = parse_task(row.definition)
        return cls(
            row.name, task, row.created_s, row.finished, row.student_state, row.stopped_s, row.best_round
        )

    @property
    def ended(self) -> str | None:
        """How the task ended, in a word; None while it has rounds left."""
        if self.stopped_s is not None:
            return "stopped"
        return "finished" if self.finished else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "task": self.task.as_json()}


@dataclass(frozen=True)
class DeviceRecord:
    """A device and what was last heard of it; never its token."""

    name: str
    task: str
    info: Mapping[str, Any]
    status: Mapping[str, Any]
    """The last STATUS; empty before the first."""
    student: str | None
    """The student it trains, once it has asked for its assignment."""
    bundle: str | None
    enrolled_s: float
    seen_s: float
    stored_bytes: int
    """Uploads stored in this task."""
    number: int | None = None
    """From 1, by the code with which it enrolled: what it draws and where it stands follow from this, not from its
    name, so that a federation can be repeated. None for devices of older coordinators."""
    revoked: bool = False
    """Whether its token is worth nothing any more."""

    @classmethod
    def from_row(cls, row: Row[Any]) -> DeviceRecord:
        return cls(
            row.name,
            row.task,
            json_object(row.info),
            json_object(row.status),
            row.student,
            row.bundle,
            row.enrolled_s,
            row.seen_s,
            row.stored_bytes,
            row.number,
            row.token_hash.startswith(REVOKED),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RoundRecord:
    """A round with what was published and measured; `round` is what the state machine knows."""

    task: str
    round: Round
    closed_s: float | None
    published_bytes: int | None
    metrics: Mapping[str, Any]
    """Of step 5: t_uni, loss, validation_accuracy, distil_loss, steps, seconds, uploads, …; empty until completed."""
    version: int
    student_state: str | None = None
    """Blob with the global student's state after this round. Of the best and of the last completed round it is kept,
    others are deleted when they have lain for a day."""

    @classmethod
    def from_row(cls, row: Row[Any]) -> RoundRecord:
        round = Round(
            row.number,
            row.phase,
            row.opened_s,
            row.deadline_s,
            begun_s=row.begun_s,
            reason=row.reason,
            published=row.published,
        )
        metrics = json_object(row.metrics)
        return cls(
            row.task, round, row.closed_s, row.published_bytes, metrics, row.version, row.student_state
        )

    @property
    def number(self) -> int:
        return self.round.number

    @property
    def name(self) -> str:
        return f"{self.task}.{self.round.number}"


@dataclass(frozen=True)
class PartInRound:
    """One device's part in a round, in the form of a `Round` that has no other devices."""

    selected: frozenset[str]
    accepted: Mapping[str, Accepted]
    stored_bytes: int
    """Uploads that the device has stored in its task."""


@dataclass(frozen=True)
class UploadRecord:
    """An acknowledged upload; its body as sent is the blob `digest`."""

    device: str
    digest: str
    size_bytes: int
    content_encoding: str
    samples: int
    class_counts: tuple[int, ...] | None
    received_s: float

    @classmethod
    def from_row(cls, row: Row[Any]) -> UploadRecord:
        counts = None if row.class_counts is None else tuple(row.class_counts)
        return cls(
            row.device, row.digest, row.size_bytes, row.content_encoding, row.samples, counts, row.received_s
        )


@dataclass(frozen=True)
class ReportRecord:
    """What a device said about its part of a round."""

    number: int
    device: str
    report: Mapping[str, Any]
    received_s: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RefusalCount:
    """How often something was refused; round 0 stands for no particular round."""

    number: int
    kind: str
    count: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Change:
    """Something that a page may want to show; `sequence` only grows, also across replicas."""

    sequence: int
    task: str
    number: int | None
    kind: str
    """task, device, round, selected, upload, report, refusal."""
    device: str | None
    at_s: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def json_object(value: Any) -> dict[str, Any]:
    """A JSON column's value; empty where it is null."""
    return dict(value or {})
