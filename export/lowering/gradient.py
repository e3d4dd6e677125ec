"""Reverse-mode differentiation of a graph: one rule an operator, and the loop that applies them from last to first.

A rule takes dy, the gradient in the operator's value y, then y and the inputs, and says the gradient in one input; an
operator has one rule an input, in order. Where several inputs share work, one function returns all of them. What
broadcasting repeated is summed afterwards, so rules need not think of it. `()` means: constant almost everywhere.

Conventions at kinks are PyTorch's: 0 for relu(0) and |0|, halves for a tie of maximum, all that tie for reduce_max, the
first largest pixel of a pooling window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add

from edgestill.export.lowering.graph import Graph, LoweringError, Node, Value
from edgestill.export.lowering.simplify import inverse_permutation

MERGED = 4
"""From so many on, a sum of products is one product of concatenations: the weights of a recurrence."""


def gradients(graph: Graph, loss: Value, wanted: Iterable[Value]) -> dict[str, Value]:
    """The gradients of the scalar `loss` in the `wanted` values, by their names, as nodes added to the graph.

    A value that does not reach the loss has no entry. Errors: LoweringError for an operator without a rule.
    """
    return propagate(graph, [(loss, graph.constant(1.0).reshape(*(1,) * loss.rank))], wanted)


def propagate(graph: Graph, given: Iterable[tuple[Value, Value]], wanted: Iterable[Value]) -> dict[str, Value]:
    """As `gradients`, from values of the graph and the gradients that are `given` in them."""
    reached = {value.name for value in wanted}
    for node in graph.nodes:
        if node.operator not in _FLAT and any(value.name in reached for value in node.inputs):
            reached.update(value.name for value in node.outputs)
    parts: dict[str, list[Value]] = {}
    for value, gradient in given:
        parts.setdefault(value.name, []).append(gradient)
    for node in reversed(list(graph.nodes)):
        of_outputs = [_total(parts.get(value.name, ())) for value in node.outputs]
        if node.operator in _FLAT or not any(value.name in reached for value in node.inputs):
            continue
        if all(dy is None for dy in of_outputs):
            continue
        graph.path = node.path
        for value, part in zip(node.inputs, _of_inputs(node, of_outputs, reached), strict=True):
            if part is not None and value.name in reached:
                parts.setdefault(value.name, []).append(_summed_to(part, value.shape))
    return {value.name: _total(parts[value.name]) for value in wanted if value.name in parts}


def _of_inputs(node: Node, of_outputs: list[Value | None], reached: set[str]) -> Sequence[Value | None]:
    rules = RULES.get(node.operator)
    if rules is None or any(dy is not None for dy in of_outputs[1:]):
        raise LoweringError(
            f"{node.path}: no gradient is known of {node.operator}" + (" in its statistics" if rules else ""),
            hint="freeze what lies before it, or write it with other operators",
        )
    dy, y = of_outputs[0], node.outputs[0]
    if callable(rules):
        return rules(node, dy)
    return [
        rule(dy, y, *node.inputs) if value.name in reached else None
        for value, rule in zip(node.inputs, rules, strict=True)
    ]


def _total(parts: Sequence[Value]) -> Value | None:
    if len(parts) >= MERGED and (merged := _merged(parts)) is not None:
        return merged
    if len(parts) > 1 and (joined := _joined(parts)) is not None:
        return joined
    return reduce(add, parts) if parts else None


def _merged(parts: Sequence[Value]) -> Value | None:
    """Σ aᵢᵀ·bᵢ as one product of the stacked a and b, Σ of column sums as one of the stacked rows; in the order of the
    forward pass, in which they may be stacked already."""
    graph = parts[0].graph
    if all(part.operator == "matmul" and part.rank == 2 for part in parts):
        flags = parts[0].node.attributes
        if all(part.node.attributes == flags for part in parts):
            axes = (0 if flags["transpose_a"] else 1, 1 if flags["transpose_b"] else 0)
            sides = [
                graph.apply("concat", *(part.node.inputs[i] for part in reversed(parts)), axis=axis)
                for i, axis in enumerate(axes)
            ]
            return graph.apply("matmul", *sides, **flags)
    if all(part.operator == "reshape" for part in parts):
        inner = [part.node.inputs[0] for part in parts]
        if all(v.operator == "reduce_sum" and v.node.attributes["axes"] == (0,) for v in inner):
            rows = [v.node.inputs[0] for v in inner]
            if len({row.shape[1:] for row in rows}) == 1:
                return graph.apply("concat", *rows, axis=0).sum(0).reshape(*parts[0].shape)
    return None


def _joined(parts: Sequence[Value]) -> Value | None:
    """The gradients of slices that leave no gap between them, put end to end instead of padded and added."""
    if any(part.operator != "pad" or part.node.attributes["value"] for part in parts):
        return None
    spans, axes = [], set()
    for part in parts:
        begins, ends = part.node.attributes["begins"], part.node.attributes["ends"]
        axes |= {axis for axis in range(part.rank) if begins[axis] or ends[axis]}
        spans.append((begins, part.node.inputs[0]))
    if len(axes) != 1:
        return None
    (axis,) = axes
    spans.sort(key=lambda span: span[0][axis])
    first = end = spans[0][0][axis]
    for begins, inner in spans:
        if begins[axis] != end:
            return None
        end += inner.shape[axis]
    joined = parts[0].graph.apply("concat", *(inner for _, inner in spans), axis=axis)
    edges = (first, parts[0].shape[axis] - end)
    return joined.pad(*([edge if i == axis else 0 for i in range(joined.rank)] for edge in edges))


def _summed_to(gradient: Value, shape: tuple[int, ...]) -> Value:
    """The gradient of what was broadcast from `shape`; and one that is alike for a whole axis, repeated along it."""
    extra = gradient.rank - len(shape)
    aligned = (1,) * extra + tuple(shape)
    axes = [i for i, (have, want) in enumerate(zip(gradient.shape, aligned, strict=True)) if have > want]
    if axes:
        gradient = gradient.sum(*axes)
    return gradient.reshape(*shape) if math.prod(shape) == gradient.size else gradient.expand(*shape)


def _only(mask: Value, dy: Value) -> Value:
    return dy.apply("masked", mask)


def _above(a: Value, b: Value | float) -> Value:
    return a.apply("greater", b)


def _tied_half(dy: Value, a: Value, b: Value) -> Value:
    """The part of dy that goes to a where a ≥ b: all, or half of it where they tie."""
    return _only(a.apply("greater_equal", b), dy) - _only(a.apply("equal", b), dy) * 0.5


def _clamp(dy: Value, y: Value, x: Value) -> Value:
    """PyTorch's clamp passes a gradient at its ends, its hardtanh does not (`closed`)."""
    a = y.node.attributes
    for bound, sign in ((a["low"], 1.0), (a["high"], -1.0)):
        if math.isfinite(bound):
            inside = (x - bound) * sign
            dy = _only(inside.apply("greater_equal", 0.0) if a["closed"] else _above(inside, 0.0), dy)
    return dy


