"""`edgestill reproduce`: the experiments of docs/experiments.md, each with one command."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgestill.benchmarks.experiments import EXPERIMENTS
from edgestill.benchmarks.experiments.grid import (
    Cell,
    Context,
    Experiment,
    Options,
    Progress,
    read_records,
    run_cells,
)
from edgestill.benchmarks.experiments.locks import locked
from edgestill.benchmarks.experiments.report import Report
from edgestill.benchmarks.experiments.sources import Sources, find_sources
from edgestill.benchmarks.machine import commit_record, machine_record
from edgestill.runtime.console import add_json_option, count
from edgestill.runtime.errors import EdgestillError, UsageError
from edgestill.runtime.files import write_atomically
from edgestill.runtime.machine import cores
from edgestill.simulation.bundles import installed_versions

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = Path(__file__).resolve().parent / "results" / "reproduce"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "reproduce",
        help="repeat the experiments on real images",
        description="Runs one experiment of docs/experiments.md and writes its records, tables and plots. "
        "The same command again goes on where it stopped.",
    )
    add = parser.add_argument
    add("experiment", choices=tuple(EXPERIMENTS), metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    add("--quick", action="store_true", help="a small version: minutes on 2 cores, with cifar10-mini")
    add("--seeds", type=count, metavar="N", help="seeds of the final runs (default: the experiment's own)")
    add(
        "--data",
        metavar="DIR",
        help="a folder with cifar10.npz or cifar-10-python.tar.gz, one of these files, or cifar10-mini "
        "(default with --quick)",
    )
    add(
        "--transfer",
        metavar="PATH",
        help="the auxiliary images: cifar100_transfer.npz, cifar-100-python.tar.gz or cifar100-transfer-mini "
        "(default: what lies beside --data, else the last)",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for records, tables and plots (default: benchmarks/results/reproduce of the checkout, "
        "build/reproduce-quick with --quick)",
    )
    add("--workers", type=count, default=cores(), metavar="W",
        help="processes, one thread each (default: every core, here %(default)s)")  # fmt: skip
    add("--cache", type=Path, metavar="DIR",
        help="keep bundles and teachers here (default: in the user's cache)")  # fmt: skip
    add("--keep-states", type=Path, metavar="DIR",
        help="write the final states and their bundles here, for `edgestill evaluate`")  # fmt: skip
    add("--summary", action="store_true",
        help="run nothing: print the summary of the records in --output (default: the committed ones)")  # fmt: skip
    add_json_option(parser, "the summary as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs an experiment, or prints what is recorded; 0 when everything is there. Errors: EdgestillError."""
    experiment = load_experiment(arguments.experiment)
    if arguments.summary:
        return _print_summary(experiment, arguments)
    if arguments.keep_states is not None and not hasattr(experiment, "redo"):
        raise UsageError(f"{experiment.NAME} keeps no states", "leave --keep-states out; `methods` has it")
    options, sources = _prepare(arguments)
    output: Path = arguments.output or _default_output(arguments.quick)
    context = Context(
        sources.data, sources.transfer, arguments.cache or _default_cache(), arguments.keep_states
    )
    for option, folder in (("--output", output), ("--keep-states", arguments.keep_states)):
        if folder is not None:
            _make_folder(option, folder)
    records = output / f"{experiment.NAME}.jsonl"
    workers: int = arguments.workers
    _tell(
        f"{experiment.NAME}: {experiment.TITLE}; with {workers} worker{'s' if workers > 1 else ''} about "
        f"{experiment.estimate_minutes(options, workers):.0f} minutes from nothing; "
        f"{len(read_records(records))} runs are recorded in {records}"
    )
    started = time.monotonic()
    run_stages(experiment, options, context, output, workers)
    _tell(f"finished after {(time.monotonic() - started) / 60:.1f} minutes")
    report = experiment.report(read_records(records, experiment.NAME))  # with those of earlier commands
    for path in write_report(experiment, report, output, arguments.quick):
        _tell(f"wrote {path}")
    _print_report(experiment, report, arguments)
    return 0


def load_experiment(name: str) -> Experiment:
    """The module of an experiment."""
    module: Any = importlib.import_module(EXPERIMENTS[name])
    return module


def run_stages(
    experiment: Experiment, options: Options, context: Context, output: Path, workers: int
) -> list[dict[str, Any]]:
    """The records of all stages, made or found in OUTPUT/NAME.jsonl.

    Errors: RunsFailed; EdgestillError while another process does the same.
    """
    records: list[dict[str, Any]] = []
    path = output / f"{experiment.NAME}.jsonl"
    origin = {
        "machine": machine_record(),
        "commit": commit_record(),
        "edgestill": installed_versions().get("edgestill"),
    }
    redo = getattr(experiment, "redo", lambda cell, folder: False)
    stages = experiment.stages(options)
    with locked(path, wait=False):
        _refuse_other_images(path, experiment.NAME, options)
        for number, stage in enumerate(stages, start=1):
            cells = stage(records)
            where = f"stage {number}/{len(stages)}"
            on_start = partial(_tell_start, where=where, workers=workers)
            records += run_cells(
                cells,
                experiment.run_cell,
                context,
                path,
                workers=workers,
                on_start=on_start,
                on_done=partial(_tell_done, where=where, names=_varied(cells)),
                again=lambda cell: context.keep_states is not None and redo(cell, context.keep_states),
                origin=origin,
            )
    return records


