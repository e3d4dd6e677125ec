"""Labelled images for a bundle: shipped sets, CIFAR archives, .npz files, folders of images a class."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.data.cifar import find_cifar, read_cifar
from edgestill.runtime.data.datasets import SHIPPED
from edgestill.runtime.data.image_folder import is_image_folder, read_image_folder
from edgestill.runtime.data.partition import dirichlet_partition
from edgestill.runtime.errors import DataError, UsageError
from edgestill.runtime.randomness import SUBSET, permutation

__all__ = ["Dataset", "Splits", "dirichlet_partition", "load_splits", "load_transfer_images"]


@dataclass(frozen=True)
class Dataset:
    """Images [N, C, H, W], uint8 or float32, as the bundle takes them; labels int64 [N]; one name a class.

    `users` [N] names whose sample each is, as text or integers; None where the data do not say.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    users: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images and labels with their shapes."""
        return digest_of_arrays(self.images, self.labels)

    def take(self, count: int, seed: int) -> Dataset:
        """At most `count` samples drawn by the seed, in their old order."""
        if count >= len(self):
            return self
        return self.select(np.sort(permutation(seed, SUBSET, 0, len(self))[:count]))

    def select(self, indices: np.ndarray) -> Dataset:
        """The samples with these indices."""
        users = None if self.users is None else self.users[indices]
        return Dataset(self.images[indices], self.labels[indices], self.class_names, users)


@dataclass(frozen=True)
class Splits:
    """The parts of a data source; one that has a single part has it as `train`."""

    train: Dataset
    test: Dataset | None

    def choose(self, name: str | None) -> Dataset:
        """The named split; with None the test split if there is one, else all there is. Errors: UsageError."""
        if name == "test" and self.test is None:
            raise UsageError("the data have no test split", "leave --split out, or give data with one")
        if name == "train" or self.test is None:
            return self.train
        return self.test


def load_splits(source: str | Path, form: InputSpec, classes: int, resize: bool = False) -> Splits:
    """Reads a data source in the form that a bundle takes.

    `resize` scales the images of a folder. Errors: DataError naming the file and what is wrong; UsageError.
    """
    path, users = find_source(source), None
    if find_cifar(path):
        train, test, names = read_cifar(path)
        parts = {"train": (train.images, train.labels), "test": (test.images, test.labels)}
    elif is_image_folder(path):
        parts, names = read_image_folder(path, form, resize)
    else:
        parts, names, users = _read_npz(path)
    sets = {}
    for name, (images, labels) in parts.items():
        where = f"{source}: {name}"
        images = fit_images(images, form, where)
        of_users = None if name == "test" else _fit_users(users, len(images), where)
        sets[name] = Dataset(images, _fit_labels(labels, len(images), classes, where), names, of_users)
    return Splits(sets["train"], sets.get("test"))


def load_transfer_images(source: str | Path, form: InputSpec, resize: bool = False) -> np.ndarray:
    """The images of a transfer set, whose labels nobody looks at: of all splits that are not for testing."""
    path = find_source(source)
    if find_cifar(path):
        images: np.ndarray = read_cifar(path)[0].images
    elif is_image_folder(path):
        images = read_image_folder(path, form, resize)[0]["train"][0]
    else:
        images = _read_npz(path, labelled=False)[0]["train"][0]
    return fit_images(images, form, str(source))


def digest_of_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays with their shapes and dtypes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    return digest.hexdigest()


def fit_images(images: np.ndarray, form: InputSpec, where: str) -> np.ndarray:
    """The images as contiguous [N, C, H, W] of the bundle's dtype.

    uint8 may be N×H×W×C, N×C×H×W, or N×H×W with one channel; float may lack axes of length one.
    Errors: DataError.
    """
    channels, height, width = form.shape
    expected = f"{channels}x{height}x{width} (channels, height, width) of {form.dtype}"
    if images.ndim == 0 or len(images) == 0:
        raise DataError(f"{where}: no samples")
    if form.dtype == "uint8":
        if images.dtype != np.uint8:
            raise DataError(
                f"{where}: images are {images.dtype}, the bundle takes uint8 grey levels",
                "give images 0-255 as uint8, or export with --input-dtype float32",
            )
        if images.shape[1:] == (height, width, channels):
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if images.shape[1:] == form.shape or (channels == 1 and images.shape[1:] == (height, width)):
            return np.ascontiguousarray(images.reshape(-1, *form.shape))
    else:
        if images.dtype.kind != "f":
            raise DataError(
                f"{where}: samples are {images.dtype}, the bundle takes float32",
                "give float32 samples, or export with --input-dtype uint8",
            )
        if [n for n in images.shape[1:] if n != 1] == [n for n in form.shape if n != 1]:
            samples = np.ascontiguousarray(images, dtype=np.float32).reshape(-1, *form.shape)
            if not np.isfinite(samples).all():
                raise DataError(f"{where}: samples hold NaN or infinity", "remove or fill those samples")
            return samples
    found = "x".join(map(str, images.shape[1:]))
    raise DataError(
        f"{where}: samples have shape {found}, the bundle takes {expected}",
        "convert the data, or export the student with --input-shape",
    )


def _fit_labels(labels: np.ndarray, samples: int, classes: int, where: str) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) != samples:
        raise DataError(f"{where}: labels are {labels.dtype}{list(labels.shape)}, not {samples} integers")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise DataError(
            f"{where}: label {wrong} is outside 0 … {classes - 1}, the bundle's classes",
            "give data of the bundle's classes, or export with --classes",
        )
    return labels.astype(np.int64)


def _fit_users(users: np.ndarray | None, samples: int, where: str) -> np.ndarray | None:
    if users is not None and (users.dtype.kind not in "iuU" or users.shape != (samples,)):
        raise DataError(
            f"{where}: users are {users.dtype}{list(users.shape)}, not {samples} names or integers",
            "give the user of every training sample, or leave the array out",
        )
    return users


def find_source(source: str | Path) -> Path:
    """Where a shipped data set or a path lies. Errors: UsageError when there is none."""
    if str(source) in SHIPPED:
        return SHIPPED[str(source)]
    path = Path(source)
    if not path.exists():
        raise UsageError(
            f"no data called {str(source)!r}",
            f"give {' or '.join(SHIPPED)}, a CIFAR archive, an .npz or an image folder",
        )
    return path


def _read_npz(
    path: Path, labelled: bool = True
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...], np.ndarray | None]:
    """Splits as (images, labels), the class names and the users of `train`; a file without splits counts as `train`.

    Labels may be absent when not `labelled`; they are empty then.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path}: not a readable .npz, which is a zip of arrays",
            "save images and labels with numpy.savez",
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in _NPZ_NAMES}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(
            f"{path}: not a readable .npz: {error}", "give an .npz of plain arrays, without objects"
        ) from error
    suffix = "_train" if "x_train" in arrays else ""
    keys = {"train": (f"x{suffix}", f"y{suffix}")}
    if "x_test" in arrays:
        keys["test"] = ("x_test", "y_test")
    for key in (key for pair in keys.values() for key in (pair if labelled else pair[:1])):
        if key not in arrays:
            raise DataError(
                f"{path}: no array {key!r}", "it needs x_train, y_train, x_test and y_test, or x and y"
            )
    parts = {split: (arrays[x], arrays.get(y, np.zeros(0, np.int64))) for split, (x, y) in keys.items()}
    named = arrays.get("classes", arrays.get("class_names", np.zeros(0)))
    names = tuple(str(name) for name in named) if named.ndim == 1 else ()
    return parts, names, arrays.get(f"users{suffix}")


_NPZ_NAMES = (
    "x_train", "y_train", "users_train", "x_test", "y_test", "x", "y", "users", "classes", "class_names",
)  # fmt: skip
