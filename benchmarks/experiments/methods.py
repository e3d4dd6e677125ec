"""Cross-entropy alone against four ways of distilling and a fifth that mixes two, on one device's data.

Three stages: how many private images put cross-entropy near the source's figures; each method's own settings by
validation; the final runs, scored on test images. What is chosen is chosen on validation images and on seeds that no
final run has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.experiments.figures import Figure, draw_bars
from benchmarks.experiments.grid import Cell, Context, Options, Stage
from benchmarks.experiments.protocol import (
    TEACHER_CPU_MINUTES,
    base_settings,
    make_run,
    student_cpu_minutes,
    teacher_stage,
)
from benchmarks.experiments.report import Report
from benchmarks.experiments.series import PARTS, compare
from benchmarks.experiments.statistics import Mean, mean_with_interval
from benchmarks.experiments.tables import Table

NAME = "methods"
TITLE = "Methods: ce, kd, crd, lpd, lkd and their best mixture"
METHODS = ("ce", "kd", "crd", "lpd", "lkd", "best")
SOURCE = {"ce": (0.634, 0.492), "kd": (0.631, 0.551), "crd": (0.655, 0.530), "lpd": (0.391, 0.183),
          "lkd": (0.674, 0.544)}  # fmt: skip
"""T_priv and T_uni that the source reports."""
GAMMA = 1.0
FINAL_SEEDS = 8
TUNING_SEED, SAMPLES_SEED = 1000, 2000
"""Where the seeds of the earlier stages start; final seeds count from 0."""
SHARES = (0.5, 0.9, 0.98)
MIXTURES = (("mse", 0.9, 0.2), ("mse", 0.9, 0.5), ("kl", 0.9, 0.5), ("kl", 0.98, 0.5))
CRD_NEGATIVES_PER_IMAGE = 16384 / 50000
"""Of the authors' implementation, which this scales to the data."""


def candidates(method: str, samples: int) -> list[dict[str, Any]]:
    """The settings among which validation chooses for a method, as parts of a run's settings."""
    if method == "ce":
        return [{"objective": "ce"}]
    if method == "best":
        return [
            {"objective": "both", "export_options": ["--kd-loss", loss],
             "hyperparameters": {"alpha": alpha, "logit_share": share}}
            for loss, alpha, share in MIXTURES
        ]  # fmt: skip
    options: dict[str, Any] = {}
    if method == "crd":
        options["export_options"] = ["--negatives", str(round(CRD_NEGATIVES_PER_IMAGE * samples))]
    shares = (0.2, 0.45, 0.8) if method == "crd" else (0.1, 0.5, 0.9) if method == "lpd" else SHARES
    return [{"objective": method, "hyperparameters": {"alpha": alpha}, **options} for alpha in shares]


