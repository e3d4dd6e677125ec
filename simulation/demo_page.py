"""The demo's page: tables for the terminal, and the same with two pictures as HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.runtime.console import align
from edgestill.simulation.seeds import EXPLAINED

# Okabe and Ito's palette, told apart with any colour vision
PRIVATE, UNIFORM, GLOBAL, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
CURVES = (("#0072B2", "-"), ("#D55E00", "--"), ("#CC79A7", "-."), ("#000000", ":"))
NARROW_REM = 50
"""Up to this width pages stack table rows, and the panels of a picture."""
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class DeviceResult:
    """One device: accuracies before its first training, after each round, and had it trained alone for as many epochs,
    and for as many steps; `unlabelled`: together without transfer labels, as recorded, or None."""

    name: str
    student: str
    engine: str
    samples: int
    class_counts: tuple[int, ...]
    before: Scores
    after: list[Scores]
    alone: Scores
    alone_steps: Scores
    unlabelled: Scores | None
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
class RoundResult:
    """One round, and the accuracy of its global student on test and on validation images; `best` by the latter."""

    number: int
    phase: str
    t_uni: float | None
    validation_accuracy: float | None
    best: bool


@dataclass(frozen=True)
class Results:
    """Everything that the page shows.

    `same_as_recorded`: whether the figures are those that `make demo-seeds` has recorded of the seed, at the commit
    `recorded_by`; None where it has not, or with other settings. `rows_of_seeds`: its table, empty without records.
    """

    gamma: float
    local_epochs: int
    global_student: str
    transfer_samples: int
    validation_samples: int
    devices: tuple[DeviceResult, ...]
    rounds: tuple[RoundResult, ...]
    seed: int = 0
    same_as_recorded: bool | None = None
    recorded_by: str = ""
    rows_of_seeds: tuple[tuple[str, ...], ...] = ()


COLUMNS = ("alone, epochs", "alone, steps", "no labels", "together")


def scores_of(device: DeviceResult) -> tuple[Scores, ...]:
    """What stands in COLUMNS."""
    return (device.alone, device.alone_steps, device.unlabelled or {}, device.after[-1])


def accuracy_rows(results: Results) -> list[tuple[str, ...]]:
    """A heading, a row a device, and the means."""
    rows = [("device", "student", *(f"{test} {name}" for test in ("T_priv", "T_uni") for name in COLUMNS))]
    for device in results.devices:
        scores = [one.get(test) for test in ("t_priv", "t_uni") for one in scores_of(device)]
        rows.append((device.name, device.student, *map(_share, scores)))
    means = [
        _mean([scores_of(device)[i].get(test) for device in results.devices])
        for test in ("t_priv", "t_uni")
        for i in range(len(COLUMNS))
    ]
    return [*rows, ("mean", "", *map(_share, means))]


def effort_rows(results: Results) -> list[tuple[str, ...]]:
    """A heading and a row a device: what it has, sends and takes."""
    rows = [("device", "student", "engine", "images", "kB up", "kB down", "ms a step", "peak MB")]
    for device in results.devices:
        rows.append(
            (
                device.name,
                device.student,
                device.engine,
                str(device.samples),
                _kilobytes(device.bytes_up),
                _kilobytes(device.bytes_down[1:]),
                f"{device.step_ms:.1f}",
                "–" if device.peak_rss_bytes is None else f"{device.peak_rss_bytes / 1e6:.0f}",
            )
        )
    return rows


def gains(results: Results, steps: bool = False) -> dict[str, float]:
    """Mean accuracy after the last round minus that of training alone for as many epochs, or steps."""
    found = {}
    for name in ("t_priv", "t_uni"):
        differences = [
            after - alone
            for device in results.devices
            if (after := device.after[-1][name]) is not None
            and (alone := (device.alone_steps if steps else device.alone)[name]) is not None
        ]
        found[name] = sum(differences) / len(differences) if differences else 0.0
    return found


def labels_known(results: Results) -> tuple[tuple[str, str], ...]:
    """Which images there are, and who knows their classes."""
    return (
        ("each device's private images", "that device alone; neither they nor their classes leave it"),
        (
            f"{results.transfer_samples} transfer images",
            "the coordinator alone: devices get the images without classes, and none of them is a private image",
        ),
        (
            f"{results.validation_samples} validation images",
            "the coordinator alone, which chooses the best round by them",
        ),
        ("test images", "nobody trains or chooses by them: T_priv and T_uni of devices, T_uni of the global student"),
    )


def words_of_records(results: Results) -> str:
    """Where the column without transfer labels comes from, and whether this run's figures are the recorded ones."""
    if results.same_as_recorded is None:
        return (
            "no labels: not recorded for these settings and this seed; `make demo-seeds` runs ten seeds of the demo's, "
            "with and without transfer labels"
        )
    told = f"no labels: as `make demo-seeds` has recorded it at commit {results.recorded_by}, not run again here; "
    if results.same_as_recorded:
        return told + f"every figure of this run is the recorded one of seed {results.seed}, to the last digit"
    return told + (
        f"the figures of this run are not the recorded ones of seed {results.seed}: since then the engine adds in "
        "another order, which moves every training a little; at that commit it is a mistake worth reporting"
    )


