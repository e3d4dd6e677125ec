"""`make demo-seeds`: the demo's federation for ten seeds, with and without transfer labels, beside devices alone.

A line a seed and run, written when the run has ended: the same command goes on where it stopped. Devices, students,
data and settings are those of `make demo`, through `edgestill simulate`'s code: the same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from edgestill.benchmarks.machine import commit_record, machine_record, now
from edgestill.benchmarks.report import align
from edgestill.benchmarks.simulation.federation import Federation
from edgestill.benchmarks.simulation.pool import open_pool
from edgestill.benchmarks.simulation.settings import SimulationSettings
from edgestill.benchmarks.simulation.students import default_cache, prepare_students

STUDENTS = ("cnn3", "cnn4", "cnn5")
DEVICES = 4
SEEDS = 10
RECORDS = Path(__file__).parent / "results" / "demo-seeds.jsonl"
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
        validation=SimulationSettings.transfer,
        seed=seed,
    )


def run_seed(
    seed: int, run: str, cache: Path, alone: bool, tell: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The run and its record, and with `alone` the two comparisons and theirs."""
    settings = settings_of(seed, run == TOGETHER)
    bundles, global_bundle = prepare_students(settings, cache, tell)
    with tempfile.TemporaryDirectory(prefix="edgestill-demo-seeds-") as folder, open_pool(1, False) as pool:
        started_s = time.perf_counter()
        federation = Federation(settings, bundles, global_bundle, Path(folder))
        lines = []
        for number in range(1, settings.rounds + 1):
            lines.append(federation.run_round(number, pool))
            tell(f"seed {seed}, {run}: round {number} of {settings.rounds}")
        record = {
            "devices": _of_devices(federation.tally.after),
            "rounds": [_kept(line) for line in lines],
            "seconds": round(time.perf_counter() - started_s, 1),
        }
        yield run, record
        for name in (EPOCHS, STEPS) if alone else ():
            tell(f"seed {seed}, {name}")
            started_s = time.perf_counter()
            found = federation.train_alone(pool, as_many_steps=name == STEPS)
            yield name, {"devices": _of_devices(found), "seconds": round(time.perf_counter() - started_s, 1)}


def _of_devices(found: Mapping[int, Mapping[str, float | None]]) -> list[dict[str, float | None]]:
    return [{name: found[index][name] for name in WANTED} for index in sorted(found)]


def _kept(line: Mapping[str, Any]) -> dict[str, Any]:
    names = ("round", "phase", "t_priv", "t_uni", "global_t_uni", "validation_accuracy", "best", "published")
    return {name: line[name] for name in names}


def read_records(path: Path) -> list[dict[str, Any]]:
    """All lines but one that a kill has cut short."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
            found.append(f"{name} gains {fmean(values.values()):+.1f} points in the mean, {in_mean:+g} are wanted")
        found += [
            f"{name} gains {value:+.1f} points with seed {seed}, {in_each:+g} are wanted in each"
            for seed, value in values.items()
            if value < in_each
        ]
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row a seed, and the mean: points over devices alone, T_priv / T_uni."""
    pairs = [(run, baseline) for run in RUNS for baseline in (EPOCHS, STEPS)]
    columns = [gains(records, *pair) for pair in pairs]
    rows: list[tuple[str, ...]] = [("seed", *(f"{run} − {baseline}" for run, baseline in pairs))]

    def cell(gain: Mapping[str, float] | None) -> str:
        return "–" if gain is None else f"{gain['t_priv']:+.1f} / {gain['t_uni']:+.1f}"

    for seed in sorted({record["seed"] for record in records}):
        rows.append((str(seed), *(cell(column.get(seed)) for column in columns)))
    means = [
        {name: fmean(gain[name] for gain in column.values()) for name in WANTED} if column else None
        for column in columns
    ]
    rows.append(("mean", *map(cell, means)))
    return align(rows)


def run_missing(seeds: Sequence[int], path: Path, cache: Path, tell: Callable[[str], None]) -> None:
    """Runs what is not recorded yet, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = "".join(json.dumps(record) + "\n" for record in read_records(path))
    if path.exists() and path.read_text(encoding="utf-8") != whole:
        path.write_text(whole, encoding="utf-8")  # without a line that was cut short
    about = {"machine": machine_record(), "commit": commit_record()}
    with path.open("a", encoding="utf-8") as file:
        for run in RUNS:
            for seed in seeds:
                there = of_seed(read_records(path), seed)
                alone = run == TOGETHER and not {EPOCHS, STEPS} <= set(there)
                if run in there and not alone:
                    continue
                for name, record in run_seed(seed, run, cache, alone, tell):
                    if name not in there:
                        file.write(json.dumps({"seed": seed, "run": name, "date": now(), **about, **record}) + "\n")
                        file.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the recorded seeds reach what is wanted, else 1."""
    parser = argparse.ArgumentParser(prog="python -m edgestill.benchmarks.demo_seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="0 to N − 1 (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="S", help="the first of them (%(default)s)")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FILE", help="%(default)s")
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="exported bundles")
    parser.add_argument("--summary", action="store_true", help="run nothing, show what is recorded")
    given = parser.parse_args(arguments)
    if not given.summary:
        seeds = range(given.first, given.first + given.seeds)
        run_missing(seeds, given.records, given.cache or default_cache(), _tell)
    records = read_records(given.records)
    print(table(records))
    missed = shortfalls(records)
    for sentence in missed:
        print(f"demo-seeds: {sentence}", file=sys.stderr)
    return 1 if missed or not records else 0


def _tell(text: str) -> None:
    print(f"demo-seeds: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