def _reduce_max(dy: Value, y: Value, x: Value) -> Value:
    hits = x.apply("equal", y)
    count = hits.sum(*y.node.attributes["axes"]).apply("maximum", 1.0)  # which it is, but bounds.py does not know it
    return _only(hits, dy / count)


def _softmax(dy: Value, y: Value, x: Value) -> Value:
    return y * (dy - (dy * y).sum(y.rank - 1))


def _log_softmax(dy: Value, y: Value, x: Value) -> Value:
    return dy - x.apply("softmax") * dy.sum(y.rank - 1)


def _standardize(node: Node, dy: Value) -> tuple[Value]:
    y, inverse = node.outputs
    last = y.rank - 1
    return ((dy - dy.mean(last) - y * (dy * y).mean(last)) * inverse,)


def _times(a: Value, b: Value) -> Value:
    """a @ b; where a may be infinite without the zeros of a constant b, as of a resampling: 0·∞ is NaN."""
    if a.finite or b.constant is None or b.rank != 2 or bool(b.constant.all()):
        return a @ b
    terms = (a.reshape(*a.shape, 1) * b).apply("masked", b.graph.constant((b.constant != 0) * 1.0))
    return terms.sum(a.rank - 1).reshape(*a.shape[:-1], b.shape[1])


def _matmul(node: Node, dy: Value) -> tuple[Value, Value]:
    (a, b), flags = node.inputs, node.attributes
    left, right = (a.swap() if flags["transpose_a"] else a), (b.swap() if flags["transpose_b"] else b)
    da = right @ dy.swap() if flags["transpose_a"] else _times(dy, right.swap())
    db = dy.swap() @ left if flags["transpose_b"] else left.swap() @ dy
    return da, db


