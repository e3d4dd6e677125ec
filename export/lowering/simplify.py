"""Simpler spellings of a node that is built: identities, joined turns, products of turned matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgestill.export.lowering.graph import Graph, Value


def simplified(
    graph: Graph, operator: str, inputs: tuple[Value, ...], attributes: dict[str, Any]
) -> Value | tuple[Value, ...] | None:
    """A value that says the same, or None where there is none simpler."""
    if operator in _BROADCASTING and any(value.operator == "expand" for value in inputs):
        shape = np.broadcast_shapes(*(value.shape for value in inputs))
        for i, value in enumerate(inputs):  # an expansion may be left out where the others have the whole shape
            if value.operator == "expand":
                rest = [*inputs[:i], value.node.inputs[0], *inputs[i + 1 :]]
                if np.broadcast_shapes(*(other.shape for other in rest)) == shape:
                    return graph.apply(operator, *rest, **attributes)
    rule = _RULES.get(operator)
    return None if rule is None else rule(*inputs, **attributes)


def inverse_permutation(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(permutation))


def _unless(number: float, a: Value, b: Value) -> Value | None:
    """a, where b is nothing but the number that changes nothing, and does not broadcast a."""
    neutral = b.constant is not None and bool((b.constant == number).all())
    return a if neutral and np.broadcast_shapes(a.shape, b.shape) == a.shape else None


def _number(x: Value) -> float | None:
    return float(x.constant.reshape(-1)[0]) if x.constant is not None and x.size == 1 else None


def _multiply(a: Value, b: Value) -> Value | None:
    if (kept := _unless(1.0, a, b) or _unless(1.0, b, a)) is not None:
        return kept
    if a.operator == "multiply" and b.rank <= a.rank:
        inner, factor = a.node.inputs
        if inner.rank == a.rank and (first := _number(factor)) is not None and (second := _number(b)) is not None:
            return inner * (first * second)
    return None


def _reshape(x: Value, shape: tuple[int, ...]) -> Value | None:
    if x.shape == shape:
        return x
    return x.node.inputs[0].reshape(*shape) if x.operator == "reshape" else None


def _transpose(x: Value, permutation: tuple[int, ...]) -> Value | None:
    moved = [axis for axis in permutation if x.shape[axis] != 1]
    if moved == sorted(moved):  # only axes of size 1 move
        return x.reshape(*(x.shape[axis] for axis in permutation))
    if x.operator == "transpose":
        first = x.node.attributes["permutation"]
        return x.node.inputs[0].transpose(*(first[axis] for axis in permutation))
    return None


def _matmul(a: Value, b: Value, **given: bool) -> Value | None:
    """Turns of the last two axes become flags."""
    values, flags = [], {}
    for x, flag in ((a, "transpose_a"), (b, "transpose_b")):
        last = x.rank - 1
        swapped = (*range(last - 1), last, last - 1)
        turned = x.operator == "transpose" and x.node.attributes["permutation"] == swapped
        values.append(x.node.inputs[0] if turned else x)
        flags[flag] = bool(given.get(flag)) ^ turned
    return a.graph.apply("matmul", *values, **flags) if flags != given or values != [a, b] else None


def _slice(x: Value, axis: int, start: int, stop: int, step: int) -> Value | None:
    return x if start == 0 and stop >= x.shape[axis] and step == 1 else None


def _expand(x: Value, shape: tuple[int, ...]) -> Value | None:
    if x.shape == shape:
        return x
    return x.reshape(*(1,) * (len(shape) - x.rank), *x.shape).expand(*shape) if x.rank < len(shape) else None


def _reduce(x: Value, axes: tuple[int, ...]) -> Value | None:
    return x if math.prod(x.shape[axis] for axis in axes) == 1 else None


_BROADCASTING = frozenset(
    "add subtract multiply divide maximum minimum greater greater_equal equal where masked".split()
)
_RULES: dict[str, Callable[..., Value | None]] = {
    "add": lambda a, b: _unless(0.0, a, b) or _unless(0.0, b, a),
    "subtract": lambda a, b: _unless(0.0, a, b),
    "divide": lambda a, b: _unless(1.0, a, b),
    "multiply": _multiply,
    "reshape": _reshape,
    "transpose": _transpose,
    "matmul": _matmul,
    "slice": _slice,
    "pad": lambda x, begins, ends, value=0.0: None if any(begins) or any(ends) else x,
    "concat": lambda *parts, axis: parts[0] if len(parts) == 1 else None,
    "expand": _expand,
    "reduce_sum": _reduce,
    "reduce_mean": _reduce,
    "reduce_max": _reduce,
}
