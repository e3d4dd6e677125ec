"""Draws result lines: step time and memory beside eager PyTorch's, one row of panels a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from edgestill.benchmarks.report import case_key, case_title

# Okabe and Ito's palette, told apart with any colour vision: eager PyTorch grey, the engines in colour.
EAGER_COLOUR, TIME_COLOUR, MEMORY_COLOUR = "#999999", "#0072B2", "#D55E00"


def plot_results(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG with bars of time ratio and peak memory; the dashed line is eager PyTorch.

    Errors: ImportError without matplotlib, ValueError when no line was measured, OSError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [line for line in lines if "error" not in line]
    if not measured:
        raise ValueError("nothing was measured, so there is nothing to plot")
    cases = [list(group) for _, group in groupby(measured, key=case_key)]
    heights = [0.42 * len(case) + 1.1 for case in cases]
    figure, panels = pyplot.subplots(
        len(cases),
        2,
        figsize=(11, sum(heights)),
        squeeze=False,
        sharey="row",
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for case, (time_panel, memory_panel) in zip(cases, panels, strict=True):
        names = [line["engine"] for line in case]
        by_ratio = case[0]["ratio_to_eager"] is not None
        _bars(
            time_panel,
            names,
            [line["ratio_to_eager" if by_ratio else "p50_ms"] for line in case],
            [
                f"{line['ratio_to_eager']:.2f}  ({line['p50_ms']:.1f} ms)"
                if by_ratio
                else f"{line['p50_ms']:.1f} ms"
                for line in case
            ],
            TIME_COLOUR,
        )
        time_panel.invert_yaxis()  # the memory panel shares the axis
        time_panel.set_title(case_title(case[0]), loc="left", fontweight="bold")
        time_panel.set_xlabel(
            "step time ÷ eager PyTorch (dashed), lower is better" if by_ratio else "median step, ms"
        )
        memory_mb = [(line["peak_rss_bytes"] or 0) / 1e6 for line in case]
        _bars(
            memory_panel,
            names,
            memory_mb,
            [f"{value:.0f} MB" if value else "–" for value in memory_mb],
            MEMORY_COLOUR,
        )
        memory_panel.set_xlabel("peak resident memory in MB, lower is better")
        if by_ratio:
            time_panel.axvline(1.0, color="black", linestyle="--", linewidth=1, zorder=2)
        if names[0].startswith("torch-eager") and memory_mb[0]:
            memory_panel.axvline(memory_mb[0], color="black", linestyle="--", linewidth=1, zorder=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(
    panel: Any, names: Sequence[str], values: Sequence[float], texts: Sequence[str], colour: str
) -> None:
    colours = [EAGER_COLOUR if name.startswith("torch-eager") else colour for name in names]
    bars = panel.barh(names, values, color=colours, height=0.66)
    # white behind a number, so that the dashed line does not run through it
    panel.bar_label(
        bars,
        texts,
        padding=4,
        fontsize=9,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    panel.set_xlim(0, max(values, default=0) * 1.4 or 1)
    panel.spines[["top", "right"]].set_visible(False)
