"""Pooling of two and three dimensions as two-dimensional pooling; PyTorch says one dimension as two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from edgestill.export.lowering.aten.context import Context, Refusal, row
from edgestill.export.lowering.aten.movement import pieces
from edgestill.export.lowering.aten.products import mapped
from edgestill.export.lowering.graph import Value

Form = Sequence[Sequence]
"""Kernel, stride, padding on both sides and dilation, each by axis."""


def _form(c: Context, x: Value, kernel, stride, padding, dilation=(1,)) -> Form:
    """Padding such that exactly the windows of the result fit: what is past the last one may be negative."""
    axes = 3 if "3d" in c.node.target.name() else 2
    if x.rank != axes + 2:
        raise Refusal("pooling without a batch")
    kernel, stride, padding, dilation = (
        list(v) * axes if len(v) == 1 else list(v) for v in (kernel, stride or kernel, padding, dilation)
    )
    wanted = zip(x.shape[-axes:], c.shape[-axes:], kernel, stride, padding, dilation, strict=True)
    ends = [(out - 1) * s + d * (k - 1) + 1 - size - p for size, out, k, s, p, d in wanted]
    return kernel, stride, list(zip(padding, ends, strict=True)), dilation


def _pooled(x: Value, form: Form, pool: Callable[..., Value]) -> Value:
    """First in the plane, then in depth, so that the first largest of a window stays the first."""
    if len(form[0]) == 3:
        plane = _pooled(x.reshape(x.shape[0], -1, *x.shape[-2:]), [v[1:] for v in form], pool)
        lines = plane.reshape(*x.shape[:-2], -1)
        in_depth = [(v[0], one) for v, one in zip(form, (1, 1, (0, 0), 1), strict=True)]
        y = _pooled(lines, in_depth, pool)
        return y.reshape(*x.shape[:-3], -1, *plane.shape[-2:])
    kernel, stride, pads, dilation = form
    for axis, (_, after) in enumerate(pads):  # negative padding cuts
        x = x.narrow(2 + axis, 0, x.shape[2 + axis] + min(after, 0))
    pads = tuple((before, max(after, 0)) for before, after in pads)
    whole = tuple(kernel) == x.shape[2:] and not any(map(sum, pads))
    return pool(x, whole, tuple(kernel), tuple(kernel if whole else stride), pads, tuple(dilation))


def _largest(x: Value, whole: bool, kernel, stride, padding, dilation) -> Value:
    return x.apply("max_pool2d", kernel=kernel, stride=stride, padding=padding, dilation=dilation)


def _average(x: Value, whole: bool, kernel, stride, padding, _) -> Value:
    return x.mean(2, 3) if whole else x.apply("avg_pool2d", kernel=kernel, stride=stride, padding=padding)


@row("max_pool2d_with_indices max_pool3d_with_indices")
def _max_pool(c: Context, x: Value, kernel, stride, padding, dilation, _) -> tuple[Value, None]:
    """Without the indices, which nothing here can read."""
    return _pooled(x, _form(c, x, kernel, stride, padding, dilation), _largest), None


@row("avg_pool2d avg_pool3d")
def _avg_pool(c: Context, x: Value, kernel, stride, padding, ceil_mode, count_include_pad, divisor) -> Value:
    y = _pooled(x, _form(c, x, kernel, stride, padding), _average).reshape(*c.shape)
    # What each window is divided by instead of all its pixels: PyTorch itself says so of an image of ones.
    ones = torch.ones(1, 1, *x.shape[2:], dtype=torch.float64)
    form = (kernel, stride, padding, ceil_mode, count_include_pad)
    factor = c.node.target(ones, *form, divisor) / c.node.target(ones, *form, 1) * math.prod(kernel)
    return y * c.value(factor) if bool((factor - 1).abs().max() > 1e-6) else y


def _tiles(x: Value, size: Sequence[int]) -> Form | None:
    """The windows of an adaptive pooling where they are of one size and tile the image."""
    if any(have % out for have, out in zip(x.shape[2:], size, strict=True)):
        return None
    kernel = [have // out for have, out in zip(x.shape[2:], size, strict=True)]
    return kernel, kernel, [(0, 0)] * len(kernel), [1] * len(kernel)


@row("_adaptive_avg_pool2d _adaptive_avg_pool3d")
def _adaptive_average(c: Context, x: Value, size: Sequence[int]) -> Value:
    if (form := _tiles(x, size)) is not None:
        return _pooled(x, form, _average)
    for axis, out in enumerate(size, 2):
        if x.shape[axis] != out:
            shares = torch.adaptive_avg_pool1d(torch.eye(x.shape[axis], dtype=torch.float64), out)
            x = mapped(x, axis, shares.T.numpy())
    return x


@row("adaptive_max_pool2d adaptive_max_pool3d")
def _adaptive_max(c: Context, x: Value, size: Sequence[int]) -> tuple[Value, None]:
    """Uneven windows axis by axis from the last, so that the first largest of a window stays the first."""
    if (form := _tiles(x, size)) is not None:
        return _pooled(x, form, _largest), None
    for axis, out in reversed(list(enumerate(size, 2))):
        if (have := x.shape[axis]) == out:
            continue
        windows = [(i * have // out, -(-(i + 1) * have // out)) for i in range(out)]
        longest = max(stop - start for start, stop in windows)
        # windows repeat their last entry up to one length
        x = pieces(x, axis, [min(start + k, stop - 1) for start, stop in windows for k in range(longest)])
        lines = x.reshape(1, -1, x.shape[axis], math.prod(x.shape[axis + 1 :]))
        y = _pooled(lines, ((longest, 1), (longest, 1), ((0, 0), (0, 0)), (1, 1)), _largest)
        x = y.reshape(*x.shape[:axis], out, *x.shape[axis + 1 :])
    return x, None
