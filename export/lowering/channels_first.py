"""N C H W formulations for engines with convolution, pooling and matrix products of runtime tensors (ONNX Runtime).

On ONNX Runtime 1.31, CPU, the input gradient of a convolution is quickest as ConvTranspose,
the weight gradient as a product with the image's columns, and columns and pooling windows are quickest cut out by a
depthwise convolution with one-hot kernels, whose adjoint (ConvTranspose) puts them back for any stride and padding.
"""

from __future__ import annotations

import operator
from functools import reduce

import numpy as np

from edgestill.export.lowering.capture import Layer
from edgestill.export.lowering.formulations import Backward, Context, Gradients, Layout
from edgestill.export.lowering.graph import Graph, Value

SMALL_AREA = 64
SMALL_CHANNELS = 16
CACHE_BYTES = 2 * 2**20


def _channelwise(value: Value) -> Value:
    return value.reshape(1, -1, 1, 1)


def _channel_sum(x: Value) -> Value:
    return x.graph.apply("reduce_sum", x, axes=(0, 2, 3)).reshape(-1)


def _one_hot_kernels(graph: Graph, channels: int, kernel: tuple[int, int]) -> Value:
    """[channels·kh·kw, 1, kh, kw]: output channel c·kh·kw + k picks the k-th pixel of the window of channel c."""
    size = kernel[0] * kernel[1]
    return graph.constant(np.tile(np.eye(size, dtype=np.float32), (channels, 1)).reshape(-1, 1, *kernel))


def _columns(x: Value, kernel, stride, padding, dilation=(1, 1)) -> Value:
    """Windows of each channel: [N, C, kh·kw, oh·ow]."""
    n, channels = x.shape[:2]
    if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0):
        return x.reshape(n, channels, 1, -1)
    kernels = _one_hot_kernels(x.graph, channels, kernel)
    cut = convolve(x, kernels, None, stride, padding, dilation, channels)
    return cut.reshape(n, channels, kernel[0] * kernel[1], -1)


def _put_back(parts: Value, size, kernel, stride, padding, dilation=(1, 1)) -> Value:
    """The adjoint of `_columns`: parts [N, C·kh·kw, oh, ow] summed into images [N, C, *size]."""
    channels = parts.shape[1] // (kernel[0] * kernel[1])
    kernels = _one_hot_kernels(parts.graph, channels, kernel)
    return _transposed(parts, kernels, size, stride, padding, dilation, channels)


