"""What the dashboard shows, from the store's records: pure functions to frozen values and charts.

Reports and descriptions of devices are what devices say about themselves: every value is checked before it counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from edgestill.coordinator.dashboard.charts import Chart, Series, bar_chart, heat_map, line_chart
from edgestill.coordinator.distillation.job import VALIDATION
from edgestill.coordinator.problems import CATALOG
from edgestill.coordinator.rounds.round import ABANDONED, COMPLETED, FINAL_PHASES
from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.store.records import DeviceRecord, RefusalCount, TaskRecord

ROUNDS_CHARTED, BARS_CHARTED, DEVICES_CHARTED = 200, 30, 40
LONGEST_NAME = 80
LARGEST = 1e18  # more than any count, size or time that is meant
LINE_STYLES = {"global model": 0, "devices before": 1, "devices after": 2}


@dataclass(frozen=True)
class Means:
    """Means over the devices that reported them: accuracies 0..1, cross-entropy."""

    t_priv: float | None
    t_uni: float | None
    loss: float | None


@dataclass(frozen=True)
class RoundView:
    """One round; bytes are sums over devices."""

    number: int
    phase: str
    goal: int
    accepted: int
    selected: int
    opened_s: float
    deadline_s: float
    reason: str | None
    bytes_up: int | None
    bytes_down: int | None
    global_t_uni: float | None
    global_loss: float | None
    best: bool
    """Whether its global model is the best so far on the validation images."""
    validation_accuracy: float | None
    before: Means
    after: Means
    refused: int


@dataclass(frozen=True)
class DeviceView:
    """One device, with the newest that it said of itself."""

    device: str
    label: str
    student: str | None
    engine: str | None
    step_ms: float | None
    memory_text: str
    battery_text: str
    samples: int | None
    class_counts: tuple[int, ...] | None
    last_seen_s: float


@dataclass(frozen=True)
class RefusalView:
    """How often a kind of problem was answered, all rounds together."""

    kind: str
    count: int
    meaning: str


@dataclass(frozen=True)
class TaskView:
    """One task with its rounds in order, its devices (most recently seen first) and its refusals (most first)."""

    name: str
    state: str
    exchange: str
    mode: str
    precision: str
    aggregation: str
    goal: int
    minimum: int
    rounds_planned: int
    rounds: tuple[RoundView, ...]
    devices: tuple[DeviceView, ...]
    refusals: tuple[RefusalView, ...]

    @property
    def current(self) -> RoundView | None:
        """The round that has not ended."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].phase not in FINAL_PHASES else None

    @property
    def completed(self) -> int:
        return sum(one.phase == COMPLETED for one in self.rounds)

    @property
    def abandoned(self) -> int:
        return sum(one.phase == ABANDONED for one in self.rounds)

    @property
    def device_count(self) -> int:
        return len(self.devices)

    @property
    def refused(self) -> int:
        return sum(one.count for one in self.refusals)

    @property
    def latest_t_uni(self) -> float | None:
        return next((one.global_t_uni for one in reversed(self.rounds) if one.global_t_uni is not None), None)


def view_task(
    record: TaskRecord,
    rounds: Iterable[RoundOverview],
    devices: Iterable[DeviceRecord],
    refusals: Iterable[RefusalCount],
) -> TaskView:
    """Everything a page shows of a task."""
    task, counts = record.task, tuple(refusals)
    ordered = sorted(rounds, key=lambda one: one.number)
    by_round: dict[int, int] = {}
    by_kind: dict[str, int] = {}
    for one in counts:
        by_round[one.number] = by_round.get(one.number, 0) + one.count
        by_kind[one.kind] = by_kind.get(one.kind, 0) + one.count
    newest: dict[str, dict[str, Any]] = {}
    for overview in ordered:
        for name, report in overview.reports.items():
            # field by field: a later report may leave out what an earlier one said
            newest.setdefault(name, {}).update((k, v) for k, v in report.items() if v is not None)
    views = tuple(_view_round(one, task.goal, by_round.get(one.number, 0)) for one in ordered)
    running = bool(views) and views[-1].phase not in FINAL_PHASES
    return TaskView(
        name=record.name,
        state=record.ended or (views[-1].phase if running else "waiting"),
        exchange=task.exchange,
        mode=task.mode,
        precision=task.precision,
        aggregation=task.aggregation.rule.replace("_", " ") + (", aligned" if task.aggregation.align else ""),
        goal=task.goal,
        minimum=task.minimum,
        rounds_planned=task.rounds,
        rounds=views,
        devices=tuple(
            _view_device(one, newest.get(one.name, {}))
            for one in sorted(devices, key=lambda one: (-one.seen_s, one.name))
        ),
        refusals=tuple(
            RefusalView(kind, count, CATALOG[kind].title if kind in CATALOG else "")
            for kind, count in sorted(by_kind.items(), key=lambda item: (-item[1], item[0]))
        ),
    )


def summarise(task: TaskView) -> str:
    """One sentence of what just changed, to be read aloud."""
    if task.current is not None:
        one = task.current
        return f"{task.name}: round {one.number} {one.phase}, {one.accepted} of {one.goal} accepted."
    if task.rounds:
        one = task.rounds[-1]
        return f"{task.name}: {task.state}, round {one.number} {one.phase}."
    return f"{task.name}: {task.state}, {task.device_count} devices."


