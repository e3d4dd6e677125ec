"""Outputs on the wire: latents, logits or parameters in fp32, fp16 or int8, read within what is expected.

A body is a safetensors file (`wire`), as it is or compressed by Zstandard. Its metadata carries `format` and
`precision`; what else stands there is the caller's. Form: docs/federation.md, "Uploads and published outputs".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.errors import WireError

FORMAT = "edgestill-outputs"
PRECISIONS = ("fp32", "fp16", "int8")
CONTENT_ENCODINGS = ("identity", "zstd")

_SCALE = ".scale"
_DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
_LARGEST_INT8 = 127
_SCALE_BITS = 17
"""Significant bits of a scale: with the 7 of an int8 the product fits float32's 24, so decoding never rounds."""

_COMPRESSION_LEVEL = 3
_SMALLEST_GAIN = 0.05
"""Share of the bytes that compression must save: below it, a device's time to decode costs more."""

_METADATA_BYTES = 32 * 2**10
MOST_CLASS_COUNTS = 3000
"""Up to so many classes, counts of 999,999,999 samples each still fit into the metadata."""
_ENTRY_BYTES = 256
_WINDOW_BYTES = 8 * 2**20  # what RFC 8878 asks every decoder to support


class WrongOutputs(WireError):
    """A well-formed body that holds other tensors, shapes, types or values than those expected."""


class UnknownEncoding(WireError):
    """A content encoding that is not read."""


@dataclass(frozen=True)
class Packed:
    """A body ready to send."""

    body: bytes
    content_encoding: str
    """`identity` or `zstd`."""
    max_error: dict[str, float]
    """The largest |value - decoded value| of each tensor."""
    metadata: dict[str, str]


def pack(
    arrays: Mapping[str, np.ndarray],
    precision: str,
    metadata: Mapping[str, str] | None = None,
    compress: bool = True,
) -> Packed:
    """The body that carries `arrays`, taken as float32; the same arguments always give the same bytes.

    fp16: values are rounded to the nearest. int8: every row (entry of the first axis) has a scale of its own, and
    no value is further than half of it from what `unpack` returns. Zstandard is used if `compress`, the package
    `backports.zstd` is installed, and it saves at least a twentieth.
    Errors: WireError for values that are not finite or do not fit the precision, and for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise WireError(f"precision {precision!r} is not known", f"one of {', '.join(PRECISIONS)}")
    tensors: dict[str, np.ndarray] = {}
    max_error: dict[str, float] = {}
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            values = np.asarray(array).astype(np.float32)
        if not np.isfinite(values).all():
            raise WireError(
                f"outputs {name!r}: NaN or infinity cannot be sent",
                "the training diverged; a smaller learning rate may help",
            )
        encoded = _encode(name, values, precision)
        if not encoded.keys().isdisjoint(tensors):
            raise WireError(f"outputs {name!r}: {name + _SCALE!r} is the name of another tensor too")
        tensors.update(encoded)
        decoded = _decode(name, encoded, precision, "outputs")
        max_error[name] = float(np.abs(values.astype(np.float64) - decoded).max(initial=0.0))
    described = {**(metadata or {}), "format": FORMAT, "precision": precision}
    body = b"".join(wire.encode(tensors, described))
    zstd = _import_zstd() if compress else None
    if zstd is not None:
        smaller = zstd.compress(body, level=_COMPRESSION_LEVEL)
        if len(smaller) <= len(body) * (1 - _SMALLEST_GAIN):
            return Packed(smaller, "zstd", max_error, described)
    return Packed(body, "identity", max_error, described)


def unpack(
    body: bytes | bytearray | memoryview,
    content_encoding: str,
    expected: Mapping[str, tuple[int, ...]],
    *,
    source: str = "outputs",
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The float32 arrays and the metadata of a body that holds exactly the tensors `expected` (name to shape).

    Sizes are checked before anything is allocated: a body, compressed or not, takes at most `largest_body` bytes.
    Errors, all naming `source`: UnknownEncoding; WrongOutputs for other tensors, shapes or types, and for NaN or
    infinity; WireError for anything else that `pack` would not write.
    """
    limit_bytes = largest_body(expected)
    if content_encoding not in CONTENT_ENCODINGS:
        raise UnknownEncoding(
            f"{source}: content encoding {content_encoding[:40]!r} is not read",
            f"send one of {', '.join(CONTENT_ENCODINGS)}",
        )
    if len(body) > limit_bytes:
        raise WireError(f"{source}: {len(body)} bytes, more than the limit of {limit_bytes}")
    if content_encoding == "zstd":
        body = _decompress(bytes(body), limit_bytes, source)
    limits = wire.Limits(
        header_bytes=_header_bytes(expected),
        total_bytes=limit_bytes,
        tensors=2 * len(expected),
        rank=max(map(len, expected.values()), default=0) or 1,
    )
    tensors = wire.decode(body, limits, source=source)
    if tensors.metadata.get("format") != FORMAT:
        raise WrongOutputs(f"{source}: its metadata does not say format {FORMAT!r}")
    precision = tensors.metadata.get("precision", "")
    if precision not in PRECISIONS:
        raise WrongOutputs(
            f"{source}: its metadata does not say a precision", f"one of {', '.join(PRECISIONS)}"
        )
    _check_tensors(tensors.arrays, expected, precision, source)
    return {name: _decode(name, tensors.arrays, precision, source) for name in expected}, tensors.metadata