def summary_table(results: Results) -> str:
    """The tables for the terminal."""
    epochs, steps = gains(results), gains(results, steps=True)
    lines = [align(accuracy_rows(results), texts=2), "", align(effort_rows(results), texts=3), ""]
    for gain, what in ((epochs, "as many epochs"), (steps, "as many steps")):
        lines.append(
            f"together − alone for {what}: T_priv {100 * gain['t_priv']:+.1f} points, "
            f"T_uni {100 * gain['t_uni']:+.1f} points"
        )
    lines.append(words_of_records(results))
    lines += [f"classes of {images}: {who}" for images, who in labels_known(results)]
    for one in results.rounds:
        if one.best and one.t_uni is not None:
            lines.append(
                f"the global student ({results.global_student}) of round {one.number}, the best on validation images: "
                f"T_uni {one.t_uni:.1%}"
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
    epochs, steps = gains(results), gains(results, steps=True)
    rounds = "".join(
        f"<li>round {one.number}: {html.escape(one.phase)}"
        + (f", global student T_uni {one.t_uni:.1%}" if one.t_uni is not None else "")
        + (f", validation {one.validation_accuracy:.1%}" if one.validation_accuracy is not None else "")
        + (" – <strong>the best on validation images, kept</strong>" if one.best else "")
        + "</li>"
        for one in results.rounds
    )
    figures = "\n".join(
        f'<figure><picture><source media="(max-width: {NARROW_REM}rem)" srcset="{html.escape(one.narrow)}">'
        f'<img src="{html.escape(one.wide)}" alt="{html.escape(one.text)}"></picture></figure>'
        for one in pictures
    )
    known = "".join(
        f"<dt>{html.escape(images)}</dt><dd>{html.escape(who)}</dd>" for images, who in labels_known(results)
    )
    seeds = ""
    if results.rows_of_seeds:
        head, *body, means = results.rows_of_seeds
        seeds = f"<h2>Ten seeds</h2><p>{html.escape(EXPLAINED)}</p>{_table(head, body, means)}"
    head, *body, means = accuracy_rows(results)
    effort_head, *effort = effort_rows(results)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Four devices and a coordinator on this machine</title><style>{_STYLE}</style></head><body><main>
<h1>Four devices, three students, one common head</h1>
<p>Each device trained {results.local_epochs} epochs a round on its own share (Dirichlet, gamma {results.gamma:g},
seed {results.seed}) and exchanged nothing but its latents on {results.transfer_samples} transfer images.</p>
<p class="gain">Together against alone for as many epochs: <strong>T_priv {100 * epochs["t_priv"]:+.1f}</strong> points,
<strong>T_uni {100 * epochs["t_uni"]:+.1f}</strong> points; for as many steps: T_priv {100 * steps["t_priv"]:+.1f},
T_uni {100 * steps["t_uni"]:+.1f} points</p>
{figures}
<h2>Every device</h2>
{_table(head, body, means)}
<p>T_priv: test images of the device's own class distribution. T_uni: all classes alike. Alone: the same student on the
same data, no exchange, for as many epochs, and for as many steps (a batch of the federation is half of transfer images,
so its epochs take more steps).</p>
<p>{html.escape(words_of_records(results)[0].upper() + words_of_records(results)[1:])}.</p>
<h2>Who knows which classes</h2><dl>{known}</dl>
<h2>What it takes</h2>
{_table(effort_head, effort)}
<p>kB: a round's mean upload, and its mean download of global outputs; in the first round a device downloads its student
and the transfer set instead.</p>
{seeds}
<h2>Rounds</h2><ul>{rounds}</ul>
</main></body></html>
"""


def _table(head: Sequence[str], body: Sequence[Sequence[str]], foot: Sequence[str] | None = None) -> str:
    """A table whose cells say themselves what they are, for narrow screens."""

    def cells(row: Sequence[str]) -> str:
        first = f'<th scope="row">{html.escape(row[0])}</th>'
        rest = zip(head[1:], row[1:], strict=True)
        return first + "".join(
            f'<td data-label="{html.escape(label)}">{html.escape(cell)}</td>' for label, cell in rest
        )

    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    rows = "\n".join(f"<tr>{cells(row)}</tr>" for row in body)
    feet = "" if foot is None else f"<tfoot><tr>{cells(foot)}</tr></tfoot>"
    return f"""<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody>{feet}</table></div>"""


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
            "Bars of each device's accuracy alone, for as many epochs and steps, and together; the table has the "
            "numbers",
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
            (-0.27, "alone, epochs", "#CCCCCC", [device.alone[key] for device in results.devices]),
            (0.0, "alone, steps", GREY, [device.alone_steps[key] for device in results.devices]),
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
    points = [(one.number, 100 * one.t_uni) for one in results.rounds if one.t_uni is not None]
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
th:first-child, td:nth-child(2), thead th:nth-child(-n+2) { text-align: left; }
dt { font-weight: 600; }
tfoot { font-weight: 600; }
@media (max-width: 50rem) {
  img { max-width: 28rem; margin: 0 auto; }
  table, tbody, tfoot { display: block; }
  thead { position: absolute; clip-path: inset(50%); }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0 .75rem; padding: .5rem 0; }
  tr { border-bottom: 1px solid var(--line); }
  tr > * { border: 0; padding: .2rem 0; }
  tr > td, tr > td:nth-child(n) { text-align: left; }
  tr > th { font-size: 1rem; }
  td::before { content: attr(data-label); display: block; font-size: .75rem; font-weight: 400; }
  td:empty { display: none; }
}
"""
