"""Plots of experiments: each as PNG and SVG, in colours that everybody can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart with any colour vision; markers tell lines apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Figure:
    """`draw` fills an empty matplotlib figure; `name` is part of the files' names; sizes are in inches."""

    name: str
    draw: Callable[[Any], None]
    width: float = 8.0
    height: float = 4.5


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes STEM-NAME.png and .svg, equal bytes for equal figures. Errors: ImportError without matplotlib, OSError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(figure.width, figure.height), layout="constrained")
    FigureCanvasAgg(canvas)
    figure.draw(canvas)
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "edgestill", "svg.fonttype": "path"}):
        for suffix, options in ((".png", {"dpi": 130}), (".svg", {"metadata": {"Date": None}})):
            path = stem.with_name(f"{stem.name}-{figure.name}{suffix}")
            canvas.savefig(path, **options)
            written.append(path)
    return written


@dataclass(frozen=True)
class Line:
    """Points of one line with the half width of each one's interval; x in increasing order."""

    x: Sequence[float]
    y: Sequence[float]
    half_widths: Sequence[float] | None = None


def draw_lines(
    axes: Any, lines: Mapping[str, Line | None], x_label: str, y_label: str, title: str = ""
) -> None:
    """One line a name, with interval bars and a legend; None keeps a colour for a line of another plot."""
    for index, (name, line) in enumerate(lines.items()):
        if line is None:
            continue
        style = {"color": COLOURS[index % 8], "marker": MARKERS[index % 8], "markersize": 5, "label": name}
        axes.errorbar(line.x, line.y, yerr=line.half_widths, capsize=3, linewidth=1.5, **style)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def draw_bars(
    axes: Any,
    groups: Sequence[str],
    bars: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    y_label: str,
    title: str = "",
    inside: bool = False,
    form: str = ".3f",
) -> None:
    """Groups of bars beside each other; a name's bars are (heights, half widths of the intervals), one a group.

    `inside`: the figures, of the format `form`, stand in the bars, where these are high and something else is marked at
    their tops.
    """
    width = 0.8 / max(1, len(bars))
    for index, (name, (heights, half_widths)) in enumerate(bars.items()):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(
            places, heights, width * 0.92, yerr=half_widths, capsize=3, color=COLOURS[index % 8], label=name
        )
        place: dict[str, Any] = {"label_type": "center", "color": "white"} if inside else {"padding": 2}
        axes.bar_label(drawn, [f"{height:{form}}" for height in heights], fontsize=8, **place)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel=y_label, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    if len(bars) > 1:
        axes.legend(frameon=False, fontsize=9)
