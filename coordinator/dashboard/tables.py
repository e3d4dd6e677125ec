"""What pages show, as CSV for a spreadsheet; a field that a device wrote can start no formula there."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from edgestill.coordinator.dashboard.views import DeviceHistory, TaskView

ROUND_COLUMNS = (
    "round", "phase", "reason", "opened_s", "took_s", "goal", "selected", "accepted", "refused", "bytes_up",
    "bytes_down", "global_t_uni", "global_loss", "best", "validation_accuracy", "before_t_priv", "before_t_uni",
    "before_loss", "after_t_priv", "after_t_uni", "after_loss", "alone_t_priv", "alone_t_uni", "alone_loss",
)  # fmt: skip
REPORT_COLUMNS = (
    "device", "name", "round", "phase", "part", "before_t_priv", "before_t_uni", "before_loss", "after_t_priv",
    "after_t_uni", "after_loss", "alone_t_priv", "alone_t_uni", "alone_loss", "step_ms", "bytes_up", "bytes_down",
    "epsilon",
)  # fmt: skip


def rounds_csv(task: TaskView) -> str:
    """A row a round; times in seconds since the epoch, accuracies 0 to 1, means over devices."""
    return _table(ROUND_COLUMNS, (_row(one, ROUND_COLUMNS, round=one.number) for one in task.rounds))


def reports_csv(histories: Iterable[DeviceHistory]) -> str:
    """A row for each device and round that it took part in."""
    rows = (
        _row(part, REPORT_COLUMNS, device=one.view.device, name=one.view.label, round=part.number)
        for one in histories
        for part in one.parts
    )
    return _table(REPORT_COLUMNS, rows)


def _row(one: Any, columns: Iterable[str], **given: Any) -> list[Any]:
    def value(column: str) -> Any:
        when, _, name = column.partition("_")
        if when in ("before", "after", "alone"):
            return getattr(getattr(one, when), name)
        return given[column] if column in given else getattr(one, column)

    return [_safe(value(column)) for column in columns]


def _safe(value: Any) -> Any:
    """Source: OWASP, "CSV Injection"."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _table(columns: Iterable[str], rows: Iterable[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
