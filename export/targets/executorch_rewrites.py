"""What XNNPACK takes in place of what it does not: the engine `executorch`'s rewrites.

It takes products of two runtime tensors, but no convolution whose weight is an input, and neither comparisons, sums nor
slices with a step. Everything becomes elementwise arithmetic, matrix products and contiguous movement, so that the
whole step is one delegated piece. Images are turned channels last, which makes every window a contiguous run; the
layout pass then takes out the turns between them.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np

from edgestill.export.lowering.graph import Node, Value
from edgestill.export.lowering.rewrite import EXPANSIONS
from edgestill.export.targets.windows import Windows, concat, pad, total

FEW_CHANNELS = 16
NONE = ((0, 0), (0, 0))


def _last(x: Value) -> Value:
    """[N, C, H, W] → [N, H, W, C]."""
    return x.transpose(0, 2, 3, 1)


def _first(x: Value) -> Value:
    return x.transpose(0, 3, 1, 2)


def _rows(x: Value) -> Value:
    """[N, H, W, C] → [N·H·W, C]."""
    return x.reshape(-1, x.shape[-1])


def _windows(x: Value, a: dict, kernel: tuple[int, int]) -> Windows:
    return Windows(x.shape, kernel, a["stride"], a["padding"], a.get("dilation", (1, 1)))


# --- convolution -----------------------------------------------------------------------------------------------------
def conv2d(node: Node, x: Value, weight: Value, *bias: Value) -> Value:
    a, x = node.attributes, _last(x)
    if a["groups"] == 1:
        return _first(_dense(x, weight, bias, a))
    if a["groups"] == x.shape[3] == weight.shape[0]:
        factors = _taps(weight)
        parts = _windows(x, a, weight.shape[2:]).cut(x)
        y = total([part * factor for part, factor in zip(parts, factors, strict=True)])
    else:
        pieces = zip(_split(x, 3, a["groups"]), _split(weight, 0, a["groups"]), strict=True)
        y = concat([_dense(part, w, (), a) for part, w in pieces], 3)
    return _first(y + bias[0].reshape(1, 1, 1, -1) if bias else y)


def _split(x: Value, axis: int, groups: int) -> list[Value]:
    size = x.shape[axis] // groups
    return [x.narrow(axis, g * size, (g + 1) * size) for g in range(groups)]


def _taps(weight: Value) -> list[Value]:
    """A depthwise weight as one factor a channel for each window position."""
    taps = weight.transpose(2, 3, 1, 0).reshape(math.prod(weight.shape[2:]), -1)
    return [taps.narrow(0, k, k + 1).reshape(1, 1, 1, -1) for k in range(taps.shape[0])]


def _dense(x: Value, weight: Value, bias: tuple[Value, ...], a: dict) -> Value:
    """Columns of the window positions times the weight, one product a kernel row (one in all if channels are few)."""
    windows = _windows(x, a, weight.shape[2:])
    columns = _columns(x, windows, bool(bias))
    sizes = [part.shape[1] - (bool(bias) and i == 0) for i, part in enumerate(columns)]
    flat, start, weights = _by_row(weight), 0, []
    for size in sizes:
        weights.append(flat.narrow(0, start, start + size))
        start += size
    if bias:
        weights[0] = concat([weights[0], bias[0].reshape(1, -1)], 0)
    y = total([part @ w for part, w in zip(columns, weights, strict=True)])
    return y.reshape(x.shape[0], *windows.size, weight.shape[0])


def _by_row(weight: Value) -> Value:
    """[kh·kw·C, O]."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _columns(x: Value, windows: Windows, ones: bool) -> list[Value]:
    """What the weight is multiplied with: [N·oh·ow, kw·C] for each row of the kernel, or all of them side by side if
    there are few channels. A column of ones carries the bias: its row of the weight is the bias, its part of the weight
    gradient the bias gradient, and neither needs a pass of its own."""
    columns = _kernel_rows(x, windows)
    if x.shape[3] < FEW_CHANNELS:
        columns = [concat(columns, 1)]
    if ones:
        column = x.graph.constant(np.ones((columns[0].shape[0], 1)))
        columns[0] = concat([columns[0], column], 1)
    return columns


