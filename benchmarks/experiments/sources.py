"""The images of the experiments: where they lie, what identifies them, and each loaded once a process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.data.dataset import Splits, digest_of_arrays, load_splits, load_transfer_samples
from edgestill.runtime.data.datasets import SHIPPED
from edgestill.runtime.errors import DataError, UsageError

CLASSES = 10
INPUT = InputSpec((3, 32, 32), "uint8", (), ())
DATA_FILES = ("cifar10.npz", "cifar-10-python.tar.gz", "cifar-10-batches-py")
TRANSFER_FILES = ("cifar100_transfer.npz", "cifar-100-python.tar.gz", "cifar-100-python")
TRANSFER_LIMIT = 6000
"""Images of a transfer set that are used; the whole of CIFAR-100 would be more than any experiment asks for."""


@dataclass(frozen=True)
class Sources:
    """Names or paths of both sets, and what names them in a run's settings: a shipped name or their digest."""

    data: str
    transfer: str
    data_name: str
    transfer_name: str


def find_sources(data: str, transfer: str | None) -> Sources:
    """Both sets by what a caller gave: names, files, or for `data` a folder that holds them.

    Without `transfer` it is what lies beside the data, else the shipped set. Errors: UsageError, DataError.
    """
    if data not in SHIPPED:
        folder = Path(data)
        if folder.is_dir() and folder.name not in DATA_FILES:
            data = _first_of(folder, DATA_FILES) or _none_of(folder)
        else:
            folder = folder.parent
        transfer = transfer or _first_of(folder, TRANSFER_FILES)
    transfer = transfer or "cifar100-transfer-mini"
    splits = load_data(data)
    if splits.test is None:
        raise DataError(f"{data}: no test split", "give data with x_train, y_train, x_test and y_test")
    data_name = data if data in SHIPPED else f"sha256:{splits.train.digest[:16]}{splits.test.digest[:16]}"
    transfer_name = (
        transfer if transfer in SHIPPED else f"sha256:{digest_of_arrays(load_transfer(transfer))[:32]}"
    )
    return Sources(data, transfer, data_name, transfer_name)


@lru_cache(maxsize=2)
def load_data(data: str) -> Splits:
    """CIFAR-10 or a set of its form. Errors: UsageError, DataError."""
    return load_splits(data, INPUT, CLASSES)


@lru_cache(maxsize=2)
def load_transfer(transfer: str) -> np.ndarray:
    """The first images of the transfer set, uint8 [N, 3, 32, 32]. Errors: UsageError, DataError."""
    return load_transfer_samples(transfer, INPUT)[0][:TRANSFER_LIMIT]


def _first_of(folder: Path, names: tuple[str, ...]) -> str | None:
    return next((str(folder / name) for name in names if (folder / name).exists()), None)


def _none_of(folder: Path) -> str:
    raise UsageError(f"{folder} holds no CIFAR-10", f"put one of {', '.join(DATA_FILES)} into it")
