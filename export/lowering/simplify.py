"""Simpler spellings of a node that is built: identities, joined turns, products of turned matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgestill.export.lowering.graph import Graph, Value


def simplified(
    graph: Graph, operator: str, inputs: tuple[Value, ...], attributes: dict[str, Any]
) -> Value | tuple[Value, ...] | None:
    """A value that says the same, or None where there is none simpler."""
    if operator in _BROADCASTING and any(value.operator == "expand" for value in inputs):
        bare = [value.node.inputs[0] if value.operator == "expand" else value for value in inputs]
        shape = np.broadcast_shapes(*(value.shape for value in inputs))
        for i, value in enumerate(bare):  # one may be left out where the others still have the whole shape
            rest = [*inputs[:i], value, *inputs[i + 1 :]]
            if value is not inputs[i] and np.broadcast_shapes(*(other.shape for other in rest)) == shape:
                return graph.apply(operator, *rest, **attributes)
    rule = _RULES.get(operator)
    return None if rule is None else rule(graph, inputs, attributes)


def inverse_permutation(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(permutation))


def _is(value: Value, number: float) -> bool:
    return value.constant is not None and bool((value.constant == number).all())


def _neutral(number: float, either: bool):
    def rule(graph: Graph, inputs: tuple[Value, ...], _: dict) -> Value | None:
        a, b = inputs
        if _is(b, number) and np.broadcast_shapes(a.shape, b.shape) == a.shape:
            return a
        if either and _is(a, number) and np.broadcast_shapes(a.shape, b.shape) == b.shape:
            return b
        return None

    return rule


def _multiply(graph: Graph, inputs: tuple[Value, ...], attributes: dict) -> Value | None:
    a, b = inputs
    if (kept := _neutral(1.0, True)(graph, inputs, attributes)) is not None:
        return kept
    if b.constant is not None and b.size == 1 and a.operator == "multiply":
        inner, factor = a.node.inputs
        if factor.constant is not None and factor.size == 1 and b.rank <= a.rank:
            return inner * float(factor.constant.reshape(-1)[0] * b.constant.reshape(-1)[0])
    return None


def _reshape(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    (x,) = inputs
    if x.shape == a["shape"]:
        return x
    if x.operator == "reshape":
        return x.node.inputs[0].reshape(*a["shape"])
    return None


def _transpose(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    (x,), permutation = inputs, a["permutation"]
    moved = [axis for axis in permutation if x.shape[axis] != 1]
    if moved == sorted(moved):  # only axes of size 1 move
        return x.reshape(*(x.shape[axis] for axis in permutation))
    if x.operator == "transpose":
        first = x.node.attributes["permutation"]
        return x.node.inputs[0].transpose(*(first[axis] for axis in permutation))
    return None


def _matmul(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    """Turns of the last two axes become flags."""
    flags = {f"transpose_{side}": bool(a.get(f"transpose_{side}")) for side in "ab"}
    values, changed = list(inputs), a.keys() != flags.keys()
    for i, side in enumerate("ab"):
        x = values[i]
        last = x.rank - 1
        if x.operator == "transpose" and x.node.attributes["permutation"] == (
            *range(last - 1),
            last,
            last - 1,
        ):
            values[i], changed = x.node.inputs[0], True
            flags[f"transpose_{side}"] ^= True
    return graph.apply("matmul", *values, **flags) if changed else None


def _slice(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    (x,) = inputs
    whole = a["start"] == 0 and a["stop"] >= x.shape[a["axis"]] and a.get("step", 1) == 1
    if whole:
        return x
    return x.narrow(a["axis"], a["start"], a["stop"]) if "step" not in a else None


def _pad(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    return inputs[0] if not any(a["begins"]) and not any(a["ends"]) else None


def _concat(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    return inputs[0] if len(inputs) == 1 else None


def _expand(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    (x,), shape = inputs, a["shape"]
    if x.shape == shape:
        return x
    return x.reshape(*(1,) * (len(shape) - x.rank), *x.shape).expand(*shape) if x.rank < len(shape) else None


def _reduce(graph: Graph, inputs: tuple[Value, ...], a: dict) -> Value | None:
    (x,) = inputs
    return x if all(x.shape[axis] == 1 for axis in a["axes"]) else None


_BROADCASTING = frozenset(
    "add subtract multiply divide maximum minimum greater greater_equal equal where masked".split()
)
_RULES = {
    "add": _neutral(0.0, True),
    "subtract": _neutral(0.0, False),
    "divide": _neutral(1.0, False),
    "multiply": _multiply,
    "reshape": _reshape,
    "transpose": _transpose,
    "matmul": _matmul,
    "slice": _slice,
    "pad": _pad,
    "concat": _concat,
    "expand": _expand,
    "reduce_sum": _reduce,
    "reduce_mean": _reduce,
    "reduce_max": _reduce,
}
