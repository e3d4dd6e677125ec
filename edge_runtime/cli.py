"""The command `edgestill`: finds the subcommand, runs it, and turns errors into messages and exit codes.

Exit codes: 0 ok, 1 failure, 2 usage. A subcommand's module is imported only when it is asked for; it has
`add_parser(subparsers)`, which sets `run`, a function of the parsed arguments that returns the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from edge_runtime.errors import EdgestillError

COMMANDS = {
    "export": ("export.cli", "turn a PyTorch student into a bundle", "edgestill[export]"),
    "verify": ("export.cli", "compare a bundle's engines with eager PyTorch", "edgestill[export]"),
    "train": ("edge_runtime.commands.train", "train a bundle on this machine", "edgestill"),
    "evaluate": ("edge_runtime.commands.evaluate", "accuracy and confusion matrix of a state", "edgestill"),
    "inspect": ("edge_runtime.inspect_bundle", "what is in a bundle", "edgestill"),
    "doctor": ("edge_runtime.doctor", "which engines work here, and what to install", "edgestill"),
    "serve": ("coordinator.commands.serve", "run the coordinator", "edgestill[coordinator]"),
    "task": ("coordinator.commands.task", "create, list and show tasks", "edgestill[coordinator]"),
    "enrol": (
        "coordinator.commands.enrol",
        "print codes for devices to join a task",
        "edgestill[coordinator]",
    ),
    "join": ("edge_runtime.commands.join", "take part in a task as a device", "edgestill[device]"),
    "simulate": ("benchmarks.simulate", "a federation of virtual devices", "edgestill[export]"),
    "bench": ("benchmarks.cli", "measure engines side by side", "edgestill[export]"),
}


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
    except KeyboardInterrupt:
        print("edgestill: interrupted", file=sys.stderr)
        return 1


def _dispatch(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="edgestill", description="Training at the edge by distilling latents.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
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


def _missing_package(command: str, error: ModuleNotFoundError) -> EdgestillError:
    return EdgestillError(
        f"`edgestill {command}` needs the Python package {error.name!r}, which is not installed here",
        f"pip install '{COMMANDS[command][2]}'",
    )


def _complain(error: EdgestillError) -> int:
    # a message may quote names from a damaged file; they must not steer the terminal
    print(f"edgestill: error: {_printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {_printable(error.hint)}", file=sys.stderr)
    return error.exit_code


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _version() -> str:
    from importlib import metadata

    try:
        return f"edgestill {metadata.version('edgestill')}"
    except metadata.PackageNotFoundError:
        return "edgestill, not installed as a package"


if __name__ == "__main__":
    raise SystemExit(main())
