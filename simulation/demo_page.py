"""The demo's page: tables for the terminal, and the same with two pictures as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from edgestill.runtime.console import align
from edgestill.simulation.demo_pictures import Picture, draw
from edgestill.simulation.demo_results import DeviceResult, Results, Scores
from edgestill.simulation.seeds import EXPLAINED

NARROW_REM = 50
"""Up to this width pages stack table rows, and the panels of a picture."""
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
{figures or "<p>Pictures need matplotlib: <code>pip install 'edgestill[plots]'</code>, then the demo again.</p>"}
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
