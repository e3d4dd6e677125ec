"""Outputs on the wire: exact bounds, the official reader as oracle, and bodies that nobody honest sends."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edge_runtime import wire
from edge_runtime.errors import WireError
from edge_runtime.outputs import (
    FORMAT,
    PRECISIONS,
    Packed,
    UnknownEncoding,
    WrongOutputs,
    largest_body,
    pack,
    unpack,
)

SHAPES = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
        lambda name: name != "__metadata__" and not name.endswith(".scale")
    ),
    SHAPES.flatmap(lambda shape: npst.arrays(np.float32, shape, elements=VALUES)),
    max_size=4,
)
SMALL = {"latents": np.linspace(-3, 3, 40, dtype=np.float32).reshape(8, 5)}
SMALL_EXPECTED = {"latents": (8, 5)}


def shapes_of(arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def unpacked(packed: Packed, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    decoded, metadata = unpack(packed.body, packed.content_encoding, shapes_of(arrays))
    assert metadata == packed.metadata
    assert shapes_of(decoded) == shapes_of(arrays)
    assert all(array.dtype == np.float32 for array in decoded.values())
    for name, array in arrays.items():
        error = np.abs(array.astype(np.float64) - decoded[name]).max(initial=0.0)
        assert error == packed.max_error[name]
    return decoded


def body_of(tensors: dict[str, np.ndarray], precision: str = "fp32", **metadata: str) -> bytes:
    return b"".join(wire.encode(tensors, {"format": FORMAT, "precision": precision, **metadata}))


@given(TENSORS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_fp32_comes_back_bit_for_bit(arrays: dict[str, np.ndarray], compress: bool) -> None:
    decoded = unpacked(pack(arrays, "fp32", {"samples": "7"}, compress), arrays)
    assert all(decoded[name].tobytes() == array.tobytes() for name, array in arrays.items())


@given(TENSORS)
@settings(max_examples=100, deadline=None)
def test_fp16_is_numpys_rounding_or_an_error_that_names_another_precision(
    arrays: dict[str, np.ndarray],
) -> None:
    with np.errstate(over="ignore"):
        rounded = {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}
    if not all(np.isfinite(array).all() for array in rounded.values()):
        with pytest.raises(WireError, match="65504") as caught:
            pack(arrays, "fp16")
        assert "int8" in (caught.value.hint or "")
        return
    decoded = unpacked(pack(arrays, "fp16"), arrays)
    assert all(np.array_equal(decoded[name], array) for name, array in rounded.items())


@given(TENSORS)
@settings(max_examples=300, deadline=None)
def test_int8_is_off_by_at_most_half_of_the_rows_scale(arrays: dict[str, np.ndarray]) -> None:
    """Exactly so, without a tolerance: over the whole range of float32, subnormal numbers and zero rows included."""
    arrays = {
        name: array / np.float32(1.001) for name, array in arrays.items()
    }  # the very largest are refused
    packed = pack(arrays, "int8", compress=False)
    decoded = unpacked(packed, arrays)
    tensors = safetensors.numpy.load(packed.body)
    for name, array in arrays.items():
        rows = array.shape[0] if array.ndim else 1
        scale = tensors[name + ".scale"]
        assert (scale.shape, scale.dtype, tensors[name].dtype) == ((rows,), np.float32, np.int8)
        error = np.abs(array.astype(np.float64) - decoded[name]).reshape(rows, -1 if array.size else 0)
        assert (error <= scale.astype(np.float64)[:, None] / 2).all()
        largest = np.abs(array).reshape(error.shape).max(axis=1, initial=0.0).astype(np.float64)
        smallest = np.finfo(np.float32).smallest_subnormal
        assert (scale <= largest / 127 * (1 + 2.0**-16) + smallest).all()  # no coarser than need be


def test_the_largest_values_do_not_fit_int8() -> None:
    largest = np.full((1, 1), np.finfo(np.float32).max)
    with pytest.raises(WireError, match="int8"):
        pack({"latents": largest}, "int8")


def test_a_scalar_and_a_vector_have_rows_too() -> None:
    arrays = {"count": np.float32(-3), "bias": np.float32([1, -200, 0])}
    packed = pack(arrays, "int8", compress=False)
    assert unpacked(packed, arrays)["count"].shape == ()
    tensors = safetensors.numpy.load(packed.body)
    assert (tensors["count.scale"].shape, tensors["bias.scale"].shape) == ((1,), (3,))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_official_package_reads_our_bytes(precision: str) -> None:
    packed = pack(SMALL, precision, {"samples": "12", "class_counts": "[3, 9]"}, compress=False)
    tensors = safetensors.numpy.load(packed.body)
    values = tensors["latents"].astype(np.float32)
    if precision == "int8":
        values = values * tensors["latents.scale"][:, None]
    decoded, metadata = unpack(packed.body, "identity", SMALL_EXPECTED)
    assert np.array_equal(values, decoded["latents"])
    assert metadata == {
        "format": "edgestill-outputs",
        "precision": precision,
        "samples": "12",
        "class_counts": "[3, 9]",
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("compress", [True, False])
def test_the_same_values_give_the_same_bytes_in_any_order(precision: str, compress: bool) -> None:
    arrays = {"b": np.ones((4, 3), np.float32), "a": np.arange(12.0).reshape(6, 2)}
    first = pack(arrays, precision, {"samples": "1", "extra": "2"}, compress)
    second = pack(dict(reversed(arrays.items())), precision, {"extra": "2", "samples": "1"}, compress)
    assert first.body == second.body


def test_zstandard_is_used_where_it_pays_and_installed() -> None:
    flat = {"latents": np.ones((100, 16), np.float32)}
    noise = {
        "latents": np.frombuffer(np.random.default_rng(1).bytes(6400), np.uint8)
        .astype(np.int8)
        .reshape(100, 64)
    }
    packed = pack(flat, "fp32")
    assert packed.content_encoding == "zstd"
    plain = pack(flat, "fp32", compress=False)
    assert zstandard.ZstdDecompressor().decompress(packed.body) == plain.body
    assert len(packed.body) < len(plain.body) / 10
    assert pack(noise, "int8").content_encoding == "identity"


def test_a_device_without_zstandard_sends_and_reads_plain_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {"latents": np.ones((100, 16), np.float32)}
    compressed = pack(flat, "fp32")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    plain = pack(flat, "fp32")
    assert plain.content_encoding == "identity"
    unpacked(plain, flat)
    with pytest.raises(UnknownEncoding, match="not installed") as caught:
        unpack(compressed.body, "zstd", {"latents": (100, 16)})
    assert caught.value.hint == "pip install zstandard"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_that_are_not_finite_are_not_packed(value: float, precision: str) -> None:
    with pytest.raises(WireError, match="NaN or infinity"):
        pack({"latents": np.array([[1.0, value]])}, precision)


def test_an_unknown_precision_or_a_name_taken_twice_is_refused() -> None:
    with pytest.raises(WireError, match="fp8"):
        pack(SMALL, "fp8")
    with pytest.raises(WireError, match="another tensor"):
        pack({"a": np.ones(2), "a.scale": np.ones(2)}, "int8")


@given(TENSORS, st.sampled_from(PRECISIONS), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_no_honest_body_is_larger_than_the_limit(
    arrays: dict[str, np.ndarray], precision: str, classes: int
) -> None:
    arrays = {name: np.sign(array) for name, array in arrays.items()}
    counts = json.dumps([100_000] * classes)
    packed = pack(arrays, precision, {"samples": "1", "class_counts": counts}, compress=False)
    assert len(packed.body) <= largest_body(shapes_of(arrays))
    unpacked(packed, arrays)


WRONG = {
    "another name": {"logits": np.ones((8, 5), np.float32)},
    "one more": {**SMALL, "logits": np.ones((8, 5), np.float32)},
    "none": {},
    "transposed": {"latents": np.ones((5, 8), np.float32)},
    "flat": {"latents": np.ones(40, np.float32)},
    "float64": {"latents": np.ones((4, 5))},
    "float16 said to be fp32": {"latents": np.ones((8, 5), np.float16)},
    "integers": {"latents": np.ones((8, 5), np.int32)},
    "NaN": {"latents": np.full((8, 5), np.nan, np.float32)},
    "infinity": {"latents": np.full((8, 5), np.inf, np.float32)},
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("encoding", ["identity", "zstd"])
def test_other_tensors_than_expected_are_wrong_outputs(case: str, encoding: str) -> None:
    body = body_of(WRONG[case])
    body = zstandard.compress(body) if encoding == "zstd" else body
    with pytest.raises(WrongOutputs, match="from d-x"):
        unpack(body, encoding, SMALL_EXPECTED, source="from d-x")


STEPS = np.full((8, 5), 127, np.int8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents": STEPS},
        {"latents": STEPS, "latents.scale": np.ones(5, np.float32)},
        {"latents": STEPS, "latents.scale": np.ones((8, 1), np.float32)},
        {"latents": STEPS, "latents.scale": np.ones(8, np.float16)},
        {"latents": STEPS, "latents.scale": np.full(8, np.nan, np.float32)},
        {"latents": STEPS, "latents.scale": np.full(8, np.inf, np.float32)},
        {"latents": STEPS * 0, "latents.scale": np.full(8, np.inf, np.float32)},
        {"latents": STEPS, "latents.scale": np.full(8, -1, np.float32)},
        {"latents": STEPS, "latents.scale": np.full(8, 3e38, np.float32)},
        {"latents": STEPS.astype(np.float32), "latents.scale": np.ones(8, np.float32)},
    ],
)
def test_scales_that_are_missing_or_absurd_are_wrong_outputs(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(WrongOutputs):
        unpack(body_of(tensors, "int8"), "identity", SMALL_EXPECTED)


def test_metadata_must_say_format_and_precision() -> None:
    for metadata in ({}, {"format": FORMAT}, {"precision": "fp32"}, {"format": FORMAT, "precision": "fp8"}):
        with pytest.raises(WrongOutputs, match="metadata"):
            unpack(b"".join(wire.encode(SMALL, metadata)), "identity", SMALL_EXPECTED)


@pytest.mark.parametrize("encoding", ["gzip", "br", "", "zstd, zstd", "ZSTD", "identity "])
def test_another_content_encoding_is_refused_by_name(encoding: str) -> None:
    with pytest.raises(UnknownEncoding):
        unpack(pack(SMALL, "fp32").body, encoding, SMALL_EXPECTED)


@given(st.sampled_from(PRECISIONS), st.booleans(), st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_bodies_are_refused_or_read_as_other_values(
    precision: str, compress: bool, data: st.DataObject
) -> None:
    packed = pack({"latents": np.round(SMALL["latents"])}, precision, {"samples": "3"}, compress)
    body = bytearray(packed.body)
    if data.draw(st.booleans(), "cut"):
        with pytest.raises(WireError):
            unpack(
                bytes(body[: data.draw(st.integers(0, len(body) - 1))]),
                packed.content_encoding,
                SMALL_EXPECTED,
            )
        return
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded, _ = unpack(bytes(body), packed.content_encoding, SMALL_EXPECTED)
    except WireError:
        return
    assert decoded["latents"].shape == (8, 5) and np.isfinite(decoded["latents"]).all()


@given(st.binary(max_size=400), st.sampled_from(["identity", "zstd"]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_noise_is_refused(noise: bytes, encoding: str, compressed: bool) -> None:
    body = zstandard.compress(noise) if compressed and encoding == "zstd" else noise
    with pytest.raises(WireError):
        unpack(body, encoding, SMALL_EXPECTED)


def test_something_appended_is_refused() -> None:
    flat = {"latents": np.ones((8, 50), np.float32)}
    packed = pack(flat, "fp32")
    assert packed.content_encoding == "zstd"
    plain = pack(flat, "fp32", compress=False).body
    for body, encoding in (
        (packed.body + b"x", "zstd"),
        (packed.body + zstandard.compress(b"x"), "zstd"),
        (zstandard.compress(plain + b"x"), "zstd"),
        (plain + b"x", "identity"),
    ):
        with pytest.raises(WireError):
            unpack(body, encoding, {"latents": (8, 50)})


def test_frames_without_a_size_are_read_too() -> None:
    """Other clients compress as a stream: their frames do not say how large the content is."""
    plain = pack(SMALL, "fp32", compress=False).body
    stream = zstandard.ZstdCompressor().compressobj()
    body = stream.compress(plain) + stream.flush()
    assert zstandard.get_frame_parameters(body).content_size == zstandard.CONTENTSIZE_UNKNOWN
    decoded, _ = unpack(body, "zstd", SMALL_EXPECTED)
    assert np.array_equal(decoded["latents"], SMALL["latents"])
    with pytest.raises(WireError):
        unpack(body[:-1], "zstd", SMALL_EXPECTED)


def header_of(size_bytes: int, text: bytes = b"{}") -> bytes:
    return size_bytes.to_bytes(8, "little") + text


def entry(shape: list[int], stop: int, dtype: str = "F32") -> bytes:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}).encode()


def with_text(text: bytes, body: bytes = b"") -> bytes:
    return header_of(len(text), text) + body


def bomb(size_bytes: int, says_size: bool) -> bytes:
    if says_size:
        return zstandard.compress(bytes(size_bytes))
    stream = zstandard.ZstdCompressor().compressobj()
    return b"".join(stream.compress(bytes(2**20)) for _ in range(size_bytes // 2**20)) + stream.flush()


HUGE = 2**28
LIES = {
    "a header of 2^64 bytes": (header_of(2**64 - 1), "identity"),
    "a header of 1 GiB": (header_of(2**30), "identity"),
    "many tensors": (
        with_text(b"{" + b",".join(b'"%d":' % i + entry([0], 0) for i in range(400)) + b"}"),
        "identity",
    ),
    "a name twice": (
        with_text(
            b'{"latents":' + entry([8, 5], 160) + b',"latents":' + entry([8, 5], 160) + b"}", bytes(160)
        ),
        "identity",
    ),
    "a shape beyond all memory": (
        with_text(b'{"latents":' + entry([2**40, 2**20], 2**62) + b"}"),
        "identity",
    ),
    "a shape of many sizes": (with_text(b'{"latents":' + entry([1] * 500, 4) + b"}", bytes(4)), "identity"),
    "offsets beyond the body": (
        with_text(b'{"latents":' + entry([8, 5], 160) + b"}", bytes(100)),
        "identity",
    ),
    "deep JSON": (with_text(b'{"a":' + b"[" * 20_000), "identity"),
    "a number of many digits": (with_text(b'{"a":' + b"9" * 9_000 + b"}"), "identity"),
    "a body of many zeros": (bytes(2**22), "identity"),
    "a frame of 256 MiB of zeros": (bomb(HUGE, says_size=True), "zstd"),
    "a frame of 256 MiB that does not say so": (bomb(HUGE, says_size=False), "zstd"),
    "a frame that claims 2^62 bytes": (
        b"\x28\xb5\x2f\xfd\xe0" + (2**62).to_bytes(8, "little") + b"\1\0\0",
        "zstd",
    ),
    "a frame with a window of 2^41 bytes": (b"\x28\xb5\x2f\xfd\x00\xf8\1\0\0", "zstd"),
    "a dictionary that nobody has": (b"\x28\xb5\x2f\xfd\x21\x07\x08\1\0\0", "zstd"),
    "a skippable frame": (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", "zstd"),
    "a legacy frame": (b"\x27\xb5\x2f\xfd" + bytes(20), "zstd"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_about_sizes_cost_no_memory(case: str) -> None:
    body, encoding = LIES[case]
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(body, encoding, SMALL_EXPECTED)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_bomb_costs_no_memory_outside_of_python_either() -> None:
    """tracemalloc does not see what the Zstandard library allocates; the process' peak does."""

    def peak_bytes() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    body = bomb(HUGE, says_size=False)
    before = peak_bytes()
    for _ in range(3):
        with pytest.raises(WireError):
            unpack(body, "zstd", SMALL_EXPECTED)
    assert peak_bytes() - before < 32 * 2**20


def test_reading_takes_memory_in_proportion_to_what_is_expected() -> None:
    expected = {"latents": (1000, 128)}
    packed = pack({"latents": np.random.default_rng(0).normal(size=(1000, 128))}, "int8")
    tracemalloc.start()
    try:
        unpack(packed.body, packed.content_encoding, expected)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5 * largest_body(expected)
