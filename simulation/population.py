"""Who is there, who drops out, who is slow and who is hostile: seeded draws, each at an address of its own.

A draw depends on the seed, its kind, the round and the device's index alone, so that neither the number of workers
nor the order in which trainings end can change it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from edgestill.runtime.randomness import permutation, raw_numbers
from edgestill.simulation.settings import SimulationSettings

# Streams of one seed; those of edgestill.runtime.randomness end far below.
AVAILABLE, DROPPED, ORDER_OF_ASKING, DURATION, POISONER, ATTACK = range(100, 106)
SLOWNESS = 0.5
"""Standard deviation of the logarithm of a device's duration: one in 40 takes 2.7 times the median."""
MEDIAN_SHARE_OF_DEADLINE = 0.2


@dataclass(frozen=True)
class Turn:
    """What one device does in one round, in virtual seconds after the round's opening."""

    device: int
    drops_out: bool
    uploads_after_s: float


def uniform(seed: int, stream: int, round_number: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), one a device."""
    return (raw_numbers(seed, stream, round_number, 0, count) >> np.uint64(11)) * 2.0**-53


def turns(settings: SimulationSettings, round_number: int) -> list[Turn]:
    """The devices that are there in a round, at least one, in the order in which they ask for work."""
    count, seed = settings.devices, settings.seed
    available = uniform(seed, AVAILABLE, round_number, count) < settings.availability
    dropped = uniform(seed, DROPPED, round_number, count) < settings.dropout
    slowness = uniform(seed, DURATION, round_number, count)
    median_s = MEDIAN_SHARE_OF_DEADLINE * settings.deadline_s
    order = permutation(seed, ORDER_OF_ASKING, round_number, count)
    if not available.any():
        available[order[0]] = True
    return [
        Turn(int(device), bool(dropped[device]), median_s * _lognormal(float(slowness[device])))
        for device in order
        if available[device]
    ]


def poisoners(settings: SimulationSettings) -> frozenset[int]:
    """The hostile devices: the same ones in every round, exactly their share rounded."""
    if settings.poison is None:
        return frozenset()
    order = permutation(settings.seed, POISONER, 0, settings.devices)
    return frozenset(map(int, order[: round(settings.poison.share * settings.devices)]))


def _lognormal(share: float) -> float:
    # clipped: no device is infinitely fast or slow
    return math.exp(SLOWNESS * NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6)))
