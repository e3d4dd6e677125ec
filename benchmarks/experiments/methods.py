"""Cross-entropy alone against four ways of distilling and a fifth that mixes two, on one device's data.

Three stages: which device's data (how many images, how skewed) put cross-entropy near the source's figures; each
method's own settings by validation; the final runs, scored on test images. What is chosen is chosen on validation
images and on seeds that no final run has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from edgestill.benchmarks.experiments.figures import Figure, draw_bars
from edgestill.benchmarks.experiments.grid import Cell, Context, Options, Stage
from edgestill.benchmarks.experiments.protocol import (
    TEACHER_CPU_MINUTES,
    base_settings,
    make_run,
    student_cpu_minutes,
    teacher_stage,
)
from edgestill.benchmarks.experiments.report import Report, require_one_each
from edgestill.benchmarks.experiments.series import PARTS, Scores, compare, having, lead
from edgestill.benchmarks.experiments.states import KeptAs, is_kept
from edgestill.benchmarks.experiments.statistics import Mean, mean_with_interval
from edgestill.benchmarks.experiments.tables import Table, goals_table

NAME = "methods"
TITLE = "Methods: ce, kd, crd, lpd, lkd and their best mixture"
METHODS = ("ce", "kd", "crd", "lpd", "lkd", "best")
SOURCE = {"ce": (0.634, 0.492), "kd": (0.631, 0.551), "crd": (0.655, 0.530), "lpd": (0.391, 0.183),
          "lkd": (0.674, 0.544)}  # fmt: skip
"""T_priv and T_uni that the source reports."""
MARGINS = (("lkd", "ce", "priv", 4.0), ("lkd", "ce", "uni", 5.2), ("lkd", "kd", "priv", 4.0),
           ("lkd", "crd", "priv", 0.0), ("lkd", "crd", "uni", 0.0))  # fmt: skip
"""By how many points one method leads another in the source, at least."""
BEYOND = {"priv": 0.674, "uni": 0.551}
"""The source's best figures of any method on each test set, which one method of ours should pass at once."""
DEVICES = tuple(
    {"samples": samples, "gamma": gamma} for samples in (1000, 1500, 2000) for gamma in (1.0, 2.5)
)
"""Numbers of private images and concentrations of their classes, among which cross-entropy alone chooses."""
QUICK_DEVICES = ({"samples": 200, "gamma": 1.0}, {"samples": 300, "gamma": 1.0})
FINAL_SEEDS, TUNING_SEEDS, DEVICE_SEEDS = 6, 2, 3
TUNING_SEED, DEVICE_SEED = 1000, 2000
"""Where the seeds of the earlier stages start; final seeds count from 0."""
SHARES = {
    "lkd": (0.5, 0.7, 0.9, 0.95, 0.98),
    "crd": (0.1, 0.2, 0.45, 0.65, 0.8),
    "lpd": (0.05, 0.1, 0.3, 0.5, 0.9),
}
"""Of the distillation term; the authors of crd have 0.8 of it beside the cross-entropy, an α of 0.444."""
LOGITS = (("mse", 0.9), ("mse", 0.95), ("mse", 0.98), ("kl", 0.9), ("kl", 0.98))
"""Loss of the logits and α that `kd` chooses from: both losses that `best` has."""
MIXTURES = (("mse", 0.9, None), ("kl", 0.9, None), ("kl", 0.98, None), ("mse", 0.98, 0.5), ("kl", 0.98, 0.5))
"""Loss of the logits, α at the start and, where it is not the same, at the end: as many as the others' candidates."""
OWN = ("objective", "export_options", "hyperparameters", "alpha_end")
"""The settings in which a method's candidates differ."""
CRD_NEGATIVES_PER_IMAGE = 16384 / 50000
"""Of the authors' implementation, which this scales to the data."""
CHOSEN: Mapping[str, tuple[float, str | None]] = {
    "kd": (0.9, "kl"),
    "crd": (0.8, None),
    "lkd": (0.9, None),
}
"""α and loss of the logits that validation chose in the full run, for experiments that choose nothing themselves; a
test compares with the records."""


def chosen(method: str, samples: int) -> dict[str, Any]:
    """The settings of a method that other experiments take over from this one, for a device with so many images."""
    return {"objective": "ce"} if method == "ce" else _candidate(method, samples, *CHOSEN[method])


def candidates(method: str, samples: int) -> list[dict[str, Any]]:
    """The settings among which validation chooses for a method, as parts of a run's settings."""
    if method == "ce":
        return [{"objective": "ce"}]
    if method == "best":
        return [
            {"objective": "both", "export_options": ["--kd-loss", loss],
             "hyperparameters": {"alpha": alpha, "logit_share": 0.5},
             **({} if end is None else {"alpha_end": end})}
            for loss, alpha, end in MIXTURES
        ]  # fmt: skip
    if method == "kd":
        return [_candidate(method, samples, alpha, loss) for loss, alpha in LOGITS]
    return [_candidate(method, samples, alpha) for alpha in SHARES[method]]


