"""What experiment `federation` shows: accuracies, goals and paired tests; rounds, bytes and noise in plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from edgestill.benchmarks.experiments.figures import COLOURS, Figure, Line, draw_lines
from edgestill.benchmarks.experiments.report import Report
from edgestill.benchmarks.experiments.series import PARTS as TESTS
from edgestill.benchmarks.experiments.series import Scores, compare, lead
from edgestill.benchmarks.experiments.statistics import Mean, mean_with_interval
from edgestill.benchmarks.experiments.tables import Table, goals_table

GOALS = (
    ("latents fp32", "local only", "uni", 5.0),
    ("latents fp32", "local only", "priv", 0.0),
    ("latents fp32", "FedMD", "uni", 2.0),
    ("latents int8", "latents fp32", "priv", -0.5),
    ("latents int8", "latents fp32", "uni", -0.5),
)
"""By how many points one arm is meant to lead another."""
PAIRS = (
    ("latents fp32", "local only"),
    ("latents fp32", "local only, twice the epochs"),
    ("latents fp32", "FedMD"),
    ("latents fp32", "logits, global student"),
    ("latents int8", "latents fp32"),
    ("latents fp16", "latents fp32"),
    ("latents + logits", "local only"),
    ("latents + logits", "FedMD"),
    ("latents, no labels", "local only"),
    ("latents, no labels", "FedMD"),
    ("latents, cnn3", "FedAvg, cnn3"),
    ("latents, cnn3", "local only, cnn3"),
    ("common initial weights, aligned", "common initial weights, as they are"),
    ("independent initial weights, aligned", "independent initial weights, as they are"),
    ("independent initial weights, as they are", "common initial weights, as they are"),
)
"""Arms that are tested against each other."""
SHOWN = (
    "local only",
    "FedMD",
    "latents fp32",
    "latents int8",
    "latents + logits",
    "FedAvg, cnn3",
    "latents, cnn3",
)
"""The arms that a figure has room for."""
QUARTER = 0.26
"""Of the bytes: a byte for four, and four a row for its scale."""
TITLES = {"methods": "Exchanges", "privacy": "Noise against accuracy, rows clipped; epsilon at delta 1e-5",
          "alignment": "Alignment of latents, cnn3 with heads of their own"}  # fmt: skip
RATES = ("learning_rate", "alpha")
Runs = Mapping[int, Mapping[str, Any]]
"""Records of one arm by seed."""


def make_report(
    records: Sequence[Mapping[str, Any]],
    arms: Mapping[str, Sequence[str]],
    chosen: Mapping[str, Mapping[str, float]],
    title: str,
) -> Report:
    """Tables and figures of the parts, and the means that others script against; `arms` orders those of each part,
    `chosen` are the settings that tuning took, by method."""
    parts = {part: _by_arm(records, part, names) for part, names in arms.items()}
    methods, private = parts["methods"], parts["privacy"]
    tables = [_table(TITLES[part], found) for part, found in parts.items() if found]
    if methods:
        tables[1:1] = [_goals(methods), _differences({**methods, **parts["alignment"]})]
    if chosen:
        tables.append(_tuning_table(records, chosen))
    figures = []
    if methods:
        figures.append(Figure("rounds", lambda canvas: _draw_rounds(canvas, methods), width=11))
        figures.append(Figure("bytes", lambda canvas: _draw_bytes(canvas, methods, title)))
    if private:
        figures.append(Figure("privacy", lambda canvas: _draw_noise(canvas, private, methods), width=10))
    summary = {
        arm: {f"t_{test}": _mean(runs, test).as_json() for test in TESTS}
        | {"global_t_uni": None if (mean := _global(runs)) is None else mean.as_json()}
        | {"bytes_per_device": round(_bytes_in_all(arm, runs))}
        for found in parts.values()
        for arm, runs in found.items()
    }
    return Report(tables, figures, summary)


def _by_arm(records: Iterable[Mapping[str, Any]], part: str, names: Sequence[str]) -> dict[str, Runs]:
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        settings = record["settings"]
        if settings["part"] == part:
            found.setdefault(settings["arm"], {})[settings["seed"]] = record
    return {arm: found[arm] for arm in names if arm in found}


def _scores(runs: Runs) -> Scores:
    return {seed: {test: run["result"][f"t_{test}"] for test in TESTS} for seed, run in runs.items()}


def _mean(runs: Runs, test: str) -> Mean:
    return mean_with_interval([run["result"][f"t_{test}"] for run in runs.values()])


def _global(runs: Runs) -> Mean | None:
    values = [run["result"]["global_t_uni"] for run in runs.values()]
    return None if None in values else mean_with_interval(values)


def _bytes(run: Mapping[str, Any]) -> list[float]:
    """What a device has sent and received until the end of each round, without bundle and transfer set."""
    devices = run["settings"]["devices"]
    return list(accumulate((r["bytes_up"] + r["bytes_down"]) / devices for r in run["result"]["rounds"]))


def _bytes_in_all(arm: str, runs: Runs) -> float:
    """The same after the last round, mean over seeds; what devices alone upload teaches nobody and does not count."""
    return 0.0 if arm.startswith("local only") else fmean(_bytes(run)[-1] for run in runs.values())


def _table(title: str, found: Mapping[str, Runs]) -> Table:
    rows = []
    for arm, runs in found.items():
        spent = {run["result"].get("epsilon") for run in runs.values()} - {None}
        whole = _global(runs)
        rows.append([arm, *(str(_mean(runs, test)) for test in TESTS), None if whole is None else str(whole),
                     _bytes_in_all(arm, runs) / 1e6, f"{max(spent):.4g}" if spent else None, len(runs)])  # fmt: skip
    columns = ("exchange", *TESTS.values(), "global T_uni", "MB a device", "epsilon", "seeds")
    return Table(f"{title}; mean ± 95 % interval over seeds", columns, rows)


def _goals(methods: Mapping[str, Runs]) -> Table:
    """What the exchange of latents was meant to reach, beside what came out; of means over seeds."""
    goals = []
    for first, second, test, points in GOALS:
        if first in methods and second in methods:
            ahead = lead(_scores(methods[first]), _scores(methods[second]), test)
            goal = f"{first} above {second} by {points:g} points on {TESTS[test]}"
            goals.append((goal, f"{ahead:+.1f}", ahead >= points))
    if {"latents int8", "latents fp32"} <= methods.keys():
        int8, fp32 = (
            fmean(
                run["result"]["bytes_up_per_device_round"] for run in methods[f"latents {precision}"].values()
            )
            for precision in ("int8", "fp32")
        )
        share = int8 / fp32
        goals.append(("latents int8 in a quarter of the bytes of fp32", f"{share:.3f}", share <= QUARTER))
    return goals_table("What latents were meant to reach", goals)


def _differences(found: Mapping[str, Runs]) -> Table:
    scores = {arm: _scores(runs) for arm, runs in found.items()}
    there = [pair for pair in PAIRS if set(pair) <= scores.keys()]
    return compare(
        {f"{ours} − {theirs}": (scores[ours], scores[theirs]) for ours, theirs in there}, "Differences"
    )


def _tuning_table(records: Iterable[Mapping[str, Any]], chosen: Mapping[str, Mapping[str, float]]) -> Table:
    rows = []
    for record in records:
        settings, result = record["settings"], record["result"]
        if settings["part"] == "tuning":
            rates = {name: settings[name] for name in RATES}
            rows.append([settings["arm"], *(f"{rate:g}" for rate in rates.values()),
                         *(result[f"t_{test}"] for test in TESTS), result["rounds_abandoned"],
                         "chosen" if rates == chosen.get(settings["arm"]) else ""])  # fmt: skip
    rows.sort(key=lambda row: list(chosen).index(row[0]))
    columns = ("method", "learning rate", "alpha", "V_priv", "V_uni", "diverged rounds", "")
    return Table("Tuning on validation images", columns, rows)


def _draw_rounds(canvas: Any, methods: Mapping[str, Runs]) -> None:
    for axes, (test, label) in zip(canvas.subplots(1, 2), TESTS.items(), strict=True):
        lines = {arm: _line(methods[arm], f"t_{test}") for arm in SHOWN if arm in methods}
        draw_lines(axes, lines, "round", "accuracy", label)
        axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_bytes(canvas: Any, methods: Mapping[str, Runs], title: str) -> None:
    axes = canvas.subplots()
    lines = {
        arm: None if arm.startswith("local only") else _line(methods[arm], "t_uni", of_bytes=True)
        for arm in SHOWN
        if arm in methods
    }
    draw_lines(axes, lines, "bytes sent and received by a device", "T_uni", title)
    axes.set_xscale("log")


def _draw_noise(canvas: Any, private: Mapping[str, Runs], methods: Mapping[str, Runs]) -> None:
    """The levels beside the noisy runs are of the same seeds, which are fewer than those of the methods."""
    axes = canvas.subplots()
    by_noise = {runs[min(runs)]["settings"]["noise_multiplier"]: runs for runs in private.values()}
    noises = sorted(noise for noise in by_noise if noise)
    seeds = set.union(*(set(runs) for runs in by_noise.values()))
    alone = {seed: run for seed, run in methods.get("local only", {}).items() if seed in seeds}
    for (test, label), colour in zip(TESTS.items(), COLOURS, strict=False):
        means = [_mean(by_noise[noise], test) for noise in noises]
        axes.errorbar(noises, [mean.mean for mean in means], [mean.ci95 or 0.0 for mean in means],
                      marker="o", capsize=3, color=colour, label=label)  # fmt: skip
        for runs, style, what in ((by_noise.get(0.0), ":", "clipped, no noise"),
                                  (alone, "--", "local only")):  # fmt: skip
            if runs:
                axes.axhline(_mean(runs, test).mean, linestyle=style, color=colour, label=f"{label}, {what}")
    axes.set(xscale="log", xlabel="noise multiplier", ylabel="accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside right upper", frameon=False, fontsize=9)


def _line(runs: Runs, name: str, of_bytes: bool = False) -> Line:
    """Means over seeds by round, against the round's number or the bytes until then."""
    rounds = [run["result"]["rounds"] for run in runs.values()]
    y = [fmean(line[name] for line in same) for same in zip(*rounds, strict=True)]
    if not of_bytes:
        return Line([line["round"] for line in rounds[0]], y)
    return Line([fmean(same) for same in zip(*map(_bytes, runs.values()), strict=True)], y)
