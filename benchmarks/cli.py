"""`edgestill bench step`: measures engines on the same training step."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgestill.benchmarks import machine
from edgestill.benchmarks.report import format_table
from edgestill.benchmarks.step import EAGER_ENGINES, Case, StepSettings, error_line, measure_case
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.console import add_json_option, count
from edgestill.runtime.engines.registry import ENGINES, EngineStatus, available_engines
from edgestill.runtime.errors import UsageError
from edgestill.runtime.machine import cores
from edgestill.simulation.bundles import BundleRequest, ExportFailed, installed_versions, prepare_bundle


def add_parser(subparsers: Any) -> None:
    """Adds `bench` with its subcommand `step`."""
    bench = subparsers.add_parser(
        "bench",
        help="measure engines against eager PyTorch",
        description="Measures engines against eager PyTorch on this machine.",
    )
    benches = bench.add_subparsers(dest="bench", required=True, metavar="WHAT")
    step = benches.add_parser(
        "step",
        help="time, memory and cold start of one training step",
        description="Times one training step on every engine and on eager PyTorch, in turns in one run, "
        "then takes peak memory and cold start from fresh processes. Method: benchmarks/README.md.",
    )
    add = step.add_argument
    add("--students", type=_words, default=["cnn3"], metavar="A,B", help="students to export (default cnn3)")
    add(
        "--bundle",
        type=Path,
        action="append",
        metavar="DIR",
        help="measure an exported bundle instead (may be repeated); its student and batch size are fixed",
    )
    add("--batches", type=_counts, default=[32], metavar="N,M", help="batch sizes (default 32)")
    add(
        "--engines",
        type=_engines,
        default=None,
        metavar="A,B",
        help="engines (default: all that work here); package.module:function names one of your own",
    )
    add("--threads", type=_counts, default=[1], metavar="N,M", help="thread counts (default 1)")
    add("--steps", type=count, default=40, help="timed steps an engine (default 40)")
    add("--rounds", type=count, default=8, help="turns that the steps are divided into (default 8)")
    add("--warmup", type=count, default=5, help="steps before those that count (default 5)")
    add(
        "--cold-starts",
        type=_count_or_zero,
        default=3,
        help="fresh processes for memory and cold start (default 3, 0: don't measure them)",
    )
    add("--objective", default="lkd", choices=("ce", "kd", "lkd"), help="default lkd")
    add("--optimizer", default="sgd", choices=("sgd", "adamw"), help="default sgd")
    add("--latent-size", type=count, default=128, help="default 128")
    add(
        "--export-options",
        type=shlex.split,
        default=[],
        metavar="TEXT",
        help="further options for `edgestill export`, as in --export-options='--freeze perception'",
    )
    add("--seed", type=int, default=0, help="seed of the batches (default 0)")
    add("--cache", type=Path, metavar="DIR", help="keep exported bundles here and use them again")
    add_json_option(step, "one JSON line an engine")
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help="append the JSON lines to this .jsonl file; in a folder, to step-<machine>-<date>.jsonl",
    )
    add("--plot", type=Path, metavar="FILE.png", help="draw time and memory")
    step.set_defaults(run=run_step)
    _add_coordinator(benches)


def _add_coordinator(benches: Any) -> None:
    """`bench coordinator`, where what a coordinator needs is installed."""
    from edgestill.benchmarks.coordinator_load import add_parser as add_coordinator

    add_coordinator(benches)


def run_step(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 0 when an engine was measured, 1 when none. Errors: UsageError, BundleError."""
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    if max(arguments.threads) > cores():
        _tell(f"warning: {max(arguments.threads)} threads on {cores()} cores")
    statuses = {status.name: status for status in available_engines()}
    wanted = arguments.engines or [name for name, status in statuses.items() if status.usable]
    if not wanted:
        raise UsageError("no engine works on this machine", "see `edgestill doctor`")
    unusable = {name: statuses[name] for name in wanted if name in statuses and not statuses[name].usable}
    engine_versions = {name: status.version for name, status in statuses.items() if status.version}
    origin = {
        "machine": machine.machine_record(),
        "commit": machine.commit_record(),
        "versions": {**installed_versions(), **engine_versions},
        "date": machine.now(),
    }
    output = _output_file(arguments.output, origin) if arguments.output is not None else None
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgestill-bench-") as temporary:
        for line in _measure(arguments, wanted, unusable, arguments.cache or Path(temporary)):
            lines.append({**line, **origin})
            if arguments.json:
                print(json.dumps(lines[-1]), flush=True)
            if output is not None:
                # at once: hours of measuring may still be interrupted
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    if not arguments.json:
        print(format_table(lines), end="")
    if output is not None:
        _tell(f"appended {len(lines)} lines to {output}")
    measured = [line for line in lines if "error" not in line]
    if arguments.plot is not None and measured:
        from edgestill.benchmarks.plot import plot_results

        plot_results(lines, arguments.plot)
        _tell(f"wrote {arguments.plot}")
    return 0 if any(line["engine"] in wanted for line in measured) else 1


