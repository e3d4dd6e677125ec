"""Reductions, norms and matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from operator import mul
from typing import Any

import numpy as np

from edgestill.export.lowering.aten.context import Context, Row, axes_of, row, rows
from edgestill.export.lowering.aten.elementwise import where
from edgestill.export.lowering.aten.movement import chosen
from edgestill.export.lowering.graph import Value


def _over(name: str, sign: float = 1.0) -> Row:
    """A reduction of numbers or, before and after, of their negatives."""
    return lambda c, x, dim=None, *_: c.float(x * sign).apply(name, axes=axes_of(dim, x.rank)) * sign


def _largest(c: Context, x: Value, dim: int, sign: float = 1.0) -> tuple[Value, Value]:
    """The largest along an axis and where it stands: the first one alone gets a gradient."""
    index = (x * sign).apply("argmax", axis=dim % x.rank)
    return chosen(x, index, dim % x.rank), index


def _variance(c: Context, x: Value, dim: Any, correction: float | None, _: bool) -> tuple[Value, Value]:
    axes = axes_of(dim, x.rank)
    mean = x.mean(*axes)
    count = math.prod(x.shape[axis] for axis in axes) - (1 if correction is None else correction)
    return ((x - mean) * (x - mean)).sum(*axes) * (1 / count), mean


@row("std.correction")
def _deviation(c: Context, x: Value, dim: Any, correction: float | None, keepdim: bool) -> Value:
    return _root(_variance(c, x, dim, correction, keepdim)[0])


def _root(powers: Value, order: float = 2) -> Value:
    """Of zero the root is zero, and so is its gradient, as in PyTorch: another number's root is taken, and left out."""
    empty = powers.apply("equal", 0.0)
    safe = where(empty, 1.0, powers)
    return where(empty, 0.0, safe.apply("sqrt") if order == 2 else safe.apply("power", exponent=1 / order))


@row("any any.dim any.dims")
def _any(c: Context, x: Value, dim: Any = None, *_: Any) -> Value:
    return (1.0 - x.apply("equal", 0.0)).apply("reduce_max", axes=axes_of(dim, x.rank))


@row("linalg_vector_norm")
def _norm(c: Context, x: Value, order: float, dim: Any, *_: Any) -> Value:
    size, axes = x.apply("abs"), axes_of(dim, x.rank)
    if order == 1:
        return size.sum(*axes)
    if math.isinf(order):
        sign = math.copysign(1.0, order)
        return (size * sign).apply("reduce_max", axes=axes) * sign
    if order == 2:
        return _root((x * x).sum(*axes))
    empty = size.apply("equal", 0.0)  # below 1 the power's slope at zero is infinite
    powers = where(empty, 1.0, size).apply("power", exponent=float(order))
    return _root(where(empty, 0.0, powers).sum(*axes), order)


@row("logsumexp")
def _logsumexp(c: Context, x: Value, dim: Any, *_: Any) -> Value:
    axes = axes_of(dim, x.rank)
    top = x.apply("reduce_max", axes=axes).apply("stop_gradient")
    return (x - top).apply("exp").sum(*axes).apply("log") + top


def _along(x: Value, dim: int, function: Callable[[Value], Value]) -> Value:
    """A function of the last axis, along `dim`."""
    axis = dim % x.rank
    if axis == x.rank - 1:
        return function(x)
    order = [*(i for i in range(x.rank) if i != axis), axis]
    turned = function(x.transpose(*order))
    return turned.transpose(*(int(i) for i in np.argsort(order)))


def mapped(x: Value, axis: int, matrix: np.ndarray) -> Value:
    """The matrix [out, in] applied to every vector along an axis."""
    constant = x.graph.constant(np.asarray(matrix, float))  # numbers, also where they are whole

    def product(v: Value) -> Value:
        lines = v.reshape(-1, v.shape[-1]).apply("matmul", constant, transpose_b=True)
        return lines.reshape(*v.shape[:-1], len(matrix))

    return _along(x, axis, product)


@row("_safe_softmax")
def _safe_softmax(c: Context, x: Value, dim: int, *_: Any) -> Value:
    """Zero where everything is masked (−∞), which only a sum with a mask or a choice can give."""
    if x.operator not in ("add", "where"):
        return _softmax(c, x, dim)
    some = x.apply("reduce_max", axes=(dim % x.rank,)).apply("greater", -3e38)
    return where(some, _softmax(c, where(some, x, 0.0), dim), 0.0)  # the gradient would be NaN without the inner one


@row("_softmax")
def _softmax(c: Context, x: Value, dim: int, *_: Any) -> Value:
    return _along(x, dim, lambda v: v.apply("softmax"))


@row("linear")
def _linear(c: Context, x: Value, weight: Value, bias: Value | None) -> Value:
    """One product of all rows; PyTorch's own would repeat the weight for inputs that are turned."""
    y = x.reshape(-1, x.shape[-1]).apply("matmul", weight, transpose_b=True)
    return y if bias is None else y + bias.reshape(1, -1)


rows(
    {
        "sum.dim_IntList": _over("reduce_sum"),
        "mean": lambda c, x, *_: x.mean(*range(x.rank)),
        "mean.dim": _over("reduce_mean"),
        "amax max": _over("reduce_max"),
        "amin min": _over("reduce_max", -1.0),
        "max.dim": lambda c, x, dim, _: _largest(c, x, dim),
        "min.dim": lambda c, x, dim, _: _largest(c, x, dim, -1.0),
        "argmax": lambda c, x, dim, _: c.float(x).apply("argmax", axis=dim % x.rank),
        "var.correction": lambda c, *given: _variance(c, *given)[0],
        "var_mean.correction": _variance,
        "prod.dim_int": lambda c, x, dim, *_: reduce(
            mul, [x.narrow(dim % x.rank, i, i + 1) for i in range(x.shape[dim])]
        ),
        "cumsum": lambda c, x, dim, *_: mapped(c.float(x), dim % x.rank, np.tri(x.shape[dim])),
        "_log_softmax": lambda c, x, dim, *_: _along(x, dim, lambda v: v.apply("log_softmax")),
        "mm bmm": lambda c, a, b: a @ b,
        "mv": lambda c, a, b: a @ b.reshape(-1, 1),
        "addmm": lambda c, offset, a, b, beta, alpha: a @ b * alpha + offset * beta,
    }
)