def _refuse_other_images(path: Path, experiment: str, options: Options) -> None:
    """Before hours of running: a report of several data sets would be of none."""
    recorded = read_records(path, experiment)
    for name, own in (("data", options.data), ("transfer", options.transfer)):
        if any(record["settings"].get(name, own) != own for record in recorded):
            raise UsageError(
                f"{path} holds runs with other images than those of --{name}",
                "give another --output, such as --output build/reproduce",
            )


def write_report(experiment: Experiment, report: Report, output: Path, quick: bool) -> list[Path]:
    """Writes NAME.md, NAME.csv and the plots; returns the paths. Without matplotlib there are no plots."""
    from edgestill.benchmarks.experiments.figures import save_figure
    from edgestill.benchmarks.experiments.tables import to_csv

    stem = output / experiment.NAME
    written = []
    for suffix, text in ((".md", _markdown(experiment, report, quick)), (".csv", to_csv(report.tables))):
        path = stem.with_name(stem.name + suffix)
        write_atomically(path, [text.encode()])
        written.append(path)
    try:
        for figure in report.figures:
            written += save_figure(figure, stem)
    except ImportError:
        _tell(
            "no plots: matplotlib is not installed; pip install 'edgestill[plots]' and run the command again"
        )
    return written


def _print_summary(experiment: Experiment, arguments: argparse.Namespace) -> int:
    folder = arguments.output or (_default_output(quick=True) if arguments.quick else COMMITTED)
    path = folder / f"{experiment.NAME}.jsonl"
    records = read_records(path, experiment.NAME)
    if not records:
        raise EdgestillError(
            f"{path} holds no records of {experiment.NAME}",
            f"run `edgestill reproduce {experiment.NAME} {'--quick' if arguments.quick else '--data DIR'}` first, "
            "or give its --output",
        )
    part = EdgestillError(
        f"{path} holds only a part of the runs of {experiment.NAME}",
        f"wait for the rest, or run `edgestill reproduce {experiment.NAME}` again: it makes what is missing",
    )
    try:
        report = experiment.report(records)
    except (LookupError, ValueError) as error:  # a mean of nothing
        raise part from error
    if not report.summary:  # tuning alone
        raise part
    _print_report(experiment, report, arguments)
    return 0


def _print_report(experiment: Experiment, report: Report, arguments: argparse.Namespace) -> None:
    print(json.dumps(report.summary) if arguments.json else _markdown(experiment, report, arguments.quick))


def _markdown(experiment: Experiment, report: Report, quick: bool) -> str:
    note = "Quick version: it shows that everything runs; its figures mean nothing.\n\n" if quick else ""
    return f"# {experiment.TITLE}\n\n{note}{describe_report(report)}"


def describe_report(report: Report) -> str:
    """Notes and tables as Markdown."""
    from edgestill.benchmarks.experiments.tables import to_markdown

    return "\n".join([*(f"{note}\n" for note in report.notes), *map(to_markdown, report.tables)])


def _prepare(arguments: argparse.Namespace) -> tuple[Options, Sources]:
    if arguments.data is None and not arguments.quick:
        raise UsageError(
            f"reproduce {arguments.experiment} needs CIFAR-10",
            "give --data DIR with cifar10.npz or cifar-10-python.tar.gz in it, or --quick for the shipped images",
        )
    sources = find_sources(arguments.data or "cifar10-mini", arguments.transfer)
    return Options(arguments.quick, arguments.seeds, sources.data_name, sources.transfer_name), sources


def _default_output(quick: bool) -> Path:
    in_checkout = (ROOT / "pyproject.toml").is_file()
    if quick:
        return ROOT / "build" / "reproduce-quick" if in_checkout else Path("edgestill-reproduce-quick")
    return COMMITTED if in_checkout else Path("edgestill-reproduce")


def _default_cache() -> Path:
    from edgestill.simulation.students import default_cache

    return default_cache().parent / "reproduce"


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(
            f"{option} {folder} is a file", "name a folder; it is made if it is not there"
        ) from error


def _varied(cells: Sequence[Cell]) -> list[str]:
    """The settings in which the cells differ: enough to name one of them."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.settings))
    return [
        name for name in names if len({json.dumps(c.settings.get(name), sort_keys=True) for c in cells}) > 1
    ]


def _tell_start(waiting: int, where: str, workers: int) -> None:
    _tell(f"{where}: {waiting} to run, {min(waiting, workers)} at once")


def _tell_done(done: Progress, where: str, names: Sequence[str]) -> None:
    _tell(_describe(done, where, names))


def _describe(done: Progress, where: str, names: Sequence[str]) -> str:
    settings = done.cell.settings
    what = ", ".join(filter(None, (_worded(name, settings.get(name)) for name in names)))
    what = what or settings.get("stage") or done.cell.key
    head = f"{where}: {done.finished}/{done.total}: {what}"
    if done.error is not None:
        return f"{head}: FAILED: {done.error}\n  settings: {json.dumps(dict(settings))}"
    left = "" if not done.left_s else f", about {done.left_s / 60:.0f} min left in this stage"
    return f"{head}: {done.elapsed_s:.0f} s{left}"


def _worded(name: str, value: Any) -> str:
    """A setting in a few words; nothing of a whole group of settings, such as the teacher's."""
    if isinstance(value, Mapping):
        return "" if len(value) > 3 else ", ".join(f"{inner} {number}" for inner, number in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else f"{name} {value}"


def _tell(text: str) -> None:
    print(f"reproduce: {text}", file=sys.stderr, flush=True)
