"""The one rule for what commands print: data on stdout, in words, or with `--json` as JSON; progress on stderr."""

from __future__ import annotations

import argparse


def add_json_option(parser: argparse.ArgumentParser, form: str) -> None:
    """Adds `--json`; `form` says what is printed with it, such as "one JSON object"."""
    parser.add_argument("--json", action="store_true", help=f"{form} on stdout instead of words")
