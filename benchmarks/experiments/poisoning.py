"""Experiment `poisoning`: what hostile devices cost the global model, by attack and by aggregation rule.

A fifth of the devices uploads spoiled outputs in every round (simulation/attack.py). Each rule's loss is
against its own run of the same seed without hostile devices, on every test image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgestill.benchmarks.experiments.figures import Figure, draw_bars
from edgestill.benchmarks.experiments.grid import Cell, Context, Options, Stage
from edgestill.benchmarks.experiments.report import Report, require_one_each
from edgestill.benchmarks.experiments.simulated import run_federation
from edgestill.benchmarks.experiments.statistics import Mean, mean_with_interval, paired_test, show_p
from edgestill.benchmarks.experiments.tables import Table

NAME = "poisoning"
TITLE = "Hostile devices: the global model's loss by attack and aggregation rule"
ATTACKS = ("scale", "shuffle", "random")
SHARE = 0.2
ALLOWED_LOSS_POINTS = 3.0
RULES: Mapping[str, Mapping[str, Any]] = {
    "median, screened": {"aggregation": "median", "clip": "median", "screen": True},
    "trimmed mean, screened": {"aggregation": "trimmed_mean", "clip": "median", "trim": 0.25, "screen": True},
    "mean, not clipped": {"aggregation": "mean", "clip": None},
    "mean": {"aggregation": "mean", "clip": "median"},
    "median": {"aggregation": "median", "clip": "median"},
    "trimmed mean": {"aggregation": "trimmed_mean", "clip": "median", "trim": 0.25},
}
FULL = {
    "devices": 20, "gamma": 1.0, "rounds": 8, "train_samples": 4000, "transfer_samples": 800,
    "local_epochs": 2, "distil_epochs": 8,
}  # fmt: skip
QUICK = {
    "devices": 10, "gamma": 1.0, "rounds": 3, "train_samples": 1000, "transfer_samples": 400,
    "local_epochs": 2, "distil_epochs": 4,
}  # fmt: skip
COMMON = {
    "students": ["cnn3"], "width_divisor": 4, "exchange": "both", "learning_rate": 0.02, "distil_learning_rate": 0.02,
    "local_only": False,
}  # fmt: skip
FULL_SEEDS, QUICK_SEEDS = 3, 1
CPU_S_A_CELL = {False: 160.0, True: 8.0}
"""Measured on one of two busy cores of an AMD EPYC."""


def stages(options: Options) -> list[Stage]:
    return [lambda records: cells(options)]


def cells(options: Options) -> list[Cell]:
    """Every rule without hostile devices and under every attack, for every seed."""
    return [
        Cell(NAME, {**COMMON, **_size(options), **how, "rule": rule, "attack": attack, "seed": seed,
                    "poison": None if attack is None else f"{SHARE}:{attack}",
                    "data": options.data, "quick": options.quick})
        for rule, how in RULES.items()
        for seed in range(options.seeds or (QUICK_SEEDS if options.quick else FULL_SEEDS))
        for attack in (None, *ATTACKS)
    ]  # fmt: skip


def run_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Accuracy of the global model on all test images after the last round, and of every round."""
    result = run_federation(settings, context)
    return {
        name: result[name]
        for name in ("global_t_uni", "t_uni", "t_priv", "rounds", "rounds_abandoned", "poisoners")
    }


def estimate_minutes(options: Options, workers: int) -> float:
    return len(cells(options)) * CPU_S_A_CELL[options.quick] / 60 / workers


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    """Table and figure of losses in points, and whether median and trimmed mean stay within what is asked."""
    require_one_each(records, ("rule", "attack", "seed"))
    found = {
        (r["settings"]["rule"], r["settings"]["attack"], r["settings"]["seed"]): r["result"]["global_t_uni"]
        for r in records
        if r["result"]["global_t_uni"] is not None
    }
    rows, losses = [], {}
    for rule in RULES:
        clean = {seed: value for (of, attack, seed), value in found.items() if (of, attack) == (rule, None)}
        if not clean:
            continue
        rows.append([rule, "none", str(mean_with_interval(list(clean.values()))), None, None, len(clean)])
        for attack in ATTACKS:
            attacked = {seed: found[rule, attack, seed] for seed in clean if (rule, attack, seed) in found}
            if not attacked:
                continue
            test = paired_test([100 * clean[seed] for seed in attacked], [100 * v for v in attacked.values()])
            losses[rule, attack] = test.difference
            rows.append([rule, attack, str(mean_with_interval(list(attacked.values()))),
                         test.difference.shown(".1f"), show_p(test.p), len(attacked)])  # fmt: skip
    columns = ("rule", "attack", "accuracy", "loss, points", "p (paired)", "seeds")
    within = {
        rule: max(loss.mean for (of, _), loss in losses.items() if of == rule) <= ALLOWED_LOSS_POINTS
        for rule in {of for of, _ in losses}
    }
    summary = {
        rule: {attack: losses[rule, attack].as_json() for attack in ATTACKS if (rule, attack) in losses}
        | {"within_3_points": within[rule]}
        for rule in RULES
        if rule in within
    }
    return Report([Table(TITLE, columns, rows)], [Figure("loss", lambda canvas: _draw(canvas, losses))],
                  summary)  # fmt: skip


def _size(options: Options) -> dict[str, Any]:
    return dict(QUICK if options.quick else FULL)


def _draw(canvas: Any, losses: Mapping[tuple[str, str], Mean]) -> None:
    rules = [rule for rule in RULES if any(of == rule for of, _ in losses)]
    attacks = [attack for attack in ATTACKS if all((rule, attack) in losses for rule in rules)]
    bars = {
        rule: (
            [losses[rule, attack].mean for attack in attacks],
            [losses[rule, attack].ci95 or 0.0 for attack in attacks],
        )
        for rule in rules
    }
    draw_bars(canvas.subplots(), attacks, bars, "loss against the clean run, points", TITLE, form=".1f")
