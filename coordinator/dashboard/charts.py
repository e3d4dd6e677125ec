"""Charts as SVG text: pure functions of numbers, drawn on the server, readable without colour or script.

Every chart comes with its own data as a table, for screen readers and for copying. Colours, dashes and text
sizes are classes (`series-0` …) of the style sheet: the page's policy allows no inline style, and light and
dark are one file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 440, 264
LEFT, RIGHT, TOP = 56, 12, 12
LEGEND_LINE, CHARACTER = 18, 8.2
MOST_MARKERS, MOST_TITLED_CELLS = 40, 1000
DRAWABLE = 1e100
SERIES_STYLES = 6  # how many `series-N` classes the style sheet has

Formatter = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars: values in the order of the chart's categories; None where nothing is known.

    `style` picks colour, dash and marker, so that a thing looks the same in every chart.
    """

    name: str
    values: tuple[float | None, ...]
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """A drawing (`svg`, safe to place in HTML) and the numbers in it, as texts: one head a column, rows of cells."""

    title: str
    description: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 · 10^n that enclose [low, high], about `count` of them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def line_chart(
    title: str,
    categories: Sequence[int],
    series: Sequence[Series],
    *,
    category: str = "round",
    format_value: Formatter = lambda v: f"{v:.3g}",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    legend: bool = True,
) -> Chart:
    """Lines over whole numbers (rounds), on an axis that fits the values. Gaps stay gaps; a value that is not finite
    counts as unknown.

    `bounds`: beyond which no value can lie, so no axis goes there either.
    """
    series = [_known(s) for s in series]
    table = _table(category, [str(c) for c in categories], series, format_value)
    known = [v for s in series for v in s.values if v is not None]
    if not known:
        return Chart(title, "No values yet.", "", *table)
    low, high = min(known), max(known)
    ticks = [t for t in nice_ticks(low, high) if bounds[0] <= t <= bounds[1] or low <= t <= high]
    key, base = _legend(series if legend else (), lines=True)
    x = _scale(min(categories), max(categories), LEFT + 10, WIDTH - RIGHT - 10)
    y = _scale(ticks[0], ticks[-1], base, TOP)
    body = [_grid(ticks, y, format_value), _axis_title(category, base)]
    every = max(1, math.ceil(len(categories) / 10))
    body += [_category_label(x(c), base, str(c)) for c in list(categories)[::every]]
    for one in series:
        style = one.style % SERIES_STYLES
        points = [None if v is None else (x(c), y(v)) for c, v in zip(categories, one.values, strict=True)]
        body += [
            f'<path class="line series-{style}" d="{_path(run)}"/>' for run in _runs(points) if len(run) > 1
        ]
        # thin where nothing is known in between, as after an abandoned round
        body += [
            f'<path class="line bridge series-{style}" d="{_path((one_run[-1], next_run[0]))}"/>'
            for one_run, next_run in pairwise(_runs(points))
        ]
        # A point without neighbours has no line: its marker is all there is to see.
        lonely = {run[0] for run in _runs(points) if len(run) == 1}
        for c, v, point in zip(categories, one.values, points, strict=True):
            if point and (len(categories) <= MOST_MARKERS or point in lonely):
                text = f"{one.name}, {category} {c}: {format_value(v)}"
                body.append(_marker(style, *point, text))
    description = f"{len(categories)} {category}s. " + " ".join(
        _summary(one, categories, category, format_value) for one in series
    )
    return Chart(title, description, _svg(title, description, body + [key]), *table)


def bar_chart(
    title: str,
    categories: Sequence[int | str],
    series: Sequence[Series],
    *,
    category: str = "round",
    format_value: Formatter = lambda v: f"{v:.3g}",
    legend: bool = True,
) -> Chart:
    """Groups of upright bars from zero, one group a category, one bar a series; negative values are unknown.

    Names below the bars are slanted, numbers upright.
    """
    series = [_known(s, at_least=0.0) for s in series]
    table = _table(category, [str(c) for c in categories], series, format_value)
    known = [v for s in series for v in s.values if v is not None]
    if not known:
        return Chart(title, "No values yet.", "", *table)
    ticks = nice_ticks(0.0, max(known) or 1.0)
    named = any(isinstance(c, str) for c in categories)
    key, base = _legend(series if legend else (), lines=False)
    deeper = _slanted_height(categories) - 28 if named else 0.0
    base -= deeper
    y = _scale(ticks[0], ticks[-1], base, TOP)
    body = [_grid(ticks, y, format_value)]
    if not named:
        body.append(_axis_title(category, base))
    group = (WIDTH - LEFT - RIGHT) / len(categories)
    bar = min(group * 0.8 / len(series), 28.0)
    every = max(1, math.ceil(len(categories) / (20 if named else 10)))
    for i, c in enumerate(categories):
        middle = LEFT + group * (i + 0.5)
        if i % every == 0:
            upright = _category_label(middle, base, str(c))
            body.append(_slanted(middle + 4, base + 14, str(c), False) if named else upright)
        for index, one in enumerate(series):
            v = one.values[i]
            if v is None:
                continue
            left = middle + (index - len(series) / 2) * bar
            body.append(
                f'<rect class="bar series-{one.style % SERIES_STYLES}" x="{left:.2f}" y="{y(v):.2f}" '
                f'width="{bar:.2f}" height="{base - y(v):.2f}">'
                f"<title>{_text(f'{one.name}, {category} {c}: {format_value(v)}')}</title></rect>"
            )
    description = f"{len(categories)} {category}s. " + " ".join(
        _summary(one, categories, category, format_value) for one in series
    )
    return Chart(title, description, _svg(title, description, body + [key]), *table)


