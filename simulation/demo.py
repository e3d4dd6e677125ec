"""`edgestill demo`: a coordinator, its global student, and four devices with three students, on this machine.

Every step is an `edgestill` command, printed as one would type it. Coordinator and devices are processes of their
own that talk HTTP; figures are read from what they report. The same seed gives the same figures, those of
`make demo-seeds`, on every machine with the engine `native`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from edgestill.coordinator.distillation.job import VALIDATION
from edgestill.runtime.console import add_json_option
from edgestill.runtime.errors import UsageError
from edgestill.simulation import demo_bundles
from edgestill.simulation.demo_board import DEVICES, Board
from edgestill.simulation.demo_commands import Background, Commands, DemoFailed
from edgestill.simulation.demo_page import summary_table, write_page
from edgestill.simulation.demo_results import DeviceResult, Results, RoundResult
from edgestill.simulation.seeds import (
    RECORDS,
    STUDENTS,
    TOGETHER,
    UNLABELLED,
    WANTED,
    of_seed,
    read_records,
    rows_of_seeds,
    settings_of,
)
from edgestill.simulation.settings import TRANSFER
from edgestill.simulation.students import narrow

DATA, TASK = "cifar10-mini", "demo"
START_TIMEOUT_S = 60.0
DEFAULTS = settings_of(seed=0, labelled=True)
GLOBAL_STUDENT = STUDENTS[-1]
ENGINE = "native"
MARK = ".edgestill-demo"
"""Lies in a folder that a demo made."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo is asked to do; with its defaults its figures are those of `make demo-seeds`."""

    output: Path = Path("demo")
    gamma: float = DEFAULTS.gamma
    rounds: int = DEFAULTS.rounds
    local_epochs: int = DEFAULTS.local_epochs
    distil_epochs: int = DEFAULTS.distil_epochs
    transfer_count: int = DEFAULTS.transfer_count
    seed: int = DEFAULTS.seed
    port: int = 0
    export: bool = False
    keep: bool = False

    @property
    def unpacks(self) -> bool:
        """Whether the students are those that the package carries."""
        return not self.export and demo_bundles.carried(STUDENTS)

    @property
    def is_recorded(self) -> bool:
        """Whether these are the settings of `make demo-seeds`, whose records can stand beside the figures.

        The bundles that the package carries have initial weights of one seed.
        """
        names = ("gamma", "rounds", "local_epochs", "distil_epochs", "transfer_count")
        same = all(getattr(self, name) == getattr(DEFAULTS, name) for name in names)
        return same and (self.seed == DEFAULTS.seed or not self.unpacks)


def run_demo(settings: DemoSettings, screen: TextIO, tell: Callable[[Results], None]) -> None:
    """Runs all commands, writes the page and tells what it shows. Errors: DemoFailed."""
    started_s = time.monotonic()
    show = Commands(screen)
    folder = claim(settings.output)
    for stale in ("coordinator", *(f"device-{device.name}" for device in DEVICES)):
        shutil.rmtree(folder / stale, ignore_errors=True)

    lay_bundles(show, settings)

    show.heading("2. A coordinator, a task with a global student, and a code for each device")
    data_dir = folder / "coordinator"
    show.run("task", "create", *task_words(settings, data_dir), "--json")
    printed = show.run("enrol", "--data-dir", data_dir, "--task", TASK, "--count", len(DEVICES), "--json")
    codes = json.loads(printed)["codes"]
    server, url = start_coordinator(show, data_dir, settings.port)
    running: list[Background] = [server]
    try:
        show.say(f"  dashboard: {url}")
        show.heading(
            f"3. {len(DEVICES)} devices join, each with its own skewed share of {DATA} (gamma {settings.gamma:g})"
        )
        board = Board(show)
        joined = [
            show.start(
                "join", url, "--code", code, *join_words(settings, number), on_line=board.listener(number)
            )
            for number, code in enumerate(codes)
        ]
        running += joined
        board.follow(joined, server)
        for device, seen in zip(DEVICES, board.seen, strict=True):
            if not seen.settled:
                raise DemoFailed(
                    f"{device.name} finished no round: there is nothing to compare with devices alone",
                    "give the devices more time, or fewer --local-epochs",
                )
        show.heading("4. The same devices, each alone on the same data: as many epochs, then as many steps")
        task = json.loads(show.run("task", "show", TASK, "--data-dir", data_dir, "--json"))
        results = collect(settings, task, board, train_alone(settings, data_dir, task, board))
        page = write_page(results, folder)
        tell(results)
        show.heading(f"Done in {time.monotonic() - started_s:.0f} s; the page is {page}")
        for words, what in next_commands(settings):
            show.say(f"  {what}:\n    {show.typed(*words)}")
        if settings.keep:
            show.say(f"the coordinator goes on at {url} until Ctrl-C")
            while server.poll() is None:
                time.sleep(0.5)
    finally:
        for process in reversed(running):
            process.stop()


