"""Rewrites: tables `operator → replacement`, those that every engine may use, and fusions before the gradient.

An engine's own table stands in its module under targets/. Each replacement says the same as what it replaces; the tests
compare them on random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from edgestill.export.lowering.graph import Graph, Node, Value

Rule = Callable[..., "Value | tuple[Value, ...] | None"]


def rewrite(graph: Graph, rules: Mapping[str, Rule]) -> Graph:
    """The graph anew, each node by the rule of its operator where there is one that does not return None.

    A rule takes the old node and its new inputs and returns the new value or values.
    """
    new = Graph()
    values = {value.name: new.input(value.name, value.shape, value.dtype) for value in graph.inputs}

    def of(value: Value) -> Value:
        return new.constant(value.constant) if value.constant is not None else values[value.name]

    for node in graph.nodes:
        new.path = node.path
        inputs = [of(value) for value in node.inputs]
        rule = rules.get(node.operator)
        made = None if rule is None else rule(node, *inputs)
        if made is None:
            made = new.apply_many(node.operator, *inputs, **node.attributes)
        made = made if isinstance(made, tuple) else (made,)
        values.update((old.name, value) for old, value in zip(node.outputs, made, strict=True))
    for name, value in graph.outputs.items():
        new.output(name, of(value))
    new.prune()
    return new


def rewrite_fully(graph: Graph, rules: Mapping[str, Rule]) -> Graph:
    """As `rewrite`, again and again until nothing changes: what a replacement is made of may be replaced in turn."""
    while True:
        before = graph.operators()
        if not before.keys() & rules.keys():
            return graph
        graph = rewrite(graph, rules)
        if graph.operators() == before:
            return graph


def inline(graph: Graph, part: Graph, given: Mapping[str, Value]) -> dict[str, Value]:
    """The nodes of `part` added to `graph`, its inputs being the `given` values; returns its outputs."""
    values = dict(given)

    def of(value: Value) -> Value:
        return graph.constant(value.constant) if value.constant is not None else values[value.name]

    for node in part.nodes:
        graph.path = node.path
        made = graph.apply_many(node.operator, *map(of, node.inputs), **node.attributes)
        values.update((old.name, new) for old, new in zip(node.outputs, made, strict=True))
    return {name: of(value) for name, value in part.outputs.items()}


def fuse_pooled_norms(graph: Graph, never: Callable[[str], bool] = lambda name: False) -> Graph:
    """Each batch_norm that only a max_pool2d reads joined with it, for one cheaper gradient of both.

    `never` names weights for which that would be wrong: with a weight of zero all pixels of a window tie.
    """
    readers = graph.readers()
    kept = {value.name for value in graph.outputs.values()}

    def pool_of(norm: Node) -> Node | None:
        y = norm.outputs[0].name
        found = readers.get(y, [])
        alone = len(found) == 1 and found[0].operator == "max_pool2d" and y not in kept
        return found[0] if alone and not never(norm.inputs[1].name) else None

    def batch_norm(node: Node, *inputs: Value) -> tuple[Value, ...] | None:
        if (pool := pool_of(node)) is None:
            return None
        attributes = {**node.attributes, **pool.attributes}
        return inputs[0].graph.apply_many("pooled_batch_norm", *inputs, **attributes)

    def max_pool2d(node: Node, x: Value) -> Value | None:
        fused = node.inputs[0].operator == "batch_norm" and pool_of(node.inputs[0].node) is node
        return x if fused else None

    return rewrite(graph, {"batch_norm": batch_norm, "max_pool2d": max_pool2d})


def channelwise(x: Value) -> Value:
    """[C] → [1, C, 1, 1]."""
    return x.reshape(1, -1, 1, 1)


# --- what stands for composite operators in simpler ones
def _factors(weight: Value, variance: Value, eps: float) -> tuple[Value, Value]:
    """1/σ and weight/σ a channel."""
    inverse = (variance + eps).apply("rsqrt")
    return inverse, weight * inverse


def batch_norm(node: Node, x: Value, weight: Value, bias: Value) -> tuple[Value, ...]:
    """From centred values: the variance would cancel otherwise."""
    mean = x.mean(0, 2, 3)
    centred = x - mean
    variance = (centred * centred).mean(0, 2, 3).reshape(-1)
    _, scale = _factors(weight, variance, node.attributes["eps"])
    return centred * channelwise(scale) + channelwise(bias), mean.reshape(-1), variance


def batch_norm_grad(node: Node, dy: Value, x: Value, weight: Value, mean: Value, variance: Value):
    """Three numbers a channel: a factor of dy, one of the centred x, and an offset."""
    count = x.size // x.shape[1]
    inverse, scale = _factors(weight, variance, node.attributes["eps"])
    centred = x - channelwise(mean)
    db = dy.sum(0, 2, 3).reshape(-1)
    dw = (dy * centred).sum(0, 2, 3).reshape(-1) * inverse
    slope, offset = scale * inverse * dw * (-1 / count), scale * db * (-1 / count)
    dx = dy * channelwise(scale) + channelwise(offset) + centred * channelwise(slope)
    return dx, dw, db


def _pooled(node: Node, x: Value, weight: Value) -> tuple[Value, ...]:
    """sign(w)·x̂, its largest of each window, the statistics, and sign(w)."""
    graph, a = x.graph, dict(node.attributes)
    eps = a.pop("eps")
    zeros = graph.constant(np.zeros(weight.shape))
    sign = weight.apply("greater_equal", zeros) * 2.0 - 1.0
    normalised, mean, variance = graph.apply_many("batch_norm", x, sign, zeros, eps=eps)
    return normalised, normalised.apply("max_pool2d", **a), mean, variance, sign


def pooled_batch_norm(node: Node, x: Value, weight: Value, bias: Value) -> tuple[Value, ...]:
    """max(w·x̂ + b) = |w|·max(sign(w)·x̂) + b: weight and bias work on the pooled size."""
    _, pooled, mean, variance, sign = _pooled(node, x, weight)
    return pooled * channelwise(weight * sign) + channelwise(bias), mean, variance


def pooled_batch_norm_grad(node: Node, dy: Value, x: Value, weight: Value, mean: Value, variance: Value):
    """So do all sums, because pooling passes each gradient on once."""
    normalised, pooled, mean, variance, sign = _pooled(node, x, weight)
    count = x.size // x.shape[1]
    inverse, scale = _factors(weight, variance, node.attributes["eps"])
    db = dy.sum(0, 2, 3).reshape(-1)
    dw = (dy * pooled).sum(0, 2, 3).reshape(-1) * sign
    pool = {key: value for key, value in node.attributes.items() if key != "eps"}
    unpooled = (dy * channelwise(scale)).apply("max_pool2d_grad", normalised, pooled, **pool)
    slope, offset = scale * sign * dw * (-1 / count), scale * db * (-1 / count)
    return unpooled + (normalised * channelwise(slope) + channelwise(offset)), dw, db


def avg_pool2d_grad(node: Node, dy: Value) -> Value:
    """A depthwise adjoint convolution with one number."""
    a, channels = node.attributes, dy.shape[1]
    share = dy.graph.constant(np.full((channels, 1, *a["kernel"]), 1 / np.prod(a["kernel"])))
    return dy.apply(
        "conv2d_transpose", share, size=a["size"], stride=a["stride"], padding=a["padding"],
        dilation=(1, 1), groups=channels,
    )  # fmt: skip


def standardize(node: Node, x: Value) -> tuple[Value, Value]:
    last = x.rank - 1
    centred = x - x.mean(last)
    inverse = ((centred * centred).mean(last) + node.attributes["eps"]).apply("rsqrt")
    return centred * inverse, inverse


def softplus(node: Node, x: Value) -> Value:
    """Without an exponent above zero, so that nothing overflows."""
    return x.apply("relu") + ((-x.apply("abs")).apply("exp") + 1.0).apply("log")


def stop_gradient(node: Node, x: Value) -> Value:
    return x


EXPANSIONS: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        batch_norm, batch_norm_grad, pooled_batch_norm, pooled_batch_norm_grad, avg_pool2d_grad, standardize,
        softplus, stop_gradient,
    )
}  # fmt: skip
"""Replacements by the name of the operator; what they are made of may be replaced in turn."""


# --- depthwise convolution of small images as products: a matrix a channel, from pixels to pixels
MATRIX_ELEMENTS = 2**14
"""Pixels in times pixels out up to which a product for each channel is quicker than a depthwise convolution."""


def _pixels_to_pixels(node: Node, image: Value, result: Value, weight: Value) -> np.ndarray | None:
    """[kh·kw, pixels in · pixels out]: 1 where a place of the kernel takes the one pixel to the other. None for other
    convolutions than depthwise ones of small images."""
    a, (height, width), (rows, columns) = node.attributes, image.shape[2:], result.shape[2:]
    depthwise = a["groups"] == image.shape[1] == result.shape[1] > 1
    if not depthwise or height * width * rows * columns > MATRIX_ELEMENTS:
        return None
    by_axis = []
    for axis, (size, out) in enumerate(((height, rows), (width, columns))):
        kernel, (before, _) = weight.shape[2 + axis], a["padding"][axis]
        places = np.arange(out)[None] * a["stride"][axis] + np.arange(kernel)[:, None] * a["dilation"][axis] - before
        by_axis.append((places[:, None, :] == np.arange(size)[None, :, None]).astype(np.float32))
    meet = np.einsum("ahr,bwc->abhwrc", *by_axis)
    return meet.reshape(math.prod(weight.shape[2:]), -1)


def _by_channel(x: Value) -> Value:
    """[N, C, H, W] → [C, N, H·W]."""
    return x.reshape(*x.shape[:2], -1).transpose(1, 0, 2)


def _matrices(weight: Value, meet: np.ndarray, pixels: int) -> Value:
    return (weight.reshape(weight.shape[0], -1) @ weight.graph.constant(meet)).reshape(weight.shape[0], pixels, -1)


def small_depthwise(node: Node, x: Value, weight: Value, *bias: Value) -> Value | None:
    y = node.outputs[0]
    if (meet := _pixels_to_pixels(node, x, y, weight)) is None:
        return None
    product = _by_channel(x) @ _matrices(weight, meet, math.prod(x.shape[2:]))
    y = product.transpose(1, 0, 2).reshape(*y.shape)
    return y + channelwise(bias[0]) if bias else y


def small_depthwise_transpose(node: Node, dy: Value, weight: Value) -> Value | None:
    x = node.outputs[0]
    if (meet := _pixels_to_pixels(node, x, dy, weight)) is None:
        return None
    product = _by_channel(dy) @ _matrices(weight, meet, math.prod(x.shape[2:])).swap()
    return product.transpose(1, 0, 2).reshape(*x.shape)


def small_depthwise_weight_grad(node: Node, x: Value, dy: Value, weight: Value) -> tuple[Value, Value] | None:
    if (meet := _pixels_to_pixels(node, x, dy, weight)) is None:
        return None
    of_matrices = (_by_channel(x).swap() @ _by_channel(dy)).reshape(x.shape[1], -1)
    dw = of_matrices @ x.graph.constant(meet).swap()
    return dw.reshape(*weight.shape), dy.sum(0, 2, 3).reshape(-1)


SMALL_DEPTHWISE: dict[str, Rule] = {
    "conv2d": small_depthwise,
    "conv2d_transpose": small_depthwise_transpose,
    "conv2d_weight_grad": small_depthwise_weight_grad,
}
