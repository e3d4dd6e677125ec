"""`edgestill backup`: copies a coordinator while it serves. `edgestill restore`: makes one of such a copy."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from edgestill.coordinator.opening import check_existing, check_shared, open_service
from edgestill.coordinator.settings import STORE_SETTINGS, add_flags, place_words, settings_from
from edgestill.coordinator.store.backup import Contents, restore_backup, write_backup
from edgestill.coordinator.store.blobs import open_blobs
from edgestill.coordinator.store.database import Store
from edgestill.runtime.console import add_json_option


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backup = subparsers.add_parser(
        "backup", help="copy a coordinator's database and blobs while it serves", allow_abbrev=False,
        description="Copies database and blobs of one moment into a folder, while the coordinator serves or not. In a "
        "folder that holds a backup already, only what is new is copied.",
    )  # fmt: skip
    backup.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the backup")
    restore = subparsers.add_parser(
        "restore", help="make a coordinator of a backup", allow_abbrev=False,
        description="Fills a new data folder, or a new database and new blobs, with a backup. Devices go on with their "
        "tokens; a round that was open is open again, until its deadline.",
    )  # fmt: skip
    restore.add_argument("backup", type=Path, metavar="DIR", help="a folder from `edgestill backup`")
    for parser, run in ((backup, run_backup), (restore, run_restore)):
        add_json_option(parser, "one JSON object")
        add_flags(parser, STORE_SETTINGS)
        parser.set_defaults(run=run)


def run_backup(arguments: argparse.Namespace) -> int:
    """Prints what the backup holds."""
    settings = settings_from(arguments)
    check_existing(settings)
    store = Store(settings.database_url, "checked")  # another program may be serving it
    try:
        contents = write_backup(store, open_blobs(settings.blobs_location), arguments.output)
    finally:
        store.close()
    _say(contents, arguments, "in", arguments.output)
    if not arguments.json:
        folder = shlex.quote(str(arguments.output))
        print(f"edgestill: to go on from it: `edgestill restore {folder} --data-dir NEW_DIR`", file=sys.stderr)
    return 0


def run_restore(arguments: argparse.Namespace) -> int:
    """Prints what was restored."""
    settings = settings_from(arguments)
    check_shared(settings)
    service = open_service(settings)
    contents = restore_backup(arguments.backup, service.store, service.blobs)
    _say(contents, arguments, "from", arguments.backup)
    if not arguments.json:
        print(f"edgestill: next: `edgestill serve{place_words(vars(arguments))}`", file=sys.stderr)
    return 0


def _say(contents: Contents, arguments: argparse.Namespace, which: str, folder: Path) -> None:
    if arguments.json:
        print(json.dumps({"backup": str(folder), **asdict(contents)}))
        return
    print(
        f"{contents.tasks} tasks, {contents.devices} devices, {contents.blobs} blobs ({contents.copied_blobs} copied), "
        f"{contents.size_bytes / 1e6:.1f} MB {which} {folder}"
    )
