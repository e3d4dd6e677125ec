"""`edgestill task create`, `list`, `show`, `export`, `stop`: on the store, whether or not a coordinator runs."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edgestill.coordinator.commands import export_task
from edgestill.coordinator.distillation.job import VALIDATION
from edgestill.coordinator.opening import check_shared, find_task, open_existing, open_service, task_creation
from edgestill.coordinator.rounds.round import COMPLETED
from edgestill.coordinator.settings import STORE_SETTINGS, add_flags, place_words, settings_from
from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.store.records import DeviceRecord, TaskRecord
from edgestill.coordinator.task.creation import (
    AUGMENT,
    DISTIL,
    DISTIL_RATE,
    LOCAL,
    ROUNDS,
    SOURCES,
    make_task,
)
from edgestill.coordinator.task.task import EXCHANGES, MODES, PRECISIONS, RULES, TASK_NAME, Task, clip_value
from edgestill.runtime.console import add_json_option
from edgestill.runtime.data.notice import Notices
from edgestill.runtime.errors import BundleError, DataError, UsageError
from edgestill.runtime.training.hyperparameters import (
    CHECKPOINT_EVERY,
    EPOCHS,
    HYPERPARAMETERS,
    TRANSFER_FRACTION,
)

DEFAULTS = {"local": LOCAL, "distil": DISTIL}


class _Option(NamedTuple):
    """A flag of `task create`: where its value stands in the description, its type or choices, its help."""

    field: str
    kind: Callable[[str], Any] | tuple[str, ...]
    help: str


def _clip(text: str) -> float | str:
    try:
        return clip_value(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number or median") from error


def _training_options(part: str, whose: str, prefix: str = "") -> dict[str, _Option]:
    """Options for what a task says of a training, with the defaults of the one table."""
    epochs = replace(EPOCHS, default=DEFAULTS[part]["epochs"])
    found = {f"{part}-epochs": _Option(f"{part}.epochs", int, f"{whose}: {epochs.help}")}
    for name, row in HYPERPARAMETERS.items():
        kind = int if row.whole else float
        if name in DEFAULTS[part]:
            row = replace(row, default=DEFAULTS[part][name])
        if part == "distil" and name == "learning_rate":
            row = replace(row, instead={**row.instead, **DISTIL_RATE})
        found[prefix + name.replace("_", "-")] = _Option(f"{part}.{name}", kind, f"{whose}: {row.help}")
    return found


OPTIONS: dict[str, _Option] = {
    "name": _Option("name", str, "1-40 of a-z, 0-9 and -, beginning with a letter"),
    "global-bundle": _Option("global_bundle", str, "bundle of the global student; without: mode consensus"),
    "transfer": _Option("transfer", str, "transfer set: as --data of `edgestill train`, or a .safetensors file"),
    "transfer-count": _Option("transfer_count", int, "take this many of its samples, drawn by --seed"),
    "test": _Option("test", str, "labelled data that the global student is evaluated on"),
    "test-count": _Option("test_count", int, "take this many of its samples, drawn by --seed"),
    "validation": _Option("validation", str, "labelled data that the best round is chosen by; never the test's"),
    "validation-count": _Option("validation_count", int, "take this many of its samples, drawn by --seed"),
    "seed": _Option("seed", int, "of the draw of samples (0)"),
    "class-names": _Option(
        "class_names", str, "what the outputs mean: NAME,… or data (the bundles' names, else those of labelled data)"
    ),
    "ca-cert": _Option("ca_cert", str, "PEM file of your own authority's certificate: the codes then carry its "
                       "fingerprint, and devices need no file"),
    "exchange": _Option("exchange", EXCHANGES, "what devices upload (latents)"),
    "mode": _Option("mode", MODES, "default: global with --global-bundle, else consensus"),
    "precision": _Option("precision", PRECISIONS, "of what is exchanged (fp16; parameters: fp32)"),
    "rounds": _Option("rounds", int, f"how many rounds ({ROUNDS})"),
    "goal": _Option("goal", int, "accepted uploads that end a round's collection (2)"),
    "over-selection": _Option("over_selection", float, "devices selected for each that is needed (1.3)"),
    "minimum": _Option("minimum", int, "accepted uploads that are enough at the deadline (half of the goal)"),
    "deadline": _Option("deadline_s", float, "seconds for a round's collection (3600)"),
    "aggregation": _Option("aggregation.rule", RULES, "how uploads become one (mean)"),
    "clip": _Option("aggregation.clip", _clip, "largest norm of an upload's rows, or median: that of the uploads"),
    "trim": _Option("aggregation.trim", float, "trimmed_mean: share cut at either end (0.2)"),
    "byzantine": _Option("aggregation.byzantine", float, "krum: share of hostile devices to stand (0.2)"),
    **_training_options("local", "of devices"),
    "transfer-fraction": _Option("local.transfer_fraction", float, TRANSFER_FRACTION.help),
    "augment": _Option("local.augment", str, f"augmentations of private samples ({AUGMENT}, of images)"),
    "checkpoint-every": _Option("local.checkpoint_every", int, CHECKPOINT_EVERY.help),
    **_training_options("distil", "of step 5", "distil-"),
    "distil-deadline": _Option("distil.deadline_s", float, "seconds for step 5 (600)"),
}  # fmt: skip
_SWITCHES = {
    "resize": _Option("resize", bool, "scale images of another size"),
    "skip-broken": _Option("skip_broken", bool, "leave out images that cannot be read"),
    "transfer-labels": _Option(
        "transfer_labels", bool, "step 5 learns the transfer set's classes, which no device gets to know"
    ),
    "common-head": _Option("common_head", bool, "refuse students that were exported without --common-head"),
    "align": _Option("aggregation.align", bool, "rotate each device's latents to the global ones first"),
    "screen": _Option("aggregation.screen", bool, "leave out uploads that disagree with the others"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("task", help="create, list, show, export and stop tasks", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a task from bundles and data", allow_abbrev=False)
    create.add_argument("--file", type=Path, metavar="TASK.toml", help="the task as TOML; flags win over it")
    create.add_argument(
        "--bundle", action="append", metavar="DIR_OR_ZIP", help="a student's bundle; repeat it"
    )
    for name, option in OPTIONS.items():
        choices = option.kind if isinstance(option.kind, tuple) else None
        create.add_argument(
            f"--{name}", dest=option.field, help=option.help, choices=choices,
            type=str if isinstance(option.kind, tuple) else option.kind,
            metavar=None if choices else {int: "N", float: "X"}.get(option.kind, "TEXT"),
        )  # fmt: skip
    for name, option in _SWITCHES.items():
        create.add_argument(
            f"--{name}", dest=option.field, action=argparse.BooleanOptionalAction, help=option.help
        )
    show = actions.add_parser("show", help="a task with its rounds and devices", allow_abbrev=False)
    show.add_argument("name", metavar="TASK", help="its name; `edgestill task list` has them all")
    stop = actions.add_parser(
        "stop", help="end a task before its last round, for good", allow_abbrev=False,
        description="Ends a task for good: its open round is abandoned, its devices leave, what was published stays.",
    )  # fmt: skip
    stop.add_argument("name", metavar="TASK", help="its name; `edgestill task list` has them all")
    listing = actions.add_parser("list", help="all tasks", allow_abbrev=False)
    export_task.add_parser(actions)
    for action, run in ((create, run_create), (listing, run_list), (show, run_show), (stop, run_stop)):
        add_json_option(action, "one JSON object")
        add_flags(action, STORE_SETTINGS)
        action.set_defaults(run=run)


def run_create(arguments: argparse.Namespace) -> int:
    """Stores the bundles and the data, then the task."""
    description = describe(arguments)
    settings = settings_from(arguments)
    check_shared(settings)
    name = description.get("name")
    if not isinstance(name, str) or not TASK_NAME.fullmatch(name):
        raise UsageError(
            "the task needs a --name" if name is None else f"--name {name}: no task can be called that",
            "give 1-40 of a-z, 0-9 and -, beginning with a letter",
        )
    service = open_service(settings)
    if any(record.name == name for record in service.tasks()):
        raise UsageError(f"there is a task {name} already", "choose another --name; a task never changes")
    warnings: list[str] = []
    notices = Notices()
    try:
        drafted = make_task(description, service.add_blob, warnings.append, notices)
    except (BundleError, DataError) as error:  # all that is read was named on the command line
        raise UsageError(error.message, error.hint) from error
    task = service.create_task(drafted)
    for warning in (*warnings, *task.risks()):
        print(f"edgestill: warning: {warning}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({**task.as_json(), "notices": notices.as_json()}))
    else:
        print(_in_words(task))
        place = place_words(vars(arguments))
        print(
            f"edgestill: next: `edgestill enrol --task {task.name}{place}` for each device, "
            f"and `edgestill serve{place}`",
            file=sys.stderr,
        )
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """A line a task."""
    service = open_existing(settings_from(arguments))
    rows = []
    for record in service.tasks():
        rounds, devices = service.rounds(record.name), service.devices(record.name)
        completed = sum(one.phase == "completed" for one in rounds)
        rows.append(
            {"name": record.name, "exchange": record.task.exchange, "mode": record.task.mode,
             "rounds": record.task.rounds, "completed": completed, "devices": len(devices),
             "finished": record.finished, "stopped": record.stopped_s is not None}
        )  # fmt: skip
    if arguments.json:
        print(json.dumps({"tasks": rows}))
    elif rows:
        for row in rows:
            print(
                f"{row['name']:<20}  {row['exchange']:<10}  {row['completed']}/{row['rounds']} rounds  "
                f"{row['devices']} devices{'  stopped' if row['stopped'] else '  finished' if row['finished'] else ''}"
            )
    else:
        print(
            f"edgestill: no task yet; make one with {task_creation(place_words(vars(arguments)))}",
            file=sys.stderr,
        )
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """The task, its rounds, its devices and what was refused."""
    service = open_existing(settings_from(arguments))
    record = find_task(service, arguments.name, place_words(vars(arguments)))
    task, name = record.task, record.name
    rounds, devices = service.rounds(name), service.devices(name)
    if arguments.json:
        shown = {
            "task": task.as_json(),
            "finished": record.finished,
            "stopped": record.stopped_s is not None,
            "best_round": record.best_round,
            "rounds": [one.as_json() for one in rounds],
            "devices": [one.as_json() for one in devices],
            "refusals": [one.as_json() for one in service.refusals(name)],
        }
        print(json.dumps(shown))
        return 0
    print(_in_words(task))
    print(_standing(record, rounds, devices))
    for one in rounds:
        reason = f"  {one.reason}" if one.reason else ""
        best = f"  best on validation images ({one.metrics[VALIDATION]:.3f})" if one.best else ""
        print(
            f"round {one.number:<4} {one.phase:<12} {len(one.accepted)} of {len(one.selected)} uploads{best}{reason}"
        )
    for device in devices:
        print(f"{device.name}  {device.student or 'no student yet'}  {device.info.get('name', '')}")
    return 0


def run_stop(arguments: argparse.Namespace) -> int:
    """Ends the task; one that has ended stays as it is."""
    service = open_existing(settings_from(arguments))
    record = find_task(service, arguments.name, place_words(vars(arguments)))
    stopped = service.stop_task(record.name)
    if arguments.json:
        print(json.dumps({"name": record.name, "stopped": stopped or record.stopped_s is not None}))
    elif stopped:
        print(f"{record.name}: stopped")
    else:
        print(f"{record.name}: has ended already")
    return 0


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The task's description from `--file` and flags. Errors: UsageError."""
    description = {} if arguments.file is None else read_file(arguments.file)
    if arguments.bundle:
        description["bundles"] = arguments.bundle
    for option in (*OPTIONS.values(), *_SWITCHES.values()):
        value = getattr(arguments, option.field)
        if value is None:
            continue
        *parents, last = option.field.split(".")
        place = description
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(f"{arguments.file}: {parent} is not a table", f"write [{parent}]")
        place[last] = value
    return description


