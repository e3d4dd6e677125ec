"""Reductions, norms and matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.aten.context import ATEN, Context, Row, axes_of, row
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def _reduction(name: str) -> Row:
    def rule(c: Context, x: Any, dim: Any = None, keepdim: Any = False, *_: Any) -> Value:
        x = c.float(x)
        return x.apply(name, axes=axes_of(dim, x.rank)).reshape(*c.shape)

    return rule


ATEN |= {
    aten.sum.dim_IntList: _reduction("reduce_sum"),
    aten.sum.default: lambda c, x, *_: _reduction("reduce_sum")(c, x),
    aten.mean.dim: _reduction("reduce_mean"),
    aten.mean.default: lambda c, x, *_: _reduction("reduce_mean")(c, x),
    aten.amax.default: _reduction("reduce_max"),
    aten.amin.default: lambda c, x, dim, keepdim: -_reduction("reduce_max")(c, -c.value(x), dim, keepdim),
    aten.max.default: lambda c, x: _reduction("reduce_max")(c, x),
    aten.min.default: lambda c, x: -_reduction("reduce_max")(c, -c.value(x)),
}


def _largest(c: Context, x: Any, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    """The largest along an axis and where it stands: the first one alone gets a gradient."""
    x = c.float(x)
    if x.rank == 0:
        return x, x.apply("to_integer")
    axis = dim % x.rank
    index = x.apply("argmax", axis=axis)
    places = np.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.rank)])
    first = index.apply("equal", c.graph.constant(places))
    value = c.graph.apply("where", first, x, 0.0).sum(axis)
    return value.reshape(*c.shape), index.reshape(*c.shape)


ATEN |= {
    aten.max.dim: _largest,
    aten.min.dim: lambda c, x, dim, keepdim: (
        lambda found: (-found[0], found[1])
    )(_largest(c, -c.value(x), dim, keepdim)),
    aten.argmax.default: lambda c, x, dim, keepdim: c.float(x).apply("argmax", axis=dim % x.rank).reshape(
        *c.shape
    ),
}


def _variance(c: Context, x: Any, dim: Any, correction: Any) -> tuple[Value, Value]:
    x = c.float(x)
    axes = axes_of(dim, x.rank)
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(*axes)
    centred = x - mean
    return (centred * centred).sum(*axes) * (1 / (count - (1 if correction is None else correction))), mean


ATEN |= {
    aten.var.correction: lambda c, x, dim, correction, keepdim: _variance(c, x, dim, correction)[0].reshape(
        *c.shape
    ),
    aten.std.correction: lambda c, x, dim, correction, keepdim: _variance(c, x, dim, correction)[0]
    .apply("sqrt")
    .reshape(*c.shape),
    aten.var_mean.correction: lambda c, x, dim, correction, keepdim: tuple(
        part.reshape(*c.shape) for part in _variance(c, x, dim, correction)
    ),
}


@row(aten.linalg_vector_norm.default)
def _norm(c: Context, x: Any, order: float, dim: Any, keepdim: bool, *_: Any) -> Value:
    """Zero has the gradient 0, as in PyTorch."""
    x = c.float(x)
    axes = axes_of(dim, x.rank)
    size = x.apply("abs")
    if order == 1:
        return size.sum(*axes).reshape(*c.shape)
    if math.isinf(order):
        extreme = (size if order > 0 else -size).apply("reduce_max", axes=axes)
        return (extreme if order > 0 else -extreme).reshape(*c.shape)
    powers = (x * x if order == 2 else size.apply("power", exponent=float(order))).sum(*axes)
    # sqrt'(0) is infinite: where all is zero the root of another number is taken, and left out again.
    empty = powers.apply("equal", 0.0)
    safe = c.graph.apply("where", empty, 1.0, powers)
    root = safe.apply("sqrt") if order == 2 else safe.apply("power", exponent=1 / order)
    return c.graph.apply("where", empty, 0.0, root).reshape(*c.shape)


def along_last(x: Value, dim: int, function: Callable[[Value], Value]) -> Value:
    """A function of the last axis, along `dim`."""
    axis = dim % x.rank
    if axis == x.rank - 1:
        return function(x)
    order = [*(i for i in range(x.rank) if i != axis), axis]
    turned = function(x.transpose(*order))
    return turned.transpose(*(int(i) for i in np.argsort(order)))


ATEN |= {
    aten._softmax.default: lambda c, x, dim, *_: along_last(c.float(x), dim, lambda v: v.apply("softmax")),
    aten._log_softmax.default: lambda c, x, dim, *_: along_last(c.float(x), dim, lambda v: v.apply("log_softmax")),
}


@row(aten._safe_softmax.default)
def _safe_softmax(c: Context, x: Any, dim: int, *_: Any) -> Value:
    """Zero where everything is masked (−∞), which only a sum with a mask or a choice can give."""
    x = c.float(x)
    if x.operator not in ("add", "where"):
        return along_last(x, dim, lambda v: v.apply("softmax"))
    some = x.apply("reduce_max", axes=(dim % x.rank,)).apply("greater", -3e38)
    finite = c.graph.apply("where", some, x, 0.0)  # the gradient would be NaN otherwise
    return c.graph.apply("where", some, along_last(finite, dim, lambda v: v.apply("softmax")), 0.0)


@row(aten.logsumexp.default)
def _logsumexp(c: Context, x: Any, dim: Any, keepdim: bool) -> Value:
    x = c.float(x)
    axes = axes_of(dim, x.rank)
    top = x.apply("reduce_max", axes=axes).apply("stop_gradient")
    return ((x - top).apply("exp").sum(*axes).apply("log") + top).reshape(*c.shape)


@row(aten.cumsum.default)
def _cumsum(c: Context, x: Any, dim: int, *_: Any) -> Value:
    x = c.float(x)
    size = x.shape[dim % x.rank]
    return along(x, dim % x.rank, np.tri(size))


@row(aten.prod.dim_int)
def _prod(c: Context, x: Any, dim: int, *_: Any) -> Value:
    x = c.float(x)
    axis = dim % x.rank
    parts = [x.narrow(axis, i, i + 1) for i in range(x.shape[axis])]
    return reduce(lambda a, b: a * b, parts).reshape(*c.shape)


@row(aten.any.dim, aten.any.dims, aten.any.default)
def _any(c: Context, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
    x = 1.0 - c.float(x).apply("equal", 0.0)
    return x.apply("reduce_max", axes=axes_of(dim, x.rank)).reshape(*c.shape)


def along(x: Value, axis: int, matrix: np.ndarray) -> Value:
    """The matrix [out, in] applied to every vector along an axis."""
    constant = x.graph.constant(np.asarray(matrix, np.float32))
    if axis == x.rank - 1:
        rows = x.reshape(-1, x.shape[-1])
        return rows.apply("matmul", constant, transpose_b=True).reshape(*x.shape[:-1], len(matrix))
    before, after = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    shape = (*x.shape[:axis], len(matrix), *x.shape[axis + 1 :])
    if before == 1:
        return (constant @ x.reshape(x.shape[axis], after)).reshape(*shape)
    return along_last(x, axis, lambda v: along(v, v.rank - 1, matrix))


@row(aten.linear.default)
def _linear(c: Context, x: Any, weight: Any, bias: Any) -> Value:
    x, weight = c.value(x), c.value(weight)
    rows = x.reshape(-1, x.shape[-1])
    y = rows.apply("matmul", weight, transpose_b=True)
    if bias is not None:
        y = y + c.value(bias).reshape(1, -1)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _bmm(c: Context, a: Any, b: Any) -> Value:
    return c.float(a) @ c.float(b)


@row(aten.addmm.default, aten.baddbmm.default)
def _addmm(c: Context, offset: Any, a: Any, b: Any, beta: float, alpha: float) -> Value:
    product = _bmm(c, a, b)
    product = product * float(alpha) if alpha != 1 else product
    offset = c.float(offset)
    return product + (offset * float(beta) if beta != 1 else offset)


ATEN |= {
    aten.mm.default: _bmm,
    aten.bmm.default: _bmm,
    aten.mv.default: lambda c, a, b: (c.float(a) @ c.float(b).reshape(-1, 1)).reshape(-1),
    aten.dot.default: lambda c, a, b: (c.float(a) * c.float(b)).sum(0).reshape(),
    aten.vdot.default: lambda c, a, b: (c.float(a) * c.float(b)).sum(0).reshape(),
}
