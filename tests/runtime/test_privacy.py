"""Clipping and noise against NumPy and SciPy's distributions, epsilon against the analytic Gaussian mechanism."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edgestill.runtime.device.privacy import (
    clip_rows,
    epsilon,
    epsilon_of_spent,
    noise_in_mean,
    privatise,
    sensitivity,
    spend,
)
from edgestill.runtime.errors import EdgestillError, TrainingError, UsageError

MATRICES = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=8),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
CLIPS = st.floats(1e-3, 1e3)


def delta_of(multiplier: float, epsilon_value: float) -> float:
    """Balle and Wang 2018, theorem 8, for sensitivity 1: written down here a second time, with SciPy alone."""
    shift, spread = 1 / (2 * multiplier), epsilon_value * multiplier
    log_second = epsilon_value + scipy.stats.norm.logcdf(-shift - spread)
    return scipy.stats.norm.cdf(shift - spread) - math.exp(log_second)


def analytic_epsilon(multiplier: float, delta: float) -> float:
    if delta_of(multiplier, 0.0) <= delta:
        return 0.0
    most = 10 * (1 + 1 / multiplier + 1 / multiplier**2)
    return scipy.optimize.brentq(lambda value: delta_of(multiplier, value) - delta, 0.0, most, xtol=1e-12)


@given(MATRICES, CLIPS)
@settings(max_examples=150, deadline=None)
def test_rows_are_clipped_to_the_norm_and_keep_their_direction(rows: np.ndarray, clip: float) -> None:
    clipped = clip_rows(rows, clip)
    for row, result in zip(rows.astype(np.float64), clipped, strict=True):
        norm = np.linalg.norm(row)
        expected = row if norm <= clip else row * (clip / norm)
        np.testing.assert_allclose(result, expected, rtol=1e-12)
        assert np.linalg.norm(result) <= clip * (1 + 1e-12)


@given(MATRICES, CLIPS, st.data())
@settings(max_examples=150, deadline=None)
def test_no_two_data_sets_are_further_apart_than_the_sensitivity(
    rows: np.ndarray, clip: float, data: st.DataObject
) -> None:
    other = data.draw(npst.arrays(np.float32, rows.shape, elements=st.floats(-1e6, 1e6, width=32)))
    distance = np.linalg.norm(clip_rows(rows, clip) - clip_rows(other, clip))
    assert distance <= sensitivity(len(rows), clip) * (1 + 1e-12)


def test_the_sensitivity_is_reached_by_opposite_rows() -> None:
    rows = np.full((9, 4), 100.0)
    distance = np.linalg.norm(clip_rows(rows, 1.5) - clip_rows(-rows, 1.5))
    assert distance == pytest.approx(sensitivity(9, 1.5)) == pytest.approx(9.0)


def test_noise_is_gaussian_with_multiplier_times_sensitivity() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    released = privatise(rows, 2.0, 0.25, np.random.default_rng(1))
    assert released.dtype == np.float32
    noise = released.astype(np.float64) - clip_rows(rows, 2.0)
    deviation = 0.25 * 2 * 2.0 * math.sqrt(200)
    assert scipy.stats.kstest(noise.reshape(-1) / deviation, "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[:-1].reshape(-1), noise[1:].reshape(-1))[0, 1]) < 0.03


def test_without_noise_only_clipping_is_left() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])
    released = privatise(rows, 1.0, 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(released, [[0.6, 0.8], [0, 0], [0.3, 0.4]], rtol=1e-6)


def test_each_release_has_noise_of_its_own() -> None:
    random = np.random.default_rng(3)
    rows = np.zeros((4, 4))
    assert not np.array_equal(privatise(rows, 1, 1, random), privatise(rows, 1, 1, random))


@given(
    st.floats(0.05, 200),
    st.integers(1, 500),
    st.sampled_from([1e-3, 1e-5, 1e-6]),
    st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(
    multiplier: float, rounds: int, delta: float, releases: int
) -> None:
    combined = multiplier / math.sqrt(rounds * releases)
    expected = analytic_epsilon(combined, delta)
    assert epsilon(multiplier, rounds, delta, releases) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_releases_of_different_multipliers_add_up_as_an_accountant_says() -> None:
    import dp_accounting

    spent: float | None = 0.0
    accountant = dp_accounting.pld.PLDAccountant()
    for multiplier, releases in ((2.0, 1), (8.0, 3), (5.0, 2)):
        spent = spend(spent, multiplier, releases)
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), releases)
    assert spent is not None
    ours, bound = epsilon_of_spent(spent, 1e-5), accountant.get_epsilon(1e-5)
    assert ours <= bound * 1.0001 and ours == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize("multiplier", [0.0, 1e-200])
def test_what_left_without_noise_is_never_made_good(multiplier: float) -> None:
    assert spend(0.5, multiplier, 1) is None
    assert spend(spend(0.5, multiplier, 1), 100.0, 1) is None
    assert epsilon(multiplier, 1, 1e-5) == math.inf


@pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (5.0, 10), (20.0, 100)])
def test_general_accountants_agree_that_composition_is_exact(multiplier: float, rounds: int) -> None:
    """They compose round by round and know nothing of multiplier / sqrt(rounds); both give upper bounds."""
    import dp_accounting

    ours = epsilon(multiplier, rounds, 1e-5)
    bounds = []
    for accountant in (dp_accounting.pld.PLDAccountant(), dp_accounting.rdp.RdpAccountant()):
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), rounds)
        bounds.append(accountant.get_epsilon(1e-5))
    tight, loose = bounds
    assert ours <= tight * (1 + 1e-6) and tight == pytest.approx(ours, rel=0.01)
    assert tight <= loose <= 1.5 * ours


@pytest.mark.parametrize("multiplier", [0.7, 3.0])
def test_no_test_tells_two_data_sets_apart_better_than_epsilon_allows(multiplier: float) -> None:
    """The best attack (the likelihood ratio) on sampled releases of opposite data sets stays within (eps, delta)."""
    random, trials, delta = np.random.default_rng(5), 4000, 0.01
    allowed = epsilon(multiplier, 1, delta)
    rows = np.full((3, 2), 50.0)
    direction = clip_rows(rows, 1.0).reshape(-1)
    scores = [
        np.array([privatise(data, 1.0, multiplier, random).reshape(-1) @ direction for _ in range(trials)])
        for data in (rows, -rows)
    ]
    thresholds = np.quantile(np.concatenate(scores), np.linspace(0, 1, 50))
    seen = np.array([[(side > threshold).mean() for threshold in thresholds] for side in scores])
    slack = 4 * math.sqrt(0.25 / trials)
    assert (seen[0] <= math.exp(allowed) * seen[1] + delta + slack * (1 + math.exp(allowed))).all()
    # and the attack is no straw man: with three times the noise claimed, it would have been caught
    claimed = epsilon(3 * multiplier, 1, delta)
    assert (seen[0] > math.exp(claimed) * seen[1] + delta + slack * (1 + math.exp(claimed))).any()


def test_nothing_released_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0, 1e-5) == 0.0
    assert epsilon(0.0, 1, 1e-5) == math.inf
    assert epsilon(1e-3, 1000, 1e-5) > 1e6  # far out of any useful range, and still a number


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_that_bounds_nothing_is_refused(clip: float) -> None:
    with pytest.raises(UsageError, match="clip"):
        privatise(np.ones((2, 2)), clip, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize("multiplier", [-0.1, math.nan])
def test_a_multiplier_out_of_range_is_refused(multiplier: float) -> None:
    with pytest.raises(UsageError, match="multiplier"):
        privatise(np.ones((2, 2)), 1.0, multiplier, np.random.default_rng(0))
    with pytest.raises(UsageError, match="multiplier"):
        epsilon(multiplier, 1, 1e-5)


@pytest.mark.parametrize(("rounds", "delta", "releases"), [(-1, 1e-5, 1), (1, 0, 1), (1, 1, 1), (1, 1e-5, 0)])
def test_counts_and_deltas_out_of_range_are_refused(rounds: int, delta: float, releases: int) -> None:
    with pytest.raises(UsageError):
        epsilon(1.0, rounds, delta, releases)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_not_released(value: float) -> None:
    with pytest.raises(TrainingError, match="NaN or infinity"):
        privatise(np.array([[1.0, value]]), 1.0, 1.0, np.random.default_rng(0))


def test_the_noise_in_the_mean_of_a_round_is_as_long_as_is_said() -> None:
    rows, width, devices, random = 20, 30, 5, np.random.default_rng(3)
    noise = [privatise(np.zeros((rows, width)), 0.5, 2.0, random) for _ in range(devices)]
    found = np.sqrt(np.mean(np.sum(np.mean(noise, axis=0) ** 2, axis=1))) / 0.5
    assert noise_in_mean(2.0, rows, width, devices) == pytest.approx(found, rel=0.1)
    assert noise_in_mean(2.0, rows, width, 4 * devices) == pytest.approx(found / 2, rel=0.1)


def test_only_a_matrix_has_rows() -> None:
    with pytest.raises(UsageError, match=r"shape \[3\]"):
        privatise(np.ones(3), 1.0, 1.0, np.random.default_rng(0))


def test_the_table_of_the_page_is_what_epsilon_returns() -> None:
    page = Path(__file__).parents[2] / "docs" / "privacy.md"
    table = page.read_text(encoding="utf-8").partition("epsilon:begin")[2].partition("epsilon:end")[0]
    rows = [row for line in table.splitlines() if len(row := re.findall(r"[0-9.]+", line)) == 4]
    assert len(rows) == 7
    for multiplier, *cells in rows:
        computed = [f"{epsilon(float(multiplier), rounds, 1e-5):.2f}" for rounds in (1, 10, 100)]
        assert cells == computed


def test_a_missing_accountant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(EdgestillError, match="dp-accounting") as caught:
        epsilon(1.0, 1, 1e-5)
    assert "pip install" in (caught.value.hint or "")
