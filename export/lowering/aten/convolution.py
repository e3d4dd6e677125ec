"""Convolution of one to three dimensions as two-dimensional ones; what is transposed is the gradient of such a one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from edgestill.export.lowering.aten.context import Context, row
from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Value


@row("convolution")
def _convolution(c, x, weight, bias, stride, padding, dilation, transposed, _, groups):
    axes = x.rank - 2
    form = [list(v) * axes if len(v) == 1 else list(v) for v in (stride, padding, dilation)]
    if not transposed:
        return _convolved(x, weight, bias, c.shape[2:], *form, groups)
    y = _adjoint(c, x, lambda image: _convolved(image, weight, None, x.shape[2:], *form, groups))
    return y if bias is None else y + bias.reshape(1, -1, *(1,) * axes)


def _adjoint(c: Context, dy: Value, function: Callable[[Value], Value]) -> Value:
    """The gradient of a linear function in an image of the shape of c's result, where dy is that in its value."""
    image = c.graph.input(f"image of {c.node.name}", c.shape)
    c.graph.inputs.remove(image)
    loss = (function(image).reshape(*dy.shape) * dy).sum(*range(dy.rank))
    return gradients(c.graph, loss, [image])[image.name]


def _convolved(
    x: Value, weight: Value, bias: Value | None, size: Sequence[int], stride, padding, dilation, groups: int
) -> Value:
    if x.rank == 5:  # what lies under the kernel in depth are channels of slices
        n, depth, reach = x.shape[0], size[0], (size[0] - 1) * stride[0] + 1
        x = x.transpose(0, 2, 1, 3, 4).pad([0, padding[0], 0, 0, 0], [0, padding[0], 0, 0, 0])
        plane = x.shape[3:]
        x = x.reshape(*x.shape[:2], groups, 1, -1)
        starts = [k * dilation[0] for k in range(weight.shape[2])]
        slices = [x.narrow(1, start, start + reach, stride[0]) for start in starts]
        columns = x.graph.apply("concat", *slices, axis=3).reshape(n * depth, -1, *plane)
        flat = weight.transpose(0, 2, 1, 3, 4).reshape(weight.shape[0], -1, *weight.shape[3:])
        form = [v[1:] for v in (stride, padding, dilation)]
        y = _convolved(columns, flat, bias, size[1:], *form, groups)
        return y.reshape(n, depth, *y.shape[1:]).transpose(0, 2, 1, 3, 4)
    lower = [1] * (4 - x.rank)  # what has one dimension is one row high
    x, weight = (v.reshape(*v.shape[:2], *lower, *v.shape[2:]) for v in (x, weight))
    return x.apply(
        "conv2d",
        *([weight] if bias is None else [weight, bias]),
        stride=(*lower, *stride),
        padding=tuple((p, p) for p in (*(0 for _ in lower), *padding)),
        dilation=(*lower, *dilation),
        groups=groups,
    )


@row("im2col")
def _im2col(c: Context, x: Value, kernel, dilation, padding, stride) -> Value:
    """Each pixel of the kernel sees a slice of the image."""
    x = x.pad([0, 0, *padding], [0, 0, *padding])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(x.shape[2:], kernel, dilation, stride, strict=True)]
    parts = []
    for spot in itertools.product(*map(range, kernel)):
        part = x
        for axis, (i, size, d, s) in enumerate(zip(spot, sizes, dilation, stride, strict=True), 2):
            part = part.narrow(axis, i * d, i * d + (size - 1) * s + 1, s)
        parts.append(part.reshape(*x.shape[:2], 1, -1))
    return x.graph.apply("concat", *parts, axis=2).reshape(x.shape[0], -1, math.prod(sizes))


@row("col2im")
def _col2im(c: Context, x: Value, size: Any, *form: Any) -> Value:
    return _adjoint(c, x, lambda image: _im2col(c, image, *form))
