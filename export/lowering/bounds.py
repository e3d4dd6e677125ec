"""What is known of a value's numbers before any are there: whether all are finite, and a bound below.

Infinities are of two sorts: constants (−∞ for what a maximum is not to see), and what a division by zero, a logarithm
or a root's slope at zero may give. A mask behind them must take them out: multiplied by zero they are NaN. Almost all
values are finite, and these may be multiplied. What is given to the graph counts as finite, and what overflows as lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgestill.export.lowering.graph import Value

TINY = 1e-30
"""Above zero, by how much nobody knows."""


def is_finite(operator: str, inputs: tuple[Value, ...], attributes: Mapping[str, Any]) -> bool:
    """Whether the operator gives no infinity and no NaN; False where that is not certain."""
    if operator in _BOUNDED or (operator == "clamp" and all(map(math.isfinite, _ends(attributes)))):
        return True
    return all(x.finite for x in inputs) and (
        operator not in _SINGULAR or _SINGULAR[operator](*inputs, **attributes)
    )


def least(operator: str, inputs: tuple[Value, ...], attributes: Mapping[str, Any], output: int = 0) -> float:
    """A number that none of the operator's output is below; −∞ where none is known."""
    rule = _LEAST.get((operator, output) if output else operator)
    return -math.inf if rule is None else rule(*inputs, **attributes)


def _ends(attributes: Mapping[str, Any]) -> tuple[float, float]:
    return attributes["low"], attributes["high"]


def _divides(a: Value, b: Value) -> bool:
    """One number that is zero would spoil everything."""
    return b.least > 0 or b.size == 1 or (b.constant is not None and bool(b.constant.all()))


def _has_inverse_root(x: Value) -> bool:
    """Nobody writes 1/√(x + ε) of an x that may be −ε."""
    return x.least > 0 or (
        x.operator == "add" and any(part.least > 0 for part in x.node.inputs if part.constant is not None)
    )


_BOUNDED = frozenset(
    "greater greater_equal equal argmax one_hot to_integer softmax sigmoid tanh atan erf".split()
)
_SINGULAR: dict[str, Callable[..., bool]] = {
    "divide": _divides,
    "log": lambda x: x.least > 0,
    "rsqrt": _has_inverse_root,
    "power": lambda x, exponent: exponent >= 0 or x.least > 0,
}


def _product(a: Value, b: Value, **_: Any) -> float:
    return a.least * b.least if min(a.least, b.least) >= 0 else -math.inf


def _not_below_zero(x: Value, *_: Any, **__: Any) -> float:
    return 0.0 if x.least >= 0 else -math.inf


def _same(x: Value, *_: Any, **__: Any) -> float:
    return x.least


def _zero(*_: Any, **__: Any) -> float:
    return 0.0


def _above_zero(x: Value, **_: Any) -> float:
    return TINY if x.finite else 0.0


_LEAST: dict[str | tuple[str, int], Callable[..., float]] = {
    "add": lambda a, b: a.least + b.least,
    "multiply": lambda a, b: max(_product(a, b), 0.0) if a is b else _product(a, b),
    "divide": lambda a, b: 0.0 if a.least >= 0 and b.least > 0 else -math.inf,
    "maximum": lambda a, b: max(a.least, b.least),
    "minimum": lambda a, b: min(a.least, b.least),
    "where": lambda mask, a, b: min(a.least, b.least),
    "masked": lambda x, mask: min(x.least, 0.0),
    "relu": lambda x: max(x.least, 0.0),
    "clamp": lambda x, low, high, closed: max(low, min(x.least, high)),
    "abs": lambda x: max(x.least, 0.0),
    "sqrt": lambda x: math.sqrt(max(x.least, 0.0)),
    "power": lambda x, exponent: TINY if x.least > 0 else 0.0 if x.least == 0 or exponent == 2 else -math.inf,
    "reduce_sum": lambda x, axes: x.least if x.least >= 0 else -math.inf,
    "matmul": _product,
    "avg_pool2d": _not_below_zero,
    **dict.fromkeys("greater greater_equal equal one_hot softmax argmax".split(), _zero),
    **dict.fromkeys("exp sigmoid softplus rsqrt".split(), _above_zero),
    **dict.fromkeys(
        "reduce_mean reduce_max max_pool2d reshape transpose slice expand gather stop_gradient".split(), _same
    ),
    "concat": lambda *parts, axis: min(part.least for part in parts),
    "pad": lambda x, begins, ends, value=0.0: min(x.least, value),
    ("batch_norm", 2): _zero,
    ("pooled_batch_norm", 2): _zero,
    ("standardize", 1): _above_zero,
}
"""By operator, or operator and number of the output."""
