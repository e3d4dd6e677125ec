"""Experiment `federation`: what devices exchange, against accuracy and bytes; noise for privacy; alignment of latents.

Hyperparameters are chosen on validation images, which are training images that no device holds; test images decide
nothing. Method: docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from benchmarks.experiments.figures import Figure, Line, draw_lines
from benchmarks.experiments.grid import Cell, Context, Options, Stage
from benchmarks.experiments.report import Report
from benchmarks.experiments.simulated import Bundles, run_federation
from benchmarks.experiments.statistics import Mean, mean_with_interval, paired_test
from benchmarks.experiments.tables import Table
from edge_runtime.privacy import epsilon

NAME = "federation"
TITLE = "What devices exchange: accuracy, rounds and bytes"
Settings = Mapping[str, Any]

DELTA = 1e-5
PRIVACY_CLIP = 10.0
MIXED, EQUAL = ["cnn3", "cnn4", "cnn5"], ["cnn3"]
# A device of objective ce uploads what it knows and learns from its labels alone: the same rounds, and no teacher.
ALONE = {"objective": "ce", "exchange": "logits", "mode": "consensus", "tuned": "local only"}
FEDMD = {"objective": "kd", "exchange": "logits", "mode": "consensus", "tuned": "FedMD"}
# The coordinator knows the classes of its transfer images, the devices do not: its student learns both.
LABELLED = {"mode": "global", "transfer_labels": True}
LOGITS = {"objective": "kd", "exchange": "logits", **LABELLED, "tuned": "logits"}
LATENTS = {"objective": "lkd", "exchange": "latents", **LABELLED, "head": "common", "tuned": "latents"}
BOTH = {"objective": "both", "exchange": "both", **LABELLED, "head": "common", "tuned": "both"}
UNLABELLED = {**LATENTS, "mode": "consensus", "transfer_labels": False, "tuned": "latents, no labels"}
FEDAVG = {"objective": "ce", "exchange": "parameters", "mode": "consensus", "tuned": "FedAvg", "students": EQUAL,
          "precision": "fp32"}  # fmt: skip

METHODS: Mapping[str, Settings] = {
    "local only": ALONE,
    "FedMD": FEDMD,
    "latents fp32": {**LATENTS, "precision": "fp32"},
    "latents int8": {**LATENTS, "precision": "int8"},
    "latents + logits": BOTH,
    "logits, global student": LOGITS,
    "latents, no labels": UNLABELLED,
    "latents fp16": LATENTS,
    "local only, cnn3": {**ALONE, "students": EQUAL},
    "FedAvg, cnn3": FEDAVG,
    "latents, cnn3": {**LATENTS, "students": EQUAL},
}
NOISES = (0.001, 0.01, 0.1, 3.0)
PRIVATE: Mapping[str, Settings] = {
    f"noise {noise:g}": {
        **LATENTS,
        "precision": "fp32",
        "noise_multiplier": noise,
        "privacy_clip": PRIVACY_CLIP,
    }
    for noise in NOISES
}
ALIGNED: Mapping[str, Settings] = {
    f"{start} initial weights, {'aligned' if align else 'as they are'}": {
        **LATENTS, "head": "own", "students": EQUAL, "initial": start, "align": align,
    }
    for start in ("common", "independent")
    for align in (False, True)
}  # fmt: skip
PARTS = {"methods": METHODS, "privacy": PRIVATE, "alignment": ALIGNED}

GOALS = (
    ("latents fp32", "local only", "t_uni", 5.0),
    ("latents fp32", "local only", "t_priv", 0.0),
    ("latents fp32", "FedMD", "t_uni", 2.0),
    ("latents int8", "latents fp32", "t_priv", -0.5),
    ("latents int8", "latents fp32", "t_uni", -0.5),
)
"""By how many points one arm is meant to lead another."""

# What tuning tries, by the name in `tuned`, as many for every method. α is larger for latents, whose squared error is a
# mean over l instead of K values.
RATES = ("learning_rate", "alpha", "distil_learning_rate")
CANDIDATES: Mapping[str, tuple[Settings, Sequence[tuple[float, float, float]]]] = {
    "local only": (ALONE, ((2e-3, 0.5, 2e-3), (1e-3, 0.5, 2e-3), (4e-3, 0.5, 2e-3), (5e-4, 0.5, 2e-3))),
    "FedAvg": (FEDAVG, ((2e-3, 0.5, 2e-3), (1e-3, 0.5, 2e-3), (4e-3, 0.5, 2e-3), (5e-4, 0.5, 2e-3))),
    "FedMD": (FEDMD, ((2e-3, 0.5, 2e-3), (2e-3, 0.3, 2e-3), (2e-3, 0.7, 2e-3), (1e-3, 0.5, 2e-3))),
    "logits": (LOGITS, ((2e-3, 0.5, 2e-3), (2e-3, 0.3, 2e-3), (2e-3, 0.7, 2e-3), (1e-3, 0.5, 2e-3))),
    "latents": (LATENTS, ((2e-3, 0.95, 2e-3), (2e-3, 0.9, 2e-3), (2e-3, 0.97, 2e-3), (1e-3, 0.95, 2e-3))),
    "latents, no labels": (
        UNLABELLED,
        ((2e-3, 0.95, 2e-3), (2e-3, 0.9, 2e-3), (2e-3, 0.97, 2e-3), (1e-3, 0.95, 2e-3)),
    ),
    "both": (BOTH, ((2e-3, 0.5, 2e-3), (2e-3, 0.3, 2e-3), (2e-3, 0.7, 2e-3), (1e-3, 0.5, 2e-3))),
}
FULL = {
    "devices": 10, "gamma": 0.5, "rounds": 20, "train_samples": 3000, "transfer_samples": 1000,
    "validation_samples": 2000, "test_samples": 200, "local_epochs": 1, "distil_epochs": 2,
}  # fmt: skip
QUICK = {
    "devices": 4, "gamma": 0.5, "rounds": 3, "train_samples": 800, "transfer_samples": 320,
    "validation_samples": 400, "test_samples": 100, "local_epochs": 1, "distil_epochs": 2,
}  # fmt: skip
COMMON = {
    "students": MIXED, "width_divisor": 4, "latent_size": 128, "batch": 32, "optimizer": "adamw",
    "precision": "fp16", "head": "own", "initial": "common", "transfer_labels": False, "local_only": False,
}  # fmt: skip
TUNING_ROUNDS, TUNING_SEED = 10, 1000
SEEDS = {"methods": 3, "privacy": 1, "alignment": 2}
QUICK_SEEDS = 1
CPU_S_A_ROUND = {False: 7.5, True: 2.0}
"""Measured on one of two busy cores of an AMD EPYC."""
CPU_S_AN_EXPORT = 6.0


def stages(options: Options) -> list[Stage]:
    return [lambda records: tuning_cells(options), lambda records: final_cells(options, choose(records))]


def tuning_cells(options: Options) -> list[Cell]:
    """Every candidate on validation images with a seed that no final run has."""
    size = _size(options)
    size["rounds"] = min(size["rounds"], TUNING_ROUNDS)
    return [
        _cell(options, size, {**how, **dict(zip(RATES, rates, strict=True))}, "tuning", of, TUNING_SEED)
        for of, (how, grid) in CANDIDATES.items()
        for rates in (grid[:2] if options.quick else grid)
    ]


def choose(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The rates of every method: those of the largest mean of T_priv and T_uni on validation images.

    Rates with which step 5 diverges come last: devices that nobody teaches may still do well.
    """
    best: dict[str, tuple[tuple[int, float], dict[str, float]]] = {}
    for record in records:
        settings, result = record["settings"], record["result"]
        if settings["part"] != "tuning":
            continue
        score = (-result["rounds_abandoned"], (result["t_priv"] + result["t_uni"]) / 2)
        if settings["arm"] not in best or score > best[settings["arm"]][0]:
            best[settings["arm"]] = (score, {name: settings[name] for name in RATES})
    return {arm: rates for arm, (_, rates) in best.items()}


