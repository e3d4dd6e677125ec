"""Samples in an `.npz`: arrays by name, a set of them a split."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgestill.runtime.errors import DataError

_NAMES = (
    "x_train", "y_train", "users_train", "x_test", "y_test", "x_val", "y_val", "x", "y", "users", "classes",
    "class_names",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A split as it was found: the arrays of the samples' tensors, labels that number `names`, users of `train`."""

    arrays: list[np.ndarray]
    labels: np.ndarray
    names: tuple[str, ...]
    users: np.ndarray | None = None


def read_npz(path: Path, more: list[str], labelled: bool) -> dict[str, Part]:
    """Splits; a file without splits counts as `train`, and of two splits the second is `test`.

    `more`: names of the further tensors, which stand beside `x_train` as `x_train.NAME`. Labels may be absent when not
    `labelled`; they are empty then.
    """
    arrays = _load(path, _NAMES)
    suffix = "_train" if "x_train" in arrays else ""
    endings = {"train": suffix, "test": "_test"} if "x_test" in arrays else {"train": suffix}
    if "x_val" in arrays:
        endings["validation" if "test" in endings else "test"] = "_val"
    names, parts = _names_in(arrays, path), {}
    for split, ending in endings.items():
        tensors = [f"x{ending}", *(f"x{ending}.{name}" for name in more)]
        for key in (*tensors, *([f"y{ending}"] if labelled else [])):
            if key not in arrays:
                raise DataError(
                    f"{path}: no array {key!r}",
                    "it needs x_train, y_train, x_test and y_test, or x and y"
                    + ("; beside each x the further tensors of its samples" if more else ""),
                )
        labels = arrays.get(f"y{ending}", np.zeros(0, np.int64))
        parts[split] = Part([arrays[key] for key in tensors], labels, names, arrays.get(f"users{suffix}"))
    return parts


def names_in_npz(path: Path) -> tuple[str, ...]:
    """The names of the classes; none where the file has none. Errors: DataError."""
    return _names_in(_load(path, ("classes", "class_names")), path)


def _load(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a file with these names, also with a further name behind a point. Errors: DataError."""
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path}: not a readable .npz, which is a zip of arrays",
            "save samples and labels with numpy.savez",
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name.partition(".")[0] in names}
    except MemoryError as error:
        raise DataError(f"{path}: more than fits memory: {error}", "give fewer or smaller samples") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(
            f"{path}: not a readable .npz: {error}", "give an .npz of plain arrays, without objects"
        ) from error


def _names_in(arrays: Mapping[str, np.ndarray], path: Path) -> tuple[str, ...]:
    named = arrays.get("classes", arrays.get("class_names", np.zeros(0)))
    if named.ndim != 1:
        found = f"{named.dtype}{list(named.shape)}"
        raise DataError(f"{path}: the names of the classes are {found}", "give a list of names")
    return tuple(name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name) for name in named)
