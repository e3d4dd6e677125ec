"""One data set dealt out to the devices of a federation, with what each of them is tested on.

Every device has private training samples of a class distribution of its own, T_priv: test samples of that same
distribution, and T_uni: test samples with all classes alike. Test samples are nobody's training samples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.data.partition import dirichlet_partition, user_partition
from edgestill.runtime.errors import DataError, UsageError
from edgestill.runtime.randomness import HELD_OUT, TESTS, USERS, permutation

TEST_SAMPLES = 200


@dataclass(frozen=True)
class DeviceData:
    """A device's samples as indices, so that thousands of devices share one array of images.

    `train_indices` are into `pool`, the others into `held_out`; all sorted.
    """

    pool: Dataset
    held_out: Dataset
    train_indices: np.ndarray
    t_priv_indices: np.ndarray
    t_uni_indices: np.ndarray

    @property
    def train(self) -> Dataset:
        return self.pool.select(self.train_indices)

    @property
    def t_priv(self) -> Dataset:
        return self.held_out.select(self.t_priv_indices)

    @property
    def t_uni(self) -> Dataset:
        return self.held_out.select(self.t_uni_indices)


def deal(
    dataset: Dataset,
    devices: int,
    gamma: float | None,
    seed: int,
    *,
    held_out: Dataset | None = None,
    test_share: float = 0.2,
    test_samples: int = TEST_SAMPLES,
) -> list[DeviceData]:
    """Deals `dataset` out to devices by Dirichlet class distributions of concentration `gamma`, or with None by user:
    each device has the samples of one of the users that the data name, drawn by the seed.

    Tests come from `held_out`; without it a share `test_share` of every class of `dataset` is held out first. Same
    arguments, same data. Errors: UsageError, DataError.
    """
    if held_out is not None:
        kept, tests, source = np.arange(len(dataset)), np.arange(len(held_out)), held_out
    else:
        kept, tests = hold_out(dataset.labels, test_share, seed)
        source = dataset
    if len(tests) == 0:
        raise DataError("no samples are held out for tests", "give a test split, or a larger share")
    dealt = []
    if gamma is None:
        shares = _users_shares(dataset, kept, devices, seed)
    else:
        shares = dirichlet_partition(dataset.labels[kept], devices, gamma, seed)
    for device, share in enumerate(shares):
        train = kept[share]
        t_priv, t_uni = draw_tests(dataset.labels[train], source.labels[tests], seed, test_samples, device)
        dealt.append(DeviceData(dataset, source, train, tests[t_priv], tests[t_uni]))
    return dealt


def share_of(dataset: Dataset, number: int, devices: int, gamma: float, seed: int) -> Dataset:
    """The training samples of device `number`, counted from 1, of `devices`: those that `deal` gives it where the tests
    come from a set of their own. Errors: UsageError."""
    if not 1 <= number <= devices:
        raise UsageError(f"share {number}/{devices}", f"give 1/{devices} to {devices}/{devices}")
    return dataset.select(dirichlet_partition(dataset.labels, devices, gamma, seed)[number - 1])


def parse_share(text: str) -> tuple[int, int]:
    """`3/10` as (3, 10): the third of ten devices. Errors: UsageError."""
    found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    if found is None:
        raise UsageError(f"--share {text} is not K/N", "give device K of N devices, such as 3/10")
    if not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(
            f"--share {text}: there is no device {int(found[1])} among {int(found[2])}",
            f"give 1/{int(found[2])} to {int(found[2])}/{int(found[2])}, or more devices",
        )
    return int(found[1]), int(found[2])


def draw_tests(
    train_labels: np.ndarray, test_labels: np.ndarray, seed: int, samples: int = TEST_SAMPLES, device: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of T_priv and T_uni, sorted, among the held-out samples with `test_labels`.

    T_priv has the class distribution of `train_labels`, T_uni every class equally often, as exactly as whole samples
    allow. Each device, by its number from 0, has a draw of its own. No sample is twice in a test: where a class is
    scarce a test is smaller than `samples`, its distribution the same. A class without held-out samples is left out.
    Errors: UsageError; DataError where nothing is left.
    """
    if samples < 1:
        raise UsageError(f"{samples} test samples", "give one or more")
    classes = int(max(train_labels.max(initial=-1), test_labels.max(initial=-1))) + 1
    stock = np.bincount(test_labels, minlength=classes)
    orders = [
        np.flatnonzero(test_labels == label)[
            permutation(seed, TESTS, device * classes + label, int(stock[label]))
        ]
        for label in range(classes)
    ]
    tests = []
    for wish in (np.bincount(train_labels, minlength=classes), np.ones(classes, np.int64)):
        counts = _allot(wish, stock, samples)
        chosen = [order[:count] for order, count in zip(orders, counts, strict=True)]
        tests.append(np.sort(np.concatenate(chosen)))
    return tests[0], tests[1]


def _allot(wish: np.ndarray, stock: np.ndarray, samples: int) -> np.ndarray:
    """How many samples of each class: at most `samples`, in the proportions of `wish`, within `stock`.

    In whole numbers throughout, so that no rounding takes a sample that is not there.
    """
    wish = np.where(stock > 0, wish, 0)
    total_wish = int(wish.sum())
    if total_wish == 0:
        raise DataError("no held-out sample is of the device's classes", "hold out more samples for tests")
    wished = wish > 0
    total = min(samples, int((stock[wished] * total_wish // wish[wished]).min()))
    counts = total * wish // total_wish
    remainders = total * wish % total_wish
    # largest remainders first, the lower class where they are equal
    for label in np.argsort(-remainders, kind="stable")[: total - int(counts.sum())]:
        counts[label] += 1
    return counts


def _users_shares(dataset: Dataset, kept: np.ndarray, devices: int, seed: int) -> list[np.ndarray]:
    if dataset.users is None:
        raise DataError(
            "the data do not name their users",
            "give an .npz with `users_train`, or `users`: one name a sample",
        )
    shares = user_partition(dataset.users[kept])
    if not 1 <= devices <= len(shares):
        raise UsageError(
            f"{devices} devices for {len(shares)} users", "give between one and as many as users"
        )
    return [shares[index] for index in np.sort(permutation(seed, USERS, 0, len(shares))[:devices])]


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices kept for training, indices held out), sorted; the share is of every class. Errors: UsageError."""
    if not 0 < share < 1:
        raise UsageError(f"a share of {share} held out", "give more than 0 and less than 1")
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        order = permutation(seed, HELD_OUT, int(label), len(of_class))
        held[of_class[order[: round(share * len(of_class))]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
