"""Result lines as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from edgestill.benchmarks.step import BUSY_LIMIT
from edgestill.runtime.console import align

COLUMNS = ("engine", "p50 ms", "p90 ms", "p99 ms", "ratio", "peak MB", "of eager", "cold s", "of peak")


def case_key(line: Mapping[str, Any]) -> tuple[str, int, int]:
    """What makes result lines comparable: the student, the batch size and the thread count."""
    return line["student"], line["batch"], line["threads"]


def case_title(line: Mapping[str, Any]) -> str:
    """The case of a result line in words."""
    threads = f"{line['threads']} thread" + ("s" if line["threads"] != 1 else "")
    return f"{line['student']}, batch {line['batch']}, {threads}"


def format_table(lines: Iterable[Mapping[str, Any]]) -> str:
    """One table a case; engines that failed stand below it with the reason."""
    parts = []
    for _, group in groupby(lines, key=case_key):
        members = list(group)
        measured = [line for line in members if "error" not in line]
        parts.append(case_title(members[0]))
        if measured:
            parts.append(align([COLUMNS, *(_row(line) for line in measured)]))
            busy_share = measured[0].get("busy_share")
            if busy_share is not None and busy_share > BUSY_LIMIT:
                parts.append(
                    f"Other processes used {busy_share:.0%} of this machine: don't trust these figures."
                )
        for line in members:
            if "error" in line:
                parts.append(f"{line['engine']}: not measured: {line['error']}")
                if line.get("hint"):
                    parts.append(f"  hint: {line['hint']}")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _row(line: Mapping[str, Any]) -> tuple[str, ...]:
    def number(key: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
        value = line.get(key)
        return "–" if value is None else f"{value * scale:.{digits}f}{unit}"

    return (
        line["engine"],
        number("p50_ms", 1),
        number("p90_ms", 1),
        number("p99_ms", 1),
        number("ratio_to_eager", 2),
        number("peak_rss_bytes", 0, 1e-6),
        number("rss_ratio_to_eager", 0, 100, " %"),
        number("cold_start_s", 2),
        number("fraction_of_peak", 0, 100, " %"),
    )
