"""Accuracy of several methods along one setting: what the sweeps of several experiments have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgestill.benchmarks.experiments.figures import Line, draw_lines
from edgestill.benchmarks.experiments.statistics import Mean, mean_with_interval, paired_test, show_p
from edgestill.benchmarks.experiments.tables import Table

PARTS = {"priv": "T_priv", "uni": "T_uni"}
Series = dict[str, dict[float, dict[str, Mean]]]
"""Means by method, by the setting's value in increasing order, and by `priv` and `uni`."""
Scores = Mapping[int, Mapping[str, float]]
"""Results by seed, with `priv` and `uni`."""


def collect(records: Iterable[Mapping[str, Any]], x: str) -> Series:
    """The means over seeds of these records, against their setting `x`."""
    scores: dict[str, dict[float, list[Mapping[str, float]]]] = {}
    for record in records:
        settings = record["settings"]
        scores.setdefault(settings["method"], {}).setdefault(settings[x], []).append(record["result"])
    return {
        method: {
            value: {part: mean_with_interval([result[part] for result in by_value[value]]) for part in PARTS}
            for value in sorted(by_value)
        }
        for method, by_value in sorted(scores.items())  # whatever the order of the records
    }


def having(records: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The records with these settings."""
    return [
        record
        for record in records
        if all(record["settings"].get(name) == value for name, value in wanted.items())
    ]


def by_seed(records: Iterable[Mapping[str, Any]], **wanted: Any) -> dict[int, Mapping[str, float]]:
    """The results of the records with these settings, for `compare`."""
    return {record["settings"]["seed"]: record["result"] for record in having(records, **wanted)}


def table_of(series: Series, x_label: str, title: str) -> Table:
    """A row a value of the setting, two columns a method."""
    values = sorted({value for by_value in series.values() for value in by_value})
    columns = [x_label, *(f"{label}, {method}" for method in series for label in PARTS.values())]
    rows: list[list[str | float | None]] = []
    for value in values:
        row: list[str | float | None] = [f"{value:g}"]
        for by_value in series.values():
            row += [str(by_value[value][part]) if value in by_value else None for part in PARTS]
        rows.append(row)
    return Table(f"{title}; mean ± 95 % interval over seeds", columns, rows)


def draw_series(canvas: Any, series: Series, x_label: str, log_base: int | None = None) -> None:
    """T_priv and T_uni beside each other, one line a method; with `log_base` a logarithmic axis, every value marked."""
    for axes, (part, label) in zip(canvas.subplots(1, 2, sharey=True), PARTS.items(), strict=True):
        lines = {
            method: Line(
                list(by_value),
                [means[part].mean for means in by_value.values()],
                [means[part].ci95 or 0.0 for means in by_value.values()],
            )
            for method, by_value in series.items()
        }
        draw_lines(axes, lines, x_label, "accuracy", label)
        if log_base is not None:
            axes.set_xscale("log", base=log_base)
            ticks = list(next(iter(series.values())))
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()


def summarise(series: Series) -> dict[str, Any]:
    """The means as JSON: method → value → t_priv, t_uni."""
    return {
        method: {
            f"{value:g}": {f"t_{part}": mean.as_json() for part, mean in means.items()}
            for value, means in by_value.items()
        }
        for method, by_value in series.items()
    }


def lead(ours: Scores, theirs: Scores, part: str) -> float:
    """By how many points ours are above theirs, mean over the seeds that both have. Errors: ValueError without one."""
    seeds = ours.keys() & theirs.keys()
    return 100 * mean_with_interval([ours[seed][part] - theirs[seed][part] for seed in seeds]).mean


def compare(pairs: Mapping[str, tuple[Scores, Scores]], title: str) -> Table:
    """Paired tests a row: by name, the results of two sides by seed; only the seeds that both have count."""
    rows: list[list[str | float | None]] = []
    for name, (ours, theirs) in pairs.items():
        seeds = sorted(ours.keys() & theirs.keys())
        row: list[str | float | None] = [name]
        for part in PARTS:
            test = paired_test([ours[seed][part] for seed in seeds], [theirs[seed][part] for seed in seeds])
            row += [str(test.difference), show_p(test.p)]
        rows.append(row)
    return Table(
        f"{title}, paired by seed: mean difference ± 95 % interval, two-sided t-test",
        ("difference", "T_priv", "p (T_priv)", "T_uni", "p (T_uni)"),
        rows,
    )
