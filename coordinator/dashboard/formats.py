"""Figures as words, for pages and drawings; a dash where nothing is known."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def format_percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.3g} %"


def format_bytes(value: float | None) -> str:
    """Decimal units, three digits: 12.3 MB."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError("unreachable: TB ends the loop")


def format_milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.3g} s" if value >= 999.5 else f"{value:.3g} ms"


def format_ago(at_s: float, now_s: float) -> str:
    """The same words as in static/dashboard.js."""
    seconds = now_s - at_s
    if seconds < 5:
        return "just now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def format_left(at_s: float, now_s: float) -> str:
    """The same words as in static/dashboard.js."""
    seconds = at_s - now_s
    if seconds <= 0:
        return "deadline reached"
    if seconds < 60:
        return f"{math.ceil(seconds)} s left"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s left"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min left"


def format_moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def format_points(value: float | None) -> str:
    """A difference of two shares in percentage points, with its sign: +3.4."""
    return "–" if value is None else f"{value * 100:+.1f}".replace("-", "−")
