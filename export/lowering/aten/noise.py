"""Random operators: each takes uniform numbers that the runtime draws, so that every engine masks alike."""

from __future__ import annotations

import math

from edgestill.export.lowering.aten.context import Context, rows
from edgestill.export.lowering.graph import Value


def drop(c: Context, x: Value, p: float, train: bool | None) -> tuple[Value, None]:
    if train is False or p == 0:
        return x, None
    if p == 1:
        return x * 0.0, None
    keep = c.graph.apply("greater", 1.0 - p, c.uniform(x.shape))
    return x * (keep * (1.0 / (1.0 - p))), None


def _normal(c: Context, mean: float = 0.0, std: float = 1.0) -> Value:
    """Box and Muller 1958."""
    radius = ((1.0 - c.uniform()).apply("log") * -2.0).apply("sqrt")
    return radius * (c.uniform() * (2 * math.pi)).apply("cos") * std + mean


rows(
    {
        "native_dropout": drop,
        "bernoulli": lambda c, p, *_: p.apply("greater", c.uniform()),
        "bernoulli.p": lambda c, x, p, *_: c.graph.apply("greater", p, c.uniform()),
        "rand rand_like": lambda c, *_: c.uniform(),
        "uniform": lambda c, x, low, high, *_: c.uniform() * (high - low) + low,
        "randn randn_like": lambda c, *_: _normal(c),
        "normal_functional": lambda c, x, mean, std, *_: _normal(c, mean, std),
        "exponential": lambda c, x, rate, *_: (1.0 - c.uniform()).apply("log") * (-1.0 / rate),
    },
    random=True,
)
