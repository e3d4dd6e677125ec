"""Random operators: each takes uniform numbers that the runtime draws, so that every engine masks alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from edgestill.export.lowering.aten.context import RANDOM, Context, Row, row
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def random(*overloads: Any) -> Callable[[Row], Row]:
    RANDOM.update(overloads)
    return row(*overloads)


@random(aten.native_dropout.default)
def drop(c: Context, x: Any, p: float, train: bool | None) -> tuple[Value, None]:
    if train is False or p == 0:
        return x, None
    if p == 1:
        return c.value(x) * 0.0, None
    keep = c.graph.apply("greater", 1.0 - p, c.uniform(x.shape))
    return c.value(x) * (keep * (1.0 / (1.0 - p))), None


@random(aten.bernoulli.p)
def _bernoulli_number(c: Context, x: Any, p: float, *_: Any) -> Value:
    return c.graph.apply("greater", p, c.uniform(c.shape))


@random(aten.bernoulli.default)
def _bernoulli(c: Context, p: Any, *_: Any) -> Value:
    return c.graph.apply("greater", c.value(p), c.uniform(c.shape))


@random(aten.rand.default, aten.rand_like.default)
def _rand(c: Context, *_: Any) -> Value:
    return c.uniform(c.shape)


@random(aten.uniform.default)
def _uniform(c: Context, x: Any, low: float, high: float, *_: Any) -> Value:
    return c.uniform(c.shape) * (high - low) + low


@random(aten.randn.default, aten.randn_like.default)
def _randn(c: Context, *_: Any) -> Value:
    """Box and Muller 1958."""
    radius = ((1.0 - c.uniform(c.shape)).apply("log") * -2.0).apply("sqrt")
    return radius * (c.uniform(c.shape) * (2 * math.pi)).apply("cos")


@random(aten.normal_functional.default)
def _normal(c: Context, x: Any, mean: float, std: float, *_: Any) -> Value:
    return _randn(c) * std + mean


@random(aten.exponential.default)
def _exponential(c: Context, x: Any, rate: float = 1.0, *_: Any) -> Value:
    return (1.0 - c.uniform(c.shape)).apply("log") * (-1.0 / rate)
