"""N H W C formulations for XNNPACK, which takes products of runtime tensors but no convolution with a runtime weight.

Everything is elementwise arithmetic, matrix products and contiguous movement, so that the whole step is one delegated
piece: masks come from clamps, sums over N·H·W from products with ones, strided windows from reshape and slice. Channels
last makes every window a contiguous run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from export.lowering.capture import Layer
from export.lowering.formulations import Backward, Context, Gradients, Layout
from export.lowering.graph import Graph, Value

Pair = tuple[int, int]
FEW_CHANNELS = 16


def _positive(x: Value) -> Value:
    return x.graph.apply("positive", x)


def _rows(x: Value) -> Value:
    """[N, H, W, C] → [N·H·W, C]."""
    return x.reshape(-1, x.shape[-1])


def _column_sum(x: Value) -> Value:
    """[n, c] → [1, c] as products with ones: of pieces first, then of the pieces' sums, because a product adds one term
    after the other and would lose digits over tens of thousands."""
    n, c = x.shape
    piece = next(size for size in range(int(n**0.5), 0, -1) if n % size == 0) if n > 256 else n
    if piece < n:
        pieces = n // piece
        x = (x.graph.constant(np.ones((pieces, 1, piece))) @ x.reshape(pieces, piece, c)).reshape(pieces, c)
    return x.graph.constant(np.ones((1, x.shape[0]))) @ x


def _channel_sum(x: Value) -> Value:
    """[N, H, W, C] → [1, C]."""
    return _column_sum(_rows(x.graph.equal_sums.get(x.name, x)))


def _row_sum(x: Value) -> Value:
    return x @ x.graph.constant(np.ones((x.shape[1], 1)))


def _log_softmax(x: Value) -> Value:
    """XNNPACK has no log-softmax and no row maximum: halve the columns until one is left."""
    largest = x
    while (width := largest.shape[1]) > 1:
        half = (width + 1) // 2
        largest = x.graph.apply("maximum", largest.narrow(1, 0, half), largest.narrow(1, width - half, width))
    shifted = x - largest
    return shifted - x.graph.apply("log", _row_sum(x.graph.apply("exp", shifted)))


def _concat(parts: Sequence[Value], axis: int) -> Value:
    return parts[0] if len(parts) == 1 else parts[0].graph.apply("concat", *parts, axis=axis)


def _sum(parts: Sequence[Value]) -> Value:
    return reduce(lambda a, b: a + b, parts)


def _pad(x: Value, height: Pair, width: Pair, value: float = 0.0) -> Value:
    if not any(height) and not any(width):
        return x
    return x.graph.apply(
        "pad", x, begins=(0, height[0], width[0], 0), ends=(0, height[1], width[1], 0), value=value
    )


class Windows:
    """The sliding windows over images [N, H, W, C]: cut out as one tensor a window position, and summed back.

    With a stride the padded image is split into phases (row and column remainders) by reshape and slice, in each of
    which a window position is a contiguous slice.
    """

    def __init__(
        self, shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)
    ):
        self.shape, self.kernel, self.stride, self.padding, self.dilation = (
            shape,
            kernel,
            stride,
            padding,
            dilation,
        )
        self.size = tuple(
            (shape[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )
        reach = [dilation[i] * (kernel[i] - 1) // stride[i] + self.size[i] for i in range(2)]
        self.grid = tuple(max(reach[i], -(-(shape[1 + i] + padding[i]) // stride[i])) for i in range(2))

    def _offsets(self):
        """Row-major over the kernel: (phase, start within the phase) of each axis."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                at = (i * self.dilation[0], j * self.dilation[1])
                yield [(at[k] % self.stride[k], at[k] // self.stride[k]) for k in range(2)]

    def cut(self, x: Value, fill: float = 0.0) -> list[Value]:
        """Row-major over the kernel, each [N, oh, ow, C]."""
        ends = [self.grid[i] * self.stride[i] - self.shape[1 + i] - self.padding[i] for i in range(2)]
        x = _pad(x, (self.padding[0], max(ends[0], 0)), (self.padding[1], max(ends[1], 0)), fill)
        parts = []
        for (phase_h, top), (phase_w, left) in self._offsets():
            phase = self._phase(x, phase_h, phase_w)
            parts.append(phase.narrow(1, top, top + self.size[0]).narrow(2, left, left + self.size[1]))
        return parts

    def _phase(self, x: Value, phase_h: int, phase_w: int) -> Value:
        if self.stride == (1, 1):
            return x
        n, _, _, c = x.shape
        x = x.reshape(n, self.grid[0], self.stride[0], -1).narrow(2, phase_h, phase_h + 1)
        x = x.reshape(n, self.grid[0], self.grid[1], -1)
        return x.narrow(3, phase_w * c, (phase_w + 1) * c)

    def sum_back(self, parts: Sequence[Value]) -> Value:
        """The adjoint of `cut`: parts summed into images of the original shape."""
        if self.stride == (1, 1):
            return self._sum_shifted(parts)
        phases: dict[Pair, list[Value]] = {}
        for part, ((phase_h, top), (phase_w, left)) in zip(parts, self._offsets(), strict=True):
            height = (top, self.grid[0] - top - self.size[0])
            width = (left, self.grid[1] - left - self.size[1])
            phases.setdefault((phase_h, phase_w), []).append(_pad(part, height, width))
        graph, (n, _, _, c) = parts[0].graph, self.shape
        zero = graph.constant(np.zeros((n, *self.grid, c)))
        rows = []
        for phase_h in range(self.stride[0]):
            columns = [
                _sum(phases[phase_h, w]) if (phase_h, w) in phases else zero for w in range(self.stride[1])
            ]
            rows.append(_concat(columns, 3).reshape(n, self.grid[0], 1, -1))
        whole = _concat(rows, 2).reshape(n, self.grid[0] * self.stride[0], self.grid[1] * self.stride[1], c)
        missing = [max(self.padding[i] + self.shape[1 + i] - whole.shape[1 + i], 0) for i in range(2)]
        whole = _pad(whole, (0, missing[0]), (0, missing[1]))
        for i in range(2):
            whole = whole.narrow(1 + i, self.padding[i], self.padding[i] + self.shape[1 + i])
        return whole

    def _sum_shifted(self, parts: Sequence[Value]) -> Value:
        """Stride 1: the parts of each kernel row shifted along the width and summed, then the rows along the height."""
        kernel_h, kernel_w = self.kernel
        rows = []
        for i in range(kernel_h):
            row = [
                _shift(parts[i * kernel_w + j], 2, j * self.dilation[1] - self.padding[1], self.shape[2])
                for j in range(kernel_w)
            ]
            row = [part for part in row if part is not None]
            offset = i * self.dilation[0] - self.padding[0]
            rows.append(_shift(_sum(row), 1, offset, self.shape[1]) if row else None)
        rows = [row for row in rows if row is not None]
        return _sum(rows) if rows else parts[0].graph.constant(np.zeros(self.shape))


def _shift(x: Value, axis: int, offset: int, size: int) -> Value | None:
    """x moved by `offset` along its height (axis 1) or width (2) into `size`: the outside is cut, the rest zero; None
    where nothing is left inside."""
    start, stop = max(0, -offset), min(x.shape[axis], size - offset)
    if start >= stop:
        return None
    x = x.narrow(axis, start, stop)
    edges = (offset + start, size - offset - stop)
    return _pad(x, edges, (0, 0)) if axis == 1 else _pad(x, (0, 0), edges)


def conv2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    a = layer.attributes
    weight, bias = ctx.parameter(layer, "weight"), ctx.parameter(layer, "bias")
    groups, channels = a["groups"], x.shape[3]
    if groups == 1:
        return _dense(x, weight, bias, a)
    depthwise = groups == channels == weight.shape[0]
    y, backward = _depthwise(x, weight, a) if depthwise else _grouped(x, weight, a)
    if bias is None:
        return y, backward

    def backward_with_bias(dy: Value) -> Gradients:
        of_inputs, of_parameters = backward(dy)
        return of_inputs, of_parameters | {"bias": _channel_sum(dy).reshape(*bias.shape)}

    return y + bias.reshape(1, 1, 1, -1), backward_with_bias


def _dense(x: Value, weight: Value, bias: Value | None, a: dict) -> tuple[Value, Backward]:
    """Columns of the window positions times the weight, one product a kernel row (one in all if channels are few).

    A column of ones carries the bias: its row of the weight is the bias, its part of the weight gradient the bias
    gradient, and neither needs a pass of its own.
    """
    (outputs, channels), (kernel_h, kernel_w) = weight.shape[:2], a["kernel"]
    windows = Windows(x.shape, a["kernel"], a["stride"], a["padding"], a["dilation"])
    n, (height, width), wide = x.shape[0], windows.size, kernel_w * channels
    by_row = weight.transpose(2, 3, 1, 0).reshape(kernel_h, wide, outputs)
    weights = [by_row.narrow(0, i, i + 1).reshape(wide, outputs) for i in range(kernel_h)]
    columns = _kernel_rows(x, windows)
    if channels < FEW_CHANNELS:
        columns, weights_of = [_concat(columns, 1)], [by_row.reshape(kernel_h * wide, outputs)]
    else:
        weights_of = list(weights)
    sizes = [part.shape[1] for part in columns]
    if bias is not None:
        columns[0] = _concat([columns[0], x.graph.constant(np.ones((columns[0].shape[0], 1)))], 1)
        weights_of[0] = _concat([weights_of[0], bias.reshape(1, outputs)], 0)
    y = _sum([part @ w for part, w in zip(columns, weights_of, strict=True)]).reshape(
        n, height, width, outputs
    )

    def backward(dy: Value) -> Gradients:
        if channels < FEW_CHANNELS:  # fewer columns than outputs: turn those
            products = [(part.transpose(1, 0) @ _rows(dy)).transpose(1, 0) for part in columns]
        else:
            turned = _rows(dy).transpose(1, 0)
            products = [turned @ part for part in columns]
        dw = _concat(
            [
                product.narrow(1, 0, size).reshape(outputs, -1, kernel_w, channels)
                for product, size in zip(products, sizes, strict=True)
            ],
            1,
        )
        gradients = {"weight": dw.transpose(0, 3, 1, 2)}
        if bias is not None:
            gradients["bias"] = products[0].narrow(1, sizes[0], sizes[0] + 1).reshape(*bias.shape)
        return (_input_gradient(dy, x.shape, weight, weights, windows, a),), gradients

    return y, backward


def _kernel_rows(x: Value, windows: Windows) -> list[Value]:
    """For each row of the kernel the columns [N·oh·ow, kw·C].

    With stride 1 the columns of a kernel row are those of another, shifted by whole image rows: cut the width once,
    then slice the height, which moves a third of what cutting every position would.
    """
    kernel_h, kernel_w = windows.kernel
    if windows.stride != (1, 1):
        parts = windows.cut(x)
        return [_rows(_concat(parts[i * kernel_w : (i + 1) * kernel_w], 3)) for i in range(kernel_h)]
    (pad_h, pad_w), (step_h, step_w), (height, width) = windows.padding, windows.dilation, windows.size
    x = _pad(x, (pad_h, pad_h), (pad_w, pad_w))
    wide = _concat([x.narrow(2, j * step_w, j * step_w + width) for j in range(kernel_w)], 3)
    return [_rows(wide.narrow(1, i * step_h, i * step_h + height)) for i in range(kernel_h)]


def _input_gradient(
    dy: Value, shape, weight: Value, weights: list[Value], windows: Windows, a: dict
) -> Value:
    outputs, channels, kernel_h, kernel_w = weight.shape
    reach = [a["dilation"][i] * (a["kernel"][i] - 1) - a["padding"][i] for i in range(2)]
    if a["stride"] == (1, 1) and min(reach) >= 0 and outputs < channels:
        # A convolution of dy with the turned kernel moves dy's channels, the sum of columns below moves x's.
        back = Windows(dy.shape, a["kernel"], (1, 1), tuple(reach), a["dilation"])
        columns = _kernel_rows(dy, back)
        by_row = weight.transpose(2, 3, 0, 1).reshape(kernel_h * kernel_w, outputs, channels)
        taps = [by_row.narrow(0, k, k + 1) for k in reversed(range(kernel_h * kernel_w))]
        turned = _concat(taps, 0).reshape(kernel_h, kernel_w * outputs, channels)
        parts = [
            columns[i] @ turned.narrow(0, i, i + 1).reshape(kernel_w * outputs, channels)
            for i in range(kernel_h)
        ]
        return _sum(parts).reshape(*shape)
    parts = []
    for w in weights:
        columns = (_rows(dy) @ w.transpose(1, 0)).reshape(*dy.shape[:3], -1)
        parts += [columns.narrow(3, j * channels, (j + 1) * channels) for j in range(kernel_w)]
    return windows.sum_back(parts)


def _depthwise(x: Value, weight: Value, a: dict) -> tuple[Value, Backward]:
    windows = Windows(x.shape, a["kernel"], a["stride"], a["padding"], a["dilation"])
    parts = windows.cut(x)
    taps = weight.transpose(2, 3, 1, 0).reshape(len(parts), -1)
    factors = [taps.narrow(0, k, k + 1).reshape(1, 1, 1, -1) for k in range(len(parts))]
    y = _sum([part * factor for part, factor in zip(parts, factors, strict=True)])

    def backward(dy: Value) -> Gradients:
        dw = _concat([_column_sum(_rows(part * dy)) for part in parts], 0)
        dw = dw.reshape(*a["kernel"], 1, -1).transpose(3, 2, 0, 1)
        return (windows.sum_back([dy * factor for factor in factors]),), {"weight": dw}

    return y, backward


def _grouped(x: Value, weight: Value, a: dict) -> tuple[Value, Backward]:
    groups, outputs, inputs = a["groups"], weight.shape[0] // a["groups"], weight.shape[1]
    pieces = [
        _dense(
            x.narrow(3, g * inputs, (g + 1) * inputs),
            weight.narrow(0, g * outputs, (g + 1) * outputs),
            None,
            a,
        )
        for g in range(groups)
    ]

    def backward(dy: Value) -> Gradients:
        parts = [piece(dy.narrow(3, g * outputs, (g + 1) * outputs)) for g, (_, piece) in enumerate(pieces)]
        dx = _concat([of_inputs[0] for of_inputs, _ in parts], 3)
        return (dx,), {"weight": _concat([of_own["weight"] for _, of_own in parts], 0)}

    return _concat([y for y, _ in pieces], 3), backward


def batch_norm(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    weight, bias, mean, variance = (
        ctx.parameter(layer, name).reshape(1, -1)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    graph, eps, rows = ctx.graph, layer.attributes["eps"], _rows(x)
    count = rows.shape[0]
    if ctx.batch_statistics:
        mean = _column_sum(rows) * (1 / count)
        centred = rows - mean
        variance = _column_sum(centred * centred) * (1 / count)
        ctx.update_statistics(layer, mean, variance, count)
    else:
        centred = rows - mean
    inverse = graph.apply("rsqrt", variance + eps)
    scale = weight * inverse
    y = (centred * scale + bias).reshape(*x.shape)
    own_shape = ctx.parameter(layer, "weight").shape

    def backward(dy: Value) -> Gradients:
        db = _channel_sum(dy)
        dy = _rows(dy)
        dw = _column_sum(dy * centred) * inverse
        gradients = {"weight": dw.reshape(*own_shape), "bias": db.reshape(*own_shape)}
        if not ctx_uses_batch:
            return ((dy * scale).reshape(*x.shape),), gradients
        slope = scale * inverse * dw * (-1 / count)
        offset = scale * db * (-1 / count)
        return ((dy * scale + (centred * slope + offset)).reshape(*x.shape),), gradients

    ctx_uses_batch = ctx.batch_statistics
    return y, backward


def _group_members(graph: Graph, channels: int, groups: int) -> Value:
    """[C, groups]: 1 where the channel belongs to the group."""
    return graph.constant(np.kron(np.eye(groups), np.ones((channels // groups, 1))))


def group_norm(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    n, height, width, channels = x.shape
    graph, groups = ctx.graph, layer.attributes["groups"]
    weight, bias = (ctx.parameter(layer, name).reshape(1, 1, -1) for name in ("weight", "bias"))
    members = _group_members(graph, channels, groups)
    ones = graph.constant(np.ones((n, 1, height * width)))
    flat = x.reshape(n, height * width, channels)

    def mean_of(value: Value) -> Value:
        """Mean over the pixels and channels of each group, at every channel: [N, 1, C]."""
        sums = (ones @ value).reshape(n, channels) @ members * (groups / (channels * height * width))
        return graph.apply("matmul", sums, members.transpose(1, 0)).reshape(n, 1, channels)

    centred = flat - mean_of(flat)
    inverse = graph.apply("rsqrt", mean_of(centred * centred) + layer.attributes["eps"])
    normalised = centred * inverse
    y = (normalised * weight + bias).reshape(*x.shape)
    own_shape = ctx.parameter(layer, "weight").shape

    def backward(dy: Value) -> Gradients:
        dy = dy.reshape(*flat.shape)
        dw = _column_sum((dy * normalised).reshape(-1, channels)).reshape(*own_shape)
        db = _column_sum(dy.reshape(-1, channels)).reshape(*own_shape)
        inner = dy * weight
        dx = (inner - mean_of(inner) - normalised * mean_of(inner * normalised)) * inverse
        return (dx.reshape(*x.shape),), {"weight": dw, "bias": db}

    return y, backward


def max_pool2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    """The first maximum of a window alone takes the gradient, as in PyTorch: after ReLU, ties are common."""
    (x,) = inputs
    a = layer.attributes
    halves = a["kernel"] == a["stride"] == (2, 2) and a["padding"] == (0, 0) and a["dilation"] == (1, 1)
    even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    return _max_pool_halves(x) if halves and even else _max_pool_windows(x, a)


def _max_pool_halves(x: Value) -> tuple[Value, Backward]:
    """Windows of 2×2: the larger of each two columns, then of each two rows; masks at half and quarter size."""
    n, height, width, channels = x.shape
    graph = x.graph

    def halves_of(value: Value) -> tuple[Value, Value]:
        return value.narrow(1, 0, 1), value.narrow(1, 1, 2)

    left, right = halves_of(x.reshape(n * height * width // 2, 2, channels))
    wider = graph.apply("maximum", left, right)
    upper, lower = halves_of(wider.reshape(n * height // 2, 2, width // 2 * channels))
    y = graph.apply("maximum", upper, lower)

    def share(dy: Value, first: Value, second: Value) -> Value:
        to_second = dy * _positive(second - first)
        return graph.apply("concat", dy - to_second, to_second, axis=1)

    def backward(dy: Value) -> Gradients:
        of_rows = share(dy.reshape(*y.shape), upper, lower)
        dx = share(of_rows.reshape(*wider.shape), left, right).reshape(*x.shape)
        graph.equal_sums[dx.name] = dy
        return (dx,), {}

    return y.reshape(n, height // 2, width // 2, channels), backward


def _max_pool_windows(x: Value, a: dict) -> tuple[Value, Backward]:
    """Any window: each position in turn passes on what it does not keep."""
    graph = x.graph
    windows = Windows(x.shape, a["kernel"], a["stride"], a["padding"], a["dilation"])
    parts = windows.cut(x, fill=-3e38 if any(a["padding"]) else 0.0)
    y = reduce(lambda left, right: graph.apply("maximum", left, right), parts)

    def backward(dy: Value) -> Gradients:
        left, kept = dy, []
        for part in parts[:-1]:
            passed_on = left * _positive(y - part)
            kept.append(left - passed_on)
            left = passed_on
        return (windows.sum_back([*kept, left]),), {}

    return y, backward


def avg_pool2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    a, graph = layer.attributes, ctx.graph
    n, height, width, channels = x.shape
    share = 1 / (a["kernel"][0] * a["kernel"][1])
    if a["kernel"] == (height, width) and not any(a["padding"]):
        flat = x.reshape(n, height * width, channels)
        y = graph.constant(np.full((n, 1, height * width), share)) @ flat
        everywhere = graph.constant(np.full((1, height * width, 1), share))

        def backward_global(dy: Value) -> Gradients:
            return ((dy.reshape(n, 1, channels) * everywhere).reshape(*x.shape),), {}

        return y.reshape(n, 1, 1, channels), backward_global
    windows = Windows(x.shape, a["kernel"], a["stride"], a["padding"])
    parts = windows.cut(x)
    return _sum(parts) * share, lambda dy: ((windows.sum_back([dy * share] * len(parts)),), {})


def global_mean(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    y, backward = avg_pool2d(ctx, layer, inputs)
    return y.reshape(y.shape[0], -1), lambda dy: backward(dy.reshape(*y.shape))


def flatten(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    """In the order of N C H W, because the next layer's weight is kept in PyTorch's order."""
    (x,) = inputs
    first = x.transpose(0, 3, 1, 2)
    return first.reshape(x.shape[0], -1), lambda dy: ((dy.reshape(*first.shape).transpose(0, 2, 3, 1),), {})


CHANNELS_LAST = Layout(
    name="channels_last",
    formulations={
        "conv2d": conv2d,
        "batch_norm": batch_norm,
        "group_norm": group_norm,
        "max_pool2d": max_pool2d,
        "avg_pool2d": avg_pool2d,
        "global_mean": global_mean,
        "flatten": flatten,
    },
    from_images=lambda images: images.transpose(0, 2, 3, 1),
    positive=_positive,
    column_sum=_column_sum,
    row_sum=_row_sum,
    log_softmax=_log_softmax,
)
