"""Reads the original CIFAR-10 and CIFAR-100 Python archives without running anything in them.

They are pickles, and a pickle can call any function. Here every name in one is looked up in a table of
stand-ins that only collect an array's shape, type and bytes; any other name is refused.
Source of the format: Krizhevsky, Learning multiple layers of features from tiny images (2009).
"""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.errors import DataError

_MAX_MEMBER_BYTES = 2**28
_SIDE = 32


@dataclass(frozen=True)
class _Layout:
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: bytes
    names: bytes


_LAYOUTS = {
    "CIFAR-10": _Layout(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "batches.meta",
                        b"labels", b"label_names"),
    "CIFAR-100": _Layout(("train",), ("test",), "meta", b"fine_labels", b"fine_label_names"),
}  # fmt: skip


@dataclass(frozen=True)
class CifarSplit:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray


def find_cifar(path: Path) -> bool:
    """Whether a path is an extracted CIFAR folder or a tar archive."""
    if path.is_dir():
        return any((path / layout.meta).is_file() for layout in _LAYOUTS.values())
    return path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar"))


def read_cifar(path: Path) -> tuple[CifarSplit, CifarSplit, tuple[str, ...]]:
    """Train split, test split and class names. Errors: DataError naming the archive and the member."""
    files = _read_folder(path) if path.is_dir() else _read_tar(path)
    for layout in _LAYOUTS.values():
        if layout.meta in files:
            names = _unpickle(files[layout.meta], f"{path}: {layout.meta}").get(layout.names, [])
            train, test = (_read_split(files, part, layout, path) for part in (layout.train, layout.test))
            return (
                train,
                test,
                tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names),
            )
    raise DataError(
        f"{path}: neither CIFAR-10 nor CIFAR-100 in their Python version",
        "give cifar-10-python.tar.gz, cifar-100-python.tar.gz or the folder in them",
    )


def _read_split(files: dict[str, bytes], members: tuple[str, ...], layout: _Layout, path: Path) -> CifarSplit:
    images, labels = [], []
    for member in members:
        where = f"{path}: {member}"
        if member not in files:
            raise DataError(f"{where} is missing", "the archive is incomplete: copy it again")
        content = _unpickle(files[member], where)
        data, numbers = content.get(b"data"), content.get(layout.labels)
        if not isinstance(data, _Array) or not isinstance(numbers, list):
            raise DataError(f"{where} has no data or no {layout.labels.decode()}")
        images.append(data.as_images(where))
        labels.append(np.asarray(numbers, dtype=np.int64))
        if len(labels[-1]) != len(images[-1]):
            raise DataError(f"{where}: {len(images[-1])} images and {len(labels[-1])} labels")
    return CifarSplit(np.concatenate(images), np.concatenate(labels))


def _read_folder(path: Path) -> dict[str, bytes]:
    wanted = {name for layout in _LAYOUTS.values() for name in (*layout.train, *layout.test, layout.meta)}
    files = {}
    for name in wanted:
        if (path / name).is_file():
            if (path / name).stat().st_size > _MAX_MEMBER_BYTES:
                raise DataError(f"{path / name} is larger than {_MAX_MEMBER_BYTES} bytes")
            files[name] = (path / name).read_bytes()
    return files


def _read_tar(path: Path) -> dict[str, bytes]:
    wanted = {name for layout in _LAYOUTS.values() for name in (*layout.train, *layout.test, layout.meta)}
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in wanted:
                    if member.size > _MAX_MEMBER_BYTES:
                        raise DataError(f"{path}: {member.name} is larger than {_MAX_MEMBER_BYTES} bytes")
                    files[name] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a readable tar archive: {error}", "copy it again") from error
    return files


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, _: Any) -> None:
        """Byte order and fields: a byte has none."""


class _Array:
    """Stands for numpy.ndarray: keeps what a pickle says about it."""

    shape: Any = ()
    dtype: Any = None
    content: Any = b""
    fortran: Any = False

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def as_images(self, where: str) -> np.ndarray:
        """The array [N, 3072] as images [N, 3, 32, 32]. Errors: DataError."""
        values = _SIDE * _SIDE * 3
        fits = isinstance(self.dtype, _Dtype) and self.dtype.name == "u1" and isinstance(self.content, bytes)
        if not fits or len(self.shape) != 2 or self.shape[1] != values or self.fortran:
            raise DataError(f"{where}: the images are not bytes of shape [N, {values}]")
        if len(self.content) != self.shape[0] * values:
            raise DataError(f"{where}: {len(self.content)} bytes for {self.shape[0]} images")
        return np.frombuffer(self.content, np.uint8).reshape(-1, 3, _SIDE, _SIDE)


def _new_array(*_: Any) -> _Array:
    return _Array()


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    # how Python 3 writes bytes into an old pickle
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _unpickle(data: bytes, where: str) -> dict[Any, Any]:
    try:
        content = _SafeUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{where}: refused to unpickle: {error}", "use the original archive, or an .npz"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: holds no dictionary")
    return content
