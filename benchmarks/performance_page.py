"""Fills docs/performance.md, and what README says was measured, from the committed records, and draws their chart.

Run: python -m edgestill.benchmarks.performance_page

A run is what one `edgestill bench step` has written: the lines of one date. The first and the last with the engine
native are before and after. Blocks are as in results_page.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill as fill_lines
from typing import Any

from edgestill.benchmarks.report import case_key, case_title
from edgestill.benchmarks.results_page import ROOT
from edgestill.benchmarks.step import BUSY_LIMIT
from edgestill.runtime.files import write_atomically

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "performance.md", ROOT / "README.md")
CHART = RESULTS / "performance.png"
BLOCK = re.compile(r"<!-- (?P<name>engines|native|history|tensorflow):begin -->\n.*?<!-- (?P=name):end -->", re.DOTALL)
W1 = ("cnn3", 32)
BEFORE_COLOUR, AFTER_COLOUR = "#999999", "#0072B2"

Line = Mapping[str, Any]


class Run:
    """What was measured at once, by case and engine."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = [line for line in lines if "error" not in line]
        self.cases = list(dict.fromkeys(map(case_key, self.lines)))
        self._by = {(case_key(line), line["engine"]): line for line in self.lines}

    def line(self, case: tuple[str, int, int], engine: str) -> Line | None:
        return self._by.get((case, engine))

    def ratio(self, case: tuple[str, int, int], engine: str, other: str = "torch-eager") -> float | None:
        """Step time of one engine ÷ another's; of each, the median over the rounds beside eager PyTorch."""
        one, two = self.line(case, engine), self.line(case, other)
        return one["ratio_to_eager"] / two["ratio_to_eager"] if one and two else None


def read_runs(folder: Path, pattern: str, engine: str = "native") -> list[Run]:
    """The runs in which the engine took part, oldest first."""
    dates: dict[str, list[Line]] = {}
    for path in folder.glob(pattern):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            dates.setdefault(line["date"], []).append(line)
    runs = [Run(lines) for _, lines in sorted(dates.items())]
    return [run for run in runs if any(line["engine"] == engine for line in run.lines)]


def about(run: Run) -> str:
    """Where and how a run was made."""
    line, busy = run.lines[0], max(line["busy_share"] or 0 for line in run.lines)
    machine = line["machine"]
    trust = f" Others used up to {busy:.0%} of the machine meanwhile: do not trust it." if busy > BUSY_LIMIT else ""
    return (
        f"{machine['cores']}-core {machine['architecture']} machine ({machine['cpu']}), {line['date'][:10]}, "
        f"commit {line['commit']['hash'][:7]}, {line['steps']} steps of each engine in turn.{trust}"
    )


def engines(run: Run) -> str:
    """W1 on every engine."""
    header = ("engine", "1 thread, ms (ratio)", "2 threads, ms (ratio)", "peak memory, MB", "cold start, s")
    rows = []
    for engine in dict.fromkeys(("native", *(line["engine"] for line in run.lines))):
        one, two = (run.line((*W1, threads), engine) for threads in (1, 2))
        if one is None:
            continue
        steps = [f"{x['p50_ms']:.1f} ({x['ratio_to_eager']:.2f})" if x else "–" for x in (one, two)]
        rows.append((f"`{engine}`", *steps, _number(one["peak_rss_bytes"], 0, 1e-6), _number(one["cold_start_s"], 2)))
    meaning = (
        "Ratio = step time ÷ eager PyTorch's. Memory is the peak of a fresh process that only trains, cold start the "
        "time from process start to its first finished step."
    )
    return _under(f"{about(run)} {meaning}", header, rows)


def native(first: Run, last: Run) -> str:
    """Engine native before and after, and beside others."""
    header = ("case", "÷ eager, first version", "÷ eager", "÷ eager channels last", "÷ onnxruntime", "ms", "memory, MB",
              "cold start beyond NumPy, s")  # fmt: skip
    rows = []
    for case in last.cases:
        line = last.line(case, "native")
        if line is None:
            continue
        ratios = [last.ratio(case, "native", other) for other in (
            "torch-eager", "torch-eager-channels-last", "onnxruntime")]  # fmt: skip
        start, numpy = line["cold_start_s"], line.get("numpy_start_s")
        beyond = start - numpy if start is not None and numpy is not None else None
        rows.append(
            (
                case_title(line),
                *(_number(ratio, 2) for ratio in (first.ratio(case, "native"), *ratios)),
                _number(line["p50_ms"], 1),
                _number(line["peak_rss_bytes"], 0, 1e-6),
                _number(beyond, 2),
            )
        )
    return _under(about(last), header, rows)