def claim(folder: Path) -> Path:
    """Makes or marks the folder as the demo's own, in which it may delete.

    Errors: UsageError where other things lie.
    """
    if folder.exists() and not (folder / MARK).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"--output {folder}: is there already, and no demo made it",
            f"give a folder that is new or empty, such as --output {shlex.quote(str(folder / 'demo'))}"
            if folder.is_dir()
            else "give a folder that is new or empty",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("`edgestill demo` made this folder, and replaces what it wrote here.\n")
    return folder


def lay_bundles(show: Commands, settings: DemoSettings) -> None:
    """Puts the students' bundles into the output folder: the package's, or exported. Errors: DemoFailed."""
    folder = settings.output
    if settings.unpacks:
        show.heading(f"1. Three students of different architecture with one common head, laid in {folder}/")
        demo_bundles.unpack(STUDENTS, folder)
        return
    if not _is_installed("torch"):
        raise DemoFailed(
            "the students must be exported, and PyTorch is not installed here",
            "pip install 'edgestill[export]', or install a wheel that `make wheels` made: it carries their bundles",
        )
    show.heading(f"1. Three students of different architecture with one common head, exported in {folder}/")
    show.run_beside([export_words(student, settings) for student in STUDENTS])


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # imported, or kept from being so, by hand
        return False


def next_commands(settings: DemoSettings) -> list[tuple[list[object], str]]:
    """Three commands to go on with, and what each is for."""
    folder = settings.output
    return [
        (["serve", "--data-dir", folder / "coordinator"], "the dashboard of what just ran"),
        (["train", folder / GLOBAL_STUDENT, "--data", DATA, "--alpha", 0, "--epochs", 2, "--state",
          folder / "own.safetensors"],
         "train one of the students by itself; --data takes your own images, a folder a class, with --resize"),
        (["simulate", "--bundle", folder / "cnn3", "--bundle", folder / "cnn4",
          "--global-bundle", folder / GLOBAL_STUDENT, "--devices", 20, "--rounds", 3],
         "a larger federation, without processes and sockets"),
    ]  # fmt: skip


def export_words(student: str, settings: DemoSettings, packed: bool = False) -> list[object]:
    """The command that exports one student."""
    return [
        "export", "--student", student, *narrow(student, DEFAULTS.width_divisor),
        "--objective", DEFAULTS.exported_objective, "--optimizer", DEFAULTS.optimizer, "--common-head",
        "--seed", settings.seed, "--engines", ENGINE,
        "--output", settings.output / f"{student}{'.zip' if packed else ''}", "--overwrite",
    ]  # fmt: skip


def task_words(settings: DemoSettings, data_dir: Path) -> list[object]:
    """What follows `edgestill task create`."""
    bundles = [word for student in STUDENTS for word in ("--bundle", settings.output / student)]
    return [
        "--data-dir", data_dir, "--name", TASK, *bundles,
        "--global-bundle", settings.output / GLOBAL_STUDENT, "--common-head",
        "--transfer", TRANSFER, "--transfer-count", settings.transfer_count, "--transfer-labels",
        "--validation", TRANSFER, "--test", DATA, "--rounds", settings.rounds, "--goal", len(DEVICES),
        "--over-selection", 1, "--deadline", 300, "--local-epochs", settings.local_epochs,
        "--distil-epochs", settings.distil_epochs, "--seed", settings.seed,
    ]  # fmt: skip


def join_words(settings: DemoSettings, number: int) -> list[object]:
    """What follows the code of device `number`, counted from 0."""
    device = DEVICES[number]
    memory = [] if device.memory_mb is None else ["--memory", device.memory_mb]
    return [
        "--name", device.name, "--engine", ENGINE, *memory, "--threads", 1,
        "--data", DATA, "--share", f"{number + 1}/{len(DEVICES)}", "--gamma", settings.gamma,
        "--seed", settings.seed, "--work-dir", settings.output / f"device-{device.name}",
        "--ignore-conditions", "--json",
    ]  # fmt: skip


def start_coordinator(show: Commands, data_dir: Path, port: int) -> tuple[Background, str]:
    """The running server and its address. Errors: DemoFailed when it does not come up."""
    urls: list[str] = []
    ready = threading.Event()

    def listen(line: str) -> None:
        urls.append(json.loads(line)["url"])
        ready.set()

    server = show.start("serve", "--data-dir", data_dir, "--port", port, "--json", on_line=listen)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not ready.wait(0.1):
        if server.poll() is not None:
            server.check()
        if server.poll() is not None or time.monotonic() > deadline_s:
            server.stop()
            raise DemoFailed("the coordinator did not come up")
    return server, urls[0]


