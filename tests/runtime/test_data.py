"""Data sources and partition."""

from __future__ import annotations

import io
import math
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.data.dataset import Dataset, dirichlet_partition, load_splits, load_transfer_samples
from edgestill.runtime.errors import DataError, EdgestillError, UsageError

CIFAR = InputSpec((3, 32, 32), "uint8", (0.5,) * 3, (0.25,) * 3)
SMALL = InputSpec((3, 4, 5), "uint8", (0.5,) * 3, (0.25,) * 3)
SENSOR = InputSpec((9, 1, 16), "float32", (), ())


def images(count: int, shape: tuple[int, ...] = (4, 5, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_the_shipped_data_are_balanced_and_small() -> None:
    splits = load_splits("cifar10-mini", CIFAR, 10)
    assert splits.train.class_names[0] == "airplane"
    for part, count in ((splits.train, 2400), (splits.test, 600)):
        assert part.images.shape == (count, 3, 32, 32)
        assert np.bincount(part.labels).tolist() == [count // 10] * 10
    assert load_transfer_samples("cifar100-transfer-mini", CIFAR)[0].shape == (1000, 3, 32, 32)
    # real images: neighbouring pixels are alike
    pixels = splits.train.images.astype(float)
    assert np.abs(np.diff(pixels, axis=3)).mean() < 0.25 * pixels.std()


def test_npz_images_become_channels_first(tmp_path: Path) -> None:
    x, y = images(6), np.arange(6) % 3
    path = save(tmp_path / "d.npz", x_train=x[:4], y_train=y[:4], x_test=x[4:], y_test=y[4:])
    splits = load_splits(path, SMALL, 3)
    np.testing.assert_array_equal(splits.train.images, np.moveaxis(x[:4], 3, 1))
    np.testing.assert_array_equal(splits.choose(None).labels, y[4:])
    first = save(tmp_path / "first.npz", x=np.moveaxis(x, 3, 1), y=y)
    alone = load_splits(first, SMALL, 3)
    np.testing.assert_array_equal(alone.train.images, np.moveaxis(x, 3, 1))
    assert alone.test is None and alone.choose(None) is alone.train
    with pytest.raises(UsageError, match="no test split"):
        alone.choose("test")


def test_a_transfer_set_needs_no_labels(tmp_path: Path) -> None:
    x = images(6)
    read = load_transfer_samples(save(tmp_path / "d.npz", x=x), SMALL)[0]
    np.testing.assert_array_equal(read, np.moveaxis(x, 3, 1))


def test_float_windows_may_lack_axes_of_length_one(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 9, 16))
    data = load_splits(save(tmp_path / "d.npz", x=x, y=np.zeros(5, np.int32)), SENSOR, 2).train
    assert data.images.dtype == np.float32 and data.labels.dtype == np.int64
    np.testing.assert_array_equal(data.images[:, :, 0], x.astype(np.float32))
    x[2, 3, 4] = np.inf
    with pytest.raises(DataError, match="NaN or infinity"):
        load_splits(save(tmp_path / "d.npz", x=x, y=np.zeros(5, np.int32)), SENSOR, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": images(3), "y": np.array([0, 1, 3])}, "label 3 is outside 0 … 2"),
        ({"x": images(3), "y": np.array([0, -1, 2])}, "label -1"),
        ({"x": images(3), "y": np.array([0, 1])}, "not 3 integers"),
        ({"x": images(3), "y": np.array([0.0, 1.0, 2.0])}, "float64"),
        ({"x": images(3).astype(np.float32), "y": np.arange(3)}, "takes uint8"),
        ({"x": images(3, (5, 5, 3)), "y": np.arange(3)}, "5x5x3"),
        ({"x": images(0), "y": np.zeros(0, int)}, "no samples"),
        ({"x_train": images(3)}, "no array 'y_train'"),
        ({"x": images(3), "y": np.arange(3), "users": np.array(["a", "b"])}, "not 3 names"),
        ({"pictures": images(3)}, "no array 'x'"),
        ({"x": np.array([{}], dtype=object), "y": np.arange(1)}, "not a readable .npz"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(DataError) as error:
        load_splits(save(tmp_path / "d.npz", **arrays), SMALL, 3)
    assert message in error.value.message and "d.npz" in error.value.message


def test_users_stay_with_their_samples(tmp_path: Path) -> None:
    x, users = images(6), np.array(["ann", "ben", "ann", "cleo", "ben", "ann"])
    named = {
        "x_train": x,
        "y_train": np.arange(6) % 3,
        "users_train": users,
        "x_test": x,
        "y_test": np.arange(6) % 3,
    }
    splits = load_splits(save(tmp_path / "d.npz", **named), SMALL, 3)
    assert splits.train.users.tolist() == users.tolist() and splits.test.users is None
    assert splits.train.select(np.array([4, 0])).users.tolist() == ["ben", "ann"]
    taken = splits.train.take(3, seed=1)
    where = [np.flatnonzero((splits.train.images == image).all((1, 2, 3)))[0] for image in taken.images]
    assert taken.users.tolist() == users[where].tolist()


def test_unreadable_and_missing_files_are_our_errors(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="not a readable"):
        load_splits(tmp_path / "d.npz", SMALL, 3)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(DataError, match="not a readable .npz, which"):
        load_splits(tmp_path / "single.npy", SMALL, 3)
    with pytest.raises(UsageError, match="no data called 'cifar11'"):
        load_splits("cifar11", SMALL, 3)


def cifar_batch(count: int, seed: int, key: str) -> tuple[dict[str, object], np.ndarray, list[int]]:
    x = images(count, (3, 32, 32), seed)
    labels = [i % 4 for i in range(count)]
    return {"data": x.reshape(count, -1), key: labels}, x, labels


def write_cifar10(folder: Path, protocol: int) -> np.ndarray:
    """As the original: protocol 2 with keys that are bytes once they are read as such."""
    folder.mkdir()
    parts = []
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content, x, _ = cifar_batch(4, index, "labels")
        parts.append(x)
        (folder / name).write_bytes(pickle.dumps({k.encode(): v for k, v in content.items()}, protocol))
    meta = {b"label_names": [b"cat", b"dog", b"emu", b"fox"]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
    return np.concatenate(parts)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_archives(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "cifar-10-batches-py"
    x = write_cifar10(path, protocol=2)
    if packed:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(path, path.name)
        path = tmp_path / "cifar-10-python.tar.gz"
    splits = load_splits(path, CIFAR, 10)
    np.testing.assert_array_equal(splits.train.images, x[:20])
    np.testing.assert_array_equal(splits.test.images, x[20:])
    assert splits.train.labels.tolist() == [0, 1, 2, 3] * 5
    assert splits.train.class_names == ("cat", "dog", "emu", "fox")


def test_cifar100_archives(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        content, _, _ = cifar_batch(4, seed, "fine_labels")
        raw = pickle.dumps({k.encode(): v for k, v in content.items()}, 2)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple"]}, 2))
    assert load_splits(tmp_path, CIFAR, 100).test.labels.tolist() == [0, 1, 2, 3]


class Attack:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.marker,)


def test_pickles_that_call_functions_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, protocol=2)
    marker = tmp_path / "executed"
    for payload in (
        pickle.dumps({b"data": Attack(str(marker))}),
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"rubbish",
    ):
        (folder / "data_batch_3").write_bytes(payload)
        with pytest.raises(DataError, match="data_batch_3: refused to unpickle"):
            load_splits(folder, CIFAR, 10)
    assert not marker.exists()
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        load_splits(folder, CIFAR, 10)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_pickles_end_in_our_error_or_in_images(data: st.DataObject) -> None:
    from edgestill.runtime.data.cifar import _Array, _unpickle

    content, _, _ = cifar_batch(1, 0, "labels")
    good = bytearray(pickle.dumps({k.encode(): v for k, v in content.items()}, 2))
    # the interesting bytes are the opcodes before the pixels
    good[data.draw(st.integers(0, 250))] ^= data.draw(st.integers(1, 255))
    try:
        value = _unpickle(bytes(good), "here").get(b"data")
        if isinstance(value, _Array):
            value.as_images("here")
    except EdgestillError:
        pass


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (5, 4)) -> None:
    for index, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (index * 50, number, 7)).save(root / name / f"{number}.png")


def test_image_folders_with_and_without_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", {"cat": 2, "dog": 3})
    flat = load_splits(tmp_path / "flat", SMALL, 2)
    assert flat.test is None and flat.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert flat.train.images[4, :, 0, 0].tolist() == [50, 2, 7]
    write_images(tmp_path / "split/train", {"cat": 1, "dog": 1})
    write_images(tmp_path / "split/test", {"dog": 2})
    split = load_splits(tmp_path / "split", SMALL, 2)
    assert split.test.labels.tolist() == [1, 1] and split.train.class_names == ("cat", "dog")


def test_images_of_another_size_are_named_or_resized(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 1}, size=(10, 8))
    with pytest.raises(DataError, match=r"0\.png: 10x8 pixels, the bundle takes 5x4"):
        load_splits(tmp_path, SMALL, 1)
    assert load_splits(tmp_path, SMALL, 1, resize=True).train.images.shape == (1, 3, 4, 5)
    (tmp_path / "cat/1.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        load_splits(tmp_path, SMALL, 1, resize=True)


def test_folders_that_systems_add_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, {".git": 1, "__MACOSX": 1, "cat": 1})
    assert load_splits(tmp_path, SMALL, 1).train.class_names == ("cat",)


def test_a_palette_image_is_scaled_by_its_colours(tmp_path: Path) -> None:
    """Scaled as numbers, half of colour 0 and half of colour 2 would be colour 1."""
    (tmp_path / "cat").mkdir()
    image = Image.new("P", (10, 8))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 200])
    image.putdata([0, 2] * 40)
    image.save(tmp_path / "cat/0.png")
    pixels = load_splits(tmp_path, SMALL, 1, resize=True).train.images
    assert not pixels[0, 0].any() and 0 < pixels[0, 2].mean() < 200


