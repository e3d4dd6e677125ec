"""A round with its uploads and reports, as pages, figures and the command line show it: a few queries a task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgestill.coordinator.store.transaction import Transaction


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
    student_state: str | None = None
    """Blob with the global student after this round; of the best and of the last one it is there."""
    best: bool = False
    """Whether its global model is the best of the task on the validation images."""

    @property
    def name(self) -> str:
        return f"{self.task}.{self.number}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "name": self.name}


def overview_of_rounds(transaction: Transaction, task: str) -> list[RoundOverview]:
    """Every round of a task, by number, with who took part and what they reported."""
    selected: defaultdict[int, list[str]] = defaultdict(list)
    accepted: defaultdict[int, list[str]] = defaultdict(list)
    bytes_up: defaultdict[int, int] = defaultdict(int)
    reports: defaultdict[int, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for number, device in transaction.selections(task):
        selected[number].append(device)
    for number, device, size_bytes in transaction.sizes_of_uploads(task):
        accepted[number].append(device)
        bytes_up[number] += size_bytes
    for report in transaction.reports(task):
        reports[report.number][report.device] = report.report
    found = []
    best = transaction.best_round(task)
    for head in transaction.round_heads(task):
        number, round = head.number, head.round
        found.append(
            RoundOverview(
                task=task,
                number=number,
                phase=round.phase,
                opened_s=round.opened_s,
                deadline_s=round.deadline_s,
                closed_s=head.closed_s,
                reason=round.reason,
                selected=tuple(selected[number]),
                accepted=tuple(accepted[number]),
                bytes_up=bytes_up[number],
                published=round.published,
                published_bytes=head.published_bytes,
                metrics=head.metrics,
                reports=reports[number],
                student_state=head.student_state,
                best=number == best,
            )
        )
    return found