def _slice(dy: Value, y: Value, x: Value) -> Value:
    a = y.node.attributes
    axis, step = a["axis"], a["step"]
    if step > 1:  # zeros between the entries
        shape, n = y.shape, y.shape[axis]
        dy = dy.reshape(*shape[: axis + 1], 1, *shape[axis + 1 :])
        after = [step - 1 if i == axis + 1 else 0 for i in range(dy.rank)]
        dy = dy.pad([0] * dy.rank, after).reshape(*shape[:axis], n * step, *shape[axis + 1 :])
    begins = [a["start"] if i == axis else 0 for i in range(x.rank)]
    ends = [x.shape[i] - dy.shape[i] - begins[i] for i in range(x.rank)]
    return dy.pad(begins, ends)


def _concat(node: Node, dy: Value) -> list[Value]:
    axis, start, parts = node.attributes["axis"], 0, []
    for value in node.inputs:
        parts.append(dy.narrow(axis, start, start + value.shape[axis]))
        start += value.shape[axis]
    return parts


def _pad(dy: Value, y: Value, x: Value) -> Value:
    a = y.node.attributes
    return dy.pad([-begin for begin in a["begins"]], [-end for end in a["ends"]])


def _conv2d(node: Node, dy: Value) -> list[Value]:
    x, weight, *bias = node.inputs
    a = node.attributes
    dx = dy.apply("conv2d_transpose", weight, size=x.shape[2:], **a)
    dw, db = dy.graph.apply_many("conv2d_weight_grad", x, dy, weight, bias=bool(bias), **a)
    return [dx, dw, db][: len(node.inputs)]


def _conv2d_transpose(node: Node, dy: Value) -> tuple[Value, Value]:
    x, weight = node.inputs
    a = {key: value for key, value in node.attributes.items() if key != "size"}
    dw, _ = dy.graph.apply_many("conv2d_weight_grad", dy, x, weight, bias=False, **a)
    return dy.apply("conv2d", weight, **a), dw


def _batch_norm(node: Node, dy: Value) -> tuple[Value, ...]:
    x, weight, _ = node.inputs
    _, mean, variance = node.outputs
    return dy.graph.apply_many(node.operator + "_grad", dy, x, weight, mean, variance, **node.attributes)


def _normalize(node: Node, dy: Value) -> tuple[Value | None, ...]:
    """By given statistics."""
    x, weight, _, mean, variance = node.inputs
    inverse = (variance + node.attributes["eps"]).apply("rsqrt").reshape(1, -1, 1, 1)
    dw = (dy * ((x - mean.reshape(1, -1, 1, 1)) * inverse)).sum(0, 2, 3).reshape(*weight.shape)
    db = dy.sum(0, 2, 3).reshape(*weight.shape)
    return dy * (weight.reshape(1, -1, 1, 1) * inverse), dw, db, None, None


_FLAT = frozenset(
    "greater greater_equal equal floor argmax one_hot to_integer to_float stop_gradient".split()
)
"""Operators whose derivative is zero or which have none."""

