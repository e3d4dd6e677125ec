"""`edgestill enrol`: prints one-time codes with which devices join a task."""

from __future__ import annotations

import argparse
import json
import sys

from edgestill.coordinator.opening import find_task, open_existing
from edgestill.coordinator.settings import STORE_SETTINGS, add_flags, place_words, settings_from
from edgestill.runtime.console import add_json_option
from edgestill.runtime.errors import UsageError

_MOST_CODES = 100_000


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "enrol", help="print codes for devices to join a task", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--task", required=True, metavar="TASK", help="which task they are for")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="how many codes (1)")
    parser.add_argument(
        "--hours", type=float, default=24.0, metavar="X", help="how many hours they are valid (24.0)"
    )
    add_json_option(parser, "one JSON object")
    add_flags(parser, STORE_SETTINGS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a code a line; a code is shown this once and stored as its SHA-256."""
    if not 1 <= arguments.count <= _MOST_CODES:
        raise UsageError(f"--count {arguments.count}", f"give 1 to {_MOST_CODES}")
    if not 0 < arguments.hours <= 24 * 366:
        raise UsageError(f"--hours {arguments.hours:g}", "give more than 0 and at most a year")
    service = open_existing(settings_from(arguments))
    if (ended := find_task(service, arguments.task, place_words(vars(arguments))).ended) is not None:
        raise UsageError(
            f"task {arguments.task} is {ended}: a device that joined it would have nothing to do",
            f"make another with `edgestill task create`; `edgestill task list{place_words(vars(arguments))}` has all",
        )
    lifetime_s = arguments.hours * 3600
    codes = [service.issue_code(arguments.task, lifetime_s) for _ in range(arguments.count)]
    if arguments.json:
        print(json.dumps({"task": arguments.task, "codes": codes, "lifetime_s": lifetime_s}))
    else:
        print("\n".join(codes))
        code = "CODE" if len(codes) > 1 else codes[0]
        print(
            f"edgestill: on the device: `edgestill join URL --code {code} --data PATH` (each code works once); URL is "
            f"what `edgestill serve{place_words(vars(arguments))}` says",
            file=sys.stderr,
        )
    return 0
