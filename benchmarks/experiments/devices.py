"""Who gets which images in the experiments on one device.

Four sets are disjoint: the teacher's training images, the stock of private images, the validation images (all three
from the training split) and the test images. Choices are made on validation images alone; a run is scored on
validation or on test images, never on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgestill.runtime.data.dataset import Dataset, Splits
from edgestill.runtime.data.partition import dirichlet_partition, k_shot_partition
from edgestill.runtime.data.shares import draw_tests
from edgestill.runtime.errors import UsageError
from edgestill.runtime.randomness import HELD_OUT, permutation


@dataclass(frozen=True)
class Division:
    """Indices into the training split, sorted and disjoint."""

    teacher: np.ndarray
    validation: np.ndarray
    stock: np.ndarray


def divide(labels: np.ndarray, teacher: int, validation: int) -> Division:
    """Divides a training split, every class in the same proportions; what is left is the stock of private images.

    Always the same draw: seeds of runs decide which of the stock a device has, not what the teacher has seen.
    Errors: UsageError where no image of some class is left for the stock.
    """
    classes = int(labels.max()) + 1
    least = (teacher + validation) // classes + 1
    if np.bincount(labels).min() < least:
        raise UsageError(
            f"{len(labels)} training images: too few for {teacher} of the teacher, {validation} of validation and "
            f"private ones; each of the {classes} classes needs {least} or more",
            "give --data with the whole of CIFAR-10, or --quick, which needs fewer",
        )
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in range(classes):
        of_class = np.flatnonzero(labels == label)
        order = of_class[permutation(0, HELD_OUT, label, len(of_class))]
        cuts = [teacher // classes, (teacher + validation) // classes]
        for part, indices in zip(parts, np.split(order, cuts), strict=True):
            part.append(indices)
    return Division(*(np.sort(np.concatenate(part)) for part in parts))


@dataclass(frozen=True)
class Device:
    """One device's data: `private` are indices into the training split, sorted; `priv` and `uni` score its student."""

    private: np.ndarray
    priv: Dataset
    uni: Dataset


def deal_device(splits: Splits, settings: Mapping[str, Any]) -> Device:
    """The private images of `settings` and the images that score the student, validation or test by `score_on`.

    The class distribution is drawn from a Dirichlet of concentration `gamma`, or with `ways` the device has
    `samples` / `ways` images of each of so many classes. Errors: UsageError where the stock is too small.
    """
    labels, division = splits.train.labels, divide(splits.train.labels, **settings["division"])
    stock, seed, samples = labels[division.stock], settings["seed"], settings["samples"]
    if "ways" in settings:
        ways = settings["ways"]
        share = k_shot_partition(stock, 1, samples // ways, ways, seed)[0]
    else:
        share = dirichlet_partition(stock, 1, settings["gamma"], seed, samples)[0]
    private = division.stock[share]
    if settings["score_on"] == "test":
        source, count = splits.test, settings["tests"]
    else:
        source, count = splits.train.select(division.validation), settings["validation_tests"]
    priv, uni = draw_tests(labels[private], source.labels, seed, count)
    return Device(private, source.select(priv), source.select(uni))