def _kernel_rows(x: Value, windows: Windows) -> list[Value]:
    """For each row of the kernel the columns [N·oh·ow, kw·C].

    With stride 1 the columns of a kernel row are those of another, shifted by whole image rows: cut the width once,
    then slice the height, which moves a third of what cutting every position would.
    """
    kernel_h, kernel_w = windows.kernel
    if windows.stride != (1, 1):
        parts = windows.cut(x)
        return [_rows(concat(parts[i * kernel_w : (i + 1) * kernel_w], 3)) for i in range(kernel_h)]
    (step_h, step_w), (height, width) = windows.dilation, windows.size
    x = pad(x, (windows.padding[0], windows.after[0]), (windows.padding[1], windows.after[1]))
    wide = concat([x.narrow(2, j * step_w, j * step_w + width) for j in range(kernel_w)], 3)
    return [_rows(wide.narrow(1, i * step_h, i * step_h + height)) for i in range(kernel_h)]


def conv2d_weight_grad(node: Node, x: Value, dy: Value, weight: Value) -> tuple[Value, Value]:
    a, x, dy = {**node.attributes, "kernel": weight.shape[2:]}, _last(x), _last(dy)
    groups, outputs = a["groups"], dy.shape[3]
    if groups == 1:
        return _dense_weight_grad(x, dy, a)
    if groups == x.shape[3] == outputs:
        parts = _windows(x, a, a["kernel"]).cut(x)
        dw = concat([_rows(part * dy).sum(0) for part in parts], 0)
        dw = dw.reshape(*a["kernel"], 1, -1).transpose(3, 2, 0, 1)
    else:
        pieces = zip(_split(x, 3, groups), _split(dy, 3, groups), strict=True)
        dw = concat([_dense_weight_grad(u, v, a | {"bias": False})[0] for u, v in pieces], 0)
    return dw, _rows(dy).sum(0).reshape(-1)


def _dense_weight_grad(x: Value, dy: Value, a: dict) -> tuple[Value, Value]:
    windows = _windows(x, a, a["kernel"])
    kernel_w, channels, outputs = a["kernel"][1], x.shape[3], dy.shape[3]
    columns = _columns(x, windows, a["bias"])
    if channels < FEW_CHANNELS:  # fewer columns than outputs: turn those
        products = [(part.swap() @ _rows(dy)).swap() for part in columns]
    else:
        turned = _rows(dy).transpose(1, 0)
        products = [turned @ part for part in columns]
    parts = [
        product.narrow(1, 0, product.shape[1] - (a["bias"] and i == 0)).reshape(outputs, -1, kernel_w, channels)
        for i, product in enumerate(products)
    ]
    dw = concat(parts, 1).transpose(0, 3, 1, 2)
    if not a["bias"]:
        return dw, _rows(dy).sum(0).reshape(-1)
    width = products[0].shape[1]
    return dw, products[0].narrow(1, width - 1, width).reshape(-1)


def conv2d_transpose(node: Node, dy: Value, weight: Value) -> Value:
    a, dy = node.attributes, _last(dy)
    groups = a["groups"]
    shape = (dy.shape[0], *a["size"], weight.shape[1] * groups)
    if groups == 1:
        return _first(_input_grad(dy, weight, shape, a))
    if groups == dy.shape[3] == shape[3]:
        windows = Windows(shape, weight.shape[2:], a["stride"], a["padding"], a["dilation"])
        return _first(windows.sum_back([dy * factor for factor in _taps(weight)]))
    part = (*shape[:3], weight.shape[1])
    pieces = zip(_split(dy, 3, groups), _split(weight, 0, groups), strict=True)
    return _first(concat([_input_grad(u, w, part, a) for u, w in pieces], 3))


def _input_grad(dy: Value, weight: Value, shape: tuple[int, ...], a: dict) -> Value:
    outputs, channels, kernel_h, kernel_w = weight.shape
    kernel, dilation = (kernel_h, kernel_w), a["dilation"]
    reach = [dilation[i] * (kernel[i] - 1) for i in range(2)]
    back = tuple((reach[i] - a["padding"][i][0], reach[i] - a["padding"][i][1]) for i in range(2))
    if a["stride"] == (1, 1) and min(map(min, back)) >= 0 and outputs < channels:
        # A convolution of dy with the turned kernel moves dy's channels, the sum of columns below moves x's.
        columns = _kernel_rows(dy, Windows(dy.shape, kernel, (1, 1), back, dilation))
        by_row = weight.transpose(2, 3, 0, 1).reshape(kernel_h * kernel_w, outputs, channels)
        taps = [by_row.narrow(0, k, k + 1) for k in reversed(range(kernel_h * kernel_w))]
        turned = concat(taps, 0).reshape(kernel_h, kernel_w * outputs, channels)
        parts = [
            columns[i] @ turned.narrow(0, i, i + 1).reshape(kernel_w * outputs, channels)
            for i in range(kernel_h)
        ]
        return total(parts).reshape(*shape)
    windows, parts = Windows(shape, kernel, a["stride"], a["padding"], dilation), []
    flat, wide = _by_row(weight), kernel_w * channels
    for i in range(kernel_h):
        row = flat.narrow(0, i * wide, (i + 1) * wide)
        columns = (_rows(dy) @ row.swap()).reshape(*dy.shape[:3], -1)
        parts += [columns.narrow(3, j * channels, (j + 1) * channels) for j in range(kernel_w)]
    return windows.sum_back(parts)


