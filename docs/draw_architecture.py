"""Draws docs/architecture.svg: `python docs/draw_architecture.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1040, 560
COLUMN, BOX_WIDTH, BOX_HEIGHT, STEP, TOP = 340, 280, 48, 74, 92
COLOURS = {"bundle": "#1d5fa8", "state": "#2e7d32", "upload": "#b25a00"}
"""One a journey."""

COLUMNS = (
    ("Where PyTorch is", "export/", "bundle", (
        ("student", "an nn.Module in three parts"),
        ("capture", "core ATen → graph of forward operators"),
        ("gradient", "one rule an operator; loss and optimizer"),
        ("rewrite, emit", "a table of rewrites and an emitter an engine"),
        ("bundle", "graphs, initial state, manifest"),
    )),
    ("On a device", "edge_runtime/", "state", (
        ("data", "private samples, transfer set"),
        ("plan", "hyperparameters; the batch of any step"),
        ("engine", "a program: state, batch → state′, metrics"),
        ("state", "a safetensors file, written after steps"),
        ("outputs", "latents, logits on the transfer set"),
    )),
    ("Coordinator", "coordinator/", "upload", (
        ("global outputs", "published for the next round"),
        ("distillation", "aggregate, train the global model"),
        ("round", "a state machine: who, how many, until when"),
        ("uploads", "checked, made durable, then acknowledged"),
        ("routes", "HTTP: one handler a route"),
    )),
)  # fmt: skip
"""Title, folder, journey, and the boxes from top to bottom: name, what it is."""


def draw() -> str:
    """The picture as SVG text, the same every time."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, Helvetica, Arial, DejaVu Sans, sans-serif" role="img" aria-labelledby="title">',
        '<title id="title">Three journeys: a student to a bundle, a batch to a state, an upload to a global model'
        "</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
            for name, colour in COLOURS.items()
        ),
        "</defs>",
    ]
    for column, (title, folder, journey, boxes) in enumerate(COLUMNS):
        parts += _column(_left(column), title, folder, COLOURS[journey], boxes)
        last = len(boxes) - 1
        for row in range(last):
            up = journey == "upload"  # an upload comes in at the bottom
            start, end = (_top(row + 1), _top(row) + BOX_HEIGHT) if up else (_top(row) + BOX_HEIGHT, _top(row + 1))
            middle = _left(column) + BOX_WIDTH / 2
            parts.append(_arrow(f"M{middle} {start}L{middle} {end}", journey))
    centre = BOX_HEIGHT / 2
    right = [_left(column) + BOX_WIDTH for column in range(3)]
    bend = (right[0] + _left(1)) / 2
    parts.append(
        _arrow(f"M{right[0]} {_top(4) + centre}H{bend}V{_top(2) + centre}H{_left(1)}", "bundle")
    )
    parts.append(_label(bend - 5, _top(3) + centre, "carried to devices", COLOURS["bundle"], turned=True))
    parts.append(_arrow(f"M{right[1]} {_top(4) + centre}H{_left(2)}", "upload"))
    parts.append(_arrow(f"M{_left(2)} {_top(0) + centre}H{right[1]}", "upload"))
    gap = (right[1] + _left(2)) / 2
    parts.append(_label(gap, _top(4) + centre - 8, "upload", COLOURS["upload"]))
    parts.append(_label(gap, _top(0) + centre - 8, "teacher", COLOURS["upload"]))
    lines = (
        ("bundle", "1 a student to a bundle"), ("state", "2 a batch to a state"),
        ("upload", "3 an upload to a global model"),
    )  # fmt: skip
    for number, (journey, text) in enumerate(lines):
        middle = _left(number) + BOX_WIDTH / 2
        parts.append(_label(middle, HEIGHT - 74, text, COLOURS[journey], size=15, weight="600"))
    parts.append(
        _label(
            WIDTH / 2, HEIGHT - 34,
            "What crosses a line: a bundle, outputs on the transfer set. Never private samples, never weights "
            "(but with exchange parameters).", "#444444",
        )
    )  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])


def _left(column: int) -> float:
    return 40 + column * COLUMN


def _top(row: int) -> float:
    return TOP + row * STEP


def _column(
    left: float, title: str, folder: str, colour: str, boxes: tuple[tuple[str, str], ...]
) -> list[str]:
    middle = left + BOX_WIDTH / 2
    parts = [
        f'<rect x="{left - 14}" y="20" width="{BOX_WIDTH + 28}" height="{_top(len(boxes)) - 24}" rx="10" '
        'fill="#f5f6f8"/>',
        _label(middle, 46, title, "#222222", size=17, weight="600"),
        _label(middle, 68, folder, "#555555", size=13, family="ui-monospace, DejaVu Sans Mono, monospace"),
    ]
    for row, (name, what) in enumerate(boxes):
        top = _top(row)
        parts += [
            f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="#ffffff" '
            f'stroke="{colour}" stroke-width="1.5"/>',
            _label(middle, top + 20, name, "#111111", size=14, weight="600"),
            _label(middle, top + 38, what, "#444444", size=11.5),
        ]
    return parts


def _arrow(path: str, journey: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{COLOURS[journey]}" stroke-width="2" marker-end="url(#{journey})"/>'


def _label(
    x: float, y: float, text: str, colour: str, size: float = 12, weight: str = "400", family: str = "",
    turned: bool = False,
) -> str:  # fmt: skip
    more = f' font-family="{family}"' if family else ""
    more += f' transform="rotate(-90 {x} {y})"' if turned else ""
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" text-anchor="middle"{more}>'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix("").with_name("architecture.svg").write_text(draw(), encoding="utf-8")
