"""The pictures of the demo's page: accuracies of each device, and rounds, as PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.simulation.demo_results import Results

# Okabe and Ito's palette, told apart with any colour vision
PRIVATE, UNIFORM, GLOBAL, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
CURVES = (("#0072B2", "-"), ("#D55E00", "--"), ("#CC79A7", "-."), ("#000000", ":"))


@dataclass(frozen=True)
class Picture:
    """One picture for wide and one for narrow pages, and what they show for who cannot see them."""

    wide: str
    narrow: str
    text: str


def draw(results: Results, folder: Path) -> list[Picture]:
    """Writes the pictures as PNGs; none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    drawn = []
    for name, text, draw_panels in (
        (
            "accuracy",
            "Bars of each device's accuracy alone, for as many epochs and steps, and together; the table has the "
            "numbers",
            _draw_accuracy,
        ),
        (
            "rounds",
            "T_uni over the rounds, and how many samples of each class every device has",
            _draw_rounds,
        ),
    ):
        files = []
        for suffix, rows, columns, size in (("", 1, 2, (10, 3.6)), ("-narrow", 2, 1, (3.6, 6.2))):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            draw_panels(results, figure, rows, columns)
            files.append(f"{name}{suffix}.png")
            figure.savefig(folder / files[-1], dpi=130 if columns == 2 else 260)
        drawn.append(Picture(*files, text))
    return drawn


def _draw_accuracy(results: Results, figure: Any, rows: int, columns: int) -> None:
    panels = figure.subplots(rows, columns, sharey=True)
    names = [f"{device.name}\n{device.student}" for device in results.devices]
    for panel, key, title, colour in zip(
        panels,
        ("t_priv", "t_uni"),
        ("T_priv: own classes", "T_uni: all classes"),
        (PRIVATE, UNIFORM),
        strict=True,
    ):
        for shift, label, tint, values in (
            (-0.27, "alone, epochs", "#CCCCCC", [device.alone[key] for device in results.devices]),
            (0.0, "alone, steps", GREY, [device.alone_steps[key] for device in results.devices]),
            (0.27, "together", colour, [device.after[-1][key] for device in results.devices]),
        ):
            heights = [100 * (value or 0.0) for value in values]
            places = [index + shift for index in range(len(heights))]
            bars = panel.bar(places, heights, 0.25, color=tint, label=label)
            panel.bar_label(bars, [f"{height:.0f}" for height in heights], padding=1, fontsize=8)
        panel.set_xticks(range(len(names)), names, fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panel.legend(fontsize=8, frameon=False, ncols=3, loc="upper left", columnspacing=1, handlelength=1.2)
        panel.set_ylabel("accuracy in %", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, min(100, 1.25 * panels[0].get_ylim()[1]))


def _draw_rounds(results: Results, figure: Any, rows: int, columns: int) -> None:
    curves, classes = figure.subplots(rows, columns)
    ends = []  # (round, accuracy, label, colour)
    for index, device in enumerate(results.devices):
        colour, dashes = CURVES[index % len(CURVES)]
        shares = [100 * (one["t_uni"] or 0.0) for one in (device.before, *device.after)]
        curves.plot(range(len(shares)), shares, marker="osD^v<>p"[index % 8], markersize=4, linewidth=1.5,
                    color=colour, linestyle=dashes)  # fmt: skip
        ends.append((len(shares) - 1, shares[-1], f"{device.name} ({device.student})", colour))
    points = [(one.number, 100 * one.t_uni) for one in results.rounds if one.t_uni is not None]
    if points:
        curves.plot(*zip(*points, strict=True), marker="*", markersize=9, color=GLOBAL, linewidth=3)
        ends.append((*points[-1], f"global ({results.global_student})", GLOBAL))
    top, last = 1.12 * curves.get_ylim()[1], max(end[0] for end in ends)
    curves.set(xlim=(-0.1, 1.75 * last), ylim=(0, top), xticks=range(last + 1))
    ends.sort(key=lambda end: end[1])
    # each curve says itself what it is, a line of text apart from the others
    for (number, accuracy, label, colour), place in zip(
        ends, spread([end[1] for end in ends], top * 0.08), strict=True
    ):
        curves.annotate(
            label, (number, accuracy), (1.12 * last, place), va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colour, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip
    curves.set_title("T_uni, round by round", loc="left", fontsize=10, fontweight="bold")
    curves.set_xlabel("round", fontsize=9)
    curves.set_ylabel("T_uni in %", fontsize=9)
    curves.spines[["top", "right"]].set_visible(False)
    counts = [list(device.class_counts) for device in results.devices]
    picture = classes.imshow(counts, cmap="Blues", aspect="auto", vmin=0)
    figure.colorbar(picture, ax=classes, shrink=0.8)
    classes.set_title("private samples a class", loc="left", fontsize=10, fontweight="bold")
    classes.set_xlabel("class", fontsize=9)
    classes.set_xticks(range(len(counts[0])))
    classes.set_yticks(range(len(counts)), [device.name for device in results.devices], fontsize=9)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Rising values moved apart to at least `gap`: each run of crowded ones stays around its middle."""
    runs: list[list[float]] = []  # (sum of values, how many)
    for value in values:
        runs.append([value, 1])
        while len(runs) > 1 and _middle(runs[-1]) - _middle(runs[-2]) < gap * (runs[-1][1] + runs[-2][1]) / 2:
            total, count = runs.pop()
            runs[-1] = [runs[-1][0] + total, runs[-1][1] + count]
    return [_middle(run) + gap * (i - (run[1] - 1) / 2) for run in runs for i in range(int(run[1]))]


def _middle(run: Sequence[float]) -> float:
    return run[0] / run[1]
