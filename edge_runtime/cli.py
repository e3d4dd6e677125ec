"""The command `edgestill`: finds the subcommand, runs it, and turns errors into messages and exit codes.

Exit codes: 0 ok; 1 what failed while it ran; 2 what was typed wrongly, such as an option, a value, or a name or path
of something that is not there. A subcommand's module is imported only when it is asked for; it has
`add_parser(subparsers)`, which sets `run`, a function of the parsed arguments that returns the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata

from edgestill.runtime.commands.examples import show_examples
from edgestill.runtime.console import printable
from edgestill.runtime.errors import EdgestillError

COMMANDS = {
    "export": ("edgestill.export.cli", "turn a PyTorch student into a bundle", "export"),
    "verify": ("edgestill.export.cli", "compare a bundle's engines with eager PyTorch", "export"),
    "train": ("edgestill.runtime.commands.train", "train a bundle on this machine", "onnxruntime"),
    "evaluate": ("edgestill.runtime.commands.evaluate", "accuracy and confusion matrix of a state", "onnxruntime"),
    "predict": ("edgestill.runtime.commands.predict", "classes of pictures or samples", "onnxruntime"),
    "inspect": ("edgestill.runtime.commands.inspect", "what is in a bundle", "onnxruntime"),
    "doctor": ("edgestill.runtime.commands.doctor", "which engines work here, and what to install", "onnxruntime"),
    "serve": ("edgestill.coordinator.commands.serve", "run the coordinator", "coordinator"),
    "task": ("edgestill.coordinator.commands.task", "create, show, export and stop tasks", "coordinator"),
    "enrol": ("edgestill.coordinator.commands.enrol", "print codes for devices to join a task", "coordinator"),
    "device": ("edgestill.coordinator.commands.device", "list and revoke a coordinator's devices", "coordinator"),
    "backup": ("edgestill.coordinator.commands.backup", "copy a coordinator while it serves", "coordinator"),
    "restore": ("edgestill.coordinator.commands.backup", "make a coordinator of a backup", "coordinator"),
    "downgrade": ("edgestill.coordinator.commands.downgrade", "take a database to an older version", "coordinator"),
    "join": ("edgestill.runtime.commands.join", "take part in a task as a device", "device"),
    "demo": ("edgestill.simulation.demo", "a federation on this machine, with a result page", "coordinator"),
    "simulate": ("edgestill.simulation.simulate", "a federation of virtual devices", "coordinator"),
    "reproduce": ("edgestill.benchmarks.reproduce", "repeat the experiments (in a checkout)", "coordinator"),
    "bench": ("edgestill.benchmarks.cli", "measure engines side by side (in a checkout)", "export"),
    "completion": ("edgestill.runtime.commands.completion", "print a script for a shell", "completion"),
}
"""A subcommand's module, what it is for, and the extra of the package with what it needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(arguments)
    except EdgestillError as error:
        return _complain(error)
    except BrokenPipeError:
        # whoever read our output has left, as `head` does; Python must not fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _complain(EdgestillError(what, "check the path, its rights and the free space"))
    except MemoryError as error:
        what = f"out of memory: {error}".rstrip(": ")
        return _complain(EdgestillError(what, "give this process more, or less to do"))
    except KeyboardInterrupt:
        print("edgestill: interrupted", file=sys.stderr)
        return 1


def full_parser() -> argparse.ArgumentParser:
    """The parser of every command; of one whose packages are not installed here, it knows the name alone."""
    parser, subparsers = _root_parser()
    for name, (_, help_text, _) in COMMANDS.items():
        if name in subparsers.choices:  # a module may bring several
            show_examples(subparsers.choices[name], name)
            continue
        try:
            _add_command(subparsers, name)
        except EdgestillError:
            subparsers.add_parser(name, help=help_text)
    return parser


def _root_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="edgestill", description="Training at the edge by distilling latents.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser, parser.add_subparsers(dest="command", metavar="COMMAND")


def _dispatch(arguments: Sequence[str]) -> int:
    parser, subparsers = _root_parser()
    if arguments and arguments[0] in COMMANDS:
        _add_command(subparsers, arguments[0])
    else:
        # for --help and for the message about an unknown command, names are enough
        for name, (_, help_text, _) in COMMANDS.items():
            subparsers.add_parser(name, help=help_text)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as leaving:  # argparse has printed help (0) or a usage error (2)
        return leaving.code if isinstance(leaving.code, int) else 2
    parsed.typed = tuple(arguments)  # for a hint that is this command with other values
    if parsed.version:
        print(_version())
        return 0
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        code: int = parsed.run(parsed)
    except ModuleNotFoundError as error:
        raise _missing_package(parsed.command, error) from error
    return code


def _add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    try:
        importlib.import_module(COMMANDS[name][0]).add_parser(subparsers)
    except ModuleNotFoundError as error:
        raise _missing_package(name, error) from error
    show_examples(subparsers.choices[name], name)


def _missing_package(command: str, error: ModuleNotFoundError) -> EdgestillError:
    if f"{error.name}.".startswith("edgestill.benchmarks."):
        return EdgestillError(
            f"`edgestill {command}` is not in the installed package: it runs in a checkout of edgestill",
            f"in the checkout: make setup && .venv/bin/edgestill {command} ...",
        )
    return EdgestillError(
        f"`edgestill {command}` needs the Python package {error.name!r}, which is not installed here",
        f"pip install 'edgestill[{_extra_with(error.name or '', COMMANDS[command][2])}]'",
    )


def _extra_with(package: str, likely: str) -> str:
    """The extra of this distribution that brings a package, the likely one if it does or if none is known to."""
    try:
        requirements = metadata.requires("edgestill") or []
    except metadata.PackageNotFoundError:
        return likely

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    found = [re.match(r"([A-Za-z0-9._-]+).*extra == ['\"]([^'\"]+)", one) for one in requirements]
    wanted = normal(package.partition(".")[0])
    extras = [one[2] for one in found if one is not None and normal(one[1]) == wanted]
    return likely if likely in extras or not extras else extras[0]


def _complain(error: EdgestillError) -> int:
    with suppress(OSError):  # of a terminal that is closed
        # a message may quote names from a damaged file; they must not steer the terminal
        print(f"edgestill: error: {printable(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"hint: {printable(error.hint)}", file=sys.stderr)
    return error.exit_code


def _version() -> str:
    try:
        return f"edgestill {metadata.version('edgestill')}"
    except metadata.PackageNotFoundError:
        return "edgestill, not installed as a package"


if __name__ == "__main__":
    raise SystemExit(main())
