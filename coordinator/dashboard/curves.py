"""Which curves and bars a page draws of a task, and of one of its devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgestill.coordinator.dashboard.charts import Chart, Series, bar_chart, heat_map, line_chart
from edgestill.coordinator.dashboard.formats import format_bytes, format_milliseconds, format_percent
from edgestill.coordinator.dashboard.views import DeviceHistory, PartView, RoundView, TaskView

ROUNDS_CHARTED, BARS_CHARTED, DEVICES_CHARTED = 200, 30, 40
_STYLES = {"global model": 0, "before": 1, "after": 2, "alone": 3}
_SHARE: dict[str, Any] = {"format_value": format_percent, "bounds": (0.0, 1.0)}

Lines = Mapping[str, Sequence[float | None]]
Rows = Sequence[RoundView] | Sequence[PartView]


def draw_task(task: TaskView) -> list[Chart]:
    """Accuracy on T_uni and on T_priv, loss, and bytes a round; the last rounds where there are many."""
    shown, bars = task.rounds[-ROUNDS_CHARTED:], task.rounds[-BARS_CHARTED:]
    bytes_a_round = bar_chart(
        "Bytes a round",
        [one.number for one in bars],
        [
            Series("up", tuple(one.bytes_up for one in bars)),
            Series("down", tuple(one.bytes_down for one in bars), 1),
        ],
        format_value=format_bytes,
    )
    known = {"global model": [one.global_t_uni for one in shown]}
    if task.latest_t_uni is None:
        known = {"global model on validation images": [one.validation_accuracy for one in shown]}
    losses = {"global model": [one.global_loss for one in shown]}
    return [*_draw_figures(shown, "devices ", known, losses), bytes_a_round]


def draw_device(history: DeviceHistory) -> list[Chart]:
    """The same of one device, and what a step took it."""
    shown = history.parts[-ROUNDS_CHARTED:]
    took = {"a step": [one.step_ms for one in shown]}
    steps = _lines("Time of a step", shown, took, format_value=format_milliseconds, legend=False)
    known = {"global model": [one.global_t_uni for one in shown]}
    return [*_draw_figures(shown, "", known, {}), steps]


def draw_classes(task: TaskView) -> Chart:
    """The class distributions that devices shared, those of the devices most recently seen."""
    shared = [one for one in task.devices if one.class_counts][:DEVICES_CHARTED]
    title = "Class distribution of each device"
    if sum(one.class_counts is not None for one in task.devices) > DEVICES_CHARTED:
        title += f" (the {DEVICES_CHARTED} seen last)"
    counts = [one.class_counts or () for one in shared]
    return heat_map(title, [one.label for one in shared], counts, class_names=task.class_names)


def draw_class_counts(history: DeviceHistory, class_names: Sequence[str]) -> Chart:
    """How many samples of each class the device has, where it shared that."""
    counts = history.view.class_counts or ()
    called = [class_names[k] if k < len(class_names) else str(k) for k in range(len(counts))]
    categories = called if class_names else [*range(len(counts))]
    return bar_chart("Samples of each class", categories, [Series("samples", tuple(counts))], category="class",
                     format_value=lambda v: f"{v:g}", legend=False)  # fmt: skip


def _draw_figures(shown: Rows, whose: str, uni: Lines, losses: Lines) -> list[Chart]:
    def figures(name: str) -> dict[str, list[float | None]]:
        return {f"{whose}{when}": [getattr(getattr(one, when), name) for one in shown]
                for when in ("before", "after", "alone")}  # fmt: skip

    return [
        _lines("Accuracy on T_uni", shown, {**uni, **figures("t_uni")}, **_SHARE),
        _lines("Accuracy on T_priv", shown, figures("t_priv"), **_SHARE),
        _lines("Loss", shown, {**losses, **figures("loss")}),
    ]


def _lines(title: str, shown: Rows, named: Lines, **options: Any) -> Chart:
    # a line that no round has a value for would only fill the legend
    known = [
        Series(name, tuple(values), _STYLES.get(name.removeprefix("devices "), 0))
        for name, values in named.items()
        if any(v is not None for v in values)
    ]
    return line_chart(title, [one.number for one in shown], known, **options)