def stages(options: Options) -> list[Stage]:
    """The teacher and the number of samples; each method's settings; the final runs."""
    base = base_settings(options)
    sizes = (200, 300) if options.quick else (1000, 1500, 2000)
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + (1 if options.quick else 2))
    samples_seeds = range(SAMPLES_SEED, SAMPLES_SEED + (1 if options.quick else 4))
    final_seeds = range(options.seeds or (2 if options.quick else FINAL_SEEDS))

    def cell(stage: str, method: str, seed: int, samples: int, own: Mapping[str, Any]) -> Cell:
        settings = {"stage": stage, "method": method, "seed": seed, "samples": samples, "gamma": GAMMA,
                    "score_on": "test" if stage == "final" else "validation", **own, **base}  # fmt: skip
        return Cell(NAME, settings)

    def amount(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        return [
            cell("samples", "ce", seed, samples, {"objective": "ce"})
            for samples in sizes
            for seed in samples_seeds
        ]

    def tuning(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        samples = choose_samples(records)
        return [
            cell("tuning", method, seed, samples, own)
            for method in METHODS[1:]
            for own in candidates(method, samples)
            for seed in tuning_seeds
        ]

    def final(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        samples = choose_samples(records)
        return [
            cell("final", method, seed, samples, choose_settings(records, method, samples))
            for seed in final_seeds
            for method in METHODS
        ]

    return [teacher_stage(NAME, options), amount, tuning, final]


def run_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Trains and scores one student, or the teacher."""
    return make_run(settings, context, state_name(settings) if settings["stage"] == "final" else None)


def redo(cell: Cell, folder: Path) -> bool:
    """Whether a run's final state is wanted in `folder` and not there."""
    settings = cell.settings
    return settings["stage"] == "final" and not (folder / f"{state_name(settings)}.safetensors").exists()


def state_name(settings: Mapping[str, Any]) -> str:
    return f"{settings['method']}-seed{settings['seed']}"


def estimate_cpu_minutes(options: Options) -> float:
    """Measured: docs/experiments.md."""
    if options.quick:
        return 4.0
    runs = (4 * 3 + 2 * (4 * 3 + len(MIXTURES))) + (options.seeds or FINAL_SEEDS) * len(METHODS)
    return TEACHER_CPU_MINUTES + runs * student_cpu_minutes(1500)


def choose_samples(records: Sequence[Mapping[str, Any]]) -> int:
    """The number of samples with which cross-entropy alone comes nearest to the source's figures on validation."""
    found = _by(_of_stage(records, "samples"), lambda settings: settings["samples"])

    def distance(samples: int) -> float:
        scores = [fmean(result[part] for result in found[samples]) for part in PARTS]
        return sum((score - wanted) ** 2 for score, wanted in zip(scores, SOURCE["ce"], strict=True))

    return min(sorted(found), key=distance)


def choose_settings(records: Sequence[Mapping[str, Any]], method: str, samples: int) -> dict[str, Any]:
    """The candidate with the best mean of both validation accuracies over the tuning seeds; the first of equals."""
    of_method = [r for r in _of_stage(records, "tuning") if r["settings"]["method"] == method]

    def score(own: Mapping[str, Any]) -> float:
        return fmean(
            (record["result"]["priv"] + record["result"]["uni"]) / 2
            for record in of_method
            if all(record["settings"].get(name) == value for name, value in own.items())
        )

    offered = candidates(method, samples)
    return offered[0] if len(offered) == 1 else max(offered, key=score)


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    """Accuracies with 95 % intervals beside the source's, paired tests, and what validation chose."""
    final = _of_stage(records, "final")
    results = {
        method: {r["settings"]["seed"]: r["result"] for r in final if r["settings"]["method"] == method}
        for method in METHODS
    }
    means = {
        method: {
            f"t_{part}": mean_with_interval([result[part] for result in by_seed.values()]) for part in PARTS
        }
        for method, by_seed in results.items()
    }
    summary = {
        method: {part: mean.as_json() for part, mean in parts.items()} for method, parts in means.items()
    }
    tables = [_accuracies(means), *(_tests(results, first) for first in ("lkd", "best")), _tuning(records)]
    return Report(tables, [Figure("accuracy", lambda canvas: _draw(canvas, means))], summary, _notes(records))


def _accuracies(means: Mapping[str, Mapping[str, Mean]]) -> Table:
    rows = []
    for method in METHODS:
        priv, uni = means[method]["t_priv"], means[method]["t_uni"]
        source = SOURCE.get(method, (None, None))
        rows.append([method, source[0], str(priv), source[1], str(uni), priv.seeds])
    return Table(
        "Accuracy on test images, mean ± 95 % interval over seeds",
        ("method", "T_priv, source", "T_priv", "T_uni, source", "T_uni", "seeds"),
        rows,
    )


def _tests(results: Mapping[str, Mapping[int, Mapping[str, float]]], first: str) -> Table:
    pairs = {f"{first} − {other}": (results[first], results[other]) for other in METHODS if other != first}
    return compare(pairs, f"{first} against the others")


def _tuning(records: Sequence[Mapping[str, Any]]) -> Table:
    samples = choose_samples(records)
    rows = []
    for method in METHODS[1:]:
        chosen = choose_settings(records, method, samples)
        for own in candidates(method, samples):
            results = [
                r["result"]
                for r in _of_stage(records, "tuning")
                if all(r["settings"].get(name) == value for name, value in {**own, "method": method}.items())
            ]
            priv, uni = (fmean(result[part] for result in results) for part in PARTS)
            rows.append([method, describe(own), priv, uni, "chosen" if own == chosen else ""])
    return Table("Tuning, accuracy on validation images", ("method", "settings", "V_priv", "V_uni", ""), rows)


def describe(own: Mapping[str, Any]) -> str:
    """A candidate's settings in words."""
    options = own.get("export_options", [])
    words = [
        f"{option.removeprefix('--')} {value}"
        for option, value in zip(options[::2], options[1::2], strict=True)
    ]
    numbers = own.get("hyperparameters", {}).items()
    return ", ".join([*words, *(f"{name.replace('_', ' ')} {value}" for name, value in numbers)])


def _notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    teacher = _of_stage(records, "teacher")[0]["result"]["uni"]
    found = _by(_of_stage(records, "samples"), lambda settings: settings["samples"])
    tried = "; ".join(
        f"{samples}: {fmean(r['priv'] for r in found[samples]):.3f} / {fmean(r['uni'] for r in found[samples]):.3f}"
        for samples in sorted(found)
    )
    return [
        f"Teacher: {teacher:.3f} on all test images.",
        f"Cross-entropy alone on validation images, V_priv / V_uni by the number of private samples: {tried}. "
        f"Chosen: {choose_samples(records)}, nearest to the source's {SOURCE['ce'][0]} / {SOURCE['ce'][1]}.",
    ]


def _draw(canvas: Any, means: Mapping[str, Mapping[str, Mean]]) -> None:
    axes = canvas.add_subplot()
    bars = {
        label: (
            [means[method][part].mean for method in METHODS],
            [means[method][part].ci95 or 0.0 for method in METHODS],
        )
        for part, label in (("t_priv", "T_priv"), ("t_uni", "T_uni"))
    }
    draw_bars(axes, METHODS, bars, "accuracy", "mean and 95 % interval; ◆ the source")
    for index, method in enumerate(METHODS):
        for offset, value in zip((-0.2, 0.2), SOURCE.get(method, ()), strict=False):
            axes.plot(
                index + offset, value, marker="D", color="black", markersize=4, linestyle="none", zorder=5
            )
    axes.set_ylim(0, 1)


def _of_stage(records: Sequence[Mapping[str, Any]], stage: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["settings"]["stage"] == stage]


def _by(records: Sequence[Mapping[str, Any]], key: Any) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(key(record["settings"]), []).append(record["result"])
    return groups
