"""The demo's page: one table for the terminal, and the same with two pictures as HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.runtime.console import align

# Okabe and Ito's palette, told apart with any colour vision
PRIVATE, UNIFORM, GLOBAL, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
CURVES = (("#0072B2", "-"), ("#D55E00", "--"), ("#CC79A7", "-."), ("#000000", ":"))
NARROW_REM = 50
"""Up to this width pages stack table rows, and the panels of a picture."""
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class DeviceResult:
    """One device: accuracies before its first training, after each round, and had it trained alone."""

    name: str
    student: str
    engine: str
    samples: int
    class_counts: tuple[int, ...]
    before: Scores
    after: list[Scores]
    alone: Scores
    step_ms: float
    bytes_up: list[int]
    bytes_down: list[int]
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class Picture:
    """One picture for wide and one for narrow pages, and what they show for who cannot see them."""

    wide: str
    narrow: str
    text: str


@dataclass(frozen=True)
class Results:
    """Everything that the page shows; `rounds` are (number, phase, T_uni of the global student)."""

    gamma: float
    local_epochs: int
    global_student: str
    transfer_samples: int
    devices: tuple[DeviceResult, ...]
    rounds: tuple[tuple[int, str, float | None], ...]


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """A heading, a row a device, and the means."""
    rows = [
        ("device", "student", "engine", "T_priv before", "after", "alone", "T_uni before", "after", "alone",
         "kB up", "kB down", "ms a step")
    ]  # fmt: skip
    for device in results.devices:
        last = device.after[-1]
        rows.append(
            (
                device.name,
                device.student,
                device.engine,
                *(_share(one["t_priv"]) for one in (device.before, last, device.alone)),
                *(_share(one["t_uni"]) for one in (device.before, last, device.alone)),
                _kilobytes(device.bytes_up),
                _kilobytes(device.bytes_down[1:]),
                f"{device.step_ms:.1f}",
            )
        )
    triples = [(device.before, device.after[-1], device.alone) for device in results.devices]
    means = [_mean([triple[i][name] for triple in triples]) for name in ("t_priv", "t_uni") for i in range(3)]
    rows.append(("mean", "", "", *map(_share, means), "", "", ""))
    return rows


def gains(results: Results) -> dict[str, float]:
    """Mean accuracy after the last round minus that of training alone, by T_priv and T_uni."""
    found = {}
    for name in ("t_priv", "t_uni"):
        differences = [
            after - alone
            for device in results.devices
            if (after := device.after[-1][name]) is not None and (alone := device.alone[name]) is not None
        ]
        found[name] = sum(differences) / len(differences) if differences else 0.0
    return found


def summary_table(results: Results) -> str:
    """The table for the terminal."""
    gain = gains(results)
    last = [accuracy for _, _, accuracy in results.rounds if accuracy is not None]
    lines = [
        align(table_rows(results), texts=3),
        "",
        f"together − alone: T_priv {100 * gain['t_priv']:+.1f} points, T_uni {100 * gain['t_uni']:+.1f} points",
    ]
    if last:
        lines.append(
            f"the global student ({results.global_student}): T_uni {last[-1]:.1%}, from the devices' outputs alone"
        )
    return "\n".join(lines)


def write_page(results: Results, folder: Path) -> Path:
    """Writes index.html and its pictures, where matplotlib is installed; returns the page's path."""
    pictures = draw(results, folder)
    path = folder / "index.html"
    path.write_text(page_html(results, pictures), encoding="utf-8")
    return path


