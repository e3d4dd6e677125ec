"""Labelled samples for a bundle: shipped sets, CIFAR archives, .npz files, folders of images a class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.data.cifar import find_cifar, read_cifar
from edgestill.runtime.data.classes import KnownClasses, check_names, join_names, translate
from edgestill.runtime.data.datasets import SHIPPED
from edgestill.runtime.data.notice import Tell, tell_on_stderr
from edgestill.runtime.data.npz_file import Part, names_in_npz, read_npz
from edgestill.runtime.data.partition import dirichlet_partition
from edgestill.runtime.errors import DataError, UsageError
from edgestill.runtime.randomness import SUBSET, permutation

__all__ = [
    "Dataset",
    "Splits",
    "class_names_from",
    "class_names_of",
    "dirichlet_partition",
    "load_splits",
    "load_transfer_samples",
]


@dataclass(frozen=True)
class Dataset:
    """Samples as the bundle takes them; labels int64 [N]; one name a class.

    `images` is the first tensor of the samples, of whatever kind: images [N, C, H, W], windows [N, channels, length],
    tokens [N, length]; `more` are the further ones, each [N, …], where a sample has several. `users` [N] names whose
    sample each is, as text or integers; None where the data do not say.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    users: np.ndarray | None = None
    more: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of samples and labels with their shapes."""
        return digest_of_arrays(*self.samples, self.labels)

    @property
    def samples(self) -> tuple[np.ndarray, ...]:
        """All tensors of the samples, in the bundle's order."""
        return (self.images, *self.more)

    def take(self, count: int, seed: int) -> Dataset:
        """At most `count` samples drawn by the seed, in their old order."""
        if count >= len(self):
            return self
        return self.select(np.sort(permutation(seed, SUBSET, 0, len(self))[:count]))

    def select(self, indices: np.ndarray) -> Dataset:
        """The samples with these indices."""
        users = None if self.users is None else self.users[indices]
        more = tuple(array[indices] for array in self.more)
        return Dataset(self.images[indices], self.labels[indices], self.class_names, users, more)


@dataclass(frozen=True)
class Splits:
    """The parts of a data source; one that has a single part has it as `train`, and of two the second is `test`."""

    train: Dataset
    test: Dataset | None
    validation: Dataset | None = None

    def choose(self, name: str | None) -> Dataset:
        """The named split; with None the test split if there is one, else all there is. Errors: UsageError."""
        if name is None:
            return self.test or self.train
        chosen: Dataset | None = getattr(self, name)
        if chosen is None:
            raise UsageError(f"the data have no {name} split", "leave --split out, or give data with one")
        return chosen


def load_splits(
    source: str | Path,
    form: InputSpec,
    classes: int,
    resize: bool = False,
    more: tuple[InputSpec, ...] = (),
    *,
    known: KnownClasses | None = None,
    skip_broken: bool = False,
    tell: Tell = tell_on_stderr,
) -> Splits:
    """Reads a data source in the form that a bundle takes; `more`: its `more_inputs`.

    `known`: what the student's outputs mean; data that name their classes are counted by these names, others as they
    stand. `resize` scales images, `skip_broken` leaves out those that cannot be read. Errors: DataError naming the file
    and what is wrong; UsageError.
    """
    found = _read(source, form, resize, more, skip_broken, tell)
    own = found["train"].names
    reference = known or KnownClasses(own, "the training split")
    sets = {}
    for name, part in found.items():
        where, labels = f"{source}: {name}", part.labels
        check_names(part.names, where)
        numbers = labels.dtype.kind in "iu" and labels.ndim == 1
        if reference and part.names and part.names != reference.names and numbers:
            labels = translate(labels, part.names, reference, where, tell)
        fitted = fit_dataset(part.arrays, labels, (form, *more), classes, where)
        users = None if name != "train" else _fit_users(part.users, len(fitted), where)
        sets[name] = replace(fitted, class_names=reference.names, users=users)
    if len(reference.names) > classes:
        whose = reference.whose if known else str(source)
        raise DataError(
            f"{whose} names {len(reference.names)} classes, the bundle has {classes}: {join_names(reference.names)}",
            "labels count the classes in order: remove what is of no class, also folders that are empty, or export "
            "with --classes",
        )
    return Splits(sets["train"], sets.get("test"), sets.get("validation"))


def class_names_from(given: str | Sequence[str]) -> tuple[str, ...]:
    """Class names as a person gives them: a list, with commas between them, or a data source that has them.

    Errors: UsageError, DataError.
    """
    if isinstance(given, str):
        if "," not in given or Path(given).exists():
            return class_names_of(given)
        given = [name.strip() for name in given.split(",")]
    return check_names(given, "the class names")


def class_names_of(source: str | Path) -> tuple[str, ...]:
    """The names of a data source's classes, in its own order. Errors: UsageError, DataError where it has none."""
    path = find_source(source)
    if find_cifar(path):
        names = read_cifar(path)[2]
    elif path.is_dir():
        from edgestill.runtime.data.image_folder import class_folders, find_splits, walk

        tree = walk(path)
        names = class_folders(tree, find_splits(tree)["train"])
    else:
        names = names_in_npz(path)
    if not names:
        raise DataError(f"{source} does not name its classes", "name them, separated by commas")
    return check_names(names, str(source))


def fit_dataset(
    arrays: Sequence[np.ndarray], labels: np.ndarray, forms: tuple[InputSpec, ...], classes: int, where: str
) -> Dataset:
    """Labelled samples in the form that a bundle takes, of one array for each tensor. Errors: DataError."""
    first, *more = fit_tensors(arrays, forms, where)
    return Dataset(first, _fit_labels(labels, len(first), classes, where), (), None, tuple(more))


