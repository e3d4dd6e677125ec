"""`edgestill device`: the devices of a coordinator's tasks, and the end of one."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from edgestill.coordinator.liveness import Liveness
from edgestill.coordinator.opening import find_task, open_existing
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import STORE_SETTINGS, add_flags, place_words, settings_from
from edgestill.runtime.console import add_json_option, align, printable
from edgestill.runtime.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "device", help="list and revoke a coordinator's devices", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="device_command", metavar="COMMAND", required=True)
    listed = commands.add_parser("list", help="devices, what they do, and since when", allow_abbrev=False)
    listed.add_argument("task", nargs="?", metavar="TASK", help="of one task (default: of all)")
    add_json_option(listed, "one JSON object a line")
    listed.set_defaults(run=run_list)
    revoked = commands.add_parser(
        "revoke",
        help="take a device's right to take part",
        description="A revoked device is answered as if it had never enrolled, within seconds on every replica; it "
        "needs a new code and a new work folder to come back. Uploads that were accepted stay.",
        allow_abbrev=False,
    )
    revoked.add_argument("devices", nargs="+", metavar="DEVICE", help="as `list` shows it")
    add_json_option(revoked, "one JSON object a line")
    revoked.set_defaults(run=run_revoke)
    for one in (listed, revoked):
        add_flags(one, STORE_SETTINGS)


def run_list(arguments: argparse.Namespace) -> int:
    """Devices in the order in which they enrolled. Errors: UsageError for a task that is not there."""
    settings = settings_from(arguments)
    service = open_existing(settings)
    rows = list(_described(service, arguments, settings.long_poll_s))
    if arguments.json:
        print("".join(json.dumps(row) + "\n" for row in rows), end="")
        return 0
    heard = [f"{row['silent_s']:.0f} s ago" for row in rows]
    table = [("device", "name", "task", "student", "state", "heard", "stored")]
    table += [
        (row["device"], printable(row["name"]), row["task"], row["student"] or "–", row["state"], when,
         f"{row['stored_bytes'] / 1e6:.1f} MB")
        for row, when in zip(rows, heard, strict=True)
    ]  # fmt: skip
    print(align(table) if rows else "no devices yet")
    return 0


def _described(service: Service, arguments: argparse.Namespace, long_poll_s: float) -> list[dict[str, Any]]:
    if arguments.task is None:
        records = service.tasks()
    else:
        records = [find_task(service, arguments.task, place_words(vars(arguments)))]
    now_s, found = service.clock(), []
    for record in records:
        name, rounds, ended = record.name, service.rounds(record.name), record.ended is not None
        liveness = Liveness.at(now_s, long_poll_s, ())
        for device in service.devices(name):
            found.append(
                {
                    "device": device.name,
                    "name": str(device.info.get("name", "")),
                    "task": name,
                    "student": device.student,
                    "state": liveness.state_of(device, rounds[-1] if rounds else None, ended),
                    "silent_s": max(0.0, now_s - device.seen_s),
                    "stored_bytes": device.stored_bytes,
                }
            )
    return found


def run_revoke(arguments: argparse.Namespace) -> int:
    """Revokes all of the devices, or, where one is not there, none. Errors: UsageError."""
    service = open_existing(settings_from(arguments))
    for name in arguments.devices:
        try:
            service.device(name)
        except Problem as problem:
            hint = f"`edgestill device list{place_words(vars(arguments))}` shows them"
            raise UsageError(problem.detail, hint) from problem
    for name in arguments.devices:
        news = service.revoke(name)
        if arguments.json:
            print(json.dumps({"device": name, "revoked": True, "news": news}), flush=True)
        else:
            print(f"edgestill: {name}: {'revoked' if news else 'was revoked before'}", file=sys.stderr)
    return 0
