"""Outputs on the wire: exact bounds, the official reader as oracle, and bodies that nobody honest sends."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import safetensors.numpy
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edgestill.runtime.bundle import wire
from edgestill.runtime.device.outputs import (
    FORMAT,
    PRECISIONS,
    Packed,
    UnknownEncoding,
    WrongOutputs,
    largest_body,
    pack,
    unpack,
)
from edgestill.runtime.errors import WireError

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


def test_zstd_is_used_where_it_pays_and_installed() -> None:
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


def test_a_body_larger_than_the_window_that_every_decoder_supports() -> None:
    flat = {"latents": np.ones((2300, 1024), np.float32)}  # 9.4 MB, and 8 MiB is no power of two of it
    packed = pack(flat, "fp32")
    assert packed.content_encoding == "zstd"
    assert np.array_equal(unpacked(packed, flat)["latents"], flat["latents"])


def test_a_device_without_zstd_sends_and_reads_plain_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {"latents": np.ones((100, 16), np.float32)}
    compressed = pack(flat, "fp32")
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.delattr("backports.zstd", raising=False)
    plain = pack(flat, "fp32")
    assert plain.content_encoding == "identity"
    unpacked(plain, flat)
    with pytest.raises(UnknownEncoding, match="not installed") as caught:
        unpack(compressed.body, "zstd", {"latents": (100, 16)})
    assert caught.value.hint == "pip install 'edgestill[device]'"


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
