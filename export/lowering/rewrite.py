"""Rewrites: tables `operator → replacement`, those that every engine may use, and fusions before the gradient.

An engine's own table stands in its module under targets/. Each replacement says the same as what it replaces; the tests
compare them on random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from edgestill.export.lowering.gradient import propagate
from edgestill.export.lowering.graph import Graph, Node, Value

Rule = Callable[..., "Value | tuple[Value, ...] | None"]


def rewrite(graph: Graph, rules: Mapping[str, Rule]) -> Graph:
    """The graph anew, each node by the rule of its operator where there is one that does not return None.

    A rule takes the old node and its new inputs and returns the new value or values.
    """
    new = Graph()
    given = {value.name: new.input(value.name, value.shape, value.dtype) for value in graph.inputs}
    new.outputs = inline(new, graph, given, rules)
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


def inline(
    graph: Graph, part: Graph, given: Mapping[str, Value], rules: Mapping[str, Rule] = MappingProxyType({})
) -> dict[str, Value]:
    """The nodes of `part` added to `graph`, by the rules as in `rewrite`, its inputs being the `given` values; returns
    its outputs."""
    values = dict(given)

    def of(value: Value) -> Value:
        return graph.constant(value.constant) if value.constant is not None else values[value.name]

    for node in part.nodes:
        graph.path, inputs = node.path, [of(value) for value in node.inputs]
        made = rules[node.operator](node, *inputs) if node.operator in rules else None
        if made is None:
            made = graph.apply_many(node.operator, *inputs, **node.attributes)
        made = made if isinstance(made, tuple) else (made,)
        values.update((old.name, new) for old, new in zip(node.outputs, made, strict=True))
    return {name: of(value) for name, value in part.outputs.items()}


def pull_back(
    function: Callable[..., Any], dy: Sequence[Value], wanted: Sequence[Value], *others: Value
) -> list[Value] | None:
    """The gradients in the `wanted` operands of the value or values function(*wanted, *others), whose own are `dy`: by
    the rules of the operators that the function is made of. None where it returns None.

    An operand that its gradient does not depend on, as in all that is linear, is asked for its shape alone.
    """
    graph, part = dy[0].graph, Graph(path=dy[0].graph.path)
    given = [*wanted, *others, *dy]
    inside = [part.input(f"given.{i}", value.shape, value.dtype) for i, value in enumerate(given)]
    of_dy, operands = inside[-len(dy) :], inside[: -len(dy)]
    if (made := function(*operands)) is None:
        return None
    made = [made] if isinstance(made, Value) else made
    found = propagate(part, zip(made, of_dy, strict=True), operands[: len(wanted)])
    for value in operands[: len(wanted)]:
        part.output(value.name, found.get(value.name) or part.constant(np.zeros(value.shape)))
    part.prune()
    return list(inline(graph, part, {v.name: outer for v, outer in zip(inside, given, strict=True)}).values())


def convolution_rules(convolve: Callable[..., Value | None]) -> dict[str, Rule]:
    """Rules for a convolution and for its gradients, which follow from the one way to say it:
    convolve(attributes, image, weight, *bias)."""

    def conv2d(node: Node, x: Value, weight: Value, *bias: Value) -> Value | None:
        return convolve(node.attributes, x, weight, *bias)

    def conv2d_transpose(node: Node, dy: Value, weight: Value) -> Value | None:
        by_image = pull_back(lambda *operands: convolve(node.attributes, *operands), [dy], node.outputs, weight)
        return by_image and by_image[0]

    def conv2d_weight_grad(node: Node, x: Value, dy: Value, weight: Value) -> tuple[Value, Value] | None:
        of_weight, of_bias = node.outputs
        wanted = [of_weight, of_bias] if node.attributes["bias"] else [of_weight]
        found = pull_back(lambda *operands: convolve(node.attributes, operands[-1], *operands[:-1]), [dy], wanted, x)
        return found and (found[0], found[1] if len(found) > 1 else dy.sum(0, 2, 3).reshape(-1))

    return {rule.__name__: rule for rule in (conv2d, conv2d_transpose, conv2d_weight_grad)}


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


EXPANSIONS: dict[str, Rule] = {
    "batch_norm": batch_norm,
    "batch_norm_grad": batch_norm_grad,
    "pooled_batch_norm": pooled_batch_norm,
    "pooled_batch_norm_grad": pooled_batch_norm_grad,
    "avg_pool2d_grad": avg_pool2d_grad,
    "standardize": standardize,
    # without an exponent above zero, so that nothing overflows
    "softplus": lambda node, x: x.apply("relu") + ((-x.apply("abs")).apply("exp") + 1.0).apply("log"),
    "stop_gradient": lambda node, x: x,
}
"""Replacements by the name of the operator; what they are made of may be replaced in turn."""


# --- depthwise convolution of small images as products: a matrix a channel, from pixels to pixels
MATRIX_ELEMENTS = 2**14
"""Pixels in times pixels out up to which a product for each channel is quicker than a depthwise convolution."""


def meeting(a: Mapping[str, Any], axis: int, size: int, kernel: int) -> np.ndarray:
    """Of one axis: 1 where a place of the kernel takes one row in to one row out, [kernel, in, out]."""
    gap, step, sides = (a[key][axis] for key in ("dilation", "stride", "padding"))
    out = (size + sum(sides) - gap * (kernel - 1) - 1) // step + 1
    places = np.arange(out)[None] * step + np.arange(kernel)[:, None] * gap - sides[0]
    return (places[:, None, :] == np.arange(size)[None, :, None]).astype(np.float32)


def _small_depthwise(a: Mapping[str, Any], x: Value, weight: Value, *bias: Value) -> Value | None:
    """None for other convolutions than depthwise ones of small images."""
    n, channels, *size = x.shape
    if not a["groups"] == channels == weight.shape[0] > 1:
        return None
    by_axis = [meeting(a, i, size[i], weight.shape[2 + i]) for i in range(2)]
    out = [meet.shape[2] for meet in by_axis]
    if math.prod(size) * math.prod(out) > MATRIX_ELEMENTS:
        return None
    meet = np.einsum("ahr,bwc->abhwrc", *by_axis).reshape(math.prod(weight.shape[2:]), -1)
    matrices = weight.reshape(channels, -1) @ x.graph.constant(meet)
    by_channel = x.reshape(n, channels, -1).transpose(1, 0, 2)
    product = by_channel @ matrices.reshape(channels, math.prod(size), -1)
    y = product.transpose(1, 0, 2).reshape(n, channels, *out)
    return y + channelwise(bias[0]) if bias else y


_SMALL_DEPTHWISE = convolution_rules(_small_depthwise)


def _small_depthwise_transpose(node: Node, dy: Value, weight: Value) -> Value | None:
    """The matrices are zero where no kernel takes one pixel to the other, and 0·∞ is NaN."""
    return _SMALL_DEPTHWISE["conv2d_transpose"](node, dy, weight) if dy.finite else None


SMALL_DEPTHWISE: dict[str, Rule] = _SMALL_DEPTHWISE | {"conv2d_transpose": _small_depthwise_transpose}
