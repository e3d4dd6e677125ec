"""Which samples are also in another set: what is trained, exchanged, chosen by and tested on has to be apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from edgestill.runtime.data.dataset import Dataset


def find_apart(images: np.ndarray, *reserved: np.ndarray) -> np.ndarray:
    """Indices of the samples [N, …] that are in none of the reserved sets [M, …], equal to the last byte."""
    taken = set(_digests(reserved))
    kept = [index for index, digest in enumerate(_digests([images])) if digest not in taken]
    return np.array(kept, np.int64)


def without(dataset: Dataset, *reserved: np.ndarray) -> tuple[Dataset, int]:
    """The dataset without samples of the reserved sets, and how many it has lost; its first tensor decides."""
    kept = find_apart(dataset.images, *reserved)
    lost = len(dataset) - len(kept)
    return (dataset.select(kept) if lost else dataset), lost


def _digests(sets: Iterable[np.ndarray]) -> Iterator[bytes]:
    for samples in sets:
        for sample in samples:
            yield hashlib.blake2b(np.ascontiguousarray(sample).view(np.uint8).data, digest_size=16).digest()
