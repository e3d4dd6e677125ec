"""Accuracy against the size of the student's latent, from far below the teacher's to far above it."""

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
from edgestill.benchmarks.experiments.series import collect, draw_series, having, summarise, table_of
from edgestill.benchmarks.experiments.tables import Table

NAME = "latent-size"
TITLE = "Latent size: students of l from 8 to 1024"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
SAMPLES = 1000
SEEDS = 3
HEAD_EPOCHS = 2
HEAD_CPU_MINUTES = 2.5
METHODS = ("ce", "crd", "lkd")
"""`lkd` needs a teacher whose latent is as large: the teacher's representation and output layer are trained anew for
each size on its frozen perception module. `crd` projects both latents, so that its teacher stays the one."""


def stages(options: Options) -> list[Stage]:
    """The teachers, the first one's perception module in all; then every size with every method."""
    base = base_settings(options)
    teacher = base["teacher"]
    seeds = range(options.seeds or (2 if options.quick else SEEDS))
    sizes, samples = ((8, 64), 200) if options.quick else (SIZES, SAMPLES)

    def teacher_of(size: int) -> dict[str, Any]:
        heads = {"latent_size": size, "epochs": HEAD_EPOCHS}
        return {
            **teacher,
            **heads,
            "of_latent_size": teacher["latent_size"],
            "base_epochs": teacher["epochs"],
        }

    def heads(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        common = {"stage": "teacher", "data": base["data"], "division": base["division"]}
        return [Cell(NAME, {**common, "teacher": teacher_of(size)}) for size in sizes]

    def students(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        of_method = {method: chosen(method, samples) for method in METHODS}
        of_method["crd"]["export_options"] += ["--teacher-latent-size", str(teacher["latent_size"])]
        return [
            Cell(NAME, {"stage": "student", "method": method, "seed": seed, "samples": samples, "gamma": 1.0,
                        "score_on": "test", **of_method[method], **base, "latent_size": size,
                        "epochs": epochs_for(samples, options),
                        "teacher": teacher_of(size) if method == "lkd" else teacher})
            for size in sizes
            for seed in seeds
            for method in METHODS
        ]  # fmt: skip

    return [teacher_stage(NAME, options), heads, students]


run_cell = make_run


def estimate_minutes(options: Options, workers: int) -> float:
    """Measured: docs/experiments.md."""
    if options.quick:
        return 3.0
    runs = (options.seeds or SEEDS) * len(METHODS) * len(SIZES)
    # the largest latents make a step up to half as dear again
    shared = HEAD_CPU_MINUTES * len(SIZES) + runs * 1.15 * student_cpu_minutes(SAMPLES)
    return TEACHER_CPU_MINUTES + shared / workers


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    """Accuracy of students and teachers against the latent size."""
    students = having(records, stage="student")
    require_one_each(students, ("latent_size", "method", "seed"))
    series = collect(students, "latent_size")
    teachers = having(records, stage="teacher")
    rows = [
        [r["settings"]["teacher"]["latent_size"],
         "heads alone" if "of_latent_size" in r["settings"]["teacher"] else "whole", r["result"]["uni"]]
        for r in teachers
    ]  # fmt: skip
    tables = [
        table_of(series, "l", "Accuracy against the student's latent size"),
        Table("Teachers, accuracy on all test images", ("l", "trained", "accuracy"), rows),
    ]
    return Report(
        tables,
        [Figure("accuracy", lambda canvas: draw_series(canvas, series, "latent size l", 2), width=11)],
        summarise(series),
    )