def heat_map(
    title: str,
    names: Sequence[str],
    counts: Sequence[Sequence[int]],
    *,
    row: str = "device",
    class_names: Sequence[str] = (),
) -> Chart:
    """Class distributions: one row a name, one cell a class, the stronger the larger the class's share of the row.

    counts [rows][classes], not negative; rows shorter than the longest have none of the missing classes. A class
    without a name is called by its number.
    """
    classes = max((len(c) for c in counts), default=0)
    full = [tuple(c) + (0,) * (classes - len(c)) for c in counts]
    called = [class_names[k] if k < len(class_names) else f"class {k}" for k in range(classes)]
    columns = (row, "samples", *called)
    rows = tuple((name, str(sum(c)), *(str(n) for n in c)) for name, c in zip(names, full, strict=True))
    if not classes:
        return Chart(title, "No values yet.", "", columns, rows)
    named = bool(class_names)
    left, line, top = 128, 22, _slanted_height(called) if named else 42.0
    largest = max(max(c) / (sum(c) or 1) for c in full) or 1.0
    cell = (WIDTH - left - RIGHT) / classes
    titled = len(names) * classes <= MOST_TITLED_CELLS
    every = max(1, math.ceil(classes / (18 if named else 12)))
    middles = [(k, left + cell * (k + 0.5)) for k in range(0, classes, every)]
    if named:
        body = [_slanted(x + 4, top - 6, called[k], True) for k, x in middles]
    else:
        body = [f'<text class="tick" x="{left + cell * classes / 2:.2f}" y="14" text-anchor="middle">class</text>']
        body += [
            f'<text class="tick" x="{x:.2f}" y="{top - 8:g}" text-anchor="middle">{k}</text>' for k, x in middles
        ]
    for i, (name, c) in enumerate(zip(names, full, strict=True)):
        y, total = top + i * line, sum(c) or 1
        label, baseline = _text(shorten(name, 13)), y + line / 2 + 3
        body.append(
            f'<text class="tick" x="{left - 8}" y="{baseline}" text-anchor="end">{label}</text>'
            f'<rect class="ground" x="{left}" y="{y}" width="{cell * classes:.2f}" height="{line - 3}"/>'
        )
        for k, n in enumerate(c):
            if n <= 0:
                continue
            label = f"<title>{_text(f'{name}, {called[k]}: {n} of {total} samples')}</title>" if titled else ""
            # never fainter than 0.12: one sample must differ from none
            opacity = 0.12 + 0.88 * n / total / largest
            body.append(
                f'<rect class="cell" x="{left + cell * k:.2f}" y="{y}" width="{cell:.2f}" '
                f'height="{line - 3}" fill-opacity="{opacity:.3f}">{label}</rect>'
            )
    most = [
        f"{name}: {called[c.index(max(c))]} most ({max(c) / (sum(c) or 1) * 100:.0f} %)."
        for name, c in zip(names, full, strict=True)
    ]
    description = f"{len(names)} {row}s, {classes} classes. " + " ".join(most[:8])
    height = top + len(names) * line + 30
    key = _text(f"strongest: {largest * 100:.0f} % of a {row}’s samples")
    body.append(f'<text class="legend" x="{left}" y="{height - 10}">{key}</text>')
    return Chart(title, description, _svg(title, description, body, height), columns, rows)


