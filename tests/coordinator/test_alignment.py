"""Alignment of latents: against SciPy, and what it undoes before devices are averaged."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from edgestill.coordinator.distillation.aggregation import Upload, aggregate
from edgestill.coordinator.distillation.alignment import find_motion, reference_device
from edgestill.coordinator.task.task import Aggregation


def test_alignment_finds_the_rotation_that_scipy_finds() -> None:
    rng = np.random.default_rng(3)
    latents, target = rng.normal(size=(2, 50, 8)) + rng.normal(size=(2, 1, 8)) * 5
    centred, target_centred = latents - latents.mean(axis=0), target - target.mean(axis=0)
    rotation, _ = scipy.linalg.orthogonal_procrustes(centred, target_centred)
    motion = find_motion(latents, target)
    np.testing.assert_allclose(motion.rotation, rotation, atol=1e-10)
    np.testing.assert_allclose(motion.apply(latents), centred @ rotation + target.mean(axis=0), atol=1e-10)


def turned(latents: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return latents @ scipy.stats.ortho_group.rvs(latents.shape[1], random_state=rng) + rng.normal(
        size=latents.shape[1]
    )


@pytest.mark.parametrize("with_previous", [True, False])
@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean", "krum"])
def test_alignment_undoes_what_independent_initialisation_turns(rule: str, with_previous: bool) -> None:
    rng = np.random.default_rng(5)
    latents, logits = rng.normal(size=(60, 8)), rng.normal(size=(60, 3)).astype(np.float32)
    uploads = [
        Upload(f"d-{i}", {"latents": np.float32(turned(latents, i)), "logits": logits * (i + 1)}, 1)
        for i in range(5)
    ]
    previous = {"latents": np.float32(latents)} if with_previous else None
    result = aggregate(uploads, Aggregation(rule, align=True), previous)
    targets = [latents] if with_previous else [upload.arrays["latents"] for upload in uploads]
    assert min(np.abs(result["latents"] - target).max() for target in targets) < 1e-5
    plain = aggregate(uploads, Aggregation(rule), previous)
    np.testing.assert_array_equal(result["logits"], plain["logits"], "logits need no alignment")
    if rule != "krum":
        lost = np.linalg.norm(np.std(plain["latents"], axis=0)) / np.linalg.norm(np.std(latents, axis=0))
        assert lost < 0.8, "averaging turned latents as they are cancels what they hold"


def test_hostile_devices_do_not_become_the_reference() -> None:
    rng = np.random.default_rng(7)
    latents = rng.normal(size=(80, 6)) * [6, 5, 4, 3, 2, 1]
    honest = [turned(latents + rng.normal(size=latents.shape), seed) for seed in range(6)]
    conspiracy = rng.normal(size=(80, 6)) * 1e6
    hostile = [np.zeros((80, 6)), np.ones((80, 6)) * 3, conspiracy, conspiracy.copy()]
    for order in ([*hostile, *honest], [*honest, *hostile]):
        readers = [lambda latents=latents: latents for latents in order]
        assert any(order[reference_device(readers)] is latents for latents in honest)
