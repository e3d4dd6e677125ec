"""Data dealt out to devices: nothing lost, nothing shared, tests drawn as said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.data.shares import deal, draw_tests, parse_share, share_of
from edgestill.runtime.errors import DataError, UsageError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(lambda values: np.array(values, np.int64))


def numbered(labels: np.ndarray) -> Dataset:
    """Every image is its own number, by which a sample is known wherever it goes."""
    return Dataset(np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1), labels, ("a", "b"))


def numbers(dataset: Dataset) -> list[int]:
    return dataset.images.reshape(-1).astype(int).tolist()


def balanced(samples: int, classes: int = 6) -> Dataset:
    return numbered(np.arange(samples) % classes)


@given(LABELS, st.integers(1, 9), st.sampled_from([0.1, 1.0, 100.0]), st.integers(0, 2**40))
def test_every_sample_goes_to_one_device_and_none_is_tested_on(
    labels: np.ndarray, devices: int, gamma: float, seed: int
) -> None:
    dataset = numbered(labels)
    kept = sum(count - round(0.3 * count) for count in np.bincount(labels))
    if devices > kept or kept == len(labels):
        with pytest.raises((UsageError, DataError)):
            deal(dataset, devices, gamma, seed, test_share=0.3)
        return
    try:
        dealt = deal(dataset, devices, gamma, seed, test_share=0.3)
    except DataError as error:  # a device of classes that are too rare to be held out
        assert "no held-out sample is of the device's classes" in error.message
        return
    train = [number for device in dealt for number in numbers(device.train)]
    assert len(train) == len(set(train)) == kept
    tests = {n for device in dealt for n in (*numbers(device.t_priv), *numbers(device.t_uni))}
    assert not tests & set(train)
    for device in dealt:
        for part in (device.train, device.t_priv, device.t_uni):
            assert part.labels.tolist() == labels[numbers(part)].tolist() and len(part)


@given(st.lists(st.integers(0, 7), min_size=4, max_size=60), st.integers(1, 8), st.integers(0, 2**40))
def test_each_device_has_the_samples_of_one_user(owners: list[int], devices: int, seed: int) -> None:
    dataset = replace(balanced(len(owners)), users=np.array([f"user {owner}" for owner in owners]))
    tests = balanced(30)
    if devices > len(set(owners)):
        with pytest.raises(UsageError, match=f"{devices} devices for {len(set(owners))} users"):
            deal(dataset, devices, None, seed, held_out=tests)
        return
    dealt = deal(dataset, devices, None, seed, held_out=tests)
    chosen = [{owners[number] for number in numbers(device.train)} for device in dealt]
    assert all(len(names) == 1 for names in chosen) and len(set.union(*chosen)) == devices
    for device, (owner,) in zip(dealt, chosen, strict=True):
        assert len(device.train) == owners.count(owner)
    with pytest.raises(DataError, match="do not name their users"):
        deal(balanced(12), 2, None, seed, held_out=tests)


@given(LABELS, LABELS, st.integers(1, 60), st.integers(0, 2**40))
def test_tests_have_the_classes_that_they_should(
    train: np.ndarray, held_out: np.ndarray, samples: int, seed: int
) -> None:
    stock = np.bincount(held_out, minlength=6)
    wishes = np.where(stock > 0, np.bincount(train, minlength=6), 0)
    if not wishes.any():
        with pytest.raises(DataError, match="held-out"):
            draw_tests(train, held_out, seed, samples)
        return
    for indices, wish in zip(draw_tests(train, held_out, seed, samples), (wishes, stock > 0), strict=True):
        assert len(set(indices.tolist())) == len(indices) <= samples and sorted(indices) == indices.tolist()
        counts = np.bincount(held_out[indices], minlength=6)
        share = wish / wish.sum()
        # as near to the distribution as whole samples come
        assert np.all(np.abs(counts - len(indices) * share) < 1)
        # no larger test of this distribution fits the stock
        assert len(indices) == samples or np.any((len(indices) + 1) * share > stock)


def test_tests_follow_the_device() -> None:
    dealt = deal(balanced(1200), 8, 0.25, 5, test_samples=50)
    wide = deal(balanced(1200), 8, 5000.0, 5, test_samples=50)
    for device in dealt:
        mine, theirs = (np.bincount(part.labels, minlength=6) for part in (device.train, device.t_priv))
        np.testing.assert_allclose(theirs / theirs.sum(), mine / mine.sum(), atol=1 / theirs.sum())
        assert np.ptp(np.bincount(device.t_uni.labels, minlength=6)) <= 1
    assert {len(device.t_uni) for device in dealt} == {50}
    spread = [np.mean([d.t_priv.labels.std() for d in devices]) for devices in (dealt, wide)]
    assert spread[0] < spread[1]


def test_the_seed_decides_everything() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [numbers(p) for d in deal(balanced(300), 4, 0.5, seed) for p in (d.train, d.t_priv, d.t_uni)]

    assert drawn(1) == drawn(1)
    assert all(first != second for first, second in zip(drawn(1), drawn(2), strict=True))


def test_a_share_by_its_number_is_that_of_the_deal() -> None:
    dataset, tests = balanced(300), numbered(np.arange(90) % 6)
    dealt = deal(dataset, 7, 0.5, 3, held_out=tests)
    assert (
        len(
            {
                tuple(numbers(device.t_uni))
                for device in deal(dataset, 7, 0.5, 3, held_out=tests, test_samples=30)
            }
        )
        == 7
    )
    for number, device in enumerate(dealt, 1):
        share = share_of(dataset, number, 7, 0.5, 3)
        assert numbers(share) == numbers(device.train) and share.class_names == dataset.class_names
        t_priv, t_uni = draw_tests(share.labels, tests.labels, 3, device=number - 1)
        assert numbers(device.t_priv) == numbers(tests.select(t_priv))
        assert numbers(device.t_uni) == numbers(tests.select(t_uni))
    for number in (0, 8):
        with pytest.raises(UsageError, match=f"share {number}/7"):
            share_of(dataset, number, 7, 0.5, 3)


def test_shares_are_counted_from_one() -> None:
    assert parse_share("1/1") == (1, 1) and parse_share("3/10") == (3, 10)
    for text in ("0/10", "11/10", "3", "3/", "a/b", "-1/3", "1/0", "3/10 ", "٣/10"):
        with pytest.raises(UsageError, match="share"):
            parse_share(text)


def test_what_makes_no_sense_is_refused() -> None:
    dataset = balanced(30)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="share of .* held out"):
            deal(dataset, 2, 0.5, 0, test_share=share)
    with pytest.raises(UsageError, match="0 test samples"):
        deal(dataset, 2, 0.5, 0, test_samples=0)
    with pytest.raises(DataError, match="no samples are held out"):
        deal(dataset, 2, 0.5, 0, test_share=0.01)