def shorten(text: str, most: int) -> str:
    """The text, its middle replaced by … where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return text[: most - 1 - tail] + "…" + text[len(text) - tail :]


def _known(series: Series, at_least: float = -math.inf) -> Series:
    """Values beyond DRAWABLE, which a device may make up, would overflow in the arithmetic of the axis."""
    known = (v if v is not None and abs(v) <= DRAWABLE and v >= at_least else None for v in series.values)
    return replace(series, values=tuple(v and (0.0 if abs(v) < 1 / DRAWABLE else v) for v in known))


def _table(
    category: str, categories: Sequence[str], series: Sequence[Series], format_value: Formatter
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    rows = (
        (name, *("–" if s.values[i] is None else format_value(s.values[i]) for s in series))
        for i, name in enumerate(categories)
    )
    return (category, *(s.name for s in series)), tuple(rows)


def _summary(series: Series, categories: Sequence[int], category: str, format_value: Formatter) -> str:
    known = [(c, v) for c, v in zip(categories, series.values, strict=True) if v is not None]
    if not known:
        return f"{series.name}: no values."
    (first, a), (last, b) = known[0], known[-1]
    if len(known) == 1:
        return f"{series.name}: {format_value(a)} in {category} {first}."
    return f"{series.name}: {format_value(a)} in {category} {first}, {format_value(b)} in {category} {last}."


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    if high == low:
        return lambda _: (start + stop) / 2
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _grid(ticks: Sequence[float], y: Callable[[float], float], format_value: Formatter) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.2f}" y2="{y(t):.2f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y(t) + 4:.2f}" text-anchor="end">{_text(format_value(t))}</text>'
        for t in ticks
    )


def _category_label(x: float, base: float, text: str) -> str:
    return f'<text class="tick" x="{x:.2f}" y="{base + 17:.2f}" text-anchor="middle">{_text(text)}</text>'


def _axis_title(text: str, base: float) -> str:
    """Below the middle of the axis."""
    return _category_label((LEFT + WIDTH - RIGHT) / 2, base + 15, text)


_SLANT, _LONGEST_LABEL = 40, 12


def _slanted(x: float, y: float, text: str, falling: bool) -> str:
    """A name that ends at a point, coming from the upper left (`falling`) or the lower left."""
    label = _text(shorten(text, _LONGEST_LABEL))
    turned = f'transform="rotate({_SLANT if falling else -_SLANT} {x:.2f} {y:.2f})"'
    return f'<text class="tick slanted" x="{x:.2f}" y="{y:.2f}" text-anchor="end" {turned}>{label}</text>'


def _slanted_height(names: Sequence[int | str]) -> float:
    longest = max(len(shorten(str(name), _LONGEST_LABEL)) for name in names)
    return 22 + longest * CHARACTER * math.sin(math.radians(_SLANT))


def _runs(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _path(run: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in run)


def _marker(style: int, x: float, y: float, text: str = "") -> str:
    """A shape of its own for each series, so that colour is never the only difference."""
    r = 3.6
    shapes = (
        f"M{x - r:.2f} {y:.2f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        f"M{x - r:.2f} {y - r:.2f}h{2 * r}v{2 * r}h{-2 * r}Z",
        f"M{x:.2f} {y - r - 1:.2f}l{r + 1} {2 * r}h{-2 * r - 2}Z",
        f"M{x:.2f} {y - r - 1:.2f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}Z",
    )
    label = f"<title>{_text(text)}</title>" if text else ""
    return f'<path class="marker series-{style}" d="{shapes[style % len(shapes)]}">{label}</path>'


def _legend(series: Sequence[Series], lines: bool) -> tuple[str, float]:
    """The legend below the plot, wrapped to the width, and the y of the plot's base that leaves room for it."""
    places, x, row = [], 0.0, 0
    for one in series:
        width = 34 + CHARACTER * len(one.name) + 10
        if x and LEFT + x + width > WIDTH:
            x, row = 0.0, row + 1
        places.append((LEFT + x, row))
        x += width
    top = HEIGHT - row * LEGEND_LINE - 8
    parts = []
    for one, (left, line) in zip(series, places, strict=True):
        y, style = top + line * LEGEND_LINE, one.style % SERIES_STYLES
        if lines:
            parts.append(
                f'<path class="line series-{style}" d="M{left:.2f} {y - 4:.2f}h26"/>'
                + _marker(style, left + 13, y - 4)
            )
        else:
            parts.append(
                f'<rect class="bar series-{style}" x="{left + 6:.2f}" y="{y - 10:.2f}" width="13" height="12"/>'
            )
        parts.append(f'<text class="legend" x="{left + 32:.2f}" y="{y:.2f}">{_text(one.name)}</text>')
    return f'<g class="key">{"".join(parts)}</g>', top - (56 if series else 32)


def _svg(title: str, description: str, body: Sequence[str], height: float = HEIGHT) -> str:
    name = "chart-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{_text(title)}</title><desc id="{name}-desc">{_text(description)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _text(text: str) -> str:
    """Escaped for HTML and XML; control characters, which XML has no way to write, become U+FFFD."""
    return escape(re.sub(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))
