"""What a step must know of other samples: negatives for `crd`, neighbour weights for `lpd`.

Sources: Tian, Krishnan and Isola 2020 (negatives); Chen et al. 2021 (neighbours). Formulas: docs/bundle.md.
"""

from __future__ import annotations

import numpy as np

from edgestill.runtime.randomness import NEGATIVES, raw_numbers


def draw_negatives(seed: int, step: int, count: int, samples: int, batch: np.ndarray) -> np.ndarray:
    """`count` of the samples 0 … samples−1 that are not in the batch, drawn with replacement, by (seed, step)."""
    others = np.setdiff1d(np.arange(samples), batch)
    return others[raw_numbers(seed, NEGATIVES, 0, step, count) % np.uint64(len(others))]


def neighbour_weights(latents: np.ndarray, known: np.ndarray, neighbours: int, scale: float) -> np.ndarray:
    """a_ij = exp(−‖t_i − t_j‖²/σ²) where t_j is one of the nearest to t_i within the batch, else 0; [B, B] float32.

    latents: the teacher's, [B, l]; known: which samples have one [B]; the others have no neighbours and are none.
    σ² is `scale`² times the mean squared distance between neighbours, so that no latent space needs a scale of its own.
    """
    rows = np.flatnonzero(known)
    count = min(neighbours, len(rows) - 1)
    weights = np.zeros((len(latents), len(latents)), np.float32)
    if count < 1:
        return weights
    there = latents[rows].astype(np.float64)
    # Row by row, not as a matrix product, whose last digits depend on the number of threads.
    squares = np.stack([((there - row) ** 2).sum(axis=1) for row in there])
    np.fill_diagonal(squares, np.inf)
    nearest = np.argsort(squares, axis=1, kind="stable")[:, :count]
    distances = np.take_along_axis(squares, nearest, axis=1)
    spread = scale**2 * distances.mean()
    weights[rows[:, None], rows[nearest]] = np.exp(-distances / spread) if spread > 0 else 1.0
    return weights
