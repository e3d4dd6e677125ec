"""What experiment `privacy` shows: tables, bars, and the private images beside what the attacks made of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from edgestill.benchmarks.experiments.figures import COLOURS, Figure
from edgestill.benchmarks.experiments.report import Report
from edgestill.benchmarks.experiments.statistics import Mean, mean_with_interval
from edgestill.benchmarks.experiments.tables import Table

Found = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""Results by exchange and protection, one a seed."""
_ATTACKS = {
    "decoder, transfer": ("decoder", "transfer"),
    "decoder, private": ("decoder", "private"),
    "decoder, unseen": ("decoder", "unseen"),
    "decoder, few": ("decoder", "few"),
    "gradient, few": ("gradient", "few"),
    "refined, few": ("refined", "few"),
}
_BASELINE = "mean_image"
_BARS = ("decoder, transfer", "decoder, private", "gradient, few", "refined, few")


def make_report(records: Sequence[Mapping[str, Any]], title: str) -> Report:
    """PSNR and SSIM by exchange, protection and attack, bars of what is gained, and pictures; in the records' order."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        settings = record["settings"]
        found.setdefault((settings["exchange"], settings["protection"]), []).append(record["result"])
    tables = [
        _table("PSNR in dB (higher: rebuilt better)", found, "psnr_db"),
        _table("PSNR gained over the mean image, dB", found, "gain_db"),
        _table("SSIM", found, "ssim"),
        _releases(found),
    ]
    summary: dict[str, Any] = {}
    for (exchange, protection), results in found.items():
        summary.setdefault(exchange, {})[protection] = {
            f"{attack}_{what}": {
                number: _mean(results, attack, what, number).as_json()
                for number in ("psnr_db", "gain_db", "ssim")
            }
            for attack, what in ((_BASELINE, "private"), *_ATTACKS.values())
        } | {"epsilon": results[0]["epsilon"]}
    figures = [Figure("gain", lambda canvas: _draw_gains(canvas, found, title), 9.0, 5.0)]
    pictures = {key: results[0]["pictures"] for key, results in found.items() if results[0]["pictures"]}
    if pictures:
        figures.append(
            Figure(
                "pictures", lambda canvas: _draw_pictures(canvas, pictures), 13.0, 0.8 * len(pictures) + 0.5
            )
        )
    return Report(tables, figures, summary)


def _mean(results: Sequence[Mapping[str, Any]], attack: str, what: str, number: str) -> Mean:
    return mean_with_interval([result["attacks"][attack][what][number] for result in results])


def _table(title: str, found: Found, number: str) -> Table:
    columns = {**({} if number == "gain_db" else {"mean image, private": (_BASELINE, "private")}), **_ATTACKS}
    form = ".3f" if number == "ssim" else ".2f"
    rows = [
        [exchange, protection, *(_mean(results, *of, number).shown(form) for of in columns.values())]
        for (exchange, protection), results in found.items()
    ]
    return Table(title, ("exchange", "protection", *columns), rows)


def _releases(found: Found) -> Table:
    rows = [
        [
            exchange,
            protection,
            None if results[0]["epsilon"] is None else f"{results[0]['epsilon']:.3g}",
            str(mean_with_interval([result["relative_error"] for result in results])),
            round(fmean(result["bytes_up"] for result in results)),
            str(mean_with_interval([result["student_accuracy"] for result in results])),
            len(results),
        ]
        for (exchange, protection), results in found.items()
    ]
    columns = (
        "exchange", "protection", "epsilon of one release", "error, share of the norm", "bytes up",
        "student's accuracy", "seeds",
    )  # fmt: skip
    return Table("What was released", columns, rows)


def _name(key: tuple[str, str]) -> str:
    exchange, protection = key
    return f"{exchange}, {protection}"


def _draw_gains(canvas: Any, found: Found, title: str) -> None:
    axes = canvas.subplots()
    height = 0.8 / len(_BARS)
    for index, label in enumerate(_BARS):
        means = [_mean(results, *_ATTACKS[label], "gain_db") for results in found.values()]
        places = [place + (index - (len(_BARS) - 1) / 2) * height for place in range(len(found))]
        axes.barh(
            places, [mean.mean for mean in means], height * 0.9, xerr=[mean.ci95 or float("nan") for mean in means],
            color=COLOURS[index], label=label, capsize=2,
        )  # fmt: skip
    axes.set_yticks(range(len(found)), [_name(key) for key in found])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=1)
    axes.set(xlabel="PSNR gained over the mean image, dB (0: the upload tells nothing)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside lower center", ncols=len(_BARS), frameon=False, fontsize=9)


def _draw_pictures(canvas: Any, pictures: Mapping[tuple[str, str], Mapping[str, str]]) -> None:
    """A row a protection: originals, and what the attacks made of their rows."""
    columns = {
        "original": "private images",
        "decoder": "decoder",
        "gradient": "gradient",
        "refined": "decoder, then gradient",
    }
    grid = canvas.subplots(len(pictures), len(columns), squeeze=False)
    for title, axes in zip(columns.values(), grid[0], strict=True):
        axes.set_title(title, fontsize=10)
    for (key, strips), row in zip(pictures.items(), grid, strict=True):
        row[0].set_ylabel(_name(key), rotation=0, ha="right", va="center")
        for name, axes in zip(columns, row, strict=True):
            axes.imshow(decode_strip(strips[name]), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)


def encode_strip(images: np.ndarray) -> str:
    """Images [N, C, H, W] from 0 to 1 side by side as a PNG in base64."""
    from PIL import Image

    strip = np.rint(np.concatenate(list(images), axis=2).transpose(1, 2, 0) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def decode_strip(text: str) -> np.ndarray:
    """The strip as uint8 [H, N·W, C]."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
