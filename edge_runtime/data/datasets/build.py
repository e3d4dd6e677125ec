"""Builds the shipped data from larger .npz files of the same shape; the same seed gives the same images.

Run: python -m edgestill.runtime.data.datasets.build CIFAR10.npz CIFAR100_TRANSFER.npz OUTPUT_FOLDER
where the first holds x_train, y_train, x_test, y_test, classes, and the second x, y, classes; images are
uint8, N×32×32×3.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TRAIN, TEST, TRANSFER = 2400, 600, 1000
OWN_TRANSFER, VALIDATION = 600, 400
"""Of `cifar10-transfer-mini`: other training images than those of `cifar10-mini`."""
SEED = 0


def balanced_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices of `count` samples, as many of each class as of any other."""
    random = np.random.default_rng(seed)
    each = count // len(np.unique(labels))
    chosen = [
        random.choice(np.flatnonzero(labels == label), each, replace=False) for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))


def build(private: Path, transfer: Path, folder: Path) -> None:
    with np.load(private) as source:
        arrays = {}
        for split, count in (("train", TRAIN), ("test", TEST)):
            labels = source[f"y_{split}"]
            chosen = balanced_subset(labels, count, SEED)
            arrays |= {f"x_{split}": source[f"x_{split}"][chosen], f"y_{split}": labels[chosen]}
        np.savez_compressed(folder / "cifar10-mini.npz", **arrays, classes=source["classes"])
        taken = {image.tobytes() for name in ("x_train", "x_test") for image in arrays[name]}
        images, labels = source["x_train"], source["y_train"]
        free = np.array([index for index, image in enumerate(images) if image.tobytes() not in taken])
        chosen = free[balanced_subset(labels[free], OWN_TRANSFER + VALIDATION, SEED + 1)]
        own = balanced_subset(labels[chosen], OWN_TRANSFER, SEED + 2)
        parts = {"train": chosen[own], "test": np.delete(chosen, own)}
        arrays = {f"{kind}_{split}": source[f"{kind}_train"][part] for split, part in parts.items() for kind in "xy"}
        np.savez_compressed(folder / "cifar10-transfer-mini.npz", **arrays, classes=source["classes"])
    with np.load(transfer) as source:
        chosen = balanced_subset(source["y"], TRANSFER, SEED)
        np.savez_compressed(
            folder / "cifar100-transfer-mini.npz",
            x=source["x"][chosen], y=source["y"][chosen], classes=source["classes"],
        )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    build(*map(Path, sys.argv[1:]))