def final_cells(options: Options, chosen: Mapping[str, Mapping[str, float]]) -> list[Cell]:
    """Every arm of every part with the rates that were chosen for its kind."""
    return [
        _cell(options, _size(options), {**how, **chosen[how["tuned"]]}, part, arm, seed)
        for part, arms in PARTS.items()
        for seed in range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS[part]))
        for arm, how in arms.items()
    ]


def estimate_cpu_minutes(options: Options) -> float:
    chosen = dict.fromkeys(CANDIDATES, dict.fromkeys(RATES, 0.0))
    cells = tuning_cells(options) + final_cells(options, chosen)
    exports = {
        (student, number, *(cell.settings[name] for name in ("objective", "head", "initial_seed")))
        for cell in cells
        for student in cell.settings["students"]
        for number in range(cell.settings["devices"] if cell.settings["initial"] == "independent" else 1)
    }
    rounds = sum(cell.settings["rounds"] for cell in cells)
    return (rounds * CPU_S_A_ROUND[options.quick] + len(exports) * CPU_S_AN_EXPORT) / 60


def run_cell(settings: Settings, context: Context) -> dict[str, Any]:
    """One federation: accuracies after the last round, those of every round, and bytes; epsilon where there is noise.

    Tuning runs are measured on validation images, all others on test images.
    """
    bundles = Bundles(
        settings["objective"],
        common_head=settings["head"] == "common",
        independent=settings["devices"] if settings["initial"] == "independent" else None,
    )
    result = run_federation(settings, context, bundles, validate=settings["part"] == "tuning")
    noise = settings.get("noise_multiplier")
    spent = {} if noise is None else {"epsilon": epsilon(noise, settings["rounds"], DELTA)}
    names = (
        "t_priv",
        "t_uni",
        "global_t_uni",
        "rounds_abandoned",
        "bytes_up_per_device_round",
        "bytes_down_per_device_round",
        "rounds",
    )
    return {name: result[name] for name in names} | spent


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    """Tables of the three parts, figures over rounds and bytes, and the means that others script against."""
    parts = {part: _by_arm(records, part) for part in PARTS}
    tables = [_tuning_table(records)]
    titles = {"methods": TITLE, "privacy": f"Noise against accuracy (delta {DELTA:g})",
              "alignment": "Alignment of latents, cnn3 with heads of their own"}  # fmt: skip
    tables += [_table(titles[part], found) for part, found in parts.items() if found]
    methods = parts["methods"]
    if methods:
        tables += [_goals(methods), _differences(methods)]
    figures = [
        Figure("rounds", lambda canvas: _draw_rounds(canvas, methods)),
        Figure("bytes", lambda canvas: _draw_bytes(canvas, methods)),
        Figure("privacy", lambda canvas: _draw_noise(canvas, parts["privacy"], methods)),
    ]
    summary = {
        arm: {name: _mean(runs, name).as_json() for name in ("t_priv", "t_uni")}
        | {"global_t_uni": None if (mean := _global(runs)) is None else mean.as_json()}
        | {"bytes_per_device": round(fmean(_bytes(run)[-1] for run in runs.values()))}
        for found in parts.values()
        for arm, runs in found.items()
    }
    return Report(tables, figures if methods and parts["privacy"] else figures[: 2 * bool(methods)], summary)


