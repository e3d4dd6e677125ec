"""Draws a simulation: accuracy over the rounds, and what a device sends and receives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart with any colour vision.
PRIVATE, UNIFORM, GLOBAL, ALONE = "#0072B2", "#D55E00", "#009E73", "#999999"


def plot_simulation(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG of a simulation's JSON lines. Errors: ImportError without matplotlib, OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rounds = [line for line in lines if "round" in line]
    summary = lines[-1]["summary"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, traffic = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2, 1]})
    for key, label, colour, style in (
        ("t_priv", "T_priv, devices", PRIVATE, "o-"),
        ("t_uni", "T_uni, devices", UNIFORM, "s-"),
        ("global_t_uni", "T_uni, global student", GLOBAL, "^-"),
    ):
        points = [(line["round"], 100 * line[key]) for line in rounds if line[key] is not None]
        if points:
            accuracy.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    for key, label, colour in (
        ("local_only_t_priv", "T_priv, local only", PRIVATE),
        ("local_only_t_uni", "T_uni, local only", UNIFORM),
    ):
        if summary[key] is not None:
            accuracy.axhline(100 * summary[key], color=colour, linestyle=":", linewidth=1.5, label=label)
    abandoned = [line["round"] for line in rounds if line["phase"] != "completed"]
    for number in abandoned:
        accuracy.axvspan(number - 0.5, number + 0.5, color=ALONE, alpha=0.25, linewidth=0,
                         label="abandoned" if number == abandoned[0] else None)  # fmt: skip
    accuracy.set(xlabel="round", ylabel="accuracy in %, mean of the devices", xlim=(0.5, len(rounds) + 0.5))
    accuracy.set_ylim(bottom=0)
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(fontsize=8, frameon=False)
    numbers = [line["round"] for line in rounds]
    for key, label, colour, shift in (
        ("bytes_up", "up", PRIVATE, -0.2),
        ("bytes_down", "down", UNIFORM, 0.2),
    ):
        means = [line[key] / max(1, line["trainings"]) / 1e3 for line in rounds]
        traffic.bar([number + shift for number in numbers], means, 0.4, color=colour, label=label)
    traffic.set(xlabel="round", ylabel="kB a device that takes part")
    traffic.xaxis.get_major_locator().set_params(integer=True)
    traffic.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    for panel in (accuracy, traffic):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