# --- pooling ---------------------------------------------------------------------------------------------------------
def _is_halves(x: Value, a: dict) -> bool:
    halves = a["kernel"] == a["stride"] == (2, 2) and a["padding"] == NONE and a["dilation"] == (1, 1)
    return halves and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0


def _halves(x: Value) -> tuple[Value, ...]:
    """Windows of 2×2 of [N, H, W, C]: the larger of each two columns, then of each two rows, whose masks are of half
    and quarter size."""
    n, height, width, channels = x.shape
    columns = x.reshape(n * height * width // 2, 2, channels)
    left, right = columns.narrow(1, 0, 1), columns.narrow(1, 1, 2)
    wider = left.apply("maximum", right)
    rows = wider.reshape(n * height // 2, 2, width // 2 * channels)
    return left, right, wider, rows.narrow(1, 0, 1), rows.narrow(1, 1, 2)


def max_pool2d(node: Node, x: Value) -> Value:
    a = node.attributes
    if _is_halves(x, a):
        *_, upper, lower = _halves(_last(x))
        shape = node.outputs[0].shape
        return _first(upper.apply("maximum", lower).reshape(shape[0], shape[2], shape[3], shape[1]))
    if a["kernel"][0] > 1 and a["kernel"][1] > 1:  # along the rows, then along the columns: fewer places
        row, column = _by_axis(a)
        return x.apply("max_pool2d", **row).apply("max_pool2d", **column)
    x = _last(x)
    parts = _windows(x, a, a["kernel"]).cut(x, -3e38 if any(map(any, a["padding"])) else 0.0)
    return _first(reduce(lambda left, right: left.apply("maximum", right), parts))


def _by_axis(a: dict) -> tuple[dict, dict]:
    row = {
        "kernel": (1, a["kernel"][1]), "stride": (1, a["stride"][1]), "padding": ((0, 0), a["padding"][1]),
        "dilation": (1, a["dilation"][1]),
    }  # fmt: skip
    column = {
        "kernel": (a["kernel"][0], 1), "stride": (a["stride"][0], 1), "padding": (a["padding"][0], (0, 0)),
        "dilation": (a["dilation"][0], 1),
    }  # fmt: skip
    return row, column


def max_pool2d_grad(node: Node, dy: Value, x: Value, y: Value) -> Value:
    """The first maximum of a window alone takes the gradient, as in PyTorch: after ReLU, ties are common."""
    a = node.attributes
    if _is_halves(x, a):
        left, right, wider, upper, lower = _halves(_last(x))
        of_rows = _shared(_last(dy).reshape(*upper.shape), upper, lower)
        last = _last(x).shape
        return _first(_shared(of_rows.reshape(wider.shape[0], 1, wider.shape[2]), left, right).reshape(*last))
    if a["kernel"][0] > 1 and a["kernel"][1] > 1:  # the first of a row, then the row of the first of them
        row, column = _by_axis(a)
        rows = x.apply("max_pool2d", **row)
        return dy.apply("max_pool2d_grad", rows, y, **column).apply("max_pool2d_grad", x, rows, **row)
    dy, x, y = _last(dy), _last(x), _last(y)
    windows = _windows(x, a, a["kernel"])
    left, kept = dy, []
    for part in windows.cut(x, -3e38 if any(map(any, a["padding"])) else 0.0)[:-1]:
        passed_on = left.apply("masked", y.apply("greater", part))
        kept.append(left - passed_on)
        left = passed_on
    return _first(windows.sum_back([*kept, left]))


def _shared(dy: Value, first: Value, second: Value) -> Value:
    to_second = dy.apply("masked", second.apply("greater", first))
    return dy.graph.apply("concat", dy - to_second, to_second, axis=1)


def avg_pool2d(node: Node, x: Value) -> Value:
    a, x = node.attributes, _last(x)
    return _first(total(_windows(x, a, a["kernel"]).cut(x)) * (1 / math.prod(a["kernel"])))


def avg_pool2d_grad(node: Node, dy: Value) -> Value:
    a, dy = node.attributes, _last(dy)
    shape = (dy.shape[0], *a["size"], dy.shape[3])
    windows = Windows(shape, a["kernel"], a["stride"], a["padding"])
    count = math.prod(a["kernel"])
    return _first(windows.sum_back([dy * (1 / count)] * count))


def normalize(node: Node, x: Value, weight: Value, bias: Value, mean: Value, variance: Value) -> Value:
    scale = weight * (variance + node.attributes["eps"]).apply("rsqrt")
    mean, scale, bias = (v.reshape(1, -1, 1, 1) for v in (mean, scale, bias))
    return (x - mean) * scale + bias


WINDOWED = {**EXPANSIONS, **{rule.__name__: rule for rule in (
    conv2d, conv2d_weight_grad, conv2d_transpose, max_pool2d, max_pool2d_grad, avg_pool2d, avg_pool2d_grad, normalize,
)}}  # fmt: skip
"""Applied until nothing changes; then come the layout pass and what follows."""


# --- what is not delegated -------------------------------------------------------------------------------------------
def reduce_sum(node: Node, x: Value) -> Value:
    """As products with ones, a run of neighbouring axes at a time."""
    axes, shape = list(node.attributes["axes"]), x.shape
    axes = [axis for axis in axes if shape[axis] != 1]
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


def reduce_mean(node: Node, x: Value) -> Value:
    return x.sum(*node.attributes["axes"]) * (node.outputs[0].size / x.size)


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


def greater(node: Node, a: Value, b: Value) -> Value:
    """1 where a > b, else 0, without comparisons."""
    return ((a - b) * 1e38).apply("clamp", low=0.0, high=1.0, closed=False)


def greater_equal(node: Node, a: Value, b: Value) -> Value:
    return 1.0 - b.apply("greater", a)


def equal(node: Node, a: Value, b: Value) -> Value | None:
    if a.dtype != "float32":
        return None
    return 1.0 - (a.apply("greater", b) + b.apply("greater", a))


def masked(node: Node, x: Value, mask: Value) -> Value:
    return x * mask


def erf(node: Node, x: Value) -> Value:
    """Abramowitz and Stegun 1964, 7.1.26: within 1.5e-7."""
    size = x.apply("abs")
    t = 1.0 / (size * 0.3275911 + 1.0)
    series = 0.0
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (t * series + factor) if isinstance(series, Value) else t * 0.0 + factor
    tail = series * t * (-x * x).apply("exp")
    sign = x.apply("greater", 0.0) * 2.0 - 1.0
    return sign * (1.0 - tail)


def slice_with_step(node: Node, x: Value) -> Value | None:
    """The axis split into steps of which the first entry is taken."""
    axis, start, stop, step = (node.attributes[key] for key in ("axis", "start", "stop", "step"))
    if step == 1:
        return None
    count = node.outputs[0].shape[axis]
    x = x.narrow(axis, start, min(start + count * step, x.shape[axis]))
    missing = count * step - x.shape[axis]
    x = x.pad([0] * x.rank, [missing if i == axis else 0 for i in range(x.rank)])
    after = math.prod(x.shape[axis + 1 :])
    rows = x.reshape(-1, step * after).narrow(1, 0, after)
    return rows.reshape(*node.outputs[0].shape)


def expand(node: Node, x: Value) -> Value:
    """Along one axis at a time: few copies end to end, many as products with ones."""
    for axis, size in enumerate(node.attributes["shape"]):
        if x.shape[axis] == size:
            continue
        before, after = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        if size <= 4:
            x = concat([x] * size, axis)
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
    if index.size * size > 2**22:
        return None
    hot = index.apply("one_hot", classes=size)
    if axis == 0:
        return (hot.swap() @ x.reshape(x.shape[0], -1)).reshape(size, *x.shape[1:])
    if axis == x.rank - 1:
        return (x.reshape(-1, x.shape[-1]) @ hot).reshape(*x.shape[:-1], size)
    return None


PLAIN = {
    "reduce_sum": reduce_sum,
    "reduce_mean": reduce_mean,
    "reduce_max": reduce_max,
    "log_softmax": log_softmax,
    "greater": greater,
    "greater_equal": greater_equal,
    "equal": equal,
    "masked": masked,
    "erf": erf,
    "expand": expand,
    "scatter_add": scatter_add,
    "slice": slice_with_step,
}
"""Applied after the layout pass, until nothing changes."""
