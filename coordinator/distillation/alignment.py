"""Orthogonal Procrustes alignment: turns the latents of one student towards those of another.

Two students that were initialised independently learn latents that differ by more than noise: axes are permuted,
mirrored and turned, and averaging them as they are cancels what both have learnt. The map from one to the other is
estimated on the transfer set, which both have encoded row by row.

What moves and what does not:
- A rotation or reflection only, no scaling and no general linear map: it keeps distances and angles, so it cannot
  blow up a clipped upload, hide a poisoned one by fitting it, or collapse latents to a subspace. Rows that were
  clipped to norm c end within 2c of the target's mean.
- Both sides are centred first, and the result is put on the target's mean. The bias of a representation layer moves
  all its latents by one vector; uncentred, that vector would dominate what the rotation is fitted to.

Source: Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_CANDIDATES = 16
"""Devices compared with each other to find a reference: the work grows with the square."""


@dataclass(frozen=True)
class Motion:
    """x → (x − `origin`) · `rotation` + `target_origin`, for rows x [.., l]."""

    origin: np.ndarray
    rotation: np.ndarray
    target_origin: np.ndarray

    def apply(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.origin) @ self.rotation + self.target_origin


def find_motion(latents: np.ndarray, target: np.ndarray) -> Motion:
    """The motion of `latents` [N, l] that brings them nearest to `target` [N, l] in the sum of squares.

    Where N is less than l, or rows lie in a subspace, several rotations are equally near and one of them is taken.
    """
    origin, target_origin = latents.mean(axis=0), target.mean(axis=0)
    left, _, right = np.linalg.svd((latents - origin).T @ (target - target_origin))
    return Motion(origin, left @ right, target_origin)


def reference_device(readers: Sequence[Callable[[], np.ndarray]]) -> int:
    """Index of the device whose latents the others fit best, to align to when there are no global latents yet.

    It is the one with the smallest median distance to the others after alignment, among at most `MAX_CANDIDATES`
    spread evenly over the devices' order, which no device chooses: by the numbers of their codes, then by name. The
    distance is 1 − the nuclear norm of the cross-covariance of both, each scaled to norm 1: 0 where a rotation makes
    them equal, 1 where they have nothing in common. So neither large nor vanishing latents help a hostile device, and
    as long as most candidates are honest, one of them wins. `readers` give each device's latents
    [N, l]; ties go to the first.
    """
    indices = sorted({round(i) for i in np.linspace(0, len(readers) - 1, min(len(readers), MAX_CANDIDATES))})
    if len(indices) < 3:
        return 0
    shapes = [_normalised(readers[index]()) for index in indices]
    distances = np.zeros((len(indices), len(indices)))
    for row in range(len(indices)):
        for column in range(row):
            common = np.linalg.svd(shapes[row].T @ shapes[column], compute_uv=False).sum()
            distances[row, column] = distances[column, row] = 1.0 - common
    medians = [np.median(np.delete(distances[row], row)) for row in range(len(indices))]
    return indices[int(np.argmin(medians))]


def _normalised(latents: np.ndarray) -> np.ndarray:
    centred = latents - latents.mean(axis=0)
    norm = np.linalg.norm(centred)
    return centred / norm if norm > 0 else centred
