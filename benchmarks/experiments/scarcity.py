"""Few private images: with and without an auxiliary transfer set of growing size from another data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgestill.benchmarks.experiments.figures import Figure
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

NAME = "scarcity"
TITLE = "Scarcity: few private images, with auxiliary transfer images of another data set"
METHODS = ("kd", "lkd")
"""With the settings that experiment `methods` chose for them, beside cross-entropy alone."""
SAMPLES = 512
TRANSFER_SAMPLES = (0, 512, 1024, 2048, 4096, 6000)
SEEDS = 3


def stages(options: Options) -> list[Stage]:
    """The teacher; then cross-entropy alone, and each method with every size of the transfer set.

    Half of a batch are transfer images, so runs with them make twice the steps; `longer` runs have as many without.
    """
    base = {**base_settings(options), "transfer_fraction": 0.5}
    seeds = range(options.seeds or (2 if options.quick else SEEDS))
    samples, sizes = (128, (0, 128, 1000)) if options.quick else (SAMPLES, TRANSFER_SAMPLES)
    epochs = epochs_for(samples, options)
    common = {**base, "samples": samples, "gamma": 1.0, "score_on": "test"}

    def cell(method: str, seed: int, size: int, kind: str = "sweep") -> Cell:
        transfer = {"transfer": options.transfer} if size else {}
        return Cell(NAME, {"kind": kind, "method": method, "seed": seed, "transfer_samples": size,
                           **chosen(method, samples), **common, **transfer,
                           "epochs": epochs * (2 if kind == "longer" else 1)})  # fmt: skip

    def cells(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        made = [cell("ce", seed, 0) for seed in seeds]
        for method in METHODS:
            made += [cell(method, seed, size) for size in sizes for seed in seeds]
            made += [cell(method, seed, 0, "longer") for seed in seeds]
        return made

    return [teacher_stage(NAME, options), cells]


run_cell = make_run


def estimate_minutes(options: Options, workers: int) -> float:
    """Measured: docs/experiments.md."""
    if options.quick:
        return 3.0
    steps_of = [1] + [1, 2, *(2 for size in TRANSFER_SAMPLES if size)] * len(METHODS)
    runs = (options.seeds or SEEDS) * sum(student_cpu_minutes(SAMPLES, 25 * n) for n in steps_of)
    return TEACHER_CPU_MINUTES + runs / workers


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    """Accuracy against the size of the transfer set, and what the largest brings over none with as many steps."""
    require_one_each(records, ("kind", "method", "seed", "transfer_samples"))
    series, longer = (collect(having(records, kind=kind), "transfer_samples") for kind in ("sweep", "longer"))
    largest = max(series["lkd"])
    pairs = {}
    for method in METHODS:
        most = by_seed(records, method=method, kind="sweep", transfer_samples=largest)
        others = {
            "none": by_seed(records, method=method, kind="sweep", transfer_samples=0),
            "none, as many steps": by_seed(records, method=method, kind="longer"),
            "ce": by_seed(records, method="ce"),
        }
        pairs |= {
            f"{method}: {largest:g} transfer images − {name}": (most, other) for name, other in others.items()
        }
    pairs[f"lkd − kd, {largest:g} transfer images"] = tuple(
        by_seed(records, method=method, kind="sweep", transfer_samples=largest) for method in ("lkd", "kd")
    )
    tables = [
        table_of(series, "transfer images", "Accuracy against the size of the auxiliary transfer set"),
        table_of(longer, "transfer images", "Without transfer images, as many steps as with them"),
        compare(pairs, "What transfer images bring"),
    ]
    figure = Figure(
        "transfer", lambda canvas: draw_series(canvas, series, "auxiliary transfer images"), width=11
    )
    return Report(tables, [figure], {**summarise(series), "longer": summarise(longer)})