def read_file(path: Path) -> dict[str, Any]:
    """A description in TOML; paths in it are relative to the file. Errors: UsageError."""
    try:
        with path.open("rb") as file:
            description = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML: {error}", "see docs/coordinator.md for an example") from error

    def located(value: Any) -> Any:
        return (
            str(path.parent / value) if isinstance(value, str) and (path.parent / value).exists() else value
        )

    for name in SOURCES:
        if isinstance(description.get(name), list):
            description[name] = [located(value) for value in description[name]]
        elif name in description:
            description[name] = located(description[name])
    return description


def _in_words(task: Task) -> str:
    """Everything that an operator chose of rounds and rule, in a few lines."""
    spec = task.aggregation
    students = ", ".join(entry.student for entry in task.students)
    whole = f", global student {task.global_student.student}" if task.global_student else ""
    options = [
        *(["aligned"] if spec.align else []),
        *(["screened"] if spec.screen else []),
        *([] if spec.clip is None else [f"clip {spec.clip}"]),
    ]
    return (
        f"{task.name}: {task.rounds} rounds, exchanging {task.exchange} on {task.transfer.samples} samples"
        f"{', whose classes the coordinator alone knows,' if task.transfer.labelled else ''} in "
        f"{task.precision}; students {students}{whole}\n"
        f"a round: goal {task.goal} uploads, minimum {task.minimum}, deadline {task.deadline_s:g} s\n"
        f"aggregation: {', '.join([spec.rule, *options])}"
    )


def _standing(record: TaskRecord, rounds: Sequence[RoundOverview], devices: Sequence[DeviceRecord]) -> str:
    """How far the task is, a line each."""
    completed = sum(one.phase == COMPLETED for one in rounds)
    lines = [f"{completed} of {record.task.rounds} rounds completed, {len(devices)} devices"]
    if rounds:
        lines[0] += f"; round {rounds[-1].number} is {rounds[-1].phase}"
    if record.ended is not None:
        lines[0] += f"; the task is {record.ended}"
    for one in reversed(rounds):
        if one.metrics.get("t_uni") is not None:
            lines.append(f"global model after round {one.number}: T_uni {one.metrics['t_uni']:.3f}")
            break
    for one in reversed(rounds):
        after = [report.get("after") or {} for report in one.reports.values()]
        means = [
            f"{label} {sum(values) / len(values):.3f}"
            for key, label in (("t_priv", "T_priv"), ("t_uni", "T_uni"))
            if (values := [figures[key] for figures in after if figures.get(key) is not None])
        ]
        if means:
            lines.append(f"devices after round {one.number}, on average: {', '.join(means)}")
            break
    return "\n".join(lines)
