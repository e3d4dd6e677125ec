"""docs/performance.md and README's table: every figure is what the committed records say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgestill.benchmarks.performance_page import BLOCK, PAGES, RESULTS, blocks, draw, fill, read_runs

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_what_the_records_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert fill(text, blocks()) == text, "run `make performance` and commit the page"


def test_no_figure_stands_outside_of_what_the_records_fill() -> None:
    by_hand = BLOCK.sub("", PAGES[0].read_text(encoding="utf-8"))
    assert not re.findall(r"0\.\d\d\b|\d ms|\d MB", by_hand)


def test_first_and_last_run_are_before_and_after(tmp_path: Path) -> None:
    (record,) = (path for path in RESULTS.glob("step-amd-*.jsonl"))
    first = [json.loads(text) for text in record.read_text(encoding="utf-8").splitlines()]
    first = [line for line in first if line["date"] == first[0]["date"]]
    later = [{**line, "date": "2027-01-01T00:00:00+00:00", "numpy_start_s": 0.1} for line in first]
    for line in later:
        if line["engine"] == "native":
            line |= {"ratio_to_eager": line["ratio_to_eager"] / 2, "cold_start_s": 0.19}
    (tmp_path / "step-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*later, *first)))
    made = blocks(tmp_path)
    assert "| cnn3, batch 32, 1 thread | 0.65 | 0.32 | 0.41 | 0.39 | 37.8 | 72 | 0.09 |" in made["native"]
    assert len(made["history"].splitlines()) == 4 and made["tensorflow"] == "Not measured yet.\n"
    runs = read_runs(tmp_path, "step-*.jsonl")
    draw(runs[0], runs[-1], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
