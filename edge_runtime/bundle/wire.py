"""safetensors files in NumPy, read with limits: what arrives is checked before it is allocated.

Format: 8 bytes little-endian header size, a JSON header `{name: {dtype, shape, data_offsets}}` with text
metadata under `__metadata__`, then the tensors' bytes without a gap. Source: huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgestill.runtime.errors import WireError
from edgestill.runtime.files import write_atomically

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Limits:
    """What a reader accepts at most."""

    header_bytes: int = 8 * 2**20
    total_bytes: int = 4 * 2**30
    tensors: int = 20_000
    rank: int = 8
    finite: bool = False
    """Whether a NaN or an infinity in a floating-point tensor is refused."""


@dataclass(frozen=True)
class Tensors:
    """A safetensors file in memory: arrays by name, and its metadata."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str] = field(default_factory=dict)


def encode(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """The file as chunks to write one after another; the same arrays and metadata always give the same bytes.

    Tensors are ordered by falling alignment, then by name, as the official writer does.
    Errors: WireError for a dtype that the format lacks, or a name or metadata that is not text.
    """
    prepared: dict[str, tuple[str, np.ndarray]] = {}
    for name, array in arrays.items():
        little_endian = np.asarray(array).dtype.newbyteorder("<")
        if not isinstance(name, str) or name == "__metadata__":
            raise WireError(f"a tensor cannot be named {name!r}")
        if little_endian not in _NAMES:
            raise WireError(
                f"tensor {name!r} has dtype {np.asarray(array).dtype}, which is not written",
                f"convert it to one of {', '.join(str(d) for d in _NAMES)}",
            )
        # ascontiguousarray alone would turn a scalar into a vector of one
        data = np.ascontiguousarray(array, dtype=little_endian).reshape(np.shape(array))
        prepared[name] = (_NAMES[little_endian], data)
    order = sorted(prepared, key=lambda name: (-prepared[name][1].itemsize, name))
    header: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise WireError(f"metadata {key!r}: keys and values must be text")
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in order:
        dtype_name, data = prepared[name]
        header[name] = {
            "dtype": dtype_name,
            "shape": list(data.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    text = _to_utf8(json.dumps(header, separators=(",", ":"), ensure_ascii=False))
    text += b" " * (-len(text) % _ALIGNMENT)
    chunks: list[bytes | memoryview] = [len(text).to_bytes(8, "little") + text]
    chunks += [
        memoryview(prepared[name][1].reshape(-1)).cast("B") for name in order if prepared[name][1].size
    ]
    return chunks


def decode(
    data: bytes | bytearray | memoryview, limits: Limits = Limits(), *, source: str = "data"
) -> Tensors:
    """Reads a whole file; every array is a copy of its own, writable and aligned.

    Errors: WireError naming `source`, for anything but a well-formed file within `limits`.
    """
    view = memoryview(data).cast("B")
    if len(view) > limits.total_bytes:
        raise WireError(f"{source}: {len(view)} bytes, more than the limit of {limits.total_bytes}")
    if len(view) < 8:
        raise WireError(
            f"{source}: {len(view)} bytes are too short for a safetensors file", "the file was cut off"
        )
    header_bytes = int.from_bytes(view[:8], "little")
    if header_bytes > limits.header_bytes:
        raise WireError(
            f"{source}: header of {header_bytes} bytes, more than the limit of {limits.header_bytes}",
            "this is probably not a safetensors file",
        )
    if 8 + header_bytes > len(view):
        raise WireError(
            f"{source}: the header says {header_bytes} bytes, the file has {len(view)}",
            "the file was cut off",
        )
    entries, metadata = _parse_header(bytes(view[8 : 8 + header_bytes]), limits, source)
    body = view[8 + header_bytes :]
    _check_layout(entries, len(body), source)
    arrays: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        array = np.frombuffer(body[entry.start : entry.stop], dtype=entry.dtype).reshape(entry.shape)
        array = array.astype(entry.dtype.newbyteorder("="), copy=True)
        if limits.finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WireError(f"{source}: tensor {name!r} holds NaN or infinity")
        arrays[name] = array
    return Tensors(arrays, metadata)


def save(
    path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file atomically and durably. Errors: WireError (also when the disk refuses)."""
    try:
        write_atomically(Path(path), encode(arrays, metadata))
    except OSError as error:
        raise WireError(
            f"{path}: cannot write: {error.strerror or error}",
            "check the folder, its rights and the free space",
        ) from error


def load(path: str | Path, limits: Limits = Limits()) -> Tensors:
    """Reads a file. Errors: WireError, also when the file is missing or larger than the limit."""
    path = Path(path)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > limits.total_bytes:
            raise WireError(f"{path}: {size_bytes} bytes, more than the limit of {limits.total_bytes}")
        data = _read(path, size_bytes)
    except OSError as error:
        raise WireError(f"{path}: cannot read: {error.strerror or error}") from error
    return decode(data, limits, source=str(path))


def _read(path: Path, size_bytes: int) -> memoryview:
    """In memory that goes back to the system with its last reader: the allocator would keep what it was given back."""
    data = memoryview(mmap.mmap(-1, max(size_bytes, 1)))
    count = 0
    with path.open("rb", buffering=0) as file:
        while count < size_bytes and (some := file.readinto(data[count:size_bytes])):
            count += some
    return data[:count]


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _parse_header(text: bytes, limits: Limits, source: str) -> tuple[dict[str, _Entry], dict[str, str]]:
    if not text.startswith(b"{"):
        raise WireError(
            f"{source}: the header does not start with '{{'", "this is probably not a safetensors file"
        )
    try:
        # decoded here, strictly: json.loads would guess UTF-16 from bytes
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise WireError(f"{source}: the header is not valid JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WireError(f"{source}: metadata must map text to text")
    if len(header) > limits.tensors:
        raise WireError(f"{source}: {len(header)} tensors, more than the limit of {limits.tensors}")
    return {name: _parse_entry(name, value, limits, source) for name, value in header.items()}, metadata


def _parse_entry(name: str, value: object, limits: Limits, source: str) -> _Entry:
    where = f"{source}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise WireError(
            f"{where} has dtype {value['dtype']!r}, which is not read", f"known dtypes: {', '.join(DTYPES)}"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _is_list_of_sizes(shape) or len(shape) > limits.rank:
        raise WireError(f"{where}: shape {shape!r} is not a list of at most {limits.rank} sizes")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WireError(f"{where}: data_offsets {offsets!r} are not [start, stop]")
    if math.prod(size for size in shape if size) * dtype.itemsize > sys.maxsize:
        raise WireError(f"{where}: shape {shape} is too large")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise WireError(
            f"{where}: {offsets[1] - offsets[0]} bytes do not hold {value['dtype']} of shape {shape}"
        )
    return _Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(entries: Mapping[str, _Entry], body_bytes: int, source: str) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            word = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise WireError(f"{source}: tensor {name!r} at offset {entry.start} {word}")
        position = entry.stop
    if position != body_bytes:
        raise WireError(
            f"{source}: the tensors take {position} bytes, the file holds {body_bytes} after its header",
            "the file was cut off or something was appended",
        )


def _is_list_of_sizes(value: object) -> bool:
    # bool is an int in Python, and a size beyond 63 bits would overflow NumPy
    return isinstance(value, list) and all(type(size) is int and 0 <= size < sys.maxsize for size in value)


def _to_utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise WireError(f"a name or metadata is not valid Unicode text: {error}") from error


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    for key in found:
        key.encode("utf-8")  # a lone surrogate, written as an escape, is no text
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")
