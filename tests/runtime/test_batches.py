"""Batches, augmentation and schedules: any step can be made again, and every sample comes once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.runtime.data.augmentation import augment
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.batches import BatchPlan, TransferSet
from edgestill.runtime.training.schedule import Schedule, learning_rate
from edgestill.runtime.training.teacher import TeacherOutputs


def plan(count: int, batch: int = 8, **more: object) -> BatchPlan:
    x = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 8, 8), np.uint8)
    return BatchPlan(Dataset(x, np.arange(count), ()), batch, seed=3, **more)


@given(st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_an_epoch_sees_every_sample_and_fills_up_by_wrapping(count: int, batch: int) -> None:
    batches = plan(count, batch)
    for epoch in range(2):
        first = epoch * batches.steps_per_epoch
        seen = [batches.inputs(first + i)["labels"] for i in range(batches.steps_per_epoch)]
        assert all(len(labels) == batch for labels in seen)
        order = np.concatenate(seen)
        assert sorted(order[:count]) == list(range(count))
        np.testing.assert_array_equal(order, np.resize(order[:count], len(order)))


def test_any_step_is_the_same_whenever_it_is_made() -> None:
    forwards = [plan(30, augmentations=("flip", "crop")).inputs(step) for step in range(10)]
    for step in reversed(range(10)):
        again = plan(30, augmentations=("flip", "crop")).inputs(step)
        for name, array in forwards[step].items():
            np.testing.assert_array_equal(again[name], array)
    orders = [np.concatenate([plan(30).inputs(4 * e + i)["labels"] for i in range(4)]) for e in (0, 1)]
    assert orders[0].tolist() != orders[1].tolist()


def test_a_mixed_batch_has_labels_for_private_samples_only() -> None:
    count, others = 20, 5
    rows = np.arange(count + others, dtype=np.float32)[:, None]
    private, shared = (TeacherOutputs(r, 10 * r) for r in (rows[:count], rows[count:]))
    transfer = TransferSet(np.full((others, 3, 8, 8), 200, np.uint8), shared)
    mixed = plan(count, 8, teacher=private, transfer=transfer, transfer_count=3)
    assert mixed.steps_per_epoch == 4
    seen = []
    for step in range(10):
        inputs = mixed.inputs(step)
        assert inputs["label_weights"].tolist() == [1] * 5 + [0] * 3
        assert inputs["teacher_weights"].tolist() == [1] * 8
        np.testing.assert_array_equal(inputs["teacher_latents"][:5, 0], inputs["labels"][:5])
        np.testing.assert_array_equal(inputs["teacher_logits"], 10 * inputs["teacher_latents"])
        assert (inputs["images"][5:] == 200).all() and (inputs["images"][:5] < 200).all()
        seen += inputs["teacher_latents"][5:, 0].tolist()
    for start in range(0, 30, others):  # the transfer set is passed through again and again
        assert sorted(seen[start : start + others]) == [20, 21, 22, 23, 24]


def test_augmentation_gives_flipped_and_shifted_versions() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    flipped = augment(batch, ("flip",), 0, 0, 0)
    same = [np.array_equal(a, b) for a, b in zip(flipped, batch, strict=True)]
    mirrored = [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(flipped, batch, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 16 < sum(same) < 48
    cropped = augment(batch, ("crop",), 0, 0, 0)
    shifts = set()
    for before, after in zip(batch, cropped, strict=True):
        padded = np.pad(before, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if np.array_equal(after, padded[:, top : top + 32, left : left + 32])
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert {top for top, _ in shifts} == set(range(9)) and len(shifts) > 30
    assert augment(batch, (), 0, 0, 0) is batch


def test_schedules() -> None:
    def rates(schedule: Schedule, total: int = 100) -> list[float]:
        return [learning_rate(step, total, 2.0, schedule) for step in range(total)]

    assert set(rates(Schedule())) == {2.0}
    cosine = rates(Schedule("cosine"))
    np.testing.assert_allclose(cosine, 1 + np.cos(np.pi * np.arange(100) / 100))
    steps = rates(Schedule("step"))
    assert steps[:50] == [2.0] * 50 and steps[50:75] == pytest.approx([0.2] * 25)
    assert steps[75:] == pytest.approx([0.02] * 25)
    warm = rates(Schedule("cosine", warmup_steps=4))
    assert warm[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and warm[5] < 2.0
    assert rates(Schedule(warmup_steps=200))[-1] == 1.0
    with pytest.raises(UsageError, match="no schedule"):
        Schedule("sawtooth")
