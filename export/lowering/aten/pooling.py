"""Pooling of one to three dimensions, as two-dimensional pooling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.aten.context import ATEN, Context, Refusal, Row
from edgestill.export.lowering.aten.convolution import as_list, flattened
from edgestill.export.lowering.aten.movement import pieces
from edgestill.export.lowering.aten.products import along
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def _ends(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> tuple[int, int]:
    """Padding before and after, so that exactly `out` windows fit; the rest past the last window may be negative."""
    return padding, (out - 1) * stride + dilation * (kernel - 1) + 1 - size - padding


def _pool_axes(c: Context, x: Value, kernel, stride, padding, dilation=1):
    n = x.rank - 2
    kernel = as_list(kernel, n)
    stride = as_list(stride, n) if stride not in ([], None) else kernel
    padding, dilation = as_list(padding, n), as_list(dilation, n)
    sizes = zip(x.shape[2:], c.shape[2:], kernel, stride, padding, dilation, strict=True)
    return kernel, stride, [_ends(*size) for size in sizes], dilation


def _max_pool(c: Context, x: Any, kernel, stride=(), padding=0, dilation=1, ceil_mode=False) -> Value:
    x = c.value(x)
    if x.rank != len(c.shape) or x.rank < 3:
        raise Refusal("pooling without a batch")
    kernel, stride, pads, dilation = _pool_axes(c, x, kernel, stride, padding, dilation)
    if x.rank == 5:  # first in the plane, then in depth: the first largest stays the first
        plane = x.reshape(x.shape[0], -1, *x.shape[3:])
        plane = _max_pool2d(plane, kernel[1:], stride[1:], pads[1:], dilation[1:])
        lines = plane.reshape(*x.shape[:3], -1)
        y = _max_pool2d(lines, (kernel[0], 1), (stride[0], 1), (pads[0], (0, 0)), (dilation[0], 1))
        return y.reshape(*c.shape)
    if x.rank == 3:
        x = flattened(x)
        kernel, stride, pads, dilation = [1, *kernel], [1, *stride], [(0, 0), *pads], [1, *dilation]
    return _max_pool2d(x, kernel, stride, pads, dilation).reshape(*c.shape)


def _cut(x: Value, pads) -> tuple[Value, tuple[tuple[int, int], ...]]:
    """Negative padding cuts."""
    for axis, (_, after) in enumerate(pads):
        x = x.narrow(2 + axis, 0, x.shape[2 + axis] + min(after, 0))
    return x, tuple((before, max(after, 0)) for before, after in pads)


def _max_pool2d(x: Value, kernel, stride, pads, dilation) -> Value:
    x, pads = _cut(x, pads)
    if tuple(kernel) == x.shape[2:] and not any(map(sum, pads)):
        stride = kernel
    return x.apply(
        "max_pool2d", kernel=tuple(kernel), stride=tuple(stride), padding=pads, dilation=tuple(dilation)
    )


def _avg_pool(
    c: Context, x: Any, kernel, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor=None
) -> Value:
    x = c.value(x)
    kernel, stride, pads, _ = _pool_axes(c, x, kernel, stride, padding)
    counts = np.ones((), np.float32)  # what each window's sum is divided by, axis by axis
    for size, out, k, s, p in zip(x.shape[2:], c.shape[2:], kernel, stride, as_list(padding, x.rank - 2), strict=True):
        starts = np.arange(out) * s - p
        if count_include_pad:
            last = np.minimum(starts + k, size + p) - starts
        else:
            last = np.minimum(starts + k, size) - np.maximum(starts, 0)
        counts = counts[..., None] * last
    y = _average(x, kernel, stride, pads).reshape(*c.shape)
    whole = math.prod(kernel)
    counts = np.full_like(counts, divisor) if divisor else counts
    return y if (counts == whole).all() else y * c.graph.constant(whole / counts[None, None])


def _average(x: Value, kernel, stride, pads) -> Value:
    if x.rank == 5:
        plane = _average(x.reshape(x.shape[0], -1, *x.shape[3:]), kernel[1:], stride[1:], pads[1:])
        lines = plane.reshape(*x.shape[:3], -1)
        y = _average(lines, (kernel[0], 1), (stride[0], 1), (pads[0], (0, 0)))
        return y.reshape(*x.shape[:2], y.shape[2], *plane.shape[2:])
    if x.rank == 3:
        x, kernel, stride, pads = flattened(x), [1, *kernel], [1, *stride], [(0, 0), *pads]
    x, pads = _cut(x, pads)
    if tuple(kernel) == x.shape[2:] and not any(map(sum, pads)):
        return x.mean(2, 3)
    return x.apply("avg_pool2d", kernel=tuple(kernel), stride=tuple(stride), padding=pads)


def _windows(size: int, out: int) -> list[tuple[int, int]]:
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _adaptive_average(c: Context, x: Any, *_: Any) -> Value:
    x = c.value(x)
    sizes, wanted = x.shape[2:], c.shape[2:]
    if all(size % out == 0 for size, out in zip(sizes, wanted, strict=True)):
        kernel = [size // out for size, out in zip(sizes, wanted, strict=True)]
        return _average(x, kernel, kernel, [(0, 0)] * len(kernel)).reshape(*c.shape)
    for i, (size, out) in enumerate(zip(sizes, wanted, strict=True)):
        matrix = np.zeros((out, size), np.float32)
        for o, (start, stop) in enumerate(_windows(size, out)):
            matrix[o, start:stop] = 1 / (stop - start)
        x = along(x, 2 + i, matrix)
    return x


def _adaptive_max(c: Context, x: Any, *_: Any) -> tuple[Value, None]:
    """Axis by axis from the last, so that the first largest of a window stays the first."""
    x = c.value(x)
    for i in reversed(range(x.rank - 2)):
        axis, size, out = 2 + i, x.shape[2 + i], c.shape[2 + i]
        windows = _windows(size, out)
        lengths = {stop - start for start, stop in windows}
        longest = max(lengths)
        if len(lengths) > 1 or size % out:  # windows repeat their last entry up to one length
            places = [min(start + k, stop - 1) for start, stop in windows for k in range(longest)]
            x = pieces(c, x, axis, places)
        lines = x.reshape(1, -1, x.shape[axis], math.prod(x.shape[axis + 1 :]))
        y = _max_pool2d(lines, (longest, 1), (longest, 1), ((0, 0), (0, 0)), (1, 1))
        x = y.reshape(*x.shape[:axis], out, *x.shape[axis + 1 :])
    return x, None


def _values_only(function: Row) -> Row:
    """For operators that also give indices, which nothing here can read."""
    return lambda c, *args: (function(c, *args), None)


for _n in (1, 2, 3):
    ATEN[getattr(aten, f"max_pool{_n}d").default] = _max_pool
    ATEN[getattr(aten, f"avg_pool{_n}d").default] = _avg_pool
    ATEN[getattr(aten, f"adaptive_avg_pool{_n}d").default] = _adaptive_average
    ATEN[getattr(aten, f"adaptive_max_pool{_n}d").default] = _adaptive_max
    if _n > 1:
        ATEN[getattr(aten, f"max_pool{_n}d_with_indices").default] = _values_only(_max_pool)
        ATEN[getattr(aten, f"_adaptive_avg_pool{_n}d").default] = _adaptive_average
