"""N H W C formulations for XNNPACK, which takes products of runtime tensors but no convolution with a runtime weight.

Everything is elementwise arithmetic, matrix products and contiguous movement, so that the whole step is one delegated
piece: masks come from clamps, sums over N·H·W from products with ones, strided windows from reshape and slice. Channels
last makes every window a contiguous run.
"""

from __future__ import annotations

import numpy as np

from edgestill.export.lowering.capture import Layer
from edgestill.export.lowering.channels_last_pooling import avg_pool2d, global_mean, max_pool2d
from edgestill.export.lowering.formulations import Backward, Context, Gradients, Layout
from edgestill.export.lowering.graph import Graph, Value
from edgestill.export.lowering.windows import Windows, concat, pad, total

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
    return _column_sum(_rows(x))


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
        columns, weights_of = [concat(columns, 1)], [by_row.reshape(kernel_h * wide, outputs)]
    else:
        weights_of = list(weights)
    sizes = [part.shape[1] for part in columns]
    if bias is not None:
        columns[0] = concat([columns[0], x.graph.constant(np.ones((columns[0].shape[0], 1)))], 1)
        weights_of[0] = concat([weights_of[0], bias.reshape(1, outputs)], 0)
    y = total([part @ w for part, w in zip(columns, weights_of, strict=True)]).reshape(
        n, height, width, outputs
    )

    def backward(dy: Value) -> Gradients:
        if channels < FEW_CHANNELS:  # fewer columns than outputs: turn those
            products = [(part.transpose(1, 0) @ _rows(dy)).transpose(1, 0) for part in columns]
        else:
            turned = _rows(dy).transpose(1, 0)
            products = [turned @ part for part in columns]
        dw = concat(
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
        return [_rows(concat(parts[i * kernel_w : (i + 1) * kernel_w], 3)) for i in range(kernel_h)]
    (pad_h, pad_w), (step_h, step_w), (height, width) = windows.padding, windows.dilation, windows.size
    x = pad(x, (pad_h, pad_h), (pad_w, pad_w))
    wide = concat([x.narrow(2, j * step_w, j * step_w + width) for j in range(kernel_w)], 3)
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
        turned = concat(taps, 0).reshape(kernel_h, kernel_w * outputs, channels)
        parts = [
            columns[i] @ turned.narrow(0, i, i + 1).reshape(kernel_w * outputs, channels)
            for i in range(kernel_h)
        ]
        return total(parts).reshape(*shape)
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
    y = total([part * factor for part, factor in zip(parts, factors, strict=True)])

    def backward(dy: Value) -> Gradients:
        dw = concat([_column_sum(_rows(part * dy)) for part in parts], 0)
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
        dx = concat([of_inputs[0] for of_inputs, _ in parts], 3)
        return (dx,), {"weight": concat([of_own["weight"] for _, of_own in parts], 0)}

    return concat([y for y, _ in pieces], 3), backward


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


def pooled_batch_norm(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    """BatchNorm, then maximum pooling: the weight, the bias and the sums of their gradients on the pooled size, because
    max(w·x̂ + b) = |w|·max(sign(w)·x̂) + b."""
    (x,) = inputs
    graph, rows = ctx.graph, _rows(x)
    weight, bias = (ctx.parameter(layer, name).reshape(1, -1) for name in ("weight", "bias"))
    own_shape, count = ctx.parameter(layer, "weight").shape, rows.shape[0]
    mean = _column_sum(rows) * (1 / count)
    centred = rows - mean
    variance = _column_sum(centred * centred) * (1 / count)
    ctx.update_statistics(layer, mean, variance, count)
    inverse = graph.apply("rsqrt", variance + layer.attributes["eps"])
    sign = 1.0 - _positive(-weight) * 2.0
    pooled, unpool = max_pool2d(
        ctx, layer.attributes["pool"], [(centred * (sign * inverse)).reshape(*x.shape)]
    )
    y = _rows(pooled) * (weight * sign) + bias

    def backward(dy: Value) -> Gradients:
        dy = _rows(dy)
        db, dw = _column_sum(dy), _column_sum(dy * _rows(pooled)) * sign
        scale = weight * inverse
        ((dx,), _) = unpool((dy * scale).reshape(*pooled.shape))
        slope = scale * inverse * dw * (-1 / count)
        offset = scale * db * (-1 / count)
        dx = _rows(dx) + (centred * slope + offset)
        return (dx.reshape(*x.shape),), {"weight": dw.reshape(*own_shape), "bias": db.reshape(*own_shape)}

    return y.reshape(*pooled.shape), backward


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
        "pooled_batch_norm": pooled_batch_norm,
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
