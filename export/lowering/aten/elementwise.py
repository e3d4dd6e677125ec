"""Elementwise operators: activations, arithmetic with broadcasting, comparisons, conversions."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch

from edgestill.export.lowering.aten.context import ATEN, Context, Refusal, Row, row
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def _unary(name: str) -> Row:
    return lambda c, x, *_: c.float(x).apply(name)


for _name in "relu exp log sqrt rsqrt erf tanh sigmoid sin cos atan floor abs".split():
    ATEN[getattr(aten, _name).default] = _unary(_name)


def sign(x: Value) -> Value:
    return x.apply("greater", 0.0) - (-x).apply("greater", 0.0)


def _arcsine(x: Value) -> Value:
    return (x * (1.0 - x * x).apply("rsqrt")).apply("atan")


def _elu(x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    below = (clamped(x, None, 0.0) * input_scale).apply("exp") - 1.0
    return x.graph.apply("where", x.apply("greater", 0.0), x * scale, below * (alpha * scale))


def clamped(x: Value, low: float | None, high: float | None, closed: bool = True) -> Value:
    low, high = (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
    return x.apply("clamp", low=low, high=high, closed=closed)


def _gelu(c: Context, x: Any, approximate: str = "none") -> Value:
    x = c.value(x)
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return x * ((inner.apply("tanh") + 1.0) * 0.5)
    return x * (((x * math.sqrt(0.5)).apply("erf") + 1.0) * 0.5)


ATEN |= {
    aten.neg.default: lambda c, x: -c.value(x),
    aten.reciprocal.default: lambda c, x: 1.0 / c.float(x),
    aten.square.default: lambda c, x: c.value(x) * c.value(x),
    aten.log1p.default: lambda c, x: (c.float(x) + 1.0).apply("log"),
    aten.log2.default: lambda c, x: c.float(x).apply("log") * (1 / math.log(2)),
    aten.log10.default: lambda c, x: c.float(x).apply("log") * (1 / math.log(10)),
    aten.expm1.default: lambda c, x: c.float(x).apply("exp") - 1.0,
    aten.ceil.default: lambda c, x: -(-c.value(x)).apply("floor"),
    aten.tan.default: lambda c, x: c.float(x).apply("sin") / c.float(x).apply("cos"),
    aten.asin.default: lambda c, x: _arcsine(c.float(x)),
    aten.acos.default: lambda c, x: math.pi / 2 - _arcsine(c.float(x)),
    aten.sinh.default: lambda c, x: (c.float(x).apply("exp") - (-c.float(x)).apply("exp")) * 0.5,
    aten.cosh.default: lambda c, x: (c.float(x).apply("exp") + (-c.float(x)).apply("exp")) * 0.5,
    aten.sign.default: lambda c, x: sign(c.float(x)),
    aten.sgn.default: lambda c, x: sign(c.float(x)),
    aten.relu6.default: lambda c, x: clamped(c.value(x), 0.0, 6.0, closed=False),
    aten.hardtanh.default: lambda c, x, low, high: clamped(c.value(x), low, high, closed=False),
    aten.hardsigmoid.default: lambda c, x: clamped(c.value(x) + 3.0, 0.0, 6.0, closed=False) * (1 / 6),
    aten.hardswish.default: lambda c, x: c.value(x) * clamped(c.value(x) + 3.0, 0.0, 6.0) * (1 / 6),
    aten.silu.default: lambda c, x: c.value(x) * c.value(x).apply("sigmoid"),
    aten.gelu.default: _gelu,
    aten.mish.default: lambda c, x: c.value(x) * c.value(x).apply("softplus").apply("tanh"),
    aten.softplus.default: lambda c, x, beta, threshold: (c.value(x) * float(beta)).apply("softplus") * (1 / beta),
    aten.log_sigmoid_forward.default: lambda c, x: (-(-c.value(x)).apply("softplus"), None),
    aten.log_sigmoid.default: lambda c, x: -(-c.value(x)).apply("softplus"),
    aten.elu.default: lambda c, x, alpha, scale, input_scale: _elu(c.value(x), alpha, scale, input_scale),
    aten.celu.default: lambda c, x, alpha: _elu(c.value(x), alpha, 1.0, 1.0 / alpha),
    aten.selu.default: lambda c, x: _elu(c.value(x), 1.6732632423543772, 1.0507009873554805),
    aten.leaky_relu.default: lambda c, x, slope: c.graph.apply(
        "where", c.value(x).apply("greater", 0.0), x, c.value(x) * float(slope)
    ),
    aten._prelu_kernel.default: lambda c, x, weight: c.graph.apply(
        "where", c.value(x).apply("greater", 0.0), x, c.value(x) * c.value(weight)
    ),
    aten.softshrink.default: lambda c, x, lambd: c.value(x) - clamped(c.value(x), -lambd, lambd),
    aten.hardshrink.default: lambda c, x, lambd: c.graph.apply(
        "where", c.value(x).apply("abs").apply("greater", float(lambd)), x, 0.0
    ),
    aten.threshold.default: lambda c, x, threshold, value: c.graph.apply(
        "where", c.value(x).apply("greater", float(threshold)), x, float(value)
    ),
    aten.clamp.default: lambda c, x, low, high: clamped(c.value(x), low, high),
    aten.clamp_min.default: lambda c, x, low: clamped(c.value(x), low, None),
    aten.clamp_max.default: lambda c, x, high: clamped(c.value(x), None, high),
}


def _pair(c: Context, a: Any, b: Any) -> tuple[Value, Value]:
    """Both operands as Values of the wider dtype."""
    a, b = (c.value(x, y if isinstance(y, Value) else None) if not isinstance(x, int | float) else x
            for x, y in ((a, b), (b, a)))  # fmt: skip
    whole = [isinstance(x, int) or (isinstance(x, Value) and x.dtype == "int64") for x in (a, b)]
    if all(whole) and not c.dtype.is_floating_point:
        return a, b
    a, b = (x if isinstance(x, int | float) else c.float(x) for x in (a, b))
    return (float(a) if isinstance(a, int) else a), (float(b) if isinstance(b, int) else b)


def _binary(name: str) -> Row:
    def rule(c: Context, a: Any, b: Any, alpha: float = 1) -> Value:
        a, b = _pair(c, a, b)
        if alpha != 1:
            b = b * alpha
        return c.graph.apply(name, a, b)

    return rule


for _names, _operator in (("add.Tensor add.Scalar", "add"), ("sub.Tensor sub.Scalar", "subtract")):
    for _name in _names.split():
        _packet, _overload = _name.split(".")
        ATEN[getattr(getattr(aten, _packet), _overload)] = _binary(_operator)
for _name in ("mul", "maximum", "minimum"):
    _operator = {"mul": "multiply"}.get(_name, _name)
    for _overload in getattr(aten, _name).overloads():
        if _overload in ("Tensor", "Scalar", "default"):
            ATEN[getattr(getattr(aten, _name), _overload)] = _binary(_operator)
ATEN |= {
    aten.clamp_min.Tensor: _binary("maximum"),
    aten.clamp_max.Tensor: _binary("minimum"),
    aten.rsub.Scalar: lambda c, a, b, alpha=1: _binary("subtract")(c, b, a, alpha),
    aten.rsub.Tensor: lambda c, a, b, alpha=1: _binary("subtract")(c, b, a, alpha),
}


@row(aten.div.Tensor, aten.div.Scalar)
def _div(c: Context, a: Any, b: Any) -> Value:
    a = c.float(a) if not isinstance(a, int | float) else float(a)
    if isinstance(b, int | float):
        return a * (1.0 / b) if math.log2(abs(b)).is_integer() else a / float(b)
    return c.graph.apply("divide", a, c.float(b))


@row(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(c: Context, a: Any, b: Any, rounding_mode: str | None) -> Value:
    quotient = _div(c, a, b)
    if rounding_mode == "floor":
        quotient = quotient.apply("floor")
    elif rounding_mode == "trunc":
        quotient = sign(quotient) * quotient.apply("abs").apply("floor")
    return quotient if c.dtype.is_floating_point else quotient.apply("to_integer")


@row(aten.pow.Tensor_Scalar)
def _pow(c: Context, x: Any, exponent: float) -> Value:
    x = c.float(x)
    if exponent in (1, 2, 3, 4):
        return reduce(lambda a, b: a * b, [x] * int(exponent))
    if exponent == 0.5:
        return x.apply("sqrt")
    if exponent == -0.5:
        return x.apply("rsqrt")
    if exponent == -1:
        return 1.0 / x
    return x.apply("power", exponent=float(exponent))


@row(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow_tensor(c: Context, x: Any, exponent: Any) -> Value:
    """Of positive bases."""
    exponent = c.float(exponent) if not isinstance(exponent, int | float) else exponent
    base = c.float(x) if not isinstance(x, int | float) else c.value(x, exponent)
    return (base.apply("log") * exponent).apply("exp")


_COMPARISONS = {
    "gt": lambda g, a, b: g.apply("greater", a, b),
    "ge": lambda g, a, b: g.apply("greater_equal", a, b),
    "lt": lambda g, a, b: g.apply("greater", b, a),
    "le": lambda g, a, b: g.apply("greater_equal", b, a),
    "eq": lambda g, a, b: g.apply("equal", a, b),
    "ne": lambda g, a, b: 1.0 - g.apply("equal", a, b),
}
for _name, _compare in _COMPARISONS.items():
    for _overload in ("Tensor", "Scalar"):
        ATEN[getattr(getattr(aten, _name), _overload)] = lambda c, a, b, compare=_compare: compare(
            c.graph,
            c.float(a),
            c.float(b) if not isinstance(b, int | float) else float(b),
        )
for _name in ("logical_and", "bitwise_and"):
    for _overload in set(getattr(aten, _name).overloads()) & {"default", "Tensor"}:
        ATEN[getattr(getattr(aten, _name), _overload)] = lambda c, a, b: c.float(a) * c.float(b)
for _name in ("logical_or", "bitwise_or"):
    for _overload in set(getattr(aten, _name).overloads()) & {"default", "Tensor"}:
        ATEN[getattr(getattr(aten, _name), _overload)] = lambda c, a, b: c.float(a).apply(
            "maximum", c.float(b)
        )
ATEN |= {
    aten.logical_not.default: lambda c, x: c.float(x).apply("equal", 0.0),
    aten.bitwise_not.default: lambda c, x: c.float(x).apply("equal", 0.0),
}


@row(aten.where.self)
def _where(c: Context, mask: Any, a: Any, b: Any) -> Value:
    return c.graph.apply("where", c.float(mask), c.float(a), c.float(b))


@row(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(c: Context, x: Any, mask: Any, number: Any) -> Value:
    return c.graph.apply("where", c.float(mask), c.float(number), c.float(x))


@row(aten._to_copy.default)
def _to_copy(c: Context, x: Any, *_: Any) -> Value:
    x = c.value(x)
    if c.dtype in (torch.float32, torch.bool):
        return c.float(x) if c.dtype == torch.float32 else 1.0 - c.float(x).apply("equal", 0.0)
    if c.dtype in (torch.int64, torch.int32):
        return x if x.dtype == "int64" else x.apply("to_integer")
    raise Refusal(f"a conversion to {c.dtype}", hint="compute in float32")


for _overload in (
    aten.clone.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default
):  # fmt: skip
    ATEN[_overload] = lambda c, x, *_: x
for _overload in (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default):
    ATEN[_overload] = lambda c, *_: ()
ATEN[aten.detach.default] = lambda c, x: x.apply("stop_gradient")
for _name in "full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty".split():

    def _filled(c: Context, x: Any, *rest: Any, name: str = _name) -> torch.Tensor:
        number = {"full_like": rest[0] if rest else 0, "new_full": rest[1] if len(rest) > 1 else 0}.get(name)
        if number is None:
            number = 1 if "ones" in name else 0
        return torch.full(c.shape, number, dtype=c.dtype)

    ATEN[getattr(aten, _name).default] = _filled
ATEN[aten.empty_permuted.default] = lambda c, *_: torch.zeros(c.shape)