Runs = Mapping[int, Mapping[str, Any]]
"""Records of one arm by seed."""


def _cell(options: Options, size: Settings, how: Settings, part: str, arm: str, seed: int) -> Cell:
    kept = {name: value for name, value in how.items() if name != "tuned"}
    first = {"initial_seed": 0 if part == "tuning" else seed}
    settings = {
        **COMMON,
        **size,
        **kept,
        **first,
        "part": part,
        "arm": arm,
        "seed": seed,
        "data": options.data,
    }
    return Cell(NAME, settings)


def _size(options: Options) -> dict[str, Any]:
    return dict(QUICK if options.quick else FULL)


def _by_arm(records: Iterable[Mapping[str, Any]], part: str) -> dict[str, Runs]:
    found: dict[str, dict[int, Mapping[str, Any]]] = {arm: {} for arm in PARTS[part]}
    for record in records:
        if record["settings"]["part"] == part:
            found[record["settings"]["arm"]][record["settings"]["seed"]] = record
    return {arm: runs for arm, runs in found.items() if runs}


def _mean(runs: Runs, name: str) -> Mean:
    return mean_with_interval([run["result"][name] for run in runs.values()])


def _global(runs: Runs) -> Mean | None:
    values = [run["result"]["global_t_uni"] for run in runs.values()]
    return None if None in values else mean_with_interval(values)


def _bytes(run: Mapping[str, Any]) -> list[float]:
    """What a device has sent and received until the end of each round, without bundle and transfer set."""
    devices = run["settings"]["devices"]
    return list(accumulate((r["bytes_up"] + r["bytes_down"]) / devices for r in run["result"]["rounds"]))


def _table(title: str, found: Mapping[str, Runs]) -> Table:
    rows = []
    for arm, runs in found.items():
        spent = {run["result"].get("epsilon") for run in runs.values()} - {None}
        whole = _global(runs)
        rows.append([arm, str(_mean(runs, "t_priv")), str(_mean(runs, "t_uni")), None if whole is None else str(whole),
                     None if arm.startswith("local only") else fmean(_bytes(run)[-1] for run in runs.values()) / 1e6,
                     f"{max(spent):.4g}" if spent else None, len(runs)])  # fmt: skip
    return Table(
        title, ("exchange", "T_priv", "T_uni", "global T_uni", "MB a device", "epsilon", "seeds"), rows
    )


def _goals(methods: Mapping[str, Runs]) -> Table:
    """What the exchange of latents was meant to reach, beside what came out; in points, means over seeds."""
    mean = {
        (arm, name): 100 * _mean(runs, name).mean
        for arm, runs in methods.items()
        for name in ("t_priv", "t_uni")
    }

    def bytes_up(arm: str) -> float:
        return fmean(run["result"]["bytes_up_per_device_round"] for run in methods[arm].values())

    rows = []
    for first, second, name, points in GOALS:
        if first in methods and second in methods:
            lead = mean[first, name] - mean[second, name]
            label = name.replace("t_", "T_")
            rows.append([f"{first} above {second} by {points:g} points on {label}", f"{lead:+.1f}",
                         "yes" if lead >= points else "no"])  # fmt: skip
    if {"latents int8", "latents fp32"} <= methods.keys():
        share = bytes_up("latents int8") / bytes_up("latents fp32")
        rows.append(["latents int8 in a quarter of the bytes of fp32", f"{share:.3f}",
                     "yes" if share <= 0.26 else "no"])  # fmt: skip
    return Table("What latents were meant to reach", ("goal", "came out", "reached"), rows)