def largest_body(expected: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that no body of `pack` with these tensors exceeds in any precision, before or after compression.

    Metadata is allowed 32 KiB of it, which holds a class count of several thousand classes.
    """
    size_bytes = 8 + _header_bytes(expected)
    for shape in expected.values():
        values = math.prod(shape)
        size_bytes += max(4 * values, values + 4 * _rows(shape))
    return size_bytes


def _encode(name: str, values: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    if precision == "int8":
        rows = values.reshape(_rows(values.shape), -1) if values.size else np.zeros((_rows(values.shape), 0))
        scale = _scale_rows(np.abs(rows).max(axis=1, initial=0.0).astype(np.float64))
        with np.errstate(over="ignore"):
            if not np.isfinite(scale * np.float32(_LARGEST_INT8)).all():
                raise WireError(
                    f"outputs {name!r}: values up to {np.abs(rows).max():g} do not fit int8",
                    "the training diverged; a smaller learning rate may help",
                )
        divisor = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
        # In float64 the quotient of two float32 never lands on the wrong side of a half.
        steps = np.rint(rows / divisor).astype(np.int8)
        return {name: steps.reshape(values.shape), name + _SCALE: scale}
    with np.errstate(over="ignore"):
        rounded = values.astype(_DTYPES[precision])
    if not np.isfinite(rounded).all():
        raise WireError(
            f"outputs {name!r}: values up to {np.abs(values).max():g} do not fit {precision}, which ends at 65504",
            "choose precision int8 or fp32 for the task",
        )
    return {name: rounded}


def _scale_rows(largest: np.ndarray) -> np.ndarray:
    """A float32 scale for each row, at least largest / 127, of `_SCALE_BITS` bits: a multiple of it is exact."""
    fraction, exponent = np.frexp(largest / _LARGEST_INT8)
    needed = np.ldexp(np.ceil(np.ldexp(fraction, _SCALE_BITS)), exponent - _SCALE_BITS)
    with np.errstate(over="ignore", under="ignore"):
        scale = needed.astype(np.float32)
    # Only subnormal numbers are rounded here; a scale rounded down could not reach the row's largest value.
    return np.where(scale < needed, np.nextafter(scale, np.float32(np.inf)), scale)


def _decode(name: str, tensors: Mapping[str, np.ndarray], precision: str, source: str) -> np.ndarray:
    if precision == "int8":
        steps, scale = tensors[name], tensors[name + _SCALE]
        if not np.isfinite(scale).all() or (scale < 0).any():
            raise WrongOutputs(
                f"{source}: tensor {name + _SCALE!r} holds a scale that is negative or not finite"
            )
        per_row = scale.reshape(steps.shape[:1] + (1,) * (steps.ndim - 1))
        with np.errstate(over="ignore"):
            values = np.asarray(steps.astype(np.float32) * per_row)
    else:
        values = tensors[name].astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise WrongOutputs(f"{source}: tensor {name!r} holds NaN or infinity")
    return values


def _check_tensors(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], precision: str, source: str
) -> None:
    wanted = {name: (_DTYPES[precision], tuple(shape)) for name, shape in expected.items()}
    if precision == "int8":
        wanted |= {name + _SCALE: (np.dtype(np.float32), (_rows(shape),)) for name, shape in expected.items()}
    if arrays.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
        raise WrongOutputs(
            f"{source}: tensors missing: {_some(missing)}; not expected: {_some(extra)}",
            "the task's exchange says what to send",
        )
    for name, (dtype, shape) in wanted.items():
        if (arrays[name].dtype, arrays[name].shape) != (dtype, shape):
            raise WrongOutputs(
                f"{source}: tensor {name!r} is {arrays[name].dtype} {list(arrays[name].shape)}, "
                f"not {dtype} {list(shape)}"
            )


def _decompress(body: bytes, limit_bytes: int, source: str) -> bytes:
    """The content of exactly one Zstandard frame, of at most `limit_bytes`. Source: RFC 8878."""
    zstd = _import_zstd()
    if zstd is None:
        raise UnknownEncoding(
            f"{source}: compressed by Zstandard, which is not installed", "pip install 'edgestill[device]'"
        )
    try:
        claimed = zstd.get_frame_info(body).decompressed_size
        if claimed is not None and claimed > limit_bytes:
            raise WireError(f"{source}: decompresses to {claimed} bytes, more than the limit of {limit_bytes}")
        window_log = (max(_WINDOW_BYTES, limit_bytes) - 1).bit_length()
        _, largest_log = zstd.DecompressionParameter.window_log_max.bounds()
        options = {zstd.DecompressionParameter.window_log_max: min(window_log, largest_log)}
        decompressor = zstd.ZstdDecompressor(options=options)
        content = decompressor.decompress(body, max_length=limit_bytes)
        # what is more than the limit comes with the next call, and so does the end of a frame that is that long
        more = b"" if decompressor.eof else decompressor.decompress(b"", max_length=1)
        if more or not decompressor.eof or decompressor.unused_data:
            raise ValueError("longer than that, cut off, or followed by something")
        return content
    except (zstd.ZstdError, ValueError, EOFError, MemoryError) as error:
        raise WireError(
            f"{source}: not a Zstandard frame of at most {limit_bytes} bytes: {error}",
            "the body was damaged, or its Content-Encoding is wrong",
        ) from error


def _header_bytes(expected: Mapping[str, tuple[int, ...]]) -> int:
    # Every tensor may have an entry of its own and one for its scale.
    return _METADATA_BYTES + sum(
        2 * (_ENTRY_BYTES + len(json.dumps(name)) + 24 * len(shape)) for name, shape in expected.items()
    )


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) else 1


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:3])
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


def _import_zstd() -> ModuleType | None:
    try:
        from backports import zstd
    except ImportError:
        return None
    return zstd
