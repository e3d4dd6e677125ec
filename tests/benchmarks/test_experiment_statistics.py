"""Intervals and tests against SciPy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.benchmarks.experiments.statistics import (
    Mean,
    mean_with_interval,
    paired_test,
    t_cdf,
    t_quantile,
)

stats = pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.tiny

VALUES = st.lists(st.integers(0, 1000).map(lambda value: value / 1000), min_size=2, max_size=12).filter(
    lambda values: len(set(values)) > 1
)


@given(st.floats(-50, 50), st.integers(1, 200))
def test_distribution_is_scipys(t, freedom):
    assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-8, abs=1e-9)


@given(st.floats(0.001, 0.999), st.integers(1, 200))
def test_quantile_is_scipys(probability, freedom):
    assert t_quantile(probability, freedom) == pytest.approx(
        stats.t.ppf(probability, freedom), rel=1e-8, abs=1e-9
    )


@given(VALUES)
def test_interval_is_scipys(values):
    found = mean_with_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
    assert (found.mean - found.ci95, found.mean + found.ci95) == pytest.approx((low, high), abs=1e-9)


def test_one_value_has_no_interval():
    assert mean_with_interval([0.5]).as_json() == {"mean": 0.5, "ci95": None, "seeds": 1}
    with pytest.raises(ValueError):
        mean_with_interval([])


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=2, max_size=10))
def test_paired_test_is_scipys(pairs):
    first, second = ([value / 1000 for value in values] for values in zip(*pairs, strict=True))
    found = paired_test(first, second)
    if len({a - b for a, b in pairs}) == 1:
        assert found.t is None and found.p is None
        return
    expected = stats.ttest_rel(first, second)
    assert found.t == pytest.approx(expected.statistic, rel=1e-6)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


def test_values_that_do_not_pair_are_refused():
    with pytest.raises(ValueError):
        paired_test([0.1, 0.2], [0.1])


def test_only_the_mean_shows_a_sign():
    assert Mean(1.25, 0.5, 3).shown("+.2f") == "+1.25 ± 0.50"
    assert Mean(-1.25, None, 1).shown("+.1f") == "-1.2"
    assert str(Mean(0.5, 0.25, 2)) == "0.500 ± 0.250"
