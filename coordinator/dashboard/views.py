"""What the dashboard shows, from the store's records: pure functions to frozen values and charts.

Reports and descriptions of devices are what devices say about themselves: every value is checked before it counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from edgestill.coordinator.dashboard.formats import format_bytes
from edgestill.coordinator.distillation.job import VALIDATION
from edgestill.coordinator.liveness import SILENT, Liveness
from edgestill.coordinator.problems import CATALOG
from edgestill.coordinator.rounds.round import ABANDONED, COMPLETED, FINAL_PHASES
from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.store.records import DeviceRecord, RefusalCount, TaskRecord

LONGEST_NAME = 80
LARGEST = 1e18  # more than any count, size or time that is meant
PACE_ROUNDS = 10
"""The last rounds that have ended, by which the rest is estimated."""


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
    alone: Means
    """Of the same students trained on their own, where devices compare."""
    refused: int
    took_s: float | None


@dataclass(frozen=True)
class DeviceView:
    """One device, with the newest that it said of itself."""

    device: str
    label: str
    state: str
    """One of `liveness.STATES`."""
    student: str | None
    engine: str | None
    step_ms: float | None
    memory_text: str
    battery_text: str
    samples: int | None
    class_counts: tuple[int, ...] | None
    after: Means
    alone: Means
    last_seen_s: float


@dataclass(frozen=True)
class PartView:
    """What a device did in a round, and what it said of it."""

    number: int
    phase: str
    part: str
    """uploaded, selected, or a dash."""
    before: Means
    after: Means
    alone: Means
    global_t_uni: float | None
    step_ms: float | None
    bytes_up: float | None
    bytes_down: float | None
    epsilon: float | None


@dataclass(frozen=True)
class DeviceHistory:
    """One device with its part in every round that it was selected for."""

    view: DeviceView
    enrolled_s: float
    engines: str
    processor: str
    parts: tuple[PartView, ...]

    @property
    def uploads(self) -> int:
        return sum(one.part == "uploaded" for one in self.parts)


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
    transfer: str
    """How many samples outputs are exchanged on, and who knows their classes."""
    mode: str
    precision: str
    aggregation: str
    goal: int
    minimum: int
    rounds_planned: int
    rounds: tuple[RoundView, ...]
    devices: tuple[DeviceView, ...]
    refusals: tuple[RefusalView, ...]
    class_names: tuple[str, ...]
    has_model: bool
    """Whether there is a global model to take out."""
    seconds_left: float | None
    """Until the last round ends, at the pace of the last ones; None where nobody knows."""

    @property
    def gain(self) -> Means:
        """Together minus alone, the mean over the devices that told both."""

        def mean(name: str) -> float | None:
            pairs = ((getattr(one.after, name), getattr(one.alone, name)) for one in self.devices)
            gains = [together - alone for together, alone in pairs if None not in (together, alone)]
            return fmean(gains) if gains else None

        return Means(mean("t_priv"), mean("t_uni"), None)

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

    @property
    def latest_validation(self) -> float | None:
        found = (one.validation_accuracy for one in reversed(self.rounds))
        return next((accuracy for accuracy in found if accuracy is not None), None)


def view_task(
    record: TaskRecord,
    rounds: Iterable[RoundOverview],
    devices: Iterable[DeviceRecord],
    refusals: Iterable[RefusalCount],
    liveness: Liveness,
) -> TaskView:
    """Everything a page shows of a task."""
    task, counts = record.task, tuple(refusals)
    ordered = sorted(rounds, key=lambda one: one.number)
    by_round: dict[int, int] = {}
    by_kind: dict[str, int] = {}
    for one in counts:
        by_round[one.number] = by_round.get(one.number, 0) + one.count
        by_kind[one.kind] = by_kind.get(one.kind, 0) + one.count
    newest = _newest(ordered)
    views = tuple(_view_round(one, task.goal, by_round.get(one.number, 0)) for one in ordered)
    last = ordered[-1] if ordered else None
    shown = tuple(
        _view_device(one, newest.get(one.name, {}), liveness.state_of(one, last, record.ended is not None))
        for one in sorted(devices, key=lambda one: (-one.seen_s, one.name))
    )
    running = bool(views) and views[-1].phase not in FINAL_PHASES
    return TaskView(
        name=record.name,
        state=record.ended or (views[-1].phase if running else "waiting"),
        exchange=task.exchange,
        transfer=f"{task.transfer.samples} samples, classes known to "
        + ("the coordinator alone" if task.transfer.labelled else "nobody"),
        mode=task.mode,
        precision=task.precision,
        aggregation=task.aggregation.rule.replace("_", " ") + (", aligned" if task.aggregation.align else ""),
        goal=task.goal,
        minimum=task.minimum,
        rounds_planned=task.rounds,
        rounds=views,
        devices=shown,
        refusals=tuple(
            RefusalView(kind, count, CATALOG[kind].title if kind in CATALOG else "")
            for kind, count in sorted(by_kind.items(), key=lambda item: (-item[1], item[0]))
        ),
        class_names=task.class_names,
        has_model=record.student_state is not None
        or (task.exchange == "parameters" and any(one.published is not None for one in ordered)),
        seconds_left=_seconds_left(record, views, shown, liveness.now_s),
    )


def view_devices(
    record: TaskRecord, rounds: Iterable[RoundOverview], devices: Iterable[DeviceRecord], liveness: Liveness
) -> Iterator[DeviceHistory]:
    """Everything that pages show of each device."""
    ordered = sorted(rounds, key=lambda one: one.number)
    newest, parts = _newest(ordered), _parts(ordered)
    last = ordered[-1] if ordered else None
    for device in devices:
        state = liveness.state_of(device, last, record.ended is not None)
        view = _view_device(device, newest.get(device.name, {}), state)
        yield _view_history(device, view, parts.get(device.name, []))


def _parts(ordered: Sequence[RoundOverview]) -> dict[str, list[PartView]]:
    """By device its part in every round that it was selected for or reported."""
    parts: dict[str, list[PartView]] = {}
    for one in ordered:
        accepted, selected = frozenset(one.accepted), frozenset(one.selected)
        for name in selected | one.reports.keys():
            part = "uploaded" if name in accepted else "selected" if name in selected else "–"
            parts.setdefault(name, []).append(_view_part(one, part, one.reports.get(name, {})))
    return parts


def _view_history(device: DeviceRecord, view: DeviceView, parts: Sequence[PartView]) -> DeviceHistory:
    named = device.info.get("engines")
    engines = [one for one in named if isinstance(one, str)] if isinstance(named, list | tuple) else []
    processor = device.info.get("processor")
    return DeviceHistory(
        view=view,
        enrolled_s=device.enrolled_s,
        engines=", ".join(engines) or "–",
        processor=processor if isinstance(processor, str) and processor else "–",
        parts=tuple(parts),
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


def _newest(ordered: Sequence[RoundOverview]) -> dict[str, dict[str, Any]]:
    """The newest that each device reported, field by field: a later report may leave out what an earlier one said.

    But what a student does alone is compared with what it did after the same round, or with nothing.
    """
    newest: dict[str, dict[str, Any]] = {}
    for overview in ordered:
        for name, report in overview.reports.items():
            known = newest.setdefault(name, {})
            known.update((k, v) for k, v in report.items() if v is not None)
            known["alone"] = None if report.get("after") is None else report.get("alone")
    return newest


def _seconds_left(
    record: TaskRecord, rounds: Sequence[RoundView], devices: Sequence[DeviceView], now_s: float
) -> float | None:
    took = [one.took_s for one in rounds if one.took_s is not None][-PACE_ROUNDS:]
    if record.ended is not None or not took or all(one.state == SILENT for one in devices):
        return None
    ended = sum(one.phase in FINAL_PHASES for one in rounds)
    present = rounds[-1]
    begun_s = 0.0 if present.phase in FINAL_PHASES else min(now_s - present.opened_s, fmean(took))
    return fmean(took) * (record.task.rounds - ended) - begun_s


def _view_part(one: RoundOverview, part: str, report: Mapping[str, Any]) -> PartView:
    return PartView(
        number=one.number,
        phase=one.phase,
        part=part,
        before=_figures(report.get("before")),
        after=_figures(report.get("after")),
        alone=_figures(report.get("alone")),
        global_t_uni=_number(one.metrics.get("t_uni")),
        step_ms=_number(report.get("step_ms")),
        bytes_up=_number(report.get("bytes_up")),
        bytes_down=_number(report.get("bytes_down")),
        epsilon=_number(report.get("epsilon")),
    )


def _figures(value: Any) -> Means:
    given = value if isinstance(value, Mapping) else {}
    return Means(*(_number(given.get(name)) for name in ("t_priv", "t_uni", "loss")))


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
        alone=_means(reports, "alone"),
        refused=refused,
        took_s=None if one.closed_s is None else max(0.0, one.closed_s - one.opened_s),
    )


def _means(reports: Sequence[Mapping[str, Any]], when: str) -> Means:
    def mean(name: str) -> float | None:
        figures = (getattr(_figures(report.get(when)), name) for report in reports)
        values = [v for v in figures if v is not None]
        return fmean(values) if values else None

    return Means(mean("t_priv"), mean("t_uni"), mean("loss"))


def _view_device(record: DeviceRecord, report: Mapping[str, Any], state: str) -> DeviceView:
    name = record.info.get("name")
    samples = _number(report.get("samples"))
    return DeviceView(
        device=record.name,
        label=name[:LONGEST_NAME] if isinstance(name, str) and name.strip() else record.name,
        state=state,
        student=record.student,
        engine=report.get("engine") if isinstance(report.get("engine"), str) else None,
        step_ms=_number(report.get("step_ms")),
        memory_text=_memory(record.info, record.status, report),
        battery_text=_battery(record.status),
        samples=None if samples is None else int(samples),
        class_counts=_counts(report.get("class_counts")),
        after=_figures(report.get("after")),
        alone=_figures(report.get("alone")),
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
