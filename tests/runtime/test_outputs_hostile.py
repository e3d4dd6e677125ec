"""Bodies made to harm: damaged, noise, lies about sizes and bombs are refused, and cost no memory."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.runtime.device.outputs import PRECISIONS, largest_body, pack, unpack
from edgestill.runtime.errors import WireError
from edgestill.runtime.machine import peak_rss_of

SMALL = {"latents": np.linspace(-3, 3, 40, dtype=np.float32).reshape(8, 5)}
SMALL_EXPECTED = {"latents": (8, 5)}


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
    body = bomb(HUGE, says_size=False)
    before = peak_rss_of(os.getpid())
    for _ in range(3):
        with pytest.raises(WireError):
            unpack(body, "zstd", SMALL_EXPECTED)
    assert peak_rss_of(os.getpid()) - before < 32 * 2**20


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
