"""What the store gives back, as frozen dataclasses; times are seconds since the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgestill.coordinator.rounds.round import Accepted, Round
from edgestill.coordinator.task.task import Task


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
    """Of step 5: t_uni, loss, distil_loss, steps, seconds, uploads, …; empty until completed."""
    version: int

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


@dataclass(frozen=True)
class RoundOverview:
    """A round as pages and the command line show it."""

    task: str
    number: int
    phase: str
    opened_s: float
    deadline_s: float
    closed_s: float | None
    reason: str | None
    selected: tuple[str, ...]
    accepted: tuple[str, ...]
    bytes_up: int
    """Of the accepted uploads' bodies."""
    published: str | None
    published_bytes: int | None
    metrics: Mapping[str, Any]
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """REPORT by device."""

    @property
    def name(self) -> str:
        return f"{self.task}.{self.number}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name}
