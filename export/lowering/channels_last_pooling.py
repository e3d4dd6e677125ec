"""Pooling in N H W C: maxima by halves or by window positions, whose masks are clamps; means as products with ones."""

from __future__ import annotations

from functools import reduce

import numpy as np

from edgestill.export.lowering.capture import Layer
from edgestill.export.lowering.formulations import Backward, Context, Gradients
from edgestill.export.lowering.graph import Value
from edgestill.export.lowering.windows import Windows, total


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
        to_second = dy * graph.apply("positive", second - first)
        return graph.apply("concat", dy - to_second, to_second, axis=1)

    def backward(dy: Value) -> Gradients:
        of_rows = share(dy.reshape(*y.shape), upper, lower)
        dx = share(of_rows.reshape(*wider.shape), left, right).reshape(*x.shape)
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
            passed_on = left * graph.apply("positive", y - part)
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
    return total(parts) * share, lambda dy: ((windows.sum_back([dy * share] * len(parts)),), {})


def global_mean(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    y, backward = avg_pool2d(ctx, layer, inputs)
    return y.reshape(y.shape[0], -1), lambda dy: backward(dy.reshape(*y.shape))
