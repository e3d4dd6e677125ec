"""Who gets which images: disjoint, drawn by the seed, tests like the device's classes or uniform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.benchmarks.experiments.devices import deal_device, divide
from edgestill.benchmarks.experiments.grid import Options
from edgestill.benchmarks.experiments.protocol import base_settings, epochs_for
from edgestill.benchmarks.experiments.sources import find_sources, load_data
from edgestill.runtime.data.dataset import Dataset, Splits
from edgestill.runtime.data.partition import dirichlet_partition, k_shot_partition, user_partition
from edgestill.runtime.errors import UsageError

CLASSES = 10


def splits_of(each_train: int, each_test: int) -> Splits:
    """Images that carry their own number, so that a sample can be recognised wherever it went."""
    total = CLASSES * (each_train + each_test)
    images = np.arange(total, dtype=np.int64).view(np.uint8).reshape(total, 1, 1, 8)
    labels = np.random.default_rng(0).permutation(np.arange(total) % CLASSES)
    order = np.argsort(labels, kind="stable").reshape(CLASSES, -1)
    train, test = np.sort(order[:, :each_train].ravel()), np.sort(order[:, each_train:].ravel())
    return Splits(*(Dataset(images[part], labels[part], ()) for part in (train, test)))


SPLITS = splits_of(300, 100)
SETTINGS = {
    "division": {"teacher": 1500, "validation": 500},
    "tests": 300,
    "validation_tests": 100,
    "gamma": 0.5,
    "samples": 200,
    "score_on": "test",
    "seed": 0,
}


def numbers(dataset: Dataset) -> set[int]:
    return set(dataset.images.reshape(len(dataset), 8).copy().view(np.int64).ravel().tolist())


def test_division_is_disjoint_and_of_every_class_alike():
    division = divide(SPLITS.train.labels, 1500, 500)
    parts = (division.teacher, division.validation, division.stock)
    assert sorted(np.concatenate(parts).tolist()) == list(range(3000))
    for part, each in zip(parts, (150, 50, 100), strict=True):
        assert np.bincount(SPLITS.train.labels[part]).tolist() == [each] * CLASSES


def test_too_few_images_for_teacher_and_validation_are_refused():
    with pytest.raises(UsageError, match="3000 training images: too few for 2500 of the teacher, 500"):
        divide(SPLITS.train.labels, 2500, 500)
    assert len(divide(SPLITS.train.labels, 2500, 490).stock) == 10


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    own=st.one_of(
        st.fixed_dictionaries(
            {"gamma": st.sampled_from([0.25, 1.0, 5000.0]), "samples": st.integers(20, 400)}
        ),
        st.fixed_dictionaries({"ways": st.just(2), "samples": st.sampled_from([20, 100])}),
    ),
)
def test_a_device_meets_no_image_twice(seed, own):
    given_settings = {**SETTINGS, "seed": seed, **own}
    division = divide(SPLITS.train.labels, **SETTINGS["division"])
    scored = {
        name: deal_device(SPLITS, {**given_settings, "score_on": name}) for name in ("test", "validation")
    }
    private = scored["test"].private
    assert private.tolist() == scored["validation"].private.tolist()
    assert len(set(private.tolist())) == own["samples"]
    assert set(private.tolist()) <= set(division.stock.tolist())
    held_out = division.validation
    validation = numbers(Dataset(SPLITS.train.images[held_out], SPLITS.train.labels[held_out], ()))
    for part in (scored["test"].priv, scored["test"].uni):
        assert numbers(part) <= numbers(SPLITS.test) and len(numbers(part)) == len(part)
    for part in (scored["validation"].priv, scored["validation"].uni):
        assert numbers(part) <= validation and len(numbers(part)) == len(part)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_tests_are_like_the_device_or_uniform(seed):
    device = deal_device(SPLITS, {**SETTINGS, "seed": seed})
    own = np.bincount(SPLITS.train.labels[device.private], minlength=CLASSES)
    priv = np.bincount(device.priv.labels, minlength=CLASSES)
    assert np.abs(priv / priv.sum() - own / own.sum()).max() < 1 / len(device.priv) + 1e-9
    assert np.bincount(device.uni.labels, minlength=CLASSES).tolist() == [30] * CLASSES


def test_same_seed_same_device_and_more_samples_hold_the_fewer():
    few, again, more, other = (
        deal_device(SPLITS, {**SETTINGS, **own}).private
        for own in ({"samples": 50}, {"samples": 50}, {"samples": 200}, {"samples": 50, "seed": 1})
    )
    assert few.tolist() == again.tolist() != other.tolist()
    assert set(few.tolist()) < set(more.tolist())


def test_gamma_makes_classes_more_alike():
    def largest_share(gamma):
        shares = []
        for seed in range(20):
            device = deal_device(SPLITS, {**SETTINGS, "gamma": gamma, "samples": 100, "seed": seed})
            shares.append(np.bincount(SPLITS.train.labels[device.private]).max() / 100)
        return np.mean(shares)

    assert largest_share(0.25) > largest_share(1.0) > largest_share(5000.0)


@pytest.mark.parametrize("samples", [0, 11, 100])
def test_more_samples_than_there_are_is_refused(samples):
    with pytest.raises(UsageError, match="samples"):
        dirichlet_partition(np.arange(20) % 2, 2, 1.0, 0, samples)


@given(
    seed=st.integers(0, 2**31), devices=st.integers(1, 5), shots=st.integers(1, 10), ways=st.integers(1, 4)
)
def test_k_shot_gives_each_device_as_many_of_each_class(seed, devices, shots, ways):
    labels = np.arange(500) % 5
    shares = k_shot_partition(labels, devices, shots, ways, seed)
    assert len(shares) == devices
    together = np.concatenate(shares)
    assert len(np.unique(together)) == len(together) == devices * shots * ways
    for share in shares:
        counts = np.bincount(labels[share], minlength=5)
        assert sorted(counts.tolist()) == [0] * (5 - ways) + [shots] * ways
    again = k_shot_partition(labels, devices, shots, ways, seed)
    assert [share.tolist() for share in shares] == [share.tolist() for share in again]


@pytest.mark.parametrize(
    ("devices", "shots", "ways"), [(0, 1, 1), (1, 0, 1), (1, 1, 6), (11, 10, 5), (1, 101, 1)]
)
def test_k_shot_that_cannot_be_is_refused(devices, shots, ways):
    with pytest.raises(UsageError):
        k_shot_partition(np.arange(500) % 5, devices, shots, ways, 0)


@given(st.lists(st.sampled_from(["ann", "bob", "cy"]), min_size=1, max_size=40))
def test_users_keep_their_own_samples(users):
    expected = [[index for index, user in enumerate(users) if user == name] for name in sorted(set(users))]
    assert [share.tolist() for share in user_partition(np.array(users))] == expected


def test_the_shipped_images_suffice_for_quick_runs():
    splits, base = load_data("cifar10-mini"), base_settings(Options(quick=True))
    device = deal_device(splits, {**base, "gamma": 1.0, "samples": 300, "seed": 0, "score_on": "test"})
    assert len(device.private) == 300 and len(device.uni) == base["tests"]


def test_data_are_named_by_what_they_hold(tmp_path):
    splits = load_data("cifar10-mini")
    arrays = {"x_train": splits.train.images, "y_train": splits.train.labels,
              "x_test": splits.test.images[:50], "y_test": splits.test.labels[:50]}  # fmt: skip
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        np.savez(tmp_path / folder / "cifar10.npz", **arrays)
    names = [find_sources(str(tmp_path / folder), None) for folder in ("a", "b")]
    assert names[0].data_name == names[1].data_name != "cifar10-mini"
    assert names[0].data_name.startswith("sha256:") and names[0].transfer_name == "cifar100-transfer-mini"
    with pytest.raises(UsageError, match="holds no CIFAR-10"):
        find_sources(str(tmp_path), None)


def test_few_images_get_as_many_epochs_as_make_enough_steps():
    assert epochs_for(2000, Options()) == 12  # 63 steps each
    assert epochs_for(500, Options()) == 25  # 16 steps each: 400
    assert epochs_for(250, Options()) == 50
    assert epochs_for(100, Options(quick=True)) == base_settings(Options(quick=True))["epochs"]
