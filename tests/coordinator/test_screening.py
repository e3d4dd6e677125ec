"""Screening against cosines from SciPy, and against the attacks of the simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.coordinator.distillation.aggregation import Upload, aggregate, left_out
from edgestill.coordinator.distillation.screening import FEWEST, agreement, odd_ones
from edgestill.coordinator.task.task import RULES, Aggregation
from edgestill.simulation.attack import spoil
from edgestill.simulation.settings import ATTACKS

SCREEN = Aggregation("median", clip="median", screen=True)


def honest_uploads(count: int, seed: int, spread: float = 1.0, rows: int = 60) -> list[Upload]:
    """What devices that learnt the same thing say of the same samples, each with an error of its own."""
    rng = np.random.default_rng(seed)
    common = {"latents": rng.normal(size=(rows, 8)), "logits": rng.normal(size=(rows, 5))}
    return [
        Upload(
            f"d-{index:02}",
            {
                name: (value + spread * rng.normal(size=value.shape) + 2).astype(np.float32)
                for name, value in common.items()
            },
            10,
        )
        for index in range(count)
    ]


def poisoned(uploads: list[Upload], attack: str, hostile: int) -> list[Upload]:
    return [
        Upload(one.device, spoil(one.arrays, attack, 1000 + index), 10) if index < hostile else one
        for index, one in enumerate(uploads)
    ]


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 4))
@settings(max_examples=50)
def test_agreement_is_the_cosine_with_the_median(seed: int, uploads: int, parts: int) -> None:
    values = np.random.default_rng(seed).normal(size=(uploads, parts * 3, 2))
    whole = values.reshape(uploads, -1)
    expected = [1 - scipy.spatial.distance.cosine(one, np.median(whole, axis=0)) for one in whole]
    blocks = np.split(values, parts, axis=1)
    np.testing.assert_allclose(agreement(blocks), expected, rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=FEWEST, max_size=30))
def test_odd_ones_lie_far_below_the_median_of_scipy_and_are_a_minority(cosines: list[float]) -> None:
    spread = scipy.stats.median_abs_deviation(cosines, scale="normal")
    odd = odd_ones(np.array(cosines))
    below = np.median(cosines) - np.array(cosines)
    assert not odd[below <= 0.1].any() and not odd[below < 2.99 * spread].any()
    assert odd[(below > 0.1001) & (below > 3.01 * spread)].all()
    assert odd.sum() < len(cosines) / 2


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_hostile_uploads_are_left_out_and_the_rest_is_aggregated(attack: str, rule: str) -> None:
    uploads = honest_uploads(20, seed=3)
    spec = Aggregation(rule, clip="median", screen=True)
    spoiled = poisoned(uploads, attack, 4)
    assert left_out(spoiled, spec) == ("d-00", "d-01", "d-02", "d-03")
    labels = np.arange(60) % 5 if rule == "class_mean" else None
    # clipped together with the hostile ones, so only nearly what it is without them
    alone = aggregate(uploads[4:], Aggregation(rule), None, labels)
    together = aggregate(spoiled, Aggregation(rule, screen=True), None, labels)
    for name, value in alone.items():
        np.testing.assert_array_equal(together[name], value)


@given(st.integers(0, 2**32 - 1), st.integers(FEWEST, 30), st.floats(0.1, 5))
@settings(max_examples=40)
def test_any_order_gives_the_same_bytes(seed: int, count: int, spread: float) -> None:
    uploads = poisoned(honest_uploads(count, seed, spread, rows=8), "shuffle", count // 5)
    shuffled = [uploads[index] for index in np.random.default_rng(seed).permutation(count)]
    assert left_out(uploads, SCREEN) == left_out(shuffled, SCREEN)
    first, second = aggregate(uploads, SCREEN), aggregate(shuffled, SCREEN)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_devices_that_say_the_same_are_all_kept() -> None:
    (one,) = honest_uploads(1, 0)
    uploads = [Upload(f"d-{index}", one.arrays, 1) for index in range(6)]
    assert left_out(uploads, SCREEN) == ()


def test_of_three_nobody_is_odd() -> None:
    assert left_out(poisoned(honest_uploads(FEWEST - 1, 1), "scale", 1), SCREEN) == ()


def test_nobody_is_left_out_unless_asked() -> None:
    assert left_out(poisoned(honest_uploads(10, 1), "scale", 2), Aggregation("median")) == ()


def test_parameters_are_compared_as_updates() -> None:
    """The parameters themselves are nearly alike in all devices, hostile or not."""
    rng = np.random.default_rng(5)
    before = {"a.weight": rng.normal(size=(6, 4)).astype(np.float32) * 10, "b": np.ones(3, np.float32)}
    update = {name: rng.normal(size=value.shape) for name, value in before.items()}
    uploads = [
        Upload(
            f"d-{index}",
            {
                name: (
                    value + (-1 if index < 2 else 1) * update[name] + 0.3 * rng.normal(size=value.shape)
                ).astype(np.float32)
                for name, value in before.items()
            },
            1,
        )
        for index in range(10)
    ]
    assert left_out(uploads, SCREEN, before) == ("d-0", "d-1")
    assert left_out(uploads, SCREEN) == (), "nobody knows what they started from"