def _measure(
    arguments: argparse.Namespace, wanted: Sequence[str], unusable: Mapping[str, EngineStatus], cache: Path
) -> Iterator[dict[str, Any]]:
    """Result lines of every case; an engine that can't be tried comes as a line with an error."""
    settings = StepSettings(
        arguments.steps, arguments.rounds, arguments.warmup, arguments.cold_starts, arguments.seed
    )
    usable = [engine for engine in wanted if engine not in unusable]
    for case, failed in _cases(arguments, usable, cache):
        if case.bundle is not None:
            yield from measure_case(
                case, [engine for engine in usable if engine not in failed], settings, _tell
            )
        for engine, error in failed.items():
            yield error_line(case, engine, error.message, error.hint)
        for engine, status in unusable.items():
            yield error_line(case, engine, status.reason or "does not work here", status.hint)


def _cases(
    arguments: argparse.Namespace, engines: Sequence[str], cache: Path
) -> Iterator[tuple[Case, dict[str, ExportFailed]]]:
    """Every case with the engines that its bundle could not be exported for, and why."""
    for path in arguments.bundle or ():
        with Bundle.open(path) as bundle:
            for threads in arguments.threads:
                yield Case(bundle.student.name, bundle.batch, threads, bundle.path), {}
    if arguments.bundle:
        return
    # eager PyTorch and engines of the user's own need no graphs, only what any engine's export has
    exported = [engine for engine in engines if engine in ENGINES] or ["native"]
    for student in arguments.students:
        for batch in arguments.batches:
            request = BundleRequest(
                student,
                batch,
                arguments.latent_size,
                arguments.objective,
                arguments.optimizer,
                tuple(arguments.export_options),
            )
            folder: Path | None = None
            try:
                folder, failed = prepare_bundle(request, exported, cache, _tell)
            except ExportFailed as error:
                failed = dict.fromkeys(engines, error)
            for threads in arguments.threads:
                yield Case(student, batch, threads, folder), failed


def _output_file(path: Path, origin: Mapping[str, Any]) -> Path:
    """The file to append to, whose folder exists; a folder gets one named after the machine and the date."""
    if path.suffix != ".jsonl":
        path = path / machine.results_file_name(origin["machine"], origin["date"])
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check_plot(path: Path) -> None:
    """Errors that would otherwise come after minutes of measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", "pip install 'edgestill[plots]'"
        ) from error
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: not a .png file in a folder that exists")


def _tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _count_or_zero(text: str) -> int:
    return 0 if text == "0" else count(text)


def _words(text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise argparse.ArgumentTypeError("the list is empty")
    return words


def _counts(text: str) -> list[int]:
    return [count(word) for word in _words(text)]


def _engines(text: str) -> list[str]:
    known = [*EAGER_ENGINES, *ENGINES]
    for name in (words := _words(text)):
        if name not in known and ":" not in name:
            raise argparse.ArgumentTypeError(f"no engine {name!r}; there are {', '.join(known)}")
    return words
