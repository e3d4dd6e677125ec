"""Draws docs/round.svg, a round of a federation: `python docs/draw_round.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1040, 430
TEACHER, UPLOAD, OWN = "#1d5fa8", "#b25a00", "#2e7d32"
DEVICES = (
    ("phone", "large student"),
    ("tablet", "medium student"),
    ("camera", "small student"),
)
BOX_WIDTH, BOX_HEIGHT, STEP, TOP = 300, 92, 118, 52
LEFT, RIGHT = 40, WIDTH - 40 - BOX_WIDTH
COORDINATOR_HEIGHT = 2 * STEP + BOX_HEIGHT


def draw() -> str:
    """The picture as SVG text, the same every time."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, Helvetica, Arial, DejaVu Sans, sans-serif" role="img" aria-labelledby="title">',
        '<title id="title">A round: devices learn from the global model\'s outputs on shared images and from private '
        "data, and upload their own outputs, which are distilled into the global model</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/><defs>',
        *(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
            for name, colour in (("teacher", TEACHER), ("upload", UPLOAD))
        ),
        "</defs>",
        _text(LEFT + BOX_WIDTH / 2, 34, "Coordinator", 17, "600"),
        _text(RIGHT + BOX_WIDTH / 2, 34, "Devices", 17, "600"),
        _box(LEFT, TOP, COORDINATOR_HEIGHT, TEACHER),
        _text(LEFT + BOX_WIDTH / 2, TOP + 50, "1  outputs of the global model", 15, "600", TEACHER),
        _text(LEFT + BOX_WIDTH / 2, TOP + 72, "latents and logits on shared images", 13),
        _text(LEFT + BOX_WIDTH / 2, TOP + 158, "global model", 15, "600"),
        _text(LEFT + BOX_WIDTH / 2, TOP + 180, "any student, the largest if you like", 13),
        _text(LEFT + BOX_WIDTH / 2, TOP + 250, "5  distill into the global model", 15, "600", UPLOAD),
        _text(LEFT + BOX_WIDTH / 2, TOP + 272, "from the outputs of all devices", 13),
    ]
    for row, (name, student) in enumerate(DEVICES):
        top, middle = TOP + row * STEP, RIGHT + BOX_WIDTH / 2
        parts += [
            _box(RIGHT, top, BOX_HEIGHT, OWN),
            _text(middle, top + 27, f"{name}: {student}", 15, "600"),
            _text(middle, top + 51, "3  train on private data and the teacher", 13, "600", OWN),
            _text(middle, top + 73, "data and weights stay here", 13),
        ]
        down, up = top + 34, top + 62
        parts.append(_arrow(LEFT + BOX_WIDTH, down, RIGHT, down, "teacher", TEACHER))
        parts.append(_arrow(RIGHT, up, LEFT + BOX_WIDTH, up, "upload", UPLOAD))
        if row == 0:
            gap = (LEFT + BOX_WIDTH + RIGHT) / 2
            parts.append(_text(gap, down - 9, "2  download the teacher's outputs", 13, "600", TEACHER))
            parts.append(_text(gap, up + 20, "4  upload own outputs on the same images", 13, "600", UPLOAD))
    parts.append(
        _text(
            WIDTH / 2, HEIGHT - 22,
            "What crosses the network: outputs on shared images, some 70 kB a device and round. "
            "No private sample, no weight.",
            13,
        )
    )  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])


def _box(left: float, top: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{height}" rx="8" fill="#f8f9fb" '
        f'stroke="{colour}" stroke-width="1.5"/>'
    )


def _arrow(x1: float, y1: float, x2: float, y2: float, name: str, colour: str) -> str:
    return f'<path d="M{x1} {y1}L{x2} {y2}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#{name})"/>'


def _text(x: float, y: float, text: str, size: float, weight: str = "400", colour: str = "#222222") -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    Path(__file__).with_name("round.svg").write_text(draw(), encoding="utf-8")