def load_transfer_samples(
    source: str | Path,
    form: InputSpec,
    resize: bool = False,
    more: tuple[InputSpec, ...] = (),
    *,
    skip_broken: bool = False,
    tell: Tell = tell_on_stderr,
) -> tuple[np.ndarray, ...]:
    """The samples of a transfer set, whose labels nobody looks at: of all splits that are not for testing.

    The images of a folder may lie in it as they like.
    """
    part = _read(source, form, resize, more, skip_broken, tell, labelled=False)["train"]
    return fit_tensors(part.arrays, (form, *more), str(source))


def read_unlabelled(
    source: str, forms: tuple[InputSpec, ...], split: str | None, tell: Tell
) -> list[np.ndarray]:
    """The tensors of a split's samples as they are found, labelled or not; None: the test split if there is one, else
    all there is. Errors: DataError, UsageError."""
    first, *more = forms
    parts = _read(source, first, False, tuple(more), False, tell, labelled=False)
    name = split or ("test" if "test" in parts else "train")
    if name not in parts:
        raise UsageError(f"{source} has no {name} split", f"it has {' and '.join(parts)}; or leave --split out")
    return parts[name].arrays


def _read(
    source: str | Path,
    form: InputSpec,
    resize: bool,
    more: tuple[InputSpec, ...],
    skip_broken: bool,
    tell: Tell,
    labelled: bool = True,
) -> dict[str, Part]:
    """By split, `train` first."""
    path = find_source(source)
    if not (find_cifar(path) or path.is_dir()):
        return read_npz(path, [spec.name for spec in more], labelled)
    if more:
        raise DataError(
            f"{source}: holds images, the bundle takes {1 + len(more)} tensors a sample",
            f"give an .npz with arrays x_train and {', '.join(f'x_train.{spec.name}' for spec in more)}",
        )
    if find_cifar(path):
        train, test, names = read_cifar(path)
        return {
            "train": Part([train.images], train.labels, names),
            "test": Part([test.images], test.labels, names),
        }
    from edgestill.runtime.data import image_folder  # imported when first needed: it delays the start

    if not labelled:
        images = image_folder.read_unlabelled_folder(path, form, resize, skip_broken, tell)
        return {"train": Part([images], np.zeros(0, np.int64), ())}
    found = image_folder.read_image_folder(path, form, resize, skip_broken, tell)
    return {name: Part([split.images], split.labels, split.names) for name, split in found.items()}


def fit_tensors(
    arrays: Sequence[np.ndarray], forms: tuple[InputSpec, ...], where: str
) -> tuple[np.ndarray, ...]:
    """`fit_samples` for every tensor of the samples. Errors: DataError."""
    if len(arrays) != len(forms):
        raise DataError(
            f"{where}: {len(arrays)} tensors, the bundle takes {len(forms)} "
            f"({', '.join(form.name for form in forms)})",
            "give one array for each of them",
        )
    fitted = []
    for number, (array, form) in enumerate(zip(arrays, forms, strict=True)):
        place = f"{where}: {form.name}" if number else where
        fitted.append(fit_samples(array, form, place))
        if len(array) != len(arrays[0]):
            raise DataError(
                f"{place}: {len(array)} samples, the first tensor has {len(arrays[0])}",
                "give every sample all of its tensors",
            )
    return tuple(fitted)


def digest_of_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays with their shapes and dtypes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    return digest.hexdigest()


def fit_samples(samples: np.ndarray, form: InputSpec, where: str) -> np.ndarray:
    """One tensor of all samples, contiguous [N, …] in the bundle's shape and dtype.

    uint8 images may be N×H×W×C; axes of length one may be missing or in excess. Integers of any width may feed int64,
    floats float32. Errors: DataError.
    """
    if samples.ndim == 0 or len(samples) == 0:
        raise DataError(f"{where}: no samples")
    kinds, what, instead = _KINDS[form.dtype]
    if samples.dtype.kind not in kinds or (form.dtype == "uint8" and samples.dtype != np.uint8):
        raise DataError(
            f"{where}: samples are {samples.dtype}, the bundle takes {what}",
            f"convert them, or export with {instead}",
        )
    shape = samples.shape[1:]
    if form.is_image and form.dtype == "uint8" and shape == (*form.shape[1:], form.shape[0]):
        return np.ascontiguousarray(samples.transpose(0, 3, 1, 2))
    if [n for n in shape if n != 1] != [n for n in form.shape if n != 1]:
        axes = " (channels, height, width)" if form.is_image else ""
        raise DataError(
            f"{where}: samples have shape {'x'.join(map(str, shape)) or 1}, "
            f"the bundle takes {'x'.join(map(str, form.shape))}{axes} of {form.dtype}",
            "convert the data, or export the student with --input-shape",
        )
    if form.dtype == "float32" and not np.isfinite(samples).all():
        raise DataError(f"{where}: samples hold NaN or infinity", "remove or fill those samples")
    if form.dtype == "int64" and not 0 <= int(samples.min()) <= int(samples.max()) < 2**63:
        wrong = samples.min() if samples.min() < 0 else samples.max()
        raise DataError(
            f"{where}: token {wrong} is not from 0 up",
            "number the tokens from 0, and pad with a number of the student's vocabulary",
        )
    return np.ascontiguousarray(samples, dtype=form.dtype).reshape(-1, *form.shape)


_KINDS = {
    "uint8": ("u", "uint8 grey levels 0-255", "--input-dtype float32"),
    "float32": ("f", "float32", "--input-dtype uint8"),
    "int64": ("iu", "int64, whole numbers", "--input-dtype float32"),
}
"""By the bundle's dtype: what kinds of NumPy dtypes feed it, in words, and another dtype to export with."""


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