def _candidate(method: str, samples: int, alpha: float, loss: str | None = None) -> dict[str, Any]:
    options = []
    if method == "crd":
        options = ["--negatives", str(round(CRD_NEGATIVES_PER_IMAGE * samples))]
    elif loss not in (None, "mse"):  # the default
        options = ["--kd-loss", loss]
    settings: dict[str, Any] = {"objective": method, "hyperparameters": {"alpha": alpha}}
    return {**settings, "export_options": options} if options else settings


def stages(options: Options) -> list[Stage]:
    """The teacher; the device; each method's settings; the final runs."""
    base = base_settings(options)
    few = 1 if options.quick else None
    device_seeds = range(DEVICE_SEED, DEVICE_SEED + (few or DEVICE_SEEDS))
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + (few or TUNING_SEEDS))
    final_seeds = range(options.seeds or (2 if options.quick else FINAL_SEEDS))

    def cell(stage: str, method: str, seed: int, device: Mapping[str, Any], own: Mapping[str, Any]) -> Cell:
        settings = {"stage": stage, "method": method, "seed": seed, **device,
                    "score_on": "test" if stage == "final" else "validation", **own, **base}  # fmt: skip
        return Cell(NAME, settings)

    def devices(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        return [
            cell("device", "ce", seed, device, {"objective": "ce"})
            for seed in device_seeds
            for device in (QUICK_DEVICES if options.quick else DEVICES)
        ]

    def tuning(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        device = choose_device(records)
        return [
            cell("tuning", method, seed, device, own)
            for method in METHODS[1:]
            for own in candidates(method, device["samples"])
            for seed in tuning_seeds
        ]

    def final(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
        device = choose_device(records)
        return [
            cell("final", method, seed, device, choose_settings(records, method))
            for seed in final_seeds
            for method in METHODS
        ]

    return [teacher_stage(NAME, options), devices, tuning, final]


def run_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Trains and scores one student, or the teacher."""
    return make_run(settings, context, kept_as(settings) if settings["stage"] == "final" else None)


def redo(cell: Cell, folder: Path) -> bool:
    """Whether a run's final state is wanted in `folder` and not there."""
    return cell.settings["stage"] == "final" and not is_kept(folder, kept_as(cell.settings))


def kept_as(settings: Mapping[str, Any]) -> KeptAs:
    """How the final state of a run is named."""
    method = settings["method"]
    return KeptAs(f"{method}-seed{settings['seed']}", f"{method}-bundle", Cell(NAME, settings).key)


def estimate_minutes(options: Options, workers: int) -> float:
    """Measured: docs/experiments.md."""
    if options.quick:
        return 4.0
    tuned = TUNING_SEEDS * len(MIXTURES) * len(METHODS[1:])
    runs = len(DEVICES) * DEVICE_SEEDS + tuned + (options.seeds or FINAL_SEEDS) * len(METHODS)
    return TEACHER_CPU_MINUTES + runs * student_cpu_minutes(1500) / workers


def choose_device(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The device on which cross-entropy alone comes nearest to the source's figures on validation."""

    def distance(tried: tuple[dict[str, Any], float, float]) -> float:
        return sum((score - wanted) ** 2 for score, wanted in zip(tried[1:], SOURCE["ce"], strict=True))

    return min(_devices(records), key=distance)[0]


def _devices(records: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """Every device that was tried, with mean V_priv and V_uni of cross-entropy alone."""
    found: dict[tuple[int, float], list[Mapping[str, Any]]] = {}
    for record in having(records, stage="device"):
        settings = record["settings"]
        found.setdefault((settings["samples"], settings["gamma"]), []).append(record["result"])
    return [
        ({"samples": samples, "gamma": gamma}, *(fmean(result[part] for result in results) for part in PARTS))
        for (samples, gamma), results in sorted(found.items())
    ]


def choose_settings(records: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """The candidate with the best mean of both validation accuracies over the tuning seeds; the first of equals."""
    if method == "ce":
        return {"objective": "ce"}
    tried = [(own, fmean(scores)) for of, own, *scores in _tried(records) if of == method]
    return max(tried, key=lambda pair: pair[1])[0]


def _tried(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any], float, float]]:
    """Method, own settings and mean V_priv and V_uni of every candidate in the records."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in having(records, stage="tuning"):
        found.setdefault(json.dumps([record["settings"]["method"], own_settings(record)]), []).append(
            record["result"]
        )
    return [
        (*json.loads(candidate), *(fmean(result[part] for result in results) for part in PARTS))
        for candidate, results in found.items()
    ]


def own_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a record's settings that tuning chooses."""
    return {name: record["settings"][name] for name in OWN if name in record["settings"]}


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    """Accuracies with 95 % intervals beside the source's, paired tests, and what validation chose."""
    final = having(records, stage="final")
    require_one_each(final, ("method", "seed"))
    results = {
        method: {r["settings"]["seed"]: r["result"] for r in final if r["settings"]["method"] == method}
        for method in METHODS
    }
    means = {
        method: {part: mean_with_interval([result[part] for result in by_seed.values()]) for part in PARTS}
        for method, by_seed in results.items()
    }
    summary = {
        method: {f"t_{part}": mean.as_json() for part, mean in parts.items()}
        for method, parts in means.items()
    }
    tests = [_tests(results, first) for first in ("lkd", "best")]
    tables = [_accuracies(means), _goals(results, means), *tests, _device_table(records), _tuning(records)]
    return Report(tables, [Figure("accuracy", lambda canvas: _draw(canvas, means))], summary, _notes(records))


def _accuracies(means: Mapping[str, Mapping[str, Mean]]) -> Table:
    rows = []
    for method in METHODS:
        priv, uni = means[method]["priv"], means[method]["uni"]
        source = SOURCE.get(method, (None, None))
        rows.append([method, source[0], str(priv), source[1], str(uni), priv.seeds])
    return Table(
        "Accuracy on test images, mean ± 95 % interval over seeds",
        ("method", "T_priv, source", "T_priv", "T_uni, source", "T_uni", "seeds"),
        rows,
    )


def _goals(results: Mapping[str, Scores], means: Mapping[str, Mapping[str, Mean]]) -> Table:
    """The source's order and margins, and its best figures, beside what came out; of means over seeds."""
    goals = []
    for first, second, part, points in MARGINS:
        ahead = lead(results[first], results[second], part)
        goal = f"{first} above {second} by {points:g} points on {PARTS[part]}"
        goals.append((goal, f"{ahead:+.1f}", ahead >= points))
    lowest = [min(METHODS, key=lambda method, part=part: means[method][part].mean) for part in BEYOND]
    goals.append(("lpd last on T_priv and T_uni", " and ".join(lowest), set(lowest) == {"lpd"}))
    reached = [means["best"][part].mean for part in BEYOND]
    goals.append(("best above " + " / ".join(f"{value:.3f}" for value in BEYOND.values()),
                  " / ".join(f"{value:.3f}" for value in reached),
                  all(value > wanted for value, wanted in zip(reached, BEYOND.values(), strict=True))))  # fmt: skip
    return goals_table("The source's order and margins, and beyond", goals)


def _tests(results: Mapping[str, Scores], first: str) -> Table:
    pairs = {f"{first} − {other}": (results[first], results[other]) for other in METHODS if other != first}
    return compare(pairs, f"{first} against the others")


def _device_table(records: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [f"{device['samples']}", f"{device['gamma']:g}", priv, uni] for device, priv, uni in _devices(records)
    ]
    return Table(
        "Cross-entropy alone on validation images, by device", ("images", "γ", "V_priv", "V_uni"), rows
    )


def _tuning(records: Sequence[Mapping[str, Any]]) -> Table:
    chosen = {record["settings"]["method"]: own_settings(record) for record in having(records, stage="final")}
    rows = [
        [method, describe(own), priv, uni, "chosen" if own == chosen.get(method) else ""]
        for method, own, priv, uni in sorted(_tried(records), key=lambda tried: METHODS.index(tried[0]))
    ]
    return Table("Tuning, accuracy on validation images", ("method", "settings", "V_priv", "V_uni", ""), rows)


def describe(own: Mapping[str, Any]) -> str:
    """A candidate's settings in words."""
    options = own.get("export_options", [])
    if own["objective"] == "kd" and "--kd-loss" not in options:
        options = ["--kd-loss", "mse", *options]  # the default
    words = [
        f"{option.removeprefix('--')} {value}"
        for option, value in zip(options[::2], options[1::2], strict=True)
    ]
    words += [f"{name.replace('_', ' ')} {value}" for name, value in own.get("hyperparameters", {}).items()]
    return ", ".join([*words, *([f"alpha at the end {own['alpha_end']}"] if "alpha_end" in own else [])])


def _notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    teacher = having(records, stage="teacher")[0]["result"]["uni"]
    chosen = choose_device(records)
    return [
        f"Teacher: {teacher:.3f} on all test images.",
        f"Device: {chosen['samples']} private images, γ = {chosen['gamma']:g}: on validation images cross-entropy "
        f"alone comes nearest to the source's {SOURCE['ce'][0]} / {SOURCE['ce'][1]} there.",
    ]


def _draw(canvas: Any, means: Mapping[str, Mapping[str, Mean]]) -> None:
    axes = canvas.add_subplot()
    bars = {
        label: (
            [means[method][part].mean for method in METHODS],
            [means[method][part].ci95 or 0.0 for method in METHODS],
        )
        for part, label in PARTS.items()
    }
    draw_bars(axes, METHODS, bars, "accuracy", "mean and 95 % interval; ◆ the source", inside=True)
    for index, method in enumerate(METHODS):
        for offset, value in zip((-0.2, 0.2), SOURCE.get(method, ()), strict=False):
            axes.plot(
                index + offset,
                value,
                marker="D",
                color="black",
                markeredgecolor="white",
                markersize=6,
                linestyle="none",
                zorder=5,
            )
    axes.set_ylim(0, 1)
