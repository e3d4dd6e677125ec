"""The seam between the runtime and an engine: memory for tensors, and loaded graphs that run on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from edgestill.runtime.bundle.manifest import TensorSpec

Arrays = Mapping[str, np.ndarray]
Buffers = dict[str, np.ndarray]

ALIGNMENT_BYTES = 64
SLACK_BYTES = 16
"""Readable after every tensor: vector kernels of XNNPACK read past the end of their inputs."""


class Program(Protocol):
    """One graph, loaded by an engine; it holds no state of its own."""

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        """A function that runs the graph once, from and into just these arrays, without copying any.

        The arrays, by the graph's names, are of the runner's `allocate`, and the caller keeps them as long as the
        function. Errors of the function: EngineError; the outputs then hold anything, the inputs what they held.
        """

    def close(self) -> None:
        """Frees the graph; closing twice is harmless."""


class Runner(Protocol):
    """An engine, started with a number of threads: what a runner module's `open_runner(threads)` returns."""

    def allocate(self, specs: Sequence[TensorSpec]) -> Buffers:
        """Zeroed arrays that programs of this runner can read and write in place, by name."""

    def load(self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Program:
        """Loads a graph that takes and gives these tensors, in this order, by the graph's names.

        Errors: EngineError for a file that does not load, or has other tensors.
        """

    def close(self) -> None:
        """Frees what the engine holds outside Python, such as a subprocess; closing twice is harmless."""


def allocate(
    specs: Sequence[TensorSpec],
    zeroed_bytes: Callable[[int], np.ndarray] = lambda size: np.zeros(size, np.uint8),
) -> Buffers:
    """Zeroed arrays in one block of memory, each at a multiple of 64 bytes and with slack after it."""
    strides = [-(-(spec.size_bytes + SLACK_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for spec in specs]
    block = zeroed_bytes(sum(strides) + ALIGNMENT_BYTES)
    position = -block.ctypes.data % ALIGNMENT_BYTES
    arrays = {}
    for spec, stride in zip(specs, strides, strict=True):
        data = block[position : position + spec.size_bytes]
        arrays[spec.name] = data.view(spec.numpy_dtype).reshape(spec.shape)
        position += stride
    return arrays
