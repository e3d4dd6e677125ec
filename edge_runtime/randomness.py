"""Random numbers by address: the draw of any epoch and step without replaying the ones before.

Built on the raw 64-bit output of Philox, which NumPy keeps the same from version to version, unlike its
distributions. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import numpy as np

ORDER, TRANSFER_ORDER, AUGMENTATION, SUBSET, PARTITION, HELD_OUT, TESTS, NEGATIVES, USERS = range(9)
"""Streams that one seed gives rise to; two of them never share a number."""


def raw_numbers(seed: int, stream: int, epoch: int, step: int, count: int) -> np.ndarray:
    """`count` uniform uint64 numbers at one address."""
    # the generator counts in the low words of the counter, so addresses in the high words never overlap
    return np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, step]).random_raw(count)


def permutation(seed: int, stream: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of 0 … count−1."""
    return np.argsort(raw_numbers(seed, stream, epoch, 0, count), kind="stable")
