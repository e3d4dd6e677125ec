"""Convolution of one to three dimensions and its transpose, as two-dimensional ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch

from edgestill.export.lowering.aten.context import Context, row
from edgestill.export.lowering.aten.movement import take
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def as_list(value: int | Sequence[int], n: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * n if len(value) == 1 else value


def flattened(x: Value) -> Value:
    """[N, C, L] → [N, C, 1, L]."""
    return x.reshape(*x.shape[:2], 1, x.shape[2])


@row(aten.convolution.default)
def _convolution(c, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    x, weight = c.value(x), c.value(weight)
    n = x.rank - 2
    stride, padding, dilation = (as_list(v, n) for v in (stride, padding, dilation))
    if n == 1:
        if transposed:
            y = _conv_transpose2d(
                flattened(x), flattened(weight), (1, c.shape[2]), (1, stride[0]), (0, padding[0]),
                (1, dilation[0]), groups,
            )  # fmt: skip
            return _with_bias(c, y, bias).reshape(*c.shape)
        y = _conv2d(
            c, flattened(x), flattened(weight), bias, (1, stride[0]), (0, padding[0]), (1, dilation[0]), groups
        )
        return y.reshape(*c.shape)
    if n == 2:
        if transposed:
            y = _conv_transpose2d(x, weight, c.shape[2:], stride, padding, dilation, groups)
            return _with_bias(c, y, bias)
        return _conv2d(c, x, weight, bias, stride, padding, dilation, groups)
    if groups != 1:
        return _by_group(c, x, weight, bias, stride, padding, dilation, transposed, groups)
    by_depth = _conv_transpose3d if transposed else _conv3d
    return _with_bias(c, by_depth(x, weight, c.shape, stride, padding, dilation), bias)


def _conv2d(c, x, weight, bias, stride, padding, dilation, groups):
    operands = (weight,) if bias is None else (weight, c.value(bias))
    pads = tuple((p, p) for p in padding)
    return x.apply(
        "conv2d", *operands, stride=tuple(stride), padding=pads, dilation=tuple(dilation), groups=groups
    )


def _conv_transpose2d(x, weight, size, stride, padding, dilation, groups):
    pads = tuple((p, p) for p in padding)
    return x.apply(
        "conv2d_transpose", weight, size=tuple(size), stride=tuple(stride), padding=pads,
        dilation=tuple(dilation), groups=groups,
    )  # fmt: skip


def _with_bias(c: Context, y: Value, bias: Any) -> Value:
    return y if bias is None else y + c.value(bias).reshape(1, -1, *(1,) * (y.rank - 2))


def _conv3d(x, weight, shape, stride, padding, dilation):
    """As a two-dimensional one of slices: what lies under the kernel in depth are channels."""
    kernel, depth = weight.shape[2], shape[2]
    x = x.transpose(0, 2, 1, 3, 4).pad([0, padding[0], 0, 0, 0], [0, padding[0], 0, 0, 0])
    reach = (depth - 1) * stride[0] + 1
    slices = [x.narrow(1, k * dilation[0], k * dilation[0] + reach, stride[0]) for k in range(kernel)]
    columns = x.graph.apply("concat", *slices, axis=2)
    flat = weight.transpose(0, 2, 1, 3, 4).reshape(weight.shape[0], -1, *weight.shape[3:])
    y = columns.reshape(-1, *columns.shape[2:]).apply(
        "conv2d", flat, stride=tuple(stride[1:]), padding=tuple((p, p) for p in padding[1:]),
        dilation=tuple(dilation[1:]), groups=1,
    )  # fmt: skip
    return y.reshape(x.shape[0], depth, *y.shape[1:]).transpose(0, 2, 1, 3, 4)


def _conv_transpose3d(x, weight, shape, stride, padding, dilation):
    n, channels, depth = x.shape[:3]
    kernel, outputs = weight.shape[2], weight.shape[1]
    flat = weight.transpose(0, 2, 1, 3, 4).reshape(channels, kernel * outputs, *weight.shape[3:])
    slices = x.transpose(0, 2, 1, 3, 4).reshape(n * depth, channels, *x.shape[3:])
    y = _conv_transpose2d(slices, flat, shape[3:], stride[1:], padding[1:], dilation[1:], 1)
    y = y.reshape(n, depth, 1, kernel, outputs, *shape[3:])
    y = y.pad([0] * 7, [0, 0, stride[0] - 1, 0, 0, 0, 0]).reshape(n, -1, kernel, outputs, *shape[3:])
    whole = shape[2] + 2 * padding[0]
    parts = []
    for k in range(kernel):
        part = y.narrow(2, k, k + 1).reshape(n, y.shape[1], outputs, *shape[3:])
        start = k * dilation[0]
        parts.append(part.pad([0, start, 0, 0, 0], [0, whole - start - part.shape[1], 0, 0, 0]))
    total = reduce(add, parts).narrow(1, padding[0], padding[0] + shape[2])
    return total.transpose(0, 2, 1, 3, 4)


def _by_group(c, x, weight, bias, stride, padding, dilation, transposed, groups):
    by_depth = _conv_transpose3d if transposed else _conv3d
    inputs, outputs = x.shape[1] // groups, weight.shape[0] // groups
    shape = (c.shape[0], c.shape[1] // groups, *c.shape[2:])
    parts = [
        by_depth(
            x.narrow(1, g * inputs, (g + 1) * inputs),
            weight.narrow(0, g * outputs, (g + 1) * outputs),
            shape, stride, padding, dilation,
        )
        for g in range(groups)
    ]  # fmt: skip
    return _with_bias(c, c.graph.apply("concat", *parts, axis=1), bias)


@row(aten.im2col.default)
def _im2col(c: Context, x: Any, kernel, dilation, padding, stride) -> Value:
    x = c.value(x)
    x = x.pad([0, 0, *padding], [0, 0, *padding])
    columns = torch.arange(math.prod(x.shape[2:]), dtype=torch.float64).reshape(1, 1, *x.shape[2:])
    places = aten.im2col(columns, kernel, dilation, (0, 0), stride)[0].long()
    rows = take(x.reshape(*x.shape[:2], -1), places.reshape(-1).numpy(), 2)
    return rows.reshape(*c.shape)


@row(aten.col2im.default)
def _col2im(c: Context, x: Any, size, kernel, dilation, padding, stride) -> Value:
    x = c.value(x)
    padded = [s + 2 * p for s, p in zip(size, padding, strict=True)]
    pixels = torch.arange(math.prod(padded), dtype=torch.float64).reshape(1, 1, *padded)
    places = aten.im2col(pixels, kernel, dilation, (0, 0), stride)[0].long()
    channels = x.shape[1] // math.prod(kernel)
    rows = x.reshape(x.shape[0], channels, -1)
    index = c.graph.constant(places.reshape(-1).numpy())
    whole = rows.apply("scatter_add", index, axis=2, size=math.prod(padded))
    return whole.reshape(x.shape[0], channels, *padded).pad(
        [0, 0, *(-p for p in padding)], [0, 0, *(-p for p in padding)]
    )