def _transposed(dy: Value, weight: Value, size, stride, padding, dilation, groups) -> Value:
    left_over = tuple(
        size[i]
        - ((dy.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
        for i in range(2)
    )
    return dy.graph.apply(
        "conv2d_transpose",
        dy,
        weight,
        stride=stride,
        padding=padding,
        output_padding=left_over,
        dilation=dilation,
        groups=groups,
    )


def conv2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    """The engine's own convolution; of a small image it makes products too small to share among threads, so there a
    product with the columns, which the weight gradient needs anyway, takes its place."""
    (x,) = inputs
    a = layer.attributes
    weight, bias = ctx.parameter(layer, "weight"), ctx.parameter(layer, "bias")
    size = layer.output_shape[2:]
    small = a["groups"] == 1 and np.prod(size) <= SMALL_AREA and x.shape[1] >= SMALL_CHANNELS
    if small and ctx.batch_statistics:  # inference has no weight gradient that would share the columns
        flat = weight.reshape(weight.shape[0], -1, 1, 1)
        parts = [
            convolve(columns.reshape(columns.shape[0], -1, *size), flat, bias)
            for columns in _column_parts(x, a, size)
        ]
        y = parts[0] if len(parts) == 1 else ctx.graph.apply("concat", *parts, axis=0)
    else:
        y = convolve(x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])

    def backward(dy: Value) -> Gradients:
        dx = _transposed(dy, weight, x.shape[2:], a["stride"], a["padding"], a["dilation"], a["groups"])
        gradients = {"weight": _weight_gradient(x, weight, a, dy)}
        return (dx,), gradients | ({"bias": _channel_sum(dy)} if bias is not None else {})

    return y, backward


def convolve(
    x: Value, weight: Value, bias: Value | None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
) -> Value:
    operands = (x, weight) if bias is None else (x, weight, bias)
    return x.graph.apply(
        "conv2d", *operands, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def _column_parts(x: Value, a: dict, size: tuple[int, int]) -> list[Value]:
    """The columns [images, C, kh·kw, oh·ow] of a few images at a time: few enough that they are still in the cache when
    a product reads them."""
    n = x.shape[0]
    column_bytes = 4 * int(np.prod(size)) * x.shape[1] * int(np.prod(a["kernel"]))
    images = max(
        count
        for count in range(1, n + 1)
        if n % count == 0 and (count == 1 or count * column_bytes <= CACHE_BYTES)
    )
    return [
        _columns(x.narrow(0, start, start + images), a["kernel"], a["stride"], a["padding"], a["dilation"])
        for start in range(0, n, images)
    ]


def _weight_gradient(x: Value, weight: Value, a: dict, dy: Value) -> Value:
    """A product of gradient and columns for each image, summed."""
    groups, start, parts = a["groups"], 0, []
    for columns in _column_parts(x, a, dy.shape[2:]):
        images, area = columns.shape[0], columns.shape[3]
        of_dy = dy.narrow(0, start, start + images)
        shape = (images, -1, area) if groups == 1 else (images, groups, -1, area)
        by_image = x.graph.apply("matmul", of_dy.reshape(*shape), columns.reshape(*shape), transpose_b=True)
        # A product with ones: unlike the engine's sum over the first axis it uses every thread.
        ones = x.graph.constant(np.ones((1, images)))
        parts.append(ones @ by_image.reshape(images, -1))
        start += images
    return reduce(operator.add, parts).reshape(*weight.shape)


def batch_norm(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    weight, bias = ctx.parameter(layer, "weight"), ctx.parameter(layer, "bias")
    eps = layer.attributes["eps"]
    graph = ctx.graph
    running = [ctx.parameter(layer, name) for name in ("running_mean", "running_var")]
    if not ctx.batch_statistics:
        mean, variance = running
        y = graph.apply("normalize", x, weight, bias, mean, variance, eps=eps)

        def backward_frozen(dy: Value) -> Gradients:
            inverse = graph.apply("rsqrt", variance + eps)
            dw = (_channel_sum(dy * x) - mean * _channel_sum(dy)) * inverse
            return (dy * _channelwise(weight * inverse),), {"weight": dw, "bias": _channel_sum(dy)}

        return y, backward_frozen

    count = x.size // x.shape[1]
    y, mean, variance = graph.apply_many("normalize_by_batch", x, weight, bias, *running, eps=eps)
    ctx.update_statistics(layer, mean, variance, count)

    def backward(dy: Value) -> Gradients:
        inverse = graph.apply("rsqrt", variance + eps)
        db = _channel_sum(dy)
        dw = (_channel_sum(dy * x) - mean * db) * inverse
        # dx = weight·inverse·(dy − mean(dy) − (x − mean)·inverse·dw/count), gathered into one factor of dy, one of x
        # and one offset a channel.
        scale = weight * inverse
        slope = scale * inverse * dw * (-1 / count)
        offset = scale * db * (-1 / count) - slope * mean
        dx = _affine(dy, scale, offset) + x * _channelwise(slope)
        return (dx,), {"weight": dw, "bias": db}

    return y, backward


def pooled_batch_norm(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    """BatchNorm, then maximum pooling, in an order that keeps the full-sized passes few.

    max(w·x̂ + b) = |w|·max(sign(w)·x̂) + b: the weight and bias, and every sum of their gradients, work on the pooled
    size.
    """
    (x,) = inputs
    graph = ctx.graph
    weight, bias = ctx.parameter(layer, "weight"), ctx.parameter(layer, "bias")
    running = [ctx.parameter(layer, name) for name in ("running_mean", "running_var")]
    eps, count = layer.attributes["eps"], x.size // x.shape[1]
    zeros = graph.constant(np.zeros(weight.shape))
    sign = graph.apply("greater_equal", weight, zeros) * 2.0 - 1.0
    normalised, mean, variance = graph.apply_many("normalize_by_batch", x, sign, zeros, *running, eps=eps)
    ctx.update_statistics(layer, mean, variance, count)
    pooled, unpool = max_pool2d(ctx, layer.attributes["pool"], [normalised])

    def backward(dy: Value) -> Gradients:
        inverse = graph.apply("rsqrt", variance + eps)
        db, dw = _channel_sum(dy), _channel_sum(dy * pooled) * sign
        scale = weight * inverse
        slope = scale * inverse * dw * (-1 / count)
        offset = scale * db * (-1 / count) - slope * mean
        ((dx,), _) = unpool(dy * _channelwise(scale))
        return (dx + _affine(x, slope, offset),), {"weight": dw, "bias": db}

    return _affine(pooled, weight * sign, bias), backward


def _affine(x: Value, scale: Value, offset: Value) -> Value:
    """x·scale + offset a channel, in one pass over memory: a depthwise convolution of one pixel."""
    return convolve(x, scale.reshape(-1, 1, 1, 1), offset, groups=x.shape[1])


def group_norm(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    weight, bias = ctx.parameter(layer, "weight"), ctx.parameter(layer, "bias")
    graph, groups = ctx.graph, layer.attributes["groups"]
    grouped = x.reshape(x.shape[0], groups, -1)

    def mean_of(value: Value) -> Value:
        return graph.apply("reduce_mean", value, axes=(2,))

    centred = grouped - mean_of(grouped)
    inverse = graph.apply("rsqrt", mean_of(centred * centred) + layer.attributes["eps"])
    normalised = (centred * inverse).reshape(*x.shape)
    y = normalised * _channelwise(weight) + _channelwise(bias)

    def backward(dy: Value) -> Gradients:
        gradients = {"weight": _channel_sum(dy * normalised), "bias": _channel_sum(dy)}
        inner = (dy * _channelwise(weight)).reshape(*grouped.shape)
        flat = normalised.reshape(*grouped.shape)
        dx = (inner - mean_of(inner) - flat * mean_of(inner * flat)) * inverse
        return (dx.reshape(*x.shape),), gradients

    return y, backward


def max_pool2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    """One maximum of a window alone takes the gradient, as in PyTorch: after ReLU, ties are common.

    It is the first in PyTorch's order but for a tie of only the upper right and the lower left of a 2×2 window.
    """
    (x,) = inputs
    a = layer.attributes
    halves = a["kernel"] == a["stride"] == (2, 2) and a["padding"] == (0, 0) and a["dilation"] == (1, 1)
    even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    return _max_pool_halves(x) if halves and even else _max_pool_windows(x, **a)


def _max_pool_halves(x: Value) -> tuple[Value, Backward]:
    """Windows of 2×2: the larger of each two rows, then of each two columns; masks at half and quarter size.

    Rows first, because they are contiguous and the first pass is the larger one.
    """
    n, channels, height, width = x.shape
    graph, rows = x.graph, n * channels * height // 2

    def halves_of(value: Value, axis: int) -> tuple[Value, Value]:
        return value.narrow(axis, 0, 1), value.narrow(axis, 1, 2)

    upper, lower = halves_of(x.reshape(rows, 2, width), 1)
    higher = graph.apply("maximum", upper, lower)
    left, right = halves_of(higher.reshape(-1, 2).transpose(1, 0), 0)  # even columns, then odd ones
    y = graph.apply("maximum", left, right)

    def share(dy: Value, first: Value, second: Value, axis: int) -> Value:
        to_first = dy * graph.apply("greater_equal", first, second)
        return graph.apply("concat", to_first, dy - to_first, axis=axis)

    def backward(dy: Value) -> Gradients:
        of_columns = share(dy.reshape(*y.shape), left, right, 0)
        of_rows = share(of_columns.transpose(1, 0).reshape(*higher.shape), upper, lower, 1)
        return (of_rows.reshape(*x.shape),), {}

    return y.reshape(n, channels, height // 2, width // 2), backward


def _max_pool_windows(x: Value, kernel, stride, padding, dilation) -> tuple[Value, Backward]:
    """Any window, overlapping ones too."""
    graph = x.graph
    y = graph.apply("max_pool2d", x, kernel=kernel, stride=stride, padding=padding, dilation=dilation)

    def backward(dy: Value) -> Gradients:
        n, channels, height, width = y.shape
        size = kernel[0] * kernel[1]
        source = x
        if any(padding):  # a padded pixel never wins
            edges = (0, 0, *padding)
            source = graph.apply("pad", x, begins=edges, ends=edges, value=-3e38)
        windows = _columns(source, kernel, stride, (0, 0), dilation)
        hits = graph.apply("greater_equal", windows, y.reshape(n, channels, 1, -1))
        # A hit minus the hits before it is above zero for the first one only.
        first = np.eye(size, dtype=np.float32) - np.tri(size, k=-1, dtype=np.float32)
        winners = graph.apply("relu", graph.constant(first) @ hits)
        parts = (winners * dy.reshape(n, channels, 1, -1)).reshape(n, channels * size, height, width)
        padded = (x.shape[2] + 2 * padding[0], x.shape[3] + 2 * padding[1])
        dx = _put_back(parts, padded, kernel, stride, (0, 0), dilation)
        dx = dx.narrow(2, padding[0], padding[0] + x.shape[2]).narrow(3, padding[1], padding[1] + x.shape[3])
        return (dx,), {}

    return y, backward


def avg_pool2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    a, graph = layer.attributes, ctx.graph
    kernel, stride, padding = a["kernel"], a["stride"], a["padding"]
    if kernel == x.shape[2:] and not any(padding):
        y = graph.apply("reduce_mean", x, axes=(2, 3))
        everywhere = graph.constant(np.full((1, 1, *kernel), 1 / np.prod(kernel)))
        return y, lambda dy: ((dy * everywhere,), {})
    y = graph.apply("avg_pool2d", x, kernel=kernel, stride=stride, padding=padding)

    def backward(dy: Value) -> Gradients:
        channels = x.shape[1]
        share = graph.constant(np.full((channels, 1, *kernel), 1 / np.prod(kernel)))
        return (_transposed(dy, share, x.shape[2:], stride, padding, (1, 1), channels),), {}

    return y, backward


def global_mean(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    y, backward = avg_pool2d(ctx, layer, inputs)
    return y.reshape(*y.shape[:2]), lambda dy: backward(dy.reshape(*y.shape))


def flatten(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    (x,) = inputs
    return x.reshape(x.shape[0], -1), lambda dy: ((dy.reshape(*x.shape),), {})


CHANNELS_FIRST = Layout(
    name="channels_first",
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
    from_images=lambda images: images,
    positive=lambda x: x.graph.apply("positive", x),
    column_sum=lambda x: x.graph.apply("reduce_sum", x, axes=(0,)),
    row_sum=lambda x: x.graph.apply("reduce_sum", x, axes=(1,)),
    log_softmax=lambda x: x.graph.apply("log_softmax", x),
    joint_update_size=4096,
)
