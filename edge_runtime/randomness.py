"""Random numbers by address: the draw of any epoch and step without replaying the ones before.

Built on the raw 64-bit output of Philox, which NumPy keeps the same from version to version, unlike its
distributions. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import math

import numpy as np

ORDER, TRANSFER_ORDER, AUGMENTATION, SUBSET, PARTITION, HELD_OUT, TESTS, NEGATIVES, USERS, NOISE = range(10)
"""Streams that one seed gives rise to; two of them never share a number."""


def raw_numbers(seed: int, stream: int, epoch: int, step: int, count: int) -> np.ndarray:
    """`count` uniform uint64 numbers at one address."""
    # the generator counts in the low words of the counter, so addresses in the high words never overlap
    return np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, step]).random_raw(count)


def permutation(seed: int, stream: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of 0 … count−1."""
    return np.argsort(raw_numbers(seed, stream, epoch, 0, count), kind="stable")


def noise(seed: int, step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `noise.N` of a training step: float32 numbers at least 0 and below 1, for dropout and its like.

    They are multiples of 2^-24, exact in float32, and so the same on every machine and for every engine.
    """
    index = int(name.removeprefix("noise."))
    raw = raw_numbers(seed, NOISE, index, step, math.prod(shape))
    raw >>= np.uint64(40)
    # as signed integers, which convert four times as fast
    numbers = raw.view(np.int64).astype(np.float32).reshape(shape)
    numbers *= np.float32(2**-24)
    return numbers
