"""The common head: one frozen output layer for every student of a task, so that a latent means the same on each device.

Where all students classify with the same fixed directions, their latents carry the logits: they can be averaged as they
are, and a student that learns latents alone can classify. Sources: Hoffer et al. 2018, "Fix your classifier"; Oh et al.
2022, "FedBABU".
"""

from __future__ import annotations

import math

import numpy as np

from edgestill.runtime.errors import UsageError


def common_head(classes: int, latent_size: int) -> np.ndarray:
    """The weights [K, l] float32: the first K rows of the orthonormal discrete cosine transform (DCT-II) of size l.

    Rows are orthogonal and of norm 1, so that no class lies nearer to another than any other does. They follow from
    the two sizes alone. Errors: UsageError for more classes than latents, which cannot be orthogonal.
    """
    if classes > latent_size:
        raise UsageError(
            f"a common head of {classes} classes for latents of {latent_size}: so many rows cannot be orthogonal",
            f"give --latent-size {classes} or more, or leave --common-head out",
        )
    rows = [
        [
            math.sqrt((1 if row == 0 else 2) / latent_size) * math.cos(math.pi * row * (2 * i + 1) / (2 * latent_size))
            for i in range(latent_size)
        ]
        for row in range(classes)
    ]
    return np.array(rows, np.float32)
