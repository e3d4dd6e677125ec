"""What commands have in common: data on stdout, in words, or with `--json` as JSON; progress on stderr; counts."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from types import TracebackType

LINE_S = 30.0
"""Between two lines about the same work where no terminal shows every second."""


def show_in_place(text: str) -> None:
    """Puts a line in the place of the one that the terminal of stderr shows last, cut to its width: one that is broken
    in two could not be taken back. Errors: OSError where the terminal is gone."""
    print(f"\r{cut(text, terminal_columns() - 1)}\033[K", end="", file=sys.stderr, flush=True)


def terminal_columns() -> int:
    """Of the terminal of stderr; 80 where it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def cut(text: str, columns: int) -> str:
    """The text, or its beginning and an ellipsis where it is wider than so many columns."""
    ends, width = [], 0
    for letter in text:
        width += 0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        ends.append(width)
    if width <= columns:
        return text
    return text[: sum(end < columns for end in ends)] + "…" * (columns > 0)


class Progress:
    """What a slow command is at, on stderr, a line each; and how long it has been at it: on a terminal every second in
    its place, elsewhere on a line of its own now and then. `every_s`, `clock`: for tests."""

    def __init__(self, every_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._live, self._clock = sys.stderr.isatty(), clock
        self._every_s = every_s or (1.0 if self._live else LINE_S)
        self._line, self._since_s = "", 0.0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __call__(self, line: str) -> None:
        with self._lock:
            self._end_line()
            if self._live:
                show_in_place(line)
            else:
                print(line, file=sys.stderr, flush=True)
            self._line, self._since_s = line, self._clock()

    def _end_line(self) -> None:
        if self._live and self._line:
            print(file=sys.stderr, flush=True)

    def _tell(self) -> None:
        while not self._ended.wait(self._every_s):
            with self._lock:
                text = f"{self._line} ({self._clock() - self._since_s:.0f} s so far)"
                if not self._line:
                    continue
                if self._live:
                    show_in_place(text)
                else:
                    print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._end_line()


def add_json_option(parser: argparse._ActionsContainer, form: str) -> None:
    """Adds `--json`; `form` says what is printed with it, such as "one JSON object"."""
    parser.add_argument("--json", action="store_true", help=f"{form} on stdout instead of words")


def describe_time(seconds: float) -> str:
    """A time to come in words, as exact as an estimate is: `about 40 s`, `about 3 min`, `about 2 h 10 min`."""
    tens = max(10, round(seconds / 10) * 10)
    if tens < 90:
        return f"about {tens} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    minutes = round(minutes, -1)
    if minutes < 24 * 60:
        return f"about {minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"about {minutes / 1440:.1f} days"


def add_image_options(parser: argparse._ActionsContainer) -> None:
    """Adds `--resize` and `--skip-broken`."""
    parser.add_argument("--resize", action="store_true", help="scale images of another size")
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be read; they are counted and named",
    )


def printable(text: str) -> str:
    """What of names and messages may not steer a terminal, or not be encoded, is written out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def count(text: str) -> int:
    """An option's value of 1 or more, as `type` of an argument. Errors: ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def align(rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Rows as lines of equal width; the first `texts` columns are texts, the others numbers."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