def draw_curves(task: TaskView) -> list[Chart]:
    """Accuracy on T_uni and on T_priv, loss, and bytes a round; the last rounds where there are many."""
    shown = task.rounds[-ROUNDS_CHARTED:]
    numbers = [one.number for one in shown]

    def lines(title: str, named: Mapping[str, list[float | None]], **options: Any) -> Chart:
        known = [Series(name, tuple(values), LINE_STYLES[name]) for name, values in named.items()]
        # a line that no round has a value for would only fill the legend
        return line_chart(
            title, numbers, [s for s in known if any(v is not None for v in s.values)], **options
        )

    share = {"format_value": format_percent, "limits": (0.0, 1.0)}
    bars = task.rounds[-BARS_CHARTED:]
    return [
        lines(
            "Accuracy on T_uni",
            {
                "global model": [one.global_t_uni for one in shown],
                "devices before": [one.before.t_uni for one in shown],
                "devices after": [one.after.t_uni for one in shown],
            },
            **share,
        ),
        lines(
            "Accuracy on T_priv",
            {
                "devices before": [one.before.t_priv for one in shown],
                "devices after": [one.after.t_priv for one in shown],
            },
            **share,
        ),
        lines(
            "Loss",
            {
                "global model": [one.global_loss for one in shown],
                "devices before": [one.before.loss for one in shown],
                "devices after": [one.after.loss for one in shown],
            },
        ),
        bar_chart(
            "Bytes a round",
            [one.number for one in bars],
            [
                Series("up", tuple(one.bytes_up for one in bars)),
                Series("down", tuple(one.bytes_down for one in bars), 1),
            ],
            format_value=format_bytes,
        ),
    ]


def draw_classes(task: TaskView) -> Chart:
    """The class distributions that devices shared, those of the devices most recently seen."""
    shared = [one for one in task.devices if one.class_counts][:DEVICES_CHARTED]
    title = "Class distribution of each device"
    if sum(one.class_counts is not None for one in task.devices) > DEVICES_CHARTED:
        title += f" (the {DEVICES_CHARTED} seen last)"
    return heat_map(title, [one.label for one in shared], [one.class_counts or () for one in shared])


def format_percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.3g} %"


def format_bytes(value: float | None) -> str:
    """Decimal units, three digits: 12.3 MB."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError("unreachable: TB ends the loop")


def format_milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.3g} s" if value >= 999.5 else f"{value:.3g} ms"


def format_ago(at_s: float, now_s: float) -> str:
    """The same words as in static/dashboard.js."""
    seconds = now_s - at_s
    if seconds < 5:
        return "just now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def format_left(at_s: float, now_s: float) -> str:
    """The same words as in static/dashboard.js."""
    seconds = at_s - now_s
    if seconds <= 0:
        return "deadline reached"
    if seconds < 60:
        return f"{math.ceil(seconds)} s left"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s left"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min left"


def format_moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def _view_round(one: RoundOverview, goal: int, refused: int) -> RoundView:
    reports = tuple(one.reports.values())
    down = [n for report in reports if (n := _number(report.get("bytes_down"))) is not None]
    return RoundView(
        number=one.number,
        phase=one.phase,
        goal=goal,
        accepted=len(one.accepted),
        selected=len(one.selected),
        opened_s=one.opened_s,
        deadline_s=one.deadline_s,
        reason=one.reason,
        bytes_up=one.bytes_up if one.accepted else None,
        bytes_down=int(sum(down)) if down else None,
        global_t_uni=_number(one.metrics.get("t_uni")),
        global_loss=_number(one.metrics.get("loss")),
        best=one.best,
        validation_accuracy=_number(one.metrics.get(VALIDATION)),
        before=_means(reports, "before"),
        after=_means(reports, "after"),
        refused=refused,
    )


def _means(reports: Sequence[Mapping[str, Any]], when: str) -> Means:
    def mean(name: str) -> float | None:
        parts = (report.get(when) for report in reports)
        values = [v for p in parts if isinstance(p, Mapping) and (v := _number(p.get(name))) is not None]
        return fmean(values) if values else None

    return Means(mean("t_priv"), mean("t_uni"), mean("loss"))


def _view_device(record: DeviceRecord, report: Mapping[str, Any]) -> DeviceView:
    name = record.info.get("name")
    samples = _number(report.get("samples"))
    return DeviceView(
        device=record.name,
        label=name[:LONGEST_NAME] if isinstance(name, str) and name.strip() else record.name,
        student=record.student,
        engine=report.get("engine") if isinstance(report.get("engine"), str) else None,
        step_ms=_number(report.get("step_ms")),
        memory_text=_memory(record.info, record.status, report),
        battery_text=_battery(record.status),
        samples=None if samples is None else int(samples),
        class_counts=_counts(report.get("class_counts")),
        last_seen_s=record.seen_s,
    )


def _memory(info: Mapping[str, Any], status: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    # what is offered may be a limit that the device set, far below what the machine has
    figures = (
        (report.get("peak_rss_bytes"), "used"),
        (info.get("memory_bytes"), "offered"),
        (status.get("memory_free_bytes"), "free on the machine"),
    )
    known = ((number, text) for value, text in figures if (number := _number(value)) is not None)
    return ", ".join(f"{format_bytes(number)} {text}" for number, text in known) or "–"


def _battery(status: Mapping[str, Any]) -> str:
    charge = _number(status.get("battery"))
    if charge is None:
        return "–"
    return f"{charge * 100:.0f} %" + (", charging" if status.get("charging") is True else "")


def _number(value: Any) -> float | None:
    """A number from 0 to LARGEST; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= LARGEST else None  # False for NaN


def _counts(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list | tuple) or len(value) > 1000:
        return None
    numbers = [_number(one) for one in value]
    return tuple(int(n) for n in numbers) if numbers and None not in numbers else None  # type: ignore[arg-type]
