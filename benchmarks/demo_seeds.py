"""`make demo-seeds`: the demo's federation for ten seeds, with and without transfer labels, beside devices alone.

A line a seed and run, written when the run has ended: the same command goes on where it stopped. Devices, students,
data and settings are those of `make demo`, through `edgestill simulate`'s code: the same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgestill.benchmarks.machine import commit_record, machine_record, now
from edgestill.runtime.console import align
from edgestill.simulation.federation import Federation
from edgestill.simulation.pool import open_pool
from edgestill.simulation.seeds import (
    EPOCHS,
    EXPLAINED,
    RECORDS,
    RUNS,
    SEEDS,
    STEPS,
    TOGETHER,
    WANTED,
    missing,
    of_seed,
    read_records,
    rows_of_seeds,
    settings_digest,
    settings_of,
    shortfalls,
)
from edgestill.simulation.students import default_cache, prepare_students

PAGE = Path(__file__).parent.parent / "docs" / "simulation.md"
BLOCK = re.compile(r"<!-- demo-seeds:begin -->\n.*?<!-- demo-seeds:end -->", re.DOTALL)


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


def run_missing(seeds: Sequence[int], path: Path, cache: Path, tell: Callable[[str], None]) -> None:
    """Runs what is not recorded yet, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = "".join(json.dumps(record) + "\n" for record in read_records(path))
    if path.exists() and path.read_text(encoding="utf-8") != whole:
        path.write_text(whole, encoding="utf-8")  # without other settings' lines, and one that was cut short
    about = {"machine": machine_record(), "commit": commit_record(), "settings": settings_digest()}
    with path.open("a", encoding="utf-8") as file:
        for run in RUNS:
            for seed in seeds:
                there = of_seed(read_records(path), seed)
                alone = run == TOGETHER and not {EPOCHS, STEPS} <= set(there)
                if run in there and not alone:
                    continue
                for name, record in run_seed(seed, run, cache, alone, tell):
                    if name not in there:
                        file.write(
                            json.dumps({"seed": seed, "run": name, "date": now(), **about, **record}) + "\n"
                        )
                        file.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every seed is recorded with the present settings and they reach what is wanted, else 1."""
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
    if given.records == RECORDS:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")
    print(align(rows_of_seeds(records)))
    print(EXPLAINED)
    missed = shortfalls(records)
    if absent := missing(records, range(SEEDS)):
        missed.append(
            f"{len(absent)} runs of {SEEDS} seeds are not recorded with the present settings, the first is seed "
            f"{absent[0][0]}, {absent[0][1]}; python -m edgestill.benchmarks.demo_seeds runs them"
        )
    for sentence in missed:
        print(f"demo-seeds: {sentence}", file=sys.stderr)
    return 1 if missed else 0


def fill(page: str, records: Sequence[Mapping[str, Any]]) -> str:
    """docs/simulation.md with the records' table between its markers."""
    head, *rows = rows_of_seeds(records) or [("nothing is recorded",)]
    lines = [head, ("---",) * len(head), *rows]
    machines = sorted({record["machine"]["cpu"] for record in records})
    table = "".join(f"| {' | '.join(row)} |\n" for row in lines)
    commits = sorted({record["commit"]["hash"][:7] for record in records})
    text = f"{EXPLAINED}\n\n{table}\nMeasured on: {', '.join(machines)}. Commit: {', '.join(commits)}.\n"
    return BLOCK.sub(lambda _: f"<!-- demo-seeds:begin -->\n{text}<!-- demo-seeds:end -->", page)


def _tell(text: str) -> None:
    print(f"demo-seeds: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
