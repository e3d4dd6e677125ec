"""`edgestill downgrade`: takes a coordinator's database back to the version of an older program."""

from __future__ import annotations

import argparse
import json
import sys

from edgestill.coordinator.opening import check_existing
from edgestill.coordinator.settings import STORE_SETTINGS, add_flags, settings_from
from edgestill.coordinator.store import migrations
from edgestill.coordinator.store.database import Store
from edgestill.runtime.console import add_json_option


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "downgrade", help="take a database back to an older version", allow_abbrev=False,
        description="Takes the database of a stopped coordinator back to the version that an older edgestill knows, "
        "which says so when it refuses a newer one. Make a backup first: what only the newer one knows is dropped.",
    )  # fmt: skip
    parser.add_argument(
        "--to", required=True, choices=migrations.versions(), help="version of the database"
    )
    add_json_option(parser, "one JSON object")
    add_flags(parser, STORE_SETTINGS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints what was undone."""
    settings = settings_from(arguments)
    check_existing(settings)
    store = Store(settings.database_url, "any")
    try:
        undone = store.downgrade(arguments.to)
    finally:
        store.close()
    if arguments.json:
        print(json.dumps({"version": arguments.to, "undone": undone}))
    else:
        for line in undone:
            print(f"undone  {line}")
        print(f"edgestill: the database is of version {arguments.to}; serve it with the older edgestill now: this "
              "one would bring it to its own version again", file=sys.stderr)  # fmt: skip
    return 0
