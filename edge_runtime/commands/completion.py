"""`edgestill completion`: prints a script with which a shell completes commands, options and files."""

from __future__ import annotations

import argparse
import json

from edgestill.runtime.cli import full_parser
from edgestill.runtime.console import add_json_option

SHELLS = ("bash", "zsh", "fish")
_FOLDERS = frozenset(("DIR",))
_FILES = frozenset(
    ("FILE", "FILE.toml", "FILE.png", "TASK.toml", "BUNDLE", "DIR_OR_ZIP", "NAME_OR_PATH", "BACKUP", "IMAGE")
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "completion", help="print a script that completes this command in a shell", description=__doc__,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")
    add_json_option(parser, "one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the script; commands whose packages are not installed here complete by name only."""
    import shtab

    parser = full_parser()
    _mark_files(parser, shtab.FILE, shtab.DIRECTORY)
    script = shtab.complete(parser, arguments.shell)
    print(json.dumps({"shell": arguments.shell, "script": script}) if arguments.json else script)
    return 0


def _mark_files(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Tells shtab which arguments are paths, by what help calls them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                _mark_files(child, file, folder)
        elif action.metavar in _FOLDERS:
            action.complete = folder  # type: ignore[attr-defined]
        elif action.metavar in _FILES:
            action.complete = file  # type: ignore[attr-defined]
