"""What XNNPACK takes in place of what it does not: the engine `executorch`'s rewrites.

It takes products of two runtime tensors, but no convolution whose weight is an input, and neither comparisons, sums nor
slices with a step. Everything becomes elementwise arithmetic, matrix products and contiguous movement, so that the
whole step is one delegated piece. Images are turned channels last, which makes every window a contiguous run; the
layout pass then takes out the turns between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgestill.export.lowering.graph import Node, Value
from edgestill.export.lowering.rewrite import EXPANSIONS, channelwise, convolution_rules, pull_back
from edgestill.export.targets.windows import (
    CHANNELS_LAST,
    Windows,
    by_axis,
    largest,
    strided,
    to_largest,
    total,
)

FEW_CHANNELS = 16


def _last(x: Value) -> Value:
    """[N, C, H, W] → [N, H, W, C]."""
    return x.transpose(0, 2, 3, 1)


def _first(x: Value) -> Value:
    return x.transpose(0, 3, 1, 2)


def _concat(parts: list[Value], axis: int) -> Value:
    return parts[0].graph.apply("concat", *parts, axis=axis)


# --- convolution -----------------------------------------------------------------------------------------------------
def _convolve(a: Mapping[str, Any], x: Value, weight: Value, *bias: Value) -> Value:
    x, groups = _last(x), a["groups"]
    form = {key: a[key] for key in ("stride", "padding", "dilation")}
    if groups == 1:
        return _first(_dense(x, weight, bias, form))
    if groups == x.shape[3] == weight.shape[0]:
        parts = Windows(x, CHANNELS_LAST, weight.shape[2:], **form).cut()
        taps = weight.transpose(2, 3, 1, 0).reshape(len(parts), -1)
        y = total([part * taps.narrow(0, k, k + 1).reshape(1, 1, 1, -1) for k, part in enumerate(parts)])
    else:
        pieces = zip(_split(x, 3, groups), _split(weight, 0, groups), strict=True)
        y = _concat([_dense(part, w, (), form) for part, w in pieces], 3)
    return _first(y + bias[0].reshape(1, 1, 1, -1) if bias else y)


def _split(x: Value, axis: int, groups: int) -> list[Value]:
    size = x.shape[axis] // groups
    return [x.narrow(axis, g * size, (g + 1) * size) for g in range(groups)]


def _dense(x: Value, weight: Value, bias: tuple[Value, ...], form: dict) -> Value:
    """Columns [N·oh·ow, kw·C] times the weight, a product for each row of the kernel, or one of all side by side if
    there are few channels. The columns of a kernel row are those of another, moved by whole image rows: the width is
    cut once, then the height, which moves a third of what cutting every position would. A column of ones carries the
    bias: its row of the weight is the bias, its part of the weight gradient the bias gradient."""
    windows = Windows(x, CHANNELS_LAST, weight.shape[2:], **form)
    rows = windows.along(_concat(windows.along(windows.padded, 1), 3), 0)
    columns = [row.reshape(-1, row.shape[3]) for row in rows]
    if x.shape[3] < FEW_CHANNELS:
        columns = [_concat(columns, 1)]
    weights = _split(weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]), 0, len(columns))
    if bias:
        columns[0] = _concat([columns[0], x.graph.constant(np.ones((columns[0].shape[0], 1)))], 1)
        weights[0] = _concat([weights[0], bias[0].reshape(1, -1)], 0)
    y = total([part @ w for part, w in zip(columns, weights, strict=True)])
    return y.reshape(x.shape[0], *windows.size, weight.shape[0])


CONVOLUTION = convolution_rules(_convolve)


def conv2d_transpose(node: Node, dy: Value, weight: Value) -> Value:
    """With stride 1 as a convolution with the turned kernel where that moves less: dy's channels instead of x's."""
    a, (outputs, channels, *kernel) = node.attributes, weight.shape
    reach = [gap * (size - 1) for gap, size in zip(a["dilation"], kernel, strict=True)]
    padding = tuple((r - before, r - after) for r, (before, after) in zip(reach, a["padding"], strict=True))
    depthwise = a["groups"] == outputs == dy.shape[1] and channels == 1
    fewer = a["groups"] == 1 and outputs < channels
    if a["stride"] != (1, 1) or min(map(min, padding)) < 0 or not (depthwise or fewer):
        return CONVOLUTION["conv2d_transpose"](node, dy, weight)
    last_first = dy.graph.constant(np.eye(math.prod(kernel))[::-1])
    turned = (weight.reshape(outputs * channels, -1) @ last_first).reshape(*weight.shape)
    turned = turned if depthwise else turned.transpose(1, 0, 2, 3)
    form = {"stride": (1, 1), "dilation": a["dilation"], "groups": a["groups"], "padding": padding}
    return dy.apply("conv2d", turned, **form)


# --- pooling ---------------------------------------------------------------------------------------------------------
def max_pool2d(node: Node, x: Value) -> Value:
    a = node.attributes
    if min(a["kernel"]) > 1:  # along the rows, then along the columns: fewer places
        row, column = by_axis(a)
        return x.apply("max_pool2d", **row).apply("max_pool2d", **column)
    return _first(largest(_last(x), CHANNELS_LAST, a))


def max_pool2d_grad(node: Node, dy: Value, x: Value, y: Value) -> Value:
    a = node.attributes
    if min(a["kernel"]) > 1:  # the first of a row, then the row of the first of them
        row, column = by_axis(a)
        rows = x.apply("max_pool2d", **row)
        return dy.apply("max_pool2d_grad", rows, y, **column).apply("max_pool2d_grad", x, rows, **row)
    return _first(to_largest(_last(dy), _last(x), _last(y), CHANNELS_LAST, a))


def _average(x: Value, a: Mapping[str, Any]) -> Value:
    return _first(total(Windows(_last(x), CHANNELS_LAST, **a).cut()) * (1 / math.prod(a["kernel"])))


def avg_pool2d(node: Node, x: Value) -> Value:
    return _average(x, node.attributes)


def avg_pool2d_grad(node: Node, dy: Value) -> Value:
    a = {key: value for key, value in node.attributes.items() if key != "size"}
    return pull_back(lambda x: _average(x, a), [dy], node.outputs)[0]


def normalize(node: Node, x: Value, weight: Value, bias: Value, mean: Value, variance: Value) -> Value:
    scale = weight * (variance + node.attributes["eps"]).apply("rsqrt")
    return (x - channelwise(mean)) * channelwise(scale) + channelwise(bias)


WINDOWED = EXPANSIONS | CONVOLUTION | {rule.__name__: rule for rule in (
    conv2d_transpose, max_pool2d, max_pool2d_grad, avg_pool2d, avg_pool2d_grad, normalize,
)}  # fmt: skip
"""Applied until nothing changes; then come the layout pass and what follows."""


# --- what is not delegated -------------------------------------------------------------------------------------------
def reduce_sum(node: Node, x: Value) -> Value:
    """As products with ones, a run of neighbouring axes at a time."""
    axes = [axis for axis in node.attributes["axes"] if x.shape[axis] != 1]
    while axes:
        stop = axes[-1] + 1
        start = stop - 1
        while start - 1 in axes or (start > 0 and x.shape[start - 1] == 1):
            start -= 1
        before, count, after = (math.prod(part) for part in (x.shape[:start], x.shape[start:stop], x.shape[stop:]))
        kept = tuple(1 if start <= i < stop else size for i, size in enumerate(x.shape))
        if before == 1:
            y = _column_sum(x.reshape(count, after))
        elif after == 1:
            y = x.reshape(before, count) @ x.graph.constant(np.ones((count, 1)))
        else:
            y = x.graph.constant(np.ones((before, 1, count))) @ x.reshape(before, count, after)
        x = y.reshape(*kept)
        axes = [axis for axis in axes if axis < start]
    return x


def _column_sum(x: Value) -> Value:
    """[n, c] → [1, c]: of pieces first, then of the pieces' sums, because a product adds one term after the other and
    would lose digits over tens of thousands."""
    n, c = x.shape
    piece = next(size for size in range(int(n**0.5), 0, -1) if n % size == 0) if n > 256 else n
    if 1 < piece < n:
        pieces = n // piece
        x = (x.graph.constant(np.ones((pieces, 1, piece))) @ x.reshape(pieces, piece, c)).reshape(pieces, c)
    return x.graph.constant(np.ones((1, x.shape[0]))) @ x


def reduce_max(node: Node, x: Value) -> Value:
    """By halves."""
    for axis in node.attributes["axes"]:
        while (size := x.shape[axis]) > 1:
            half = (size + 1) // 2
            x = x.narrow(axis, 0, half).apply("maximum", x.narrow(axis, size - half, size))
    return x


def log_softmax(node: Node, x: Value) -> Value:
    """XNNPACK has no log-softmax."""
    last = x.rank - 1
    shifted = x - x.apply("reduce_max", axes=(last,))
    return shifted - shifted.apply("exp").sum(last).apply("log")


def greater(node: Node, a: Value, b: Value) -> Value | None:
    """Left as it is, in a portable kernel, where both may be infinite: ∞ − ∞ is NaN."""
    return ((a - b) * 1e38).apply("clamp", low=0.0, high=1.0, closed=False) if a.finite or b.finite else None


def masked(node: Node, x: Value, mask: Value) -> Value:
    """0·∞ would be NaN."""
    return x * mask if x.finite else mask.apply("where", x, 0.0)


def equal(node: Node, a: Value, b: Value) -> Value | None:
    return 1.0 - (a.apply("greater", b) + b.apply("greater", a)) if a.dtype == "float32" else None


def erf(node: Node, x: Value) -> Value:
    """Abramowitz and Stegun 1964, 7.1.26: within 1.5e-7."""
    size = x.apply("abs")
    t = 1.0 / (size * 0.3275911 + 1.0)
    series = t * 1.061405429
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = t * (series + factor)
    tail = series * (-x * x).apply("exp")
    sign = x.apply("greater", 0.0) * 2.0 - 1.0
    return sign * (1.0 - tail)


def slice_with_step(node: Node, x: Value) -> Value | None:
    """The axis split into steps."""
    axis, start, step = (node.attributes[key] for key in ("axis", "start", "step"))
    return None if step == 1 else strided(x, axis, start, node.outputs[0].shape[axis], step)


def matmul(node: Node, a: Value, b: Value) -> Value | None:
    """A turn is a pass over memory: instead of a large a, such as the columns in a weight gradient, b and the product
    are turned."""
    size = a.size - b.size - node.outputs[0].size
    turned = node.attributes["transpose_a"] and not node.attributes["transpose_b"]
    return (b.swap() @ a).swap() if turned and size > 0 else None


def pad(node: Node, x: Value) -> Value | None:
    """One of two, as of the gradient of a slice of a slice."""
    if x.operator != "pad" or x.node.attributes["value"] != node.attributes["value"]:
        return None
    both = [np.add(node.attributes[key], x.node.attributes[key]).tolist() for key in ("begins", "ends")]
    return x.node.inputs[0].pad(*both, node.attributes["value"])


def expand(node: Node, x: Value) -> Value:
    """Along one axis at a time: few copies end to end, many as products with ones."""
    for axis, size in enumerate(node.attributes["shape"]):
        if x.shape[axis] == size:
            continue
        before, after = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        if size <= 4:
            x = _concat([x] * size, axis)
        elif after == 1:
            x = (x.reshape(before, 1) @ x.graph.constant(np.ones((1, size)))).reshape(*shape)
        elif before == 1:
            x = (x.graph.constant(np.ones((size, 1))) @ x.reshape(1, after)).reshape(*shape)
        else:
            x = (x.reshape(before, 1, after) + x.graph.constant(np.zeros((1, size, 1)))).reshape(*shape)
    return x


def scatter_add(node: Node, x: Value, index: Value) -> Value | None:
    """As a product with one-hot columns."""
    axis, size = node.attributes["axis"], node.attributes["size"]
    if index.size * size > 2**22 or not x.finite:
        return None
    hot = index.apply("one_hot", classes=size)
    if axis == 0:
        return (hot.swap() @ x.reshape(x.shape[0], -1)).reshape(size, *x.shape[1:])
    if axis == x.rank - 1:
        return (x.reshape(-1, x.shape[-1]) @ hot).reshape(*x.shape[:-1], size)
    return None


PLAIN = {
    "reduce_sum": reduce_sum,
    "reduce_mean": lambda node, x: x.sum(*node.attributes["axes"]) * (node.outputs[0].size / x.size),
    "reduce_max": reduce_max,
    "log_softmax": log_softmax,
    "greater": greater,
    "greater_equal": lambda node, a, b: 1.0 - b.apply("greater", a),
    "equal": equal,
    "masked": masked,
    "erf": erf,
    "expand": expand,
    "scatter_add": scatter_add,
    "slice": slice_with_step,
    "pad": pad,
    "matmul": matmul,
}
"""Applied after the layout pass, until nothing changes."""
