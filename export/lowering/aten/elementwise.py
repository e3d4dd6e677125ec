"""Elementwise operators: activations, arithmetic with broadcasting, comparisons, conversions."""

from __future__ import annotations

import math
from functools import reduce
from operator import mul
from typing import Any

import torch

from edgestill.export.lowering.aten.context import WHOLE, Context, Refusal, row, rows
from edgestill.export.lowering.graph import Value


def sign(x: Value) -> Value:
    return x.apply("greater", 0.0) - (-x).apply("greater", 0.0)


def where(mask: Value, a: Value | float, b: Value | float) -> Value:
    return mask.apply("where", a, b)


def clamped(x: Value, low: float | None, high: float | None, closed: bool = True) -> Value:
    low, high = (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
    return x.apply("clamp", low=low, high=high, closed=closed)


def _clamped_by(x: Value, low: Value | None, high: Value | None) -> Value:
    x = x if low is None else where(x.apply("greater_equal", low), x, low)
    return x if high is None else where(high.apply("greater_equal", x), x, high)


def _arcsine(x: Value) -> Value:
    return (x * ((1.0 - x) * (x + 1.0)).apply("rsqrt")).apply("atan")


def _log1p(x: Value) -> Value:
    """What 1 + x rounds away comes back as a correction, which is too small to have a gradient."""
    whole = x + 1.0
    return whole.apply("log") + ((x - (whole - 1.0)) / whole).apply("stop_gradient")


def _expm1(x: Value) -> Value:
    """tanh(x/2)·(eˣ + 1), which loses no digits near zero."""
    return (x * 0.5).apply("tanh") * (x.apply("exp") + 1.0)


def _softplus(c: Context, x: Value, beta: float, threshold: float) -> Value:
    y = (x * beta).apply("softplus") * (1 / beta)
    # from 15 on they differ by less than rounding
    return y if threshold >= 15 else where((x * beta).apply("greater", threshold), x, y)


def _truth(x: Value) -> Value:
    """1 or 0; of what is no mask already."""
    return x if x.operator in ("greater", "greater_equal", "equal") else 1.0 - x.apply("equal", 0.0)


def _sinc(x: Value) -> Value:
    """sin πx / πx, which is 1 and flat at zero."""
    zero = x.apply("equal", 0.0)
    angle = where(zero, 1.0, x) * math.pi
    return where(zero, 1.0, angle.apply("sin") / angle)


def _elu(c: Context, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    below = (clamped(x, None, 0.0) * input_scale).apply("exp") - 1.0  # no exponent above zero: it would overflow
    return where(x.apply("greater", 0.0), x * scale, below * (alpha * scale))


def _gelu(c: Context, x: Value, approximate: str) -> Value:
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return x * ((inner.apply("tanh") + 1.0) * 0.5)
    return x * (((x * math.sqrt(0.5)).apply("erf") + 1.0) * 0.5)


ALIKE = "relu exp log sqrt rsqrt erf tanh sigmoid sin cos atan floor abs maximum minimum"
"""Operators that the Graph has by the same name."""
rows({name: lambda c, *inputs, name=name: c.graph.apply(name, *inputs) for name in ALIKE.split()})
rows(
    {
        "neg": lambda c, x: -x,
        "reciprocal": lambda c, x: 1.0 / x,
        "square": lambda c, x: x * x,
        "log1p": lambda c, x: _log1p(x),
        "log2": lambda c, x: x.apply("log") * (1 / math.log(2)),
        "log10": lambda c, x: x.apply("log") * (1 / math.log(10)),
        "expm1": lambda c, x: _expm1(x),
        "ceil": lambda c, x: -(-x).apply("floor"),
        "tan": lambda c, x: x.apply("sin") / x.apply("cos"),
        "asin": lambda c, x: _arcsine(x),
        "acos": lambda c, x: math.pi / 2 - _arcsine(x),
        "sinc": lambda c, x: _sinc(x),
        "sinh": lambda c, x: (x.apply("exp") - (-x).apply("exp")) * 0.5,
        "cosh": lambda c, x: (x.apply("exp") + (-x).apply("exp")) * 0.5,
        "sign": lambda c, x: sign(x),
        "hardtanh": lambda c, x, low, high: clamped(x, low, high, closed=False),
        "hardsigmoid": lambda c, x: clamped(x + 3.0, 0.0, 6.0, closed=False) * (1 / 6),
        "hardswish": lambda c, x: x * clamped(x + 3.0, 0.0, 6.0, closed=False) * (1 / 6),
        "gelu": _gelu,
        "softplus": _softplus,
        "log_sigmoid_forward": lambda c, x: (-(-x).apply("softplus"), None),
        "elu": _elu,
        "celu": lambda c, x, alpha: _elu(c, x, alpha, 1.0, 1.0 / alpha),
        "leaky_relu": lambda c, x, slope: where(x.apply("greater", 0.0), x, x * slope),
        "softshrink": lambda c, x, lambd: x - clamped(x, -lambd, lambd),
        "hardshrink": lambda c, x, lambd: where(x.apply("abs").apply("greater", lambd), x, 0.0),
        "threshold": lambda c, x, bound, number: where(x.apply("greater", bound), x, number),
        "clamp": lambda c, x, low, high: clamped(x, low, high),
        # unlike maximum and minimum they do not halve the gradient of a tie
        "clamp.Tensor": lambda c, x, low, high: _clamped_by(x, low, high),
        "clamp_min.Tensor": lambda c, x, low: _clamped_by(x, low, None),
        "clamp_max.Tensor": lambda c, x, high: _clamped_by(x, None, high),
        "add.Tensor add.Scalar": lambda c, a, b, alpha: _truth(a + b) if c.dtype is torch.bool else a + b * alpha,
        "sub.Tensor sub.Scalar": lambda c, a, b, alpha: a - b * alpha,
        "rsub.Tensor rsub.Scalar": lambda c, a, b, alpha: c.graph.apply("subtract", b, a * alpha),
        "mul.Tensor mul.Scalar": lambda c, a, b: a * b,
        "logical_and": lambda c, a, b: _truth(a) * _truth(b),
        "logical_or": lambda c, a, b: _truth(a).apply("maximum", _truth(b)),
        "logical_not": lambda c, x: x.apply("equal", 0.0),
        "bitwise_and.Tensor": lambda c, a, b: _of_masks(c, a * b),
        "bitwise_or.Tensor": lambda c, a, b: _of_masks(c, a.apply("maximum", b)),
        "bitwise_not": lambda c, x: _of_masks(c, x.apply("equal", 0.0)),
        "gt.Tensor gt.Scalar": lambda c, a, b: a.apply("greater", b),
        "ge.Tensor ge.Scalar": lambda c, a, b: a.apply("greater_equal", b),
        "lt.Tensor lt.Scalar": lambda c, a, b: c.graph.apply("greater", b, a),
        "le.Tensor le.Scalar": lambda c, a, b: c.graph.apply("greater_equal", b, a),
        "eq.Tensor eq.Scalar": lambda c, a, b: a.apply("equal", b),
        "ne.Tensor ne.Scalar": lambda c, a, b: 1.0 - a.apply("equal", b),
        "where.self": lambda c, mask, a, b: where(mask, a, b),
        "pow.Scalar": lambda c, x, y: (y * math.log(x)).apply("exp"),
        "detach": lambda c, x: x.apply("stop_gradient"),
        "full_like": lambda c, x, number, *_: torch.full(c.shape, number, dtype=c.dtype),
        "empty_like empty_permuted": lambda c, *_: torch.zeros(c.shape, dtype=c.dtype),
        "_assert_tensor_metadata _assert_async _assert_async.msg": lambda c, *_: None,
    }
)


def _of_masks(c: Context, made: Value) -> Value:
    if c.dtype is not torch.bool:
        raise Refusal("an operator on the bits of integers", hint="use it on masks")
    return made


@row("div.Tensor div.Scalar")
def _div(c: Context, a: Value, b: Value | float) -> Value:
    exact = not isinstance(b, Value) and math.log2(abs(b)).is_integer()
    return a * (1.0 / b) if exact else a / b


@row("div.Tensor_mode div.Scalar_mode")
def _div_mode(c: Context, a: Value, b: Value | float, rounding_mode: str | None) -> Value:
    quotient = _div(c, c.float(a), c.float(b) if isinstance(b, Value) else b)
    if rounding_mode == "floor":
        quotient = quotient.apply("floor")
    elif rounding_mode == "trunc":
        quotient = sign(quotient) * quotient.apply("abs").apply("floor")
    return quotient if c.dtype.is_floating_point else quotient.apply("to_integer")


@row("pow.Tensor_Scalar")
def _pow(c: Context, x: Value, exponent: float) -> Value:
    if exponent == 0:
        return x * 0.0 + 1.0
    if exponent in (1, 2, 3, 4):
        return reduce(mul, [x] * int(exponent))
    special = {0.5: lambda: x.apply("sqrt"), -0.5: lambda: x.apply("rsqrt"), -1: lambda: 1.0 / x}
    return special.get(exponent, lambda: x.apply("power", exponent=float(exponent)))()


@row("pow.Tensor_Tensor")
def _pow_tensor(c: Context, x: Value, y: Value) -> Value:
    """Of positive bases; of any by one constant for all."""
    if y.constant is not None and (y.constant == y.constant.reshape(-1)[0]).all():
        return _pow(c, x.expand(*c.shape), float(y.constant.reshape(-1)[0]))
    return (x.apply("log") * y).apply("exp")


@row("_to_copy")
def _to_copy(c: Context, x: Value, *_: Any) -> Value:
    if c.dtype == torch.bool:
        return 1.0 - x.apply("equal", 0.0)
    if c.dtype == torch.float32:
        return x
    if c.dtype in WHOLE:
        return x if x.dtype == "int64" else x.apply("to_integer")
    raise Refusal(f"a conversion to {c.dtype}", hint="compute in float32")
