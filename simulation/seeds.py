"""What `make demo-seeds` has recorded of the demo's federation over ten seeds, and the settings that both share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from edgestill.simulation.settings import TRANSFER, SimulationSettings

STUDENTS = ("cnn3", "cnn4", "cnn5")
DEVICES = 4
SEEDS = 10
CHECKOUT_RECORDS = Path(__file__).parent.parent / "benchmarks" / "results" / "demo-seeds.jsonl"
CARRIED_RECORDS = Path(__file__).parent / "carried" / CHECKOUT_RECORDS.name
"""In a wheel that carries the demo's bundles."""
RECORDS = CHECKOUT_RECORDS if CHECKOUT_RECORDS.exists() else CARRIED_RECORDS
TOGETHER, UNLABELLED = "together", "together, no transfer labels"
EPOCHS, STEPS = "alone, as many epochs", "alone, as many steps"
RUNS = (TOGETHER, UNLABELLED)
WANTED = {"t_priv": (2.0, -1.0), "t_uni": (8.0, 4.0)}
"""Points that `together` is to gain over `alone, as many epochs`: in the mean over seeds, and in each."""


def settings_of(seed: int, labelled: bool) -> SimulationSettings:
    """The demo's: the defaults of `edgestill simulate`, four devices with three students."""
    return SimulationSettings(
        devices=DEVICES,
        students=STUDENTS,
        transfer_labels=labelled,
        validation=TRANSFER,
        seed=seed,
    )


def settings_digest() -> str:
    """Of all settings that decide the figures, but the seed: figures of others say nothing of these."""
    settings = [asdict(settings_of(0, labelled)) for labelled in (True, False)]
    deciding = [{name: one[name] for name in one if name not in ("seed", "workers", "ray")} for one in settings]
    return hashlib.sha256(repr(deciding).encode()).hexdigest()[:12]


def read_records(path: Path) -> list[dict[str, Any]]:
    """All lines of runs with the present settings, but one that a kill has cut short."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record.get("settings") == settings_digest()]


def missing(records: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[tuple[int, str]]:
    """Seed and run of what is not recorded."""
    there = {(record["seed"], record["run"]) for record in records}
    wanted = [(seed, run) for run in (*RUNS, EPOCHS, STEPS) for seed in seeds]
    return [one for one in wanted if one not in there]


def of_seed(records: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Mapping[str, Any]]:
    """What is recorded of a seed, by run."""
    return {record["run"]: record for record in records if record["seed"] == seed}


def gains(records: Sequence[Mapping[str, Any]], run: str, baseline: str) -> dict[int, dict[str, float]]:
    """Points of a run over a baseline in the mean of a seed's devices, by seed."""
    found = {}
    for seed in sorted({record["seed"] for record in records}):
        runs = of_seed(records, seed)
        if run in runs and baseline in runs:
            found[seed] = {
                name: 100 * (mean_of(runs[run], name) - mean_of(runs[baseline], name)) for name in WANTED
            }
    return found


def mean_of(record: Mapping[str, Any], name: str) -> float:
    """An accuracy in the mean of a record's devices."""
    return fmean(one[name] for one in record["devices"])


def shortfalls(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the recorded seeds do not reach of what is wanted, a sentence each."""
    found, by_seed = [], gains(records, TOGETHER, EPOCHS)
    for name, (in_mean, in_each) in WANTED.items():
        values = {seed: gain[name] for seed, gain in by_seed.items()}
        if values and fmean(values.values()) < in_mean:
            found.append(
                f"{name} gains {fmean(values.values()):+.1f} points in the mean, {in_mean:+g} are wanted"
            )
        found += [
            f"{name} gains {value:+.1f} points with seed {seed}, {in_each:+g} are wanted in each"
            for seed, value in values.items()
            if value < in_each
        ]
    return found


def rows_of_seeds(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A heading, a row a seed, and the mean: points over devices alone, T_priv / T_uni; nothing without records."""
    pairs = [(run, baseline) for run in RUNS for baseline in (EPOCHS, STEPS)]
    columns = [gains(records, *pair) for pair in pairs]
    seeds = sorted({seed for column in columns for seed in column})
    if not seeds:
        return []

    def cell(gain: Mapping[str, float] | None) -> str:
        return "–" if gain is None else f"{gain['t_priv']:+.1f} / {gain['t_uni']:+.1f}"

    heads = ("labels − epochs", "labels − steps", "no labels − epochs", "no labels − steps")
    rows: list[tuple[str, ...]] = [("seed", *heads)]
    rows += [(str(seed), *(cell(column.get(seed)) for column in columns)) for seed in seeds]
    means = (
        {name: fmean(gain[name] for gain in column.values()) for name in WANTED} if column else None
        for column in columns
    )
    return [*rows, ("mean", *map(cell, means))]


EXPLAINED = (
    "Points T_priv / T_uni of four devices together over each alone, in their mean: with the transfer images' classes "
    "known to the coordinator, and without; alone for as many epochs, and for as many steps."
)
