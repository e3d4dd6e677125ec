"""What commands have in common: data on stdout, in words, or with `--json` as JSON; progress on stderr; counts."""

from __future__ import annotations

import argparse


def add_json_option(parser: argparse.ArgumentParser, form: str) -> None:
    """Adds `--json`; `form` says what is printed with it, such as "one JSON object"."""
    parser.add_argument("--json", action="store_true", help=f"{form} on stdout instead of words")


def count(text: str) -> int:
    """An option's value of 1 or more, as `type` of an argument. Errors: ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)
