"""The safetensors codec against the official package, both ways, and against damaged bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edgestill.runtime import files
from edgestill.runtime.bundle import wire
from edgestill.runtime.errors import WireError

ARRAYS = st.sampled_from(list(wire.DTYPES.values())).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
FILES = st.dictionaries(NAMES, ARRAYS, max_size=5)
METADATA = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3)


def encoded(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(wire.encode(arrays, metadata))


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()  # bytes, so that NaN equals itself


@given(FILES, METADATA)
@settings(max_examples=150, deadline=None)
def test_the_official_package_reads_what_we_write(
    arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    assert_same(safetensors.numpy.load(encoded(arrays, metadata)), arrays)


@given(FILES, METADATA)
@settings(max_examples=150, deadline=None)
def test_we_read_what_the_official_package_writes(
    arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    read = wire.decode(safetensors.numpy.save(arrays, metadata or None))
    assert_same(read.arrays, arrays)
    assert read.metadata == metadata
    assert all(array.flags.writeable for array in read.arrays.values())


@given(FILES, st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_end_in_our_error_or_in_other_values(
    arrays: dict[str, np.ndarray], data: st.DataObject
) -> None:
    good = bytearray(encoded(arrays, {"key": "value"}))
    if data.draw(st.booleans()):
        damaged = bytes(good[: data.draw(st.integers(0, len(good) - 1))])
        with pytest.raises(WireError):
            wire.decode(damaged)
        return
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= data.draw(st.integers(1, 255))
    try:
        read = wire.decode(bytes(good))
    except WireError:
        return
    assert sum(array.nbytes for array in read.arrays.values()) <= len(good)


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(
    shape: list[object], offsets: list[object], dtype: str = "F32", **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        ((2**62).to_bytes(8, "little") + b"{}", "more than the limit"),
        ((100).to_bytes(8, "little") + b"{}", "the header says 100"),
        (with_header(b"[]"), "does not start"),
        (with_header(b"{nonsense"), "not valid JSON"),
        (with_header("{}".encode("utf-16-le")), "not valid JSON"),
        (with_header(b"{" * 5000), "not valid JSON"),
        (with_header(b'{"a":1,"a":2}'), "stands twice"),
        (with_header(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "not valid JSON"),
        (with_header({"__metadata__": {"a": 1}}), "text to text"),
        (with_header({"a": entry([1], [0, 4], "BF16")}, bytes(4)), "dtype 'BF16'"),
        (with_header({"a": entry([1], [0, 4], extra=1)}, bytes(4)), "exactly"),
        (with_header({"a": entry([-1], [0, 4])}, bytes(4)), "not a list"),
        (with_header({"a": entry([True], [0, 4])}, bytes(4)), "not a list"),
        (with_header({"a": entry([1.0], [0, 4])}, bytes(4)), "not a list"),
        (with_header({"a": entry([1] * 9, [0, 4])}, bytes(4)), "at most 8 sizes"),
        (with_header({"a": entry([1], [4, 0])}, bytes(4)), "not [start, stop]"),
        (with_header({"a": entry([2], [0, 4])}, bytes(4)), "do not hold"),
        (with_header({"a": entry([0, 2**62, 2**62], [0, 0])}), "too large"),
        (with_header({"a": entry([1], [4, 8])}, bytes(8)), "leaves a gap"),
        (with_header({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, bytes(4)), "overlaps"),
        (with_header({"a": entry([1], [0, 4])}, bytes(3)), "the file holds 3"),
        (with_header({"a": entry([1], [0, 4])}, bytes(5)), "the file holds 5"),
    ],
)
def test_malformed_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(WireError) as error:
        wire.decode(data, source="here")
    assert message in error.value.message and error.value.message.startswith("here")


def test_limits_hold_before_anything_is_allocated() -> None:
    data = encoded({"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)})
    for limits in (wire.Limits(tensors=1), wire.Limits(total_bytes=10), wire.Limits(header_bytes=10)):
        with pytest.raises(WireError, match="limit"):
            wire.decode(data, limits)


def test_nan_is_refused_on_request() -> None:
    data = encoded({"a": np.array([1, np.nan], np.float32)})
    assert np.isnan(wire.decode(data).arrays["a"][1])
    with pytest.raises(WireError, match="NaN"):
        wire.decode(data, wire.Limits(finite=True))


def test_dtypes_that_the_format_lacks_are_refused() -> None:
    with pytest.raises(WireError, match="complex"):
        wire.encode({"a": np.zeros(2, np.complex64)})
    assert encoded({"a": np.arange(3, dtype=">f4")}) == encoded({"a": np.arange(3, dtype="<f4")})


def test_saving_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    wire.save(path, {"a": np.zeros(3, np.float32)})
    wire.save(path, {"a": np.ones(3, np.float32)}, {"step": "2"})
    assert wire.load(path).metadata == {"step": "2"}
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    wire.save(path, {"a": np.zeros(3, np.float32)})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(WireError, match="No space left"):
        wire.save(path, {"a": np.ones(3, np.float32)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["state.safetensors"]


def test_missing_files_and_folders_are_our_errors(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="cannot read"):
        wire.load(tmp_path / "none.safetensors")
    with pytest.raises(WireError, match="cannot write"):
        wire.save(tmp_path / "none" / "x.safetensors", {})