def page_html(results: Results, pictures: Sequence[Picture]) -> str:
    """The page."""
    head, *body, means = table_rows(results)
    gain = gains(results)

    # on a narrow screen every cell says itself what it is
    tests = ["T_priv"] * 3 + ["T_uni"] * 3
    labels = head[1:3] + tuple(
        f"{test} {name.split()[-1]}" for test, name in zip(tests, head[3:9], strict=True)
    )
    labels += head[9:]

    def cells(row: Sequence[str]) -> str:
        first = f'<th scope="row">{html.escape(row[0])}</th>'
        rest = zip(labels, row[1:], strict=True)
        return first + "".join(f'<td data-label="{label}">{html.escape(cell)}</td>' for label, cell in rest)

    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    rows = "\n".join(f"<tr>{cells(row)}</tr>" for row in body)
    rounds = "".join(
        f"<li>round {number}: {html.escape(phase)}"
        + (f", global student T_uni {accuracy:.1%}" if accuracy is not None else "")
        + "</li>"
        for number, phase, accuracy in results.rounds
    )
    figures = "\n".join(
        f'<figure><picture><source media="(max-width: {NARROW_REM}rem)" srcset="{html.escape(one.narrow)}">'
        f'<img src="{html.escape(one.wide)}" alt="{html.escape(one.text)}"></picture></figure>'
        for one in pictures
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Four devices and a coordinator on this machine</title><style>{_STYLE}</style></head><body><main>
<h1>Four devices, three students</h1>
<p>Each device trained {results.local_epochs} epochs a round on its own share (Dirichlet, gamma {results.gamma:g})
and exchanged nothing but its latents and logits on {results.transfer_samples} transfer images.</p>
<p class="gain">Together against alone: <strong>T_priv {100 * gain["t_priv"]:+.1f}</strong> points,
<strong>T_uni {100 * gain["t_uni"]:+.1f}</strong> points</p>
{figures}
<h2>Every device</h2>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody><tfoot><tr>{cells(means)}</tr></tfoot></table></div>
<p>T_priv: test images of the device's own class distribution. T_uni: all classes alike. Alone: the same student, as
many epochs on the same data, no exchange. kB: a round's mean upload, and its mean download of global outputs; in the
first round a device downloads its student and the transfer set instead.</p>
<h2>Rounds</h2><ul>{rounds}</ul>
</main></body></html>
"""


def draw(results: Results, folder: Path) -> list[Picture]:
    """Writes the pictures as PNGs; none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    drawn = []
    for name, text, draw_panels in (
        (
            "accuracy",
            "Bars of each device's accuracy before, alone and together; the table has the numbers",
            _draw_accuracy,
        ),
        (
            "rounds",
            "T_uni over the rounds, and how many samples of each class every device has",
            _draw_rounds,
        ),
    ):
        files = []
        for suffix, rows, columns, size in (("", 1, 2, (10, 3.6)), ("-narrow", 2, 1, (3.6, 6.2))):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            draw_panels(results, figure, rows, columns)
            files.append(f"{name}{suffix}.png")
            figure.savefig(folder / files[-1], dpi=130 if columns == 2 else 260)
        drawn.append(Picture(*files, text))
    return drawn


def _draw_accuracy(results: Results, figure: Any, rows: int, columns: int) -> None:
    panels = figure.subplots(rows, columns, sharey=True)
    names = [f"{device.name}\n{device.student}" for device in results.devices]
    for panel, key, title, colour in zip(
        panels,
        ("t_priv", "t_uni"),
        ("T_priv: own classes", "T_uni: all classes"),
        (PRIVATE, UNIFORM),
        strict=True,
    ):
        for shift, label, tint, values in (
            (-0.27, "before", "#DDDDDD", [device.before[key] for device in results.devices]),
            (0.0, "alone", GREY, [device.alone[key] for device in results.devices]),
            (0.27, "together", colour, [device.after[-1][key] for device in results.devices]),
        ):
            heights = [100 * (value or 0.0) for value in values]
            places = [index + shift for index in range(len(heights))]
            bars = panel.bar(places, heights, 0.25, color=tint, label=label)
            panel.bar_label(bars, [f"{height:.0f}" for height in heights], padding=1, fontsize=8)
        panel.set_xticks(range(len(names)), names, fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panel.legend(fontsize=8, frameon=False, ncols=3, loc="upper left", columnspacing=1, handlelength=1.2)
        panel.set_ylabel("accuracy in %", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, min(100, 1.25 * panels[0].get_ylim()[1]))


def _draw_rounds(results: Results, figure: Any, rows: int, columns: int) -> None:
    curves, classes = figure.subplots(rows, columns)
    ends = []  # (round, accuracy, label, colour)
    for index, device in enumerate(results.devices):
        colour, dashes = CURVES[index % len(CURVES)]
        shares = [100 * (one["t_uni"] or 0.0) for one in (device.before, *device.after)]
        curves.plot(range(len(shares)), shares, marker="osD^v<>p"[index % 8], markersize=4, linewidth=1.5,
                    color=colour, linestyle=dashes)  # fmt: skip
        ends.append((len(shares) - 1, shares[-1], f"{device.name} ({device.student})", colour))
    points = [(number, 100 * accuracy) for number, _, accuracy in results.rounds if accuracy is not None]
    if points:
        curves.plot(*zip(*points, strict=True), marker="*", markersize=9, color=GLOBAL, linewidth=3)
        ends.append((*points[-1], f"global ({results.global_student})", GLOBAL))
    top, last = 1.12 * curves.get_ylim()[1], max(end[0] for end in ends)
    curves.set(xlim=(-0.1, 1.75 * last), ylim=(0, top), xticks=range(last + 1))
    ends.sort(key=lambda end: end[1])
    # each curve says itself what it is, a line of text apart from the others
    for (number, accuracy, label, colour), place in zip(
        ends, spread([end[1] for end in ends], top * 0.08), strict=True
    ):
        curves.annotate(
            label, (number, accuracy), (1.12 * last, place), va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colour, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip
    curves.set_title("T_uni, round by round", loc="left", fontsize=10, fontweight="bold")
    curves.set_xlabel("round", fontsize=9)
    curves.set_ylabel("T_uni in %", fontsize=9)
    curves.spines[["top", "right"]].set_visible(False)
    counts = [list(device.class_counts) for device in results.devices]
    picture = classes.imshow(counts, cmap="Blues", aspect="auto", vmin=0)
    figure.colorbar(picture, ax=classes, shrink=0.8)
    classes.set_title("private samples a class", loc="left", fontsize=10, fontweight="bold")
    classes.set_xlabel("class", fontsize=9)
    classes.set_xticks(range(len(counts[0])))
    classes.set_yticks(range(len(counts)), [device.name for device in results.devices], fontsize=9)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Rising values moved apart to at least `gap`: each run of crowded ones stays around its middle."""
    runs: list[list[float]] = []  # (sum of values, how many)
    for value in values:
        runs.append([value, 1])
        while len(runs) > 1 and _middle(runs[-1]) - _middle(runs[-2]) < gap * (runs[-1][1] + runs[-2][1]) / 2:
            total, count = runs.pop()
            runs[-1] = [runs[-1][0] + total, runs[-1][1] + count]
    return [_middle(run) + gap * (i - (run[1] - 1) / 2) for run in runs for i in range(int(run[1]))]


def _middle(run: Sequence[float]) -> float:
    return run[0] / run[1]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _kilobytes(values: Sequence[int]) -> str:
    known = [value for value in values if value]
    return f"{sum(known) / len(known) / 1e3:.0f}" if known else "0"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


_STYLE = """
:root { color-scheme: light dark; --line: #c8ccd0; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { box-sizing: border-box; max-width: 74rem; margin: 0 auto; padding: 1rem; }
.gain { font-size: 1.2rem; }
figure { margin: 1rem 0; background: white; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right; vertical-align: bottom; }
th:first-child, td:nth-child(2), td:nth-child(3), thead th:nth-child(-n+3) { text-align: left; }
tfoot { font-weight: 600; }
@media (max-width: 50rem) {
  img { max-width: 28rem; margin: 0 auto; }
  table, tbody, tfoot { display: block; }
  thead { position: absolute; clip-path: inset(50%); }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); padding: .5rem 0; border-bottom: 1px solid var(--line); }
  tr > * { border: 0; padding: .2rem 0; }
  tr > td, tr > td:nth-child(n) { text-align: left; }
  tr > th { font-size: 1rem; }
  td::before { content: attr(data-label); display: block; font-size: .75rem; font-weight: 400; }
  td:empty { display: none; }
}
"""
