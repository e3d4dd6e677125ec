"""Accuracy against how skewed one device's class distribution is, and against how many images it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgestill.benchmarks.experiments.figures import COLOURS, Figure
from edgestill.benchmarks.experiments.grid import Cell, Options, Stage
from edgestill.benchmarks.experiments.methods import chosen
from edgestill.benchmarks.experiments.protocol import (
    TEACHER_CPU_MINUTES,
    base_settings,
    epochs_for,
    make_run,
    student_cpu_minutes,
    teacher_stage,
)
from edgestill.benchmarks.experiments.report import Report, require_one_each
from edgestill.benchmarks.experiments.series import (
    by_seed,
    collect,
    compare,
    draw_series,
    having,
    summarise,
    table_of,
)
from edgestill.benchmarks.experiments.sources import CLASSES

NAME = "heterogeneity"
TITLE = "Heterogeneity: accuracy against γ, k-shot classes and the number of samples"
METHODS = ("ce", "kd", "lkd")
"""With the settings that experiment `methods` chose for them."""
GAMMAS = (0.25, 0.5, 1.0, 2.5, 5.0, 5000.0)
SEEDS = 3


def stages(options: Options) -> list[Stage]:
    """The teacher; then every γ, number of classes and number of samples with every method."""
    base = base_settings(options)
    seeds = range(options.seeds or (2 if options.quick else SEEDS))
    gammas, sizes, ways = (GAMMAS, (250, 500, 1000, 2000), (2, 5))
    usual = 500  # so few that no class of the stock runs out, however skewed
    if options.quick:
        gammas, sizes, ways, usual = (0.25, 1.0, 5000.0), (100, 200), (2,), 200

    def cells(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        points: list[dict[str, Any]] = [{"gamma": gamma, "samples": usual} for gamma in gammas]
        points += [{"gamma": 1.0, "samples": size} for size in sizes if size != usual]
        points += [{"ways": count, "samples": usual // count * count} for count in ways]
        return [
            Cell(NAME, {**point, "method": method, "seed": seed, "score_on": "test",
                        **chosen(method, point["samples"]), **base, "epochs": epochs_for(point["samples"], options)})
            for point in points
            for seed in seeds
            for method in METHODS
        ]  # fmt: skip

    return [teacher_stage(NAME, options), cells]


run_cell = make_run


def estimate_minutes(options: Options, workers: int) -> float:
    """Measured: docs/experiments.md."""
    if options.quick:
        return 3.0
    sizes = [500] * (len(GAMMAS) + 2) + [250, 1000, 2000]
    runs = (options.seeds or SEEDS) * len(METHODS)
    return TEACHER_CPU_MINUTES + runs * sum(map(student_cpu_minutes, sizes)) / workers


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    """Accuracy against γ, classes and samples, and what the devices' class distributions were."""
    require_one_each(records, ("gamma", "ways", "samples", "method", "seed"))
    sweeps = {
        "gamma": ("γ", "Accuracy against the concentration γ of the class distribution"),
        "samples": ("samples", "Accuracy against the number of private samples, γ = 1"),
        "ways": ("classes", "Accuracy with as many samples of each of a few classes (k-shot)"),
    }
    found = {name: collect(_sweep(records, name), name) for name in sweeps}
    tables = [table_of(found[name], x_label, title) for name, (x_label, title) in sweeps.items()]
    pairs = {
        f"{ours} − {theirs}, {sweeps[name][0]} {value:g}": tuple(
            by_seed(_sweep(records, name), method=method, **{name: value}) for method in (ours, theirs)
        )
        for name in sweeps
        for ours, theirs in (("lkd", "ce"), ("kd", "ce"), ("lkd", "kd"))
        for value in found[name]["lkd"]
    }
    tables.append(compare(pairs, "Latents and logits against labels alone and each other"))
    figures = [
        Figure(
            name, lambda canvas, name=name: draw_series(canvas, found[name], sweeps[name][0], 10), width=11
        )
        for name in ("gamma", "samples")
    ]
    figures.append(Figure("labels", lambda canvas: _draw_labels(canvas, records), width=11, height=3.5))
    return Report(tables, figures, {name: summarise(series) for name, series in found.items()})


def _sweep(records: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The runs along one setting; the device with γ = 1 and the usual number of samples is in two of them."""
    skewed = [record for record in records if "gamma" in record["settings"]]
    if name == "ways":
        return [record for record in records if "ways" in record["settings"]]
    if name == "samples":
        return having(skewed, gamma=1.0)
    usual = {record["settings"]["samples"] for record in skewed if record["settings"]["gamma"] != 1}
    if len(usual) != 1:
        raise LookupError("no runs of other γ than 1")
    return having(skewed, samples=usual.pop())


def _draw_labels(canvas: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Stacked bars: the shares of the classes, a bar for each seed's device, a panel for each γ."""
    counts: dict[float, dict[int, list[int]]] = {}
    for record in _sweep(records, "gamma"):
        settings = record["settings"]
        counts.setdefault(settings["gamma"], {})[settings["seed"]] = record["result"]["class_counts"]
    panels = canvas.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    colours = [*COLOURS, "#F0E442", "#882255"]
    for axes, (gamma, devices) in zip(panels, sorted(counts.items()), strict=True):
        bottom = [0.0] * len(devices)
        for label in range(CLASSES):
            shares = [devices[seed][label] / sum(devices[seed]) for seed in devices]
            axes.bar([str(seed) for seed in devices], shares, bottom=bottom, color=colours[label],
                     edgecolor="white", linewidth=0.4)  # fmt: skip
            bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
        axes.set(title=f"γ = {gamma:g}", xlabel="seed")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of each of the ten classes")