def train_alone(
    settings: DemoSettings, data_dir: Path, task: dict[str, Any], board: Board
) -> list[tuple[dict[str, float | None], dict[str, float | None]]]:
    """Accuracies of every device's student after as many epochs, and after as many steps, on its own data alone."""
    from edgestill.coordinator.store.blobs import FileBlobs
    from edgestill.simulation.pool import LocalFile, open_pool
    from edgestill.simulation.virtual_device import AloneJob, Setup, train_alone

    setup, stored = Setup(DATA, len(DEVICES), settings.gamma, settings.seed), FileBlobs(data_dir / "blobs")
    bundles = {device["name"]: device["bundle"] for device in task["devices"]}
    entries = {entry["bundle"]: entry for entry in task["task"]["students"]}
    transfer = task["task"]["transfer"]["blob"]
    published = [one["number"] for one in task["rounds"] if one["phase"] == "completed"]
    jobs = [
        AloneJob(
            setup,
            number,
            {"task": task["task"], "student": entries[bundles[seen.device]]},
            {digest: LocalFile(stored.path(digest)) for digest in (bundles[seen.device], transfer)},
            len(seen.settled),
            ENGINE,
            taught,
        )
        for number, seen in enumerate(board.seen)
        # as many steps: also those on the transfer set, in rounds that had global outputs
        for taught in (0, sum(bool(published) and number > published[0] for number in seen.settled))
    ]
    with open_pool(2, ray=False) as pool:
        found = list(pool.map(train_alone, jobs))
    return list(zip(found[::2], found[1::2], strict=True))


def collect(
    settings: DemoSettings,
    task: dict[str, Any],
    board: Board,
    alone: list[tuple[dict[str, float | None], dict[str, float | None]]],
) -> Results:
    """The figures of the page."""
    devices = []
    records = read_records(RECORDS) if settings.is_recorded else []
    recorded = of_seed(records, settings.seed)
    unlabelled = recorded[UNLABELLED]["devices"] if UNLABELLED in recorded else [None] * len(DEVICES)
    for device, seen, (epochs, steps), other in zip(DEVICES, board.seen, alone, unlabelled, strict=True):
        reports = [seen.settled[number] for number in sorted(seen.settled)]
        first, last = reports[0], reports[-1]
        devices.append(
            DeviceResult(
                name=device.name,
                student=seen.student,
                engine=ENGINE,
                samples=seen.samples,
                class_counts=tuple(last["class_counts"]),
                before=first["before"],
                after=[report["after"] for report in reports],
                alone=epochs,
                alone_steps=steps,
                unlabelled=other,
                step_ms=last["step_ms"],
                bytes_up=[report["bytes_up"] for report in reports],
                bytes_down=[report["bytes_down"] for report in reports],
                peak_rss_bytes=last["peak_rss_bytes"],
            )
        )
    rounds = [
        RoundResult(one["number"], one["phase"], metrics.get("t_uni"), metrics.get(VALIDATION), one["best"])
        for one in task["rounds"]
        if (metrics := one["metrics"]) is not None
    ]
    together = recorded[TOGETHER]["devices"] if TOGETHER in recorded else None
    same = None
    if together is not None:
        same = [{name: one.after[-1][name] for name in WANTED} for one in devices] == together
    return Results(
        gamma=settings.gamma,
        local_epochs=settings.local_epochs,
        global_student=GLOBAL_STUDENT,
        transfer_samples=task["task"]["transfer"]["samples"],
        validation_samples=task["task"]["validation"]["samples"],
        devices=tuple(devices),
        rounds=tuple(rounds),
        seed=settings.seed,
        same_as_recorded=same,
        recorded_by=recorded[TOGETHER]["commit"]["hash"][:7] if same is not None else "",
        rows_of_seeds=tuple(rows_of_seeds(records)),
    )


def add_parser(subparsers: Any) -> None:
    """Adds `demo`; it sets `run`, a function of the parsed arguments that returns the exit code."""
    default = DemoSettings()
    parser = subparsers.add_parser(
        "demo",
        help="a federation on this machine: coordinator, four devices, result page",
        description="A coordinator and four devices as processes of this machine, from the bundles that the package "
        "carries, or exported where there are none; at the end a table and a page. Every step is an edgestill "
        "command that is shown. Method: docs/simulation.md.",
    )
    for name, help_text in (
        ("output", "folder for everything that the demo writes: a new or empty one, or of a demo before"),
        ("gamma", "Dirichlet concentration of the devices' classes"),
        ("rounds", "rounds of the federation"),
        ("local_epochs", "epochs of local training a round"),
        ("distil_epochs", "epochs of the global student a round"),
        ("transfer_count", "images of the transfer set"),
        ("seed", "decides every draw"),
        ("port", "of the coordinator on this machine, 0 for any that is free"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path if name == "output" else type(value),
                            default=value, metavar="DIR" if name == "output" else "N",
                            help=f"{help_text} (default {value})")  # fmt: skip
    parser.add_argument(
        "--export",
        action="store_true",
        help="export the students here, with PyTorch, instead of taking the package's bundles",
    )
    parser.add_argument("--keep", action="store_true", help="leave the coordinator and its dashboard running")
    add_json_option(parser, "one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 when every command worked. Errors: DemoFailed."""
    settings = DemoSettings(**{one.name: getattr(arguments, one.name) for one in fields(DemoSettings)})

    def tell(results: Results) -> None:
        print(json.dumps(asdict(results)) if arguments.json else summary_table(results), flush=True)

    run_demo(settings, sys.stderr, tell)
    return 0
