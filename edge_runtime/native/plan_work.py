"""What a plan of the engine `native` takes and does, read from its words: memory, and each kernel's calls and work.

The words of a call stand in library/layout.h. Nothing is checked here but that they can be read: running a plan does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgestill.runtime.errors import BundleError

MAGIC, VERSION = 0x314E414C504C5345, 5
HEAD_WORDS = 8
KERNELS = tuple(
    "copy map reduce product conv conv_grad depthwise pool rows index winograd winograd_grad".split()
)
"""In the order of `KERNELS` in library/kernels.c."""
GROUPS, ADJOINT, POOL_WIDE = 25, 30, 32
"""Words of a convolution's call, and of a pooling's."""


@dataclass
class Work:
    """What the calls of a kernel do. `flops`: of products, and of convolutions as the plain sum computes them, whatever
    the kernel saves; `moved_bytes`: of the others, what they read and write, each value once."""

    calls: int = 0
    flops: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True)
class PlanWork:
    """`scratch_bytes` are of each thread, `constant_bytes` part of the file."""

    arena_bytes: int
    scratch_bytes: int
    constant_bytes: int
    file_bytes: int
    kernels: dict[str, Work]

    def memory_bytes(self, threads: int) -> int:
        """What it takes in memory beside the tensors that the caller gives it."""
        return self.arena_bytes + threads * self.scratch_bytes + self.file_bytes


def read_plan(path: Path) -> PlanWork:
    """Errors: BundleError for a file that is no plan."""
    data = path.read_bytes()
    try:
        words = np.frombuffer(data, "<i8", len(data) // 8).tolist()
        magic, _, memories, arena, scratch, calls, constants, end = words[:HEAD_WORDS]
        if magic != MAGIC:
            raise ValueError("another first word")
        kernels: dict[str, Work] = {}
        place = HEAD_WORDS + 2 * memories
        for _ in range(calls):
            name, length = KERNELS[words[place]], words[place + 1]
            call = words[place + 2 : min(place + 2 + length, end)]
            work = kernels.setdefault(name, Work())
            work.calls += 1
            work.flops += _flops(name, call)
            work.moved_bytes += _moved_bytes(name, call)
            place += 2 + length
    except (ValueError, IndexError, ZeroDivisionError) as error:
        reason = f"{path.name}: not a plan of the engine native ({error})"
        raise BundleError(reason, "export the bundle again") from error
    return PlanWork(arena, scratch, constants, len(data), kernels)


def _flops(name: str, call: list[int]) -> int:
    if name == "product":
        return 2 * math.prod(call[8:12])  # batches, m, n, k
    if "conv" in name or "winograd" in name or name == "depthwise":
        images, height, width, channels, out_height, out_width, out_channels, *window = call[10:19]
        # each element of the smaller image of an adjoint, else of the result, meets the whole window
        pixels = height * width if call[ADJOINT] else out_height * out_width
        return 2 * images * pixels * out_channels * channels // call[GROUPS] * math.prod(window)
    return 0


def _moved_bytes(name: str, call: list[int]) -> int:
    match name:
        case "copy":  # item bytes, filled elements, rank, sizes
            return call[4] * (call[6] + 2 * math.prod(call[8:14]))
        case "map":
            return _program_bytes(call)
        case "reduce":  # outer, reduced, inner
            return 4 * call[7] * call[9] * (call[8] + 1)
        case "pool":
            images, height, width, channels, out_height, out_width = call[10:16]
            winners = call[POOL_WIDE] if call[6] >= 0 else 0
            return images * channels * (4 * height * width + (4 + winners) * out_height * out_width)
        case "rows":
            return 8 * call[7] * call[8]
        case "index":  # outer, size, indices, inner
            return call[7] * call[10] * 4 * (call[8] + call[9])
    return 0


def _program_bytes(call: list[int]) -> int:
    count, sizes, (loads, _, stores) = call[0], call[1:5], call[5:8]
    moved = 4 * count * stores
    for place in range(10, 10 + 9 * loads, 9):
        kind, *axes = call[place + 2 : place + 7]
        if kind == 3:  # the gradient of a pooling: dy and its windows' winners
            moved += 5 * count // (axes[2] * axes[3])
        else:
            moved += (4, 1, 8)[kind] * math.prod(n for n, stride in zip(sizes, axes, strict=True) if stride)
    return moved
