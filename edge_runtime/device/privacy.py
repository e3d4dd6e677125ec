"""Differential privacy of what a device uploads: rows clipped, Gaussian noise added, epsilon counted over rounds.

**What is protected.** A device releases, once a round, the matrix of its outputs on the transfer set: N rows of l
values. The transfer set is not private; the device's own samples are, and they act only through the student that
was trained on them. One private sample can move every parameter, so it can move all N rows: no count of samples
bounds the change of the release, only clipping does. Two data sets are therefore neighbours when they are *any* two
data sets that the device could hold (local differential privacy, replace the whole data set). What holds for that
relation holds for replacing one sample too.

**Sensitivity.** Each row has an L2 norm of at most `clip`, so two releases differ by at most 2 · clip in a row and by
at most 2 · clip · sqrt(N) in the Frobenius norm. Every value gets independent noise of standard deviation
noise_multiplier · 2 · clip · sqrt(N), which makes one release a Gaussian mechanism with multiplier `noise_multiplier`.

**Composition.** R releases, each allowed to depend on what came before, are as private as one Gaussian mechanism with
multiplier noise_multiplier / sqrt(R): exactly so, not as an upper bound (Dong, Roth, Su 2019, corollary 3.3). Where
the multipliers differ, their 1 / multiplier² add up: that sum is what is kept of what was `spent`.

What is computed from a release (rounding, int8, compression, aggregation) costs nothing more. What is *not* covered,
and what noise of this size does to accuracy, is in docs/privacy.md.
"""

from __future__ import annotations

import math

import numpy as np

from edgestill.runtime.errors import EdgestillError, TrainingError, UsageError


def clip_rows(values: np.ndarray, clip: float) -> np.ndarray:
    """The rows of `values` [N, l], each scaled down to an L2 norm of at most `clip` where it is longer; float64.

    Errors: UsageError for a clip that is not a positive number, or anything but a matrix.
    """
    if not (math.isfinite(clip) and clip > 0):
        raise UsageError(
            f"clip {clip} is not a positive number", "the largest L2 norm of a row, for example 1.0"
        )
    if np.ndim(values) != 2:
        raise UsageError(
            f"rows of shape {list(np.shape(values))} cannot be clipped", "latents or logits are [N, l]"
        )
    rows = np.asarray(values, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1.0, clip / np.maximum(norms, clip))


def sensitivity(rows: int, clip: float) -> float:
    """The largest Frobenius distance between two matrices of `rows` rows of L2 norm at most `clip`."""
    return 2.0 * clip * math.sqrt(rows)


def privatise(
    latents: np.ndarray, clip: float, noise_multiplier: float, random: np.random.Generator
) -> np.ndarray:
    """One release: `latents` [N, l], rows clipped, with Gaussian noise, as float32.

    `random` must be seeded by the operating system (`np.random.default_rng()`), never by a seed of the task: noise
    that someone can draw again is none. Call it once a round and keep the result; a second call for the same round
    is a second release. Logits are released in the same way, and count as a release of their own.
    Errors: UsageError for a clip or multiplier out of range; TrainingError for values that are not finite.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise UsageError(f"noise multiplier {noise_multiplier} is not a number from 0 up")
    if not np.isfinite(latents).all():
        raise TrainingError(
            "the outputs hold NaN or infinity and cannot be clipped",
            "the training diverged; a smaller learning rate may help",
        )
    rows = clip_rows(latents, clip)
    deviation = noise_multiplier * sensitivity(len(rows), clip)
    return (rows + deviation * random.standard_normal(rows.shape)).astype(np.float32)


def noise_in_mean(noise_multiplier: float, rows: int, width: int, releases: int) -> float:
    """Length of the noise of one row of the mean of releases [rows, width], in units of the clip.

    So many times what a row of the mean can be at most. The mean over D releases divides the noise by sqrt(D).
    """
    return noise_multiplier * sensitivity(rows, 1.0) * math.sqrt(width / releases)


def epsilon(noise_multiplier: float, rounds: int, delta: float, releases_per_round: int = 1) -> float:
    """The smallest epsilon for which all releases together are (epsilon, delta)-locally differentially private.

    `releases_per_round`: 1 for latents or logits, 2 for both. Without noise it is infinite, without a release 0.
    Errors: UsageError for arguments out of range; EdgestillError where dp-accounting is not installed.
    Source: Balle and Wang 2018, theorem 8, as computed by dp-accounting.
    """
    if rounds < 0 or releases_per_round < 1:
        raise UsageError(f"{rounds} rounds of {releases_per_round} releases cannot be counted")
    spent = spend(0.0, noise_multiplier, rounds * releases_per_round)
    return math.inf if spent is None else epsilon_of_spent(spent, delta)


def spend(spent: float | None, noise_multiplier: float, releases: int) -> float | None:
    """The sum of 1 / multiplier² over all releases, with that many more; None where one had no noise to speak of.

    Errors: UsageError for a multiplier out of range.
    """
    if not noise_multiplier >= 0:
        raise UsageError(f"noise multiplier {noise_multiplier} is not a number from 0 up")
    if releases == 0 or spent is None:
        return spent
    square = noise_multiplier * noise_multiplier
    total = spent + releases / square if square > 0 else math.inf
    return total if math.isfinite(total) else None


def epsilon_of_spent(spent: float, delta: float) -> float:
    """The same for releases of any multipliers, added up by `spend`. Errors: as of `epsilon`."""
    if not 0 < delta < 1:
        raise UsageError(
            f"delta {delta} is not between 0 and 1", "well below 1 / number of devices, say 1e-5"
        )
    if spent == 0:
        return 0.0
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise EdgestillError(
            "epsilon needs dp-accounting 0.6 or newer", "pip install 'dp-accounting>=0.6'"
        ) from error
    return float(get_epsilon_gaussian(1 / math.sqrt(spent), delta))
