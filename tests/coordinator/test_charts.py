"""The charts against independent geometry: the SVG is parsed, and positions are turned back into numbers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.coordinator.dashboard.charts import (
    Series,
    bar_chart,
    heat_map,
    line_chart,
    nice_ticks,
    shorten,
)

NS = {"s": "http://www.w3.org/2000/svg"}
finite = st.floats(-1e100, 1e100).map(lambda v: v if abs(v) > 1e-100 else 0.0)


def parse(chart):
    return ElementTree.fromstring(chart.svg)


def axis(svg):
    """Pairs (y, number) of the horizontal grid, read from the drawing alone."""
    ys = [float(line.get("y1")) for line in svg.findall("s:line[@class='grid']", NS)]
    texts = [t.text for t in svg.findall("s:text[@class='tick']", NS) if t.get("text-anchor") == "end"]
    return list(zip(ys, map(float, texts), strict=True))


def to_value(svg, y):
    """The inverse of the chart's scale, by its own outermost grid lines."""
    (y0, v0), (y1, v1) = axis(svg)[0], axis(svg)[-1]
    return v0 + (y - y0) / (y1 - y0) * (v1 - v0)


def points(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]


def test_a_line_goes_through_its_values():
    values = (0.5, 2.0, 1.25, 3.75)
    svg = parse(line_chart("Loss", (1, 2, 3, 4), [Series("global", values)]))
    (path,) = [p for p in svg.findall("s:path", NS) if p.get("class") == "line series-0"]
    drawn = points(path.get("d"))
    assert [to_value(svg, y) for _, y in drawn] == pytest.approx(values, abs=0.02)
    steps = [b[0] - a[0] for a, b in zip(drawn, drawn[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.02) and steps[0] > 0


def test_gaps_and_values_that_are_not_finite_break_the_line_and_are_bridged():
    values = (1.0, 2.0, None, math.nan, 4.0, 5.0, math.inf, 3.0)
    chart = line_chart("Loss", range(1, 9), [Series("global", values)])
    svg = parse(chart)
    lines = [p for p in svg.findall("s:path", NS) if p.get("class") == "line series-0"]
    bridges = [p for p in svg.findall("s:path", NS) if p.get("class") == "line bridge series-0"]
    assert [len(points(p.get("d"))) for p in lines] == [2, 2]
    assert len(bridges) == 2
    markers = svg.findall("s:path[@class='marker series-0']/s:title", NS)
    assert [m.text for m in markers] == [f"global, round {n}: {v}" for n, v in zip((1, 2, 5, 6, 8), (1, 2, 4, 5, 3),
                                                                                   strict=True)]  # fmt: skip
    assert [row[1] for row in chart.rows] == ["1", "2", "–", "–", "4", "5", "–", "3"]


def test_an_axis_fits_the_values_and_stays_within_its_bounds():
    def ends(*values):
        found = [v for _, v in axis(parse(line_chart("Accuracy", (1, 2), [Series("a", values)], bounds=(0.0, 1.0))))]
        return found[0], found[-1]

    assert ends(0.42, 0.58) == (0.4, 0.6)
    assert ends(0.999, 1.0) == (0.999, 1.0)
    assert ends(1.0, 1.0)[1] == 1.0 and ends(0.0, 0.0)[0] == 0.0


def test_slanted_names_stay_inside_the_drawing():
    names = [f"a class with a long name {k}" for k in range(10)]
    for chart in (
        heat_map("Classes", ("a",), [(5,) * 10], class_names=names),
        bar_chart("Samples", names, [Series("samples", (5.0,) * 10)], legend=False),
    ):
        svg = parse(chart)
        _, _, width, height = map(float, svg.get("viewBox").split())
        slanted = svg.findall("s:text[@class='tick slanted']", NS)
        assert len(slanted) == 10
        for text in slanted:
            angle, x, y = map(float, re.findall(r"-?[\d.]+", text.get("transform")))
            length = 7.5 * len(text.text)  # a wide letter at 12 pixels
            begin_x = x - length * math.cos(math.radians(angle))
            begin_y = y - length * math.sin(math.radians(angle))
            assert 0 <= begin_x and x <= width and 0 <= begin_y <= height and y <= height


def test_bars_are_as_high_as_their_values():
    up, down = (100.0, 250.0, None), (400.0, 50.0, 0.0)
    svg = parse(bar_chart("Bytes", (7, 8, 9), [Series("up", up), Series("down", down, 1)]))
    for style, values in enumerate((up, down)):
        bars = svg.findall(f"s:rect[@class='bar series-{style}']", NS)
        tops = [to_value(svg, float(r.get("y"))) for r in bars]
        feet = [to_value(svg, float(r.get("y")) + float(r.get("height"))) for r in bars]
        assert tops == pytest.approx([v for v in values if v is not None], abs=2)
        assert feet == pytest.approx([0.0] * len(feet), abs=2)


def test_heat_map_shades_by_share_of_the_row():
    counts = [(10, 0, 30), (1, 1)]
    chart = heat_map("Classes", ("a", "b"), counts)
    cells = parse(chart).findall("s:rect[@class='cell']", NS)
    strength = [(float(c.get("fill-opacity")) - 0.12) / 0.88 for c in cells]
    # shares of the row, by the largest share of all, which is 30 of 40
    assert strength == pytest.approx([0.25 / 0.75, 1.0, 0.5 / 0.75, 0.5 / 0.75], abs=0.002)
    assert chart.rows == (("a", "40", "10", "0", "30"), ("b", "2", "1", "1", "0"))
    assert chart.columns == ("device", "samples", "class 0", "class 1", "class 2")


def test_every_drawing_is_named_and_described():
    drawn = [
        line_chart("Loss", (1, 2), [Series("global", (2.0, 1.0))]),
        bar_chart("Bytes a round", (1,), [Series("up", (5.0,))]),
        heat_map("Classes", ("a",), [(1, 2)]),
    ]
    for chart in drawn:
        svg = parse(chart)
        title, description = svg.find("s:title", NS), svg.find("s:desc", NS)
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert title.text == chart.title and description.text == chart.description
        assert "style=" not in chart.svg  # the page's policy forbids it
    assert "global: 2 in round 1, 1 in round 2." in drawn[0].description
    assert "a: class 1 most (67 %)." in drawn[2].description


@pytest.mark.parametrize("values", [(), (None, None), (math.nan,)])
def test_nothing_known_draws_nothing(values):
    numbers = tuple(range(1, len(values) + 1))
    for draw in (line_chart, bar_chart):
        chart = draw("Loss", numbers, [Series("a", tuple(values))] if values else [])
        assert chart.svg == "" and chart.description == "No values yet."
    assert heat_map("Classes", (), ()).svg == ""


def test_hostile_names_stay_text():
    name = "</title><script>alert(1)</script>\x00\x1b&\"'"
    for chart in (
        heat_map("Classes", (name,), [(1, 2)]),
        line_chart(name, (1, 2), [Series(name, (1.0, 2.0))]),
        bar_chart(name, (1,), [Series(name, (1.0,))]),
    ):
        svg = parse(chart)
        assert not [e for e in svg.iter() if e.tag.endswith("script")]
        assert any("<script>" in (e.text or "") for e in svg.iter())


@given(st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=30))
def test_any_values_give_well_formed_drawings_inside_their_box(values):
    numbers = range(1, len(values) + 1)
    for draw in (line_chart, bar_chart):
        chart = draw("Loss", numbers, [Series("a", tuple(values))])
        if not chart.svg:
            continue
        svg = parse(chart)
        assert "nan" not in chart.svg.replace("–", "") and "inf" not in chart.svg
        _, _, width, height = map(float, svg.get("viewBox").split())
        for rect in svg.findall("s:rect", NS):
            assert 0 <= float(rect.get("x")) <= width and 0 <= float(rect.get("y")) <= height + 0.01
        for path in (p for p in svg.findall("s:path", NS) if p.get("class").startswith("line")):
            assert all(-0.01 <= x <= width and -0.01 <= y <= height for x, y in points(path.get("d")))


@given(finite, finite)
def test_ticks_enclose_the_range_evenly_with_round_steps(a, b):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high))
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    for first, second in zip(ticks, ticks[1:], strict=False):
        assert second - first == pytest.approx(step, rel=1e-6, abs=1e-9 * max(abs(low), abs(high)))


@given(st.text(max_size=60), st.integers(3, 20))
def test_shortened_text_keeps_both_ends(text, most):
    short = shorten(text, most)
    assert len(short) <= most
    assert short == text or (
        "…" in short and text.startswith(short.split("…")[0]) and text.endswith(short[-1])
    )