@given(st.integers(1, 12), st.sampled_from([0.05, 0.25, 1.0, 5000.0]), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_partition_deals_out_every_sample_once(devices: int, gamma: float, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 7, 150)
    parts = dirichlet_partition(labels, devices, gamma, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(150))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for a, b in zip(parts, dirichlet_partition(labels, devices, gamma, seed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_small_gamma_skews_and_a_large_one_does_not() -> None:
    labels = np.repeat(np.arange(10), 500)

    def largest_share(gamma: float) -> float:
        parts = dirichlet_partition(labels, 10, gamma, seed=1)
        return float(np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(5000) < 0.14 < 0.25 < largest_share(0.25)


def test_a_partition_of_nonsense_is_refused() -> None:
    for devices, gamma in ((0, 1.0), (4, 1.0), (2, 0.0), (2, math.nan)):
        with pytest.raises(UsageError):
            dirichlet_partition(np.zeros(3, int), devices, gamma, 0)


def test_a_limited_dataset_is_a_seeded_subset() -> None:
    numbered = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 8, 8), np.uint8)
    whole = Dataset(numbered, np.arange(30), ())
    some = whole.take(10, seed=1)
    assert len(some) == 10 and len(set(some.labels.tolist())) == 10
    np.testing.assert_array_equal(some.images[:, 0, 0, 0], some.labels)
    assert whole.take(10, seed=1).digest == some.digest != whole.take(10, seed=2).digest
    assert whole.take(99, seed=1) is whole


def test_tar_members_are_never_written_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("../../batches.meta")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match="batches.meta: refused"):
        load_splits(path, CIFAR, 10)
    assert os.listdir(tmp_path) == ["evil.tar.gz"]