def history(runs: Iterable[Run]) -> str:
    """W1 on native in every run."""
    header = ("date", "commit", "÷ eager, 1 thread", "÷ eager, 2 threads", "memory, MB", "cold start, s")
    rows = []
    for run in runs:
        line = run.line((*W1, 1), "native")
        if line is not None:
            ratios = (_number(run.ratio((*W1, threads), "native"), 2) for threads in (1, 2))
            memory, start = _number(line["peak_rss_bytes"], 0, 1e-6), _number(line["cold_start_s"], 2)
            rows.append((line["date"][:16], line["commit"]["hash"][:7], *ratios, memory, start))
    return _table(header, rows)


def tensorflow(run: Run) -> str:
    """W1 beside TensorFlow."""
    header = ("engine", "threads", "ms", "processor time, ms", "native ÷ it")
    rows = [
        (
            f"`{line['engine']}`",
            str(line["threads"]),
            *(_number(line[key], digits) for key, digits in (("p50_ms", 1), ("cpu_ms", 1), ("native_ratio", 2))),
        )
        for line in run.lines
    ]
    return _under(f"{about(run)} TensorFlow {run.lines[-1]['tensorflow']}.", header, rows)


def blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Every block by its name."""
    runs, beside = read_runs(folder, "step-*.jsonl"), read_runs(folder, "tensorflow*.jsonl")
    widest = max(reversed(runs), key=lambda run: len({line["engine"] for line in run.lines}))  # the newest of them
    return {
        "engines": engines(widest),
        "native": native(runs[0], runs[-1]),
        "history": history(runs),
        "tensorflow": tensorflow(beside[-1]) if beside else "Not measured yet.\n",
    }


def fill(page: str, made: Mapping[str, str]) -> str:
    """The page with every block made anew."""
    return BLOCK.sub(lambda at: f"<!-- {at['name']}:begin -->\n{made[at['name']]}<!-- {at['name']}:end -->", page)


def draw(first: Run, last: Run, path: Path) -> None:
    """Writes a PNG: native's step ÷ eager PyTorch's in each case, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in last.cases if last.line(case, "native")]
    figure, panel = pyplot.subplots(figsize=(9, 0.62 * len(cases) + 1.3), layout="constrained")
    runs = [(first, "first", BEFORE_COLOUR, -0.2)] + [(last, "now", AFTER_COLOUR, 0.2)] * (first is not last)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the dashed line does not run through a number
    for run, name, colour, shift in runs:
        shown = [(place, run.ratio(case, "native")) for place, case in enumerate(cases) if run.line(case, "native")]
        line = run.lines[0]
        bars = panel.barh(
            [place + shift for place, _ in shown],
            [ratio for _, ratio in shown],
            height=0.36,
            color=colour,
            label=f"{name}: {line['date'][:10]}, commit {line['commit']['hash'][:7]}",
        )
        panel.bar_label(bars, [f"{ratio:.2f}" for _, ratio in shown], padding=4, fontsize=9, zorder=4, bbox=behind)
    panel.axvline(1.0, color="black", linestyle="--", linewidth=1)
    panel.set_yticks(range(len(cases)), [case_title(last.line(case, "native")) for case in cases])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.35)
    panel.set_xlabel("engine native: step time ÷ eager PyTorch (dashed), lower is better")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def _under(text: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"{fill_lines(text, 118)}\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    made, runs = blocks(), read_runs(RESULTS, "step-*.jsonl")
    for page in PAGES:
        write_atomically(page, [fill(page.read_text(encoding="utf-8"), made).encode()])
    draw(runs[0], runs[-1], CHART)
    print(f"wrote {', '.join(str(path.relative_to(ROOT)) for path in (*PAGES, CHART))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
