"""Grids of runs that go on where they stopped: one JSON line a finished run, each found again by its settings."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgestill.runtime.errors import EdgestillError
from edgestill.simulation.pool import submit, worker_processes

# The package stays importable without numpy: a worker limits the threads of numerical libraries before it loads one.


@dataclass(frozen=True)
class Options:
    """What a grid is made from: `data` and `transfer` are the names or digests of what --data and --transfer hold.

    `seeds` is how many final seeds are asked for, None for the experiment's own number.
    """

    quick: bool = False
    seeds: int | None = None
    data: str = "cifar10-mini"
    transfer: str = "cifar100-transfer-mini"


@dataclass(frozen=True)
class Cell:
    """One run: everything that decides its result, as JSON values; no path of a machine is among them."""

    experiment: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the run's canonical JSON."""
        text = json.dumps([self.experiment, self.settings], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Context:
    """What a run may use but what does not decide its result.

    `data` and `transfer` are names or paths as edgestill.runtime.data.dataset loads them; `cache` is for what is
    found by content.
    """

    data: str
    transfer: str
    cache: Path
    keep_states: Path | None = None


RunCell = Callable[[Mapping[str, Any], Context], dict[str, Any]]
Stage = Callable[[Sequence[Mapping[str, Any]]], list[Cell]]
"""The runs of a stage, from the records of the stages before it."""


class Experiment(Protocol):
    """What a module of this package offers."""

    NAME: str
    TITLE: str

    def stages(self, options: Options) -> list[Stage]:
        """One stage, or several where a later one depends on what an earlier one found."""

    def run_cell(self, settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
        """Makes one run; its result as JSON values. At the top of its module, so that a worker finds it."""

    def estimate_minutes(self, options: Options, workers: int) -> float:
        """What all stages take from nothing; a teacher is trained by one worker while the others wait."""

    def report(self, records: Sequence[Mapping[str, Any]]) -> Any:
        """A Report (benchmarks/experiments/report.py) of the records of all stages."""


@dataclass(frozen=True)
class Progress:
    """A run that has just ended, well or with `error`."""

    cell: Cell
    finished: int
    total: int
    elapsed_s: float
    left_s: float
    error: str | None


class RunsFailed(EdgestillError):
    """Some runs of a grid failed; the others are recorded."""


def run_cells(
    cells: Iterable[Cell],
    run_cell: RunCell,
    context: Context,
    path: Path,
    *,
    workers: int,
    on_start: Callable[[int], None] = lambda waiting: None,
    on_done: Callable[[Progress], None] = lambda progress: None,
    again: Callable[[Cell], bool] = lambda cell: False,
    origin: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Makes the runs that `path` does not hold yet and returns the records of all cells in the order of the cells.

    `on_start` hears how many these are, if any. A record, with `origin` (machine, commit) in it, is durable in `path`
    before `on_done` hears of it. Runs for which `again` says so are made once more. Errors: RunsFailed after all others
    have ended; what `path` refuses.
    """
    wanted = {cell.key: cell for cell in cells}
    known = {record["key"]: record for record in read_records(path)}
    waiting = [cell for key, cell in wanted.items() if key not in known or again(cell)]
    done = len(wanted) - len(waiting)
    if waiting:
        on_start(len(waiting))
    failed = 0
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    with (
        path.open("a", encoding="utf-8") as file,
        closing(_run_all(waiting, run_cell, context, workers)) as ended,
    ):
        for count, (cell, result, elapsed_s, error) in enumerate(ended, start=1):
            if error is None:
                record = {
                    "experiment": cell.experiment,
                    "key": cell.key,
                    "settings": dict(cell.settings),
                    "result": result,
                    "elapsed_s": round(elapsed_s, 3),
                    **(origin or {}),
                }
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
                known[cell.key] = record
            else:
                failed += 1
            left_s = (time.monotonic() - started) / count * (len(waiting) - count)
            on_done(Progress(cell, done + count, len(wanted), elapsed_s, left_s, error))
    if failed:
        raise RunsFailed(
            f"{failed} of {len(wanted)} runs failed; {path} holds the others",
            "mend what the messages above say and run the same command again: it makes only what is missing",
        )
    return [known[key] for key in wanted]


def read_records(path: Path, experiment: str | None = None) -> list[dict[str, Any]]:
    """The records of a file, the newest of each run, of one experiment or of all; none without a file.

    A last line that a killed process left unfinished is passed over. Errors: EdgestillError for any other damage.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
            key, name = record["key"], record["experiment"]
        except (ValueError, KeyError, TypeError) as error:
            raise EdgestillError(
                f"{path}, line {number}: no record of a run", "remove the line; its run is made again"
            ) from error
        if experiment is None or name == experiment:
            records[key] = record
    return list(records.values())


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)


Ended = tuple[Cell, dict[str, Any] | None, float, str | None]


def _run_all(
    cells: Sequence[Cell], run_cell: RunCell, context: Context, workers: int
) -> Generator[Ended, None, None]:
    """Runs with result, seconds and error, as they end. One worker, too, is a process: it computes on one thread."""
    if not cells:
        return
    with worker_processes(min(workers, len(cells))) as executor:
        futures: dict[Future[Any], Cell] = {
            submit(executor, _timed, run_cell, cell.settings, context): cell for cell in cells
        }
        for future in as_completed(futures):
            try:
                result, elapsed_s, error = future.result()
            except Exception as broken:  # the process itself ended, or its result cannot travel
                result, elapsed_s, error = None, 0.0, f"{type(broken).__name__}: {broken}"
            yield futures[future], result, elapsed_s, error


def _timed(
    run_cell: RunCell, settings: Mapping[str, Any], context: Context
) -> tuple[dict[str, Any] | None, float, str | None]:
    started = time.perf_counter()
    try:
        result = run_cell(settings, context)
    except Exception as failure:
        hint = getattr(failure, "hint", None)
        text = f"{type(failure).__name__}: {failure}" + (f" (hint: {hint})" if hint else "")
        return None, time.perf_counter() - started, text
    return result, time.perf_counter() - started, None
