"""The transfer set: its file, and the samples of it that each batch takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from edgestill.runtime.bundle import wire
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.errors import DataError
from edgestill.runtime.training.batches import BatchPlan, TransferSet
from edgestill.runtime.training.teacher import TeacherOutputs
from tests.support.handmade_bundle import BATCH, CHANNELS, CLASSES, LATENT, SIZE


def images(samples: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (samples, CHANNELS, size, size), dtype=np.uint8)


def private(samples: int, size: int = SIZE) -> Dataset:
    return Dataset(images(samples, size), np.random.default_rng(1).integers(0, CLASSES, samples), ())


def outputs_on(transfer: Transfer) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(2)
    shapes = {"latents": (len(transfer), LATENT), "logits": (len(transfer), CLASSES)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, BATCH - 1), st.integers(0, 30))
def test_batches_of_private_and_transfer_samples(samples: int, others: int, count: int, step: int) -> None:
    dataset, transfer = private(samples), Transfer(images(others, seed=9))
    outputs = outputs_on(transfer)
    plan = BatchPlan(
        dataset, BATCH, 11, transfer=TransferSet(transfer.images, TeacherOutputs(**outputs)),
        transfer_count=count, teacher_sizes=(LATENT, CLASSES),
    )  # fmt: skip
    batch, own = plan.inputs(step), BATCH - count
    assert batch["label_weights"].tolist() == [1] * own + [0] * count
    assert batch["teacher_weights"].tolist() == [0] * own + [1] * count
    known = {image.tobytes(): label for image, label in zip(dataset.images, dataset.labels, strict=True)}
    assert [known[image.tobytes()] for image in batch["images"][:own]] == batch["labels"][:own].tolist()
    rows = {image.tobytes(): row for row, image in enumerate(transfer.images)}
    chosen = [rows[image.tobytes()] for image in batch["images"][own:]]
    for name, array in outputs.items():
        assert not batch[f"teacher_{name}"][:own].any()
        np.testing.assert_array_equal(batch[f"teacher_{name}"][own:], array[chosen])


@pytest.mark.parametrize("labelled", [True, False])
def test_a_transfer_set_is_a_safetensors_file(tmp_path: Path, labelled: bool) -> None:
    labels = np.arange(5) % CLASSES if labelled else None
    Transfer(images(5), labels).save(tmp_path / "t.safetensors")
    official = safetensors.numpy.load_file(tmp_path / "t.safetensors")
    assert official.keys() == ({"images", "labels"} if labelled else {"images"})
    loaded = Transfer.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(loaded.images, official["images"])
    assert len(loaded) == 5 and (loaded.labels is None) != labelled
    assert not labelled or loaded.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"labels": np.zeros(2, np.int64)},
        {"images": images(2)[0, 0, 0]},
        {"images": images(2).astype(np.int8)},
        {"images": images(2)[:0]},
        {"images": images(2), "labels": np.zeros(3, np.int64)},
        {"images": images(2), "labels": np.zeros(2, np.float32)},
        {"images": images(2), "more": np.zeros(2, np.float32)},
    ],
)
def test_other_files_are_no_transfer_set(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    wire.save(tmp_path / "t.safetensors", arrays)
    with pytest.raises(DataError, match=r"t\.safetensors"):
        Transfer.load(tmp_path / "t.safetensors")