def _differences(methods: Mapping[str, Runs]) -> Table:
    """In points, paired by seed."""
    pairs = [("latents fp32", "local only"), ("latents fp32", "FedMD"), ("latents fp32", "logits, global student"),
             ("latents int8", "latents fp32"), ("latents fp16", "latents fp32"), ("latents + logits", "local only"),
             ("latents + logits", "FedMD"), ("latents, no labels", "local only"), ("latents, no labels", "FedMD"),
             ("latents, cnn3", "FedAvg, cnn3"), ("latents, cnn3", "local only, cnn3")]  # fmt: skip
    rows = []
    for first, second in pairs:
        ours, theirs = methods.get(first, {}), methods.get(second, {})
        seeds = sorted(set(ours) & set(theirs))
        for name, label in (("t_priv", "T_priv"), ("t_uni", "T_uni")) if seeds else ():
            test = paired_test(
                *([100 * runs[seed]["result"][name] for seed in seeds] for runs in (ours, theirs))
            )
            rows.append([f"{first} − {second}", label, test.difference.shown("+.2f"), test.p, len(seeds)])
    return Table("Differences in points, paired by seed", ("what", "on", "points", "p", "seeds"), rows)


def _tuning_table(records: Iterable[Mapping[str, Any]]) -> Table:
    rows = [
        [
            r["settings"]["arm"],
            *(r["settings"][name] for name in RATES),
            r["result"]["t_priv"],
            r["result"]["t_uni"],
            r["result"]["rounds_abandoned"],
        ]
        for r in records
        if r["settings"]["part"] == "tuning"
    ]
    return Table(
        "Tuning on validation images", ("method", *RATES, "V_priv", "V_uni", "diverged rounds"), rows
    )


def _draw_rounds(canvas: Any, methods: Mapping[str, Runs]) -> None:
    for axes, name in zip(canvas.subplots(1, 2), ("t_priv", "t_uni"), strict=True):
        lines = {arm: _line(runs, name, None) for arm, runs in _main(methods).items()}
        draw_lines(axes, lines, "round", name.replace("t_", "T_"))


def _draw_bytes(canvas: Any, methods: Mapping[str, Runs]) -> None:
    axes = canvas.subplots()
    exchanging = {arm: runs for arm, runs in _main(methods).items() if not arm.startswith("local only")}
    lines = {arm: _line(runs, "t_uni", _bytes) for arm, runs in exchanging.items()}
    draw_lines(axes, lines, "bytes sent and received by a device", "T_uni", TITLE)
    axes.set_xscale("log")


def _draw_noise(canvas: Any, private: Mapping[str, Runs], methods: Mapping[str, Runs]) -> None:
    axes = canvas.subplots()
    for name in ("t_priv", "t_uni"):
        points = sorted(
            (runs[min(runs)]["settings"]["noise_multiplier"], _mean(runs, name)) for runs in private.values()
        )
        means = [mean for _, mean in points]
        axes.errorbar([noise for noise, _ in points], [mean.mean for mean in means],
                      [mean.ci95 or 0.0 for mean in means], marker="o", label=name.replace("t_", "T_"))  # fmt: skip
        for arm, style in (("latents fp32", ":"), ("local only", "--")):
            if arm in methods:
                axes.axhline(_mean(methods[arm], name).mean, linestyle=style, color="0.6")
    axes.set(xscale="log", xlabel="noise multiplier", ylabel="accuracy",
             title="Noise; dotted: latents without, dashed: local only")  # fmt: skip
    axes.legend(frameon=False)


def _main(methods: Mapping[str, Runs]) -> dict[str, Runs]:
    """The arms with the mixed students that a figure has room for."""
    shown = ("local only", "FedMD", "latents fp32", "latents int8", "latents + logits", "FedAvg, cnn3")
    return {arm: methods[arm] for arm in shown if arm in methods}


def _line(runs: Runs, name: str, measure: Any) -> Line:
    """Means over seeds by round, at the round's number or at what `measure` gives."""
    rounds = [run["result"]["rounds"] for run in runs.values()]
    y = [fmean(line[name] for line in same) for same in zip(*rounds, strict=True)]
    if measure is None:
        return Line([line["round"] for line in rounds[0]], y)
    return Line([fmean(same) for same in zip(*map(measure, runs.values()), strict=True)], y)
