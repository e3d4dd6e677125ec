"""Deals a dataset out to devices whose class distributions differ."""

from __future__ import annotations

import numpy as np

from edgestill.runtime.errors import UsageError
from edgestill.runtime.randomness import PARTITION


def dirichlet_partition(
    labels: np.ndarray, devices: int, gamma: float, seed: int, samples: int | None = None
) -> list[np.ndarray]:
    """Indices of each device's samples, sorted; every sample goes to one device, sizes differ by at most one.

    With `samples` each device gets so many and the rest goes to nobody; fewer of them are a part of more of them.

    Each device draws its class distribution from a symmetric Dirichlet with concentration `gamma` a class
    (0.25: a few classes, 5000: all alike) and then its samples from that. The devices take turns, and a class
    that has run out is left out of the draw, so that the last device does not get all the leftovers.
    Errors: UsageError. Source: Hsu, Qi, Brown, Measuring the effects of non-identical data (2019).
    """
    if not 1 <= devices <= len(labels):
        raise UsageError(
            f"{devices} devices for {len(labels)} samples", "give between one and as many as samples"
        )
    if not 0 < gamma < float("inf"):
        raise UsageError(f"gamma {gamma} is not a positive number")
    total = len(labels) if samples is None else devices * samples
    if not devices <= total <= len(labels):
        raise UsageError(
            f"{samples} samples for each of {devices} devices, of {len(labels)} samples",
            f"give between 1 and {len(labels) // devices} samples",
        )
    random = np.random.Generator(np.random.Philox(key=[seed, PARTITION]))
    classes = int(labels.max()) + 1
    stock = [list(random.permutation(np.flatnonzero(labels == label))) for label in range(classes)]
    # a floor keeps a distribution usable when all classes that it favours have run out
    wishes = random.dirichlet(np.full(classes, gamma), size=devices) + 1e-9
    available = np.array([bool(indices) for indices in stock])
    shares = [np.empty(0)] * devices
    taken: list[list[int]] = [[] for _ in range(devices)]
    stale = [True] * devices
    for turn, draw in enumerate(random.random(total)):
        device = turn % devices
        if stale[device]:
            shares[device] = np.cumsum(wishes[device] * available)
            stale[device] = False
        cumulative = shares[device]
        label = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
        taken[device].append(stock[label].pop())
        if not stock[label]:
            available[label] = False
            stale = [True] * devices
    return [np.sort(np.array(indices, dtype=np.int64)) for indices in taken]


def k_shot_partition(labels: np.ndarray, devices: int, shots: int, ways: int, seed: int) -> list[np.ndarray]:
    """Indices of each device's samples, sorted: `shots` of each of `ways` classes it draws, no sample twice.

    A class that can no longer give `shots` samples is not drawn. Errors: UsageError where too few classes are left.
    """
    classes = int(labels.max(initial=0)) + 1
    if devices < 1 or shots < 1 or not 1 <= ways <= classes:
        raise UsageError(
            f"{devices} devices, {shots} shots of {ways} classes",
            f"give 1 or more, and at most {classes} classes",
        )
    random = np.random.Generator(np.random.Philox(key=[seed, PARTITION]))
    stock = [list(random.permutation(np.flatnonzero(labels == label))) for label in range(classes)]
    shares = []
    for device in range(devices):
        able = [label for label in range(classes) if len(stock[label]) >= shots]
        if len(able) < ways:
            raise UsageError(
                f"device {device + 1} of {devices}: {len(able)} classes have {shots} samples left, {ways} are needed",
                "give fewer devices, shots or classes a device",
            )
        drawn = random.choice(able, ways, replace=False)
        share = [index for label in drawn for index in (stock[label].pop() for _ in range(shots))]
        shares.append(np.sort(np.array(share, dtype=np.int64)))
    return shares


def user_partition(users: np.ndarray) -> list[np.ndarray]:
    """Indices of each user's samples, one device a user in the order of their names; `users` names each sample's."""
    return [np.flatnonzero(users == name) for name in np.unique(users)]
