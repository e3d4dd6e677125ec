"""What hostile devices do to their outputs before they upload them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SCALE = -10.0


def spoil(arrays: Mapping[str, np.ndarray], attack: str, seed: int | Sequence[int]) -> dict[str, np.ndarray]:
    """Outputs of the same names and shapes, well formed, finite and harmful.

    `scale`: ten times too long, in the opposite direction. `shuffle`: the outputs of other samples (rows of a
    tensor in another order). `random`: noise of the outputs' own mean and ten times their spread.
    """
    random = np.random.default_rng(seed)
    spoiled = {}
    for name, array in arrays.items():
        if attack == "scale":
            changed = SCALE * array
        elif attack == "shuffle":
            changed = array[random.permutation(len(array))]
        elif attack == "random":
            noise = random.standard_normal(array.shape)
            changed = array.mean() + abs(SCALE) * array.std() * noise
        else:
            raise ValueError(f"no attack is called {attack!r}")
        spoiled[name] = changed.astype(np.float32)
    return spoiled