RULES = {
    "add": (lambda dy, y, a, b: dy, lambda dy, y, a, b: dy),
    "subtract": (lambda dy, y, a, b: dy, lambda dy, y, a, b: -dy),
    "multiply": (lambda dy, y, a, b: dy * b, lambda dy, y, a, b: dy * a),
    "divide": (lambda dy, y, a, b: dy / b, lambda dy, y, a, b: -dy * y / b),
    "maximum": (lambda dy, y, a, b: _tied_half(dy, a, b), lambda dy, y, a, b: _tied_half(dy, b, a)),
    "minimum": (lambda dy, y, a, b: _tied_half(dy, b, a), lambda dy, y, a, b: _tied_half(dy, a, b)),
    "relu": (lambda dy, y, x: _only(_above(y, 0.0), dy),),
    "clamp": (_clamp,),
    "abs": (lambda dy, y, x: _only(_above(x, 0.0), dy) - _only(_above(-x, 0.0), dy),),
    "exp": (lambda dy, y, x: dy * y,),
    "log": (lambda dy, y, x: dy / x,),
    "sqrt": (lambda dy, y, x: dy / y * 0.5,),
    "rsqrt": (lambda dy, y, x: dy * (y * y * y) * -0.5,),
    "power": (lambda dy, y, x: dy * _power(x, y.node.attributes["exponent"]),),
    "erf": (lambda dy, y, x: dy * (-x * x).apply("exp") * (2 / math.sqrt(math.pi)),),
    "tanh": (lambda dy, y, x: dy * (1.0 - y * y),),
    "sigmoid": (lambda dy, y, x: dy * (y * (1.0 - y)),),
    "softplus": (lambda dy, y, x: dy * x.apply("sigmoid"),),
    "sin": (lambda dy, y, x: dy * x.apply("cos"),),
    "cos": (lambda dy, y, x: -dy * x.apply("sin"),),
    "atan": (lambda dy, y, x: dy / (x * x + 1.0),),
    "where": (
        lambda dy, y, mask, a, b: None,
        lambda dy, y, mask, a, b: _only(mask, dy),
        lambda dy, y, mask, a, b: _only(1.0 - mask, dy),
    ),
    "reduce_sum": (lambda dy, y, x: dy,),
    "reduce_mean": (lambda dy, y, x: dy * (y.size / x.size),),
    "reduce_max": (_reduce_max,),
    "matmul": _matmul,
    "softmax": (_softmax,),
    "log_softmax": (_log_softmax,),
    "standardize": _standardize,
    "reshape": (lambda dy, y, x: dy.reshape(*x.shape),),
    "transpose": (
        lambda dy, y, x: dy.transpose(*inverse_permutation(y.node.attributes["permutation"])),
    ),
    "slice": (_slice,),
    "concat": _concat,
    "pad": (_pad,),
    "expand": (lambda dy, y, x: dy,),
    "gather": (
        lambda dy, y, x, index: dy.apply(
            "scatter_add", index, axis=y.node.attributes["axis"], size=x.shape[y.node.attributes["axis"]]
        ),
        lambda dy, y, x, index: None,
    ),
    "scatter_add": (
        lambda dy, y, x, index: dy.apply("gather", index, axis=y.node.attributes["axis"]),
        lambda dy, y, x, index: None,
    ),
    "conv2d": _conv2d,
    "conv2d_transpose": _conv2d_transpose,
    "max_pool2d": (lambda dy, y, x: dy.apply("max_pool2d_grad", x, y, **y.node.attributes),),
    "avg_pool2d": (lambda dy, y, x: dy.apply("avg_pool2d_grad", size=x.shape[2:], **y.node.attributes),),
    "avg_pool2d_grad": (
        lambda dy, y, x: dy.apply(
            "avg_pool2d", **{k: v for k, v in y.node.attributes.items() if k != "size"}
        ),
    ),
    "normalize": _normalize,
    "batch_norm": _batch_norm,
    "pooled_batch_norm": _batch_norm,
}


def _power(x: Value, exponent: float) -> Value:
    return x.apply("power", exponent=exponent - 1.0) * exponent
