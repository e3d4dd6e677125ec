"""Tables and plots of experiments."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ElementTree

import pytest

from edgestill.benchmarks.experiments.figures import Figure, Line, draw_bars, draw_lines, save_figure
from edgestill.benchmarks.experiments.tables import Table, to_csv, to_markdown

TABLE = Table("Squares, | and roots", ("x", "y|z", "note"), [[1, 0.5, "a, b"], [2, None, 'say "c"']])


def test_markdown_has_a_line_a_row():
    lines = to_markdown(TABLE).splitlines()
    assert lines[0] == "**Squares, | and roots**"
    assert lines[2:] == [
        "| x | y\\|z | note |",
        "| ---: | ---: | --- |",
        "| 1 | 0.500 | a, b |",
        '| 2 | – | say "c" |',
    ]


def test_csv_reads_back():
    rows = list(csv.reader(io.StringIO(to_csv([TABLE, TABLE]))))
    assert rows[:4] == [[TABLE.title], ["x", "y|z", "note"], ["1", "0.5", "a, b"], ["2", "", 'say "c"']]
    assert rows[4:] == [[], *rows[:4]]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="a row of 1 under 2"):
        Table("t", ("a", "b"), [[1]])


def test_a_plot_is_written_twice_with_equal_bytes(tmp_path):
    pytest.importorskip("matplotlib")

    def draw(canvas):
        left, right = canvas.subplots(1, 2)
        draw_lines(
            left,
            {"lkd": Line([1, 2], [0.5, 0.6], [0.1, 0.1]), "ce": Line([1, 2], [0.4, 0.5])},
            "n",
            "accuracy",
        )
        draw_bars(
            right,
            ["a", "b"],
            {"T_priv": ([0.5, 0.6], [0.1, 0.0]), "T_uni": ([0.4, 0.5], [0.1, 0.1])},
            "accuracy",
        )

    (tmp_path / "again").mkdir()
    first = save_figure(Figure("lines", draw), tmp_path / "demo")
    second = save_figure(Figure("lines", draw), tmp_path / "again" / "demo")
    assert [path.name for path in first] == ["demo-lines.png", "demo-lines.svg"]
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True)] == [True, True]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(first[1]).getroot().tag.endswith("svg")
