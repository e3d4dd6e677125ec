"""The table of rows, by ATen operator, and what a row is given.

A row is a function of the context and the operator's own arguments, in which tensors are Values, or torch tensors where
nothing that was given at run time enters. Convolutions and pooling become two-dimensional here, whatever their rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.graph import Graph, Value
from edgestill.runtime.errors import EdgestillError

aten = torch.ops.aten


class Refusal(EdgestillError):
    """Why an operator cannot be lowered as it is used here."""


@dataclass
class Context:
    """The graph that is built, and the node whose operator is read."""

    graph: Graph
    node: torch.fx.Node | None = None
    noise: list[Value] = field(default_factory=list)

    def compute(self, node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.node = node
        rule = ATEN.get(node.target)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        symbolic = any(isinstance(leaf, Value) for leaf in leaves)
        if rule is None and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Refusal(
                f"the random operator {node.target}", hint="draw with torch.rand, torch.randn or nn.Dropout"
            )
        if not symbolic and node.target not in RANDOM:
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
            return node.target(*args, **kwargs)
        if rule is None:
            raise Refusal(f"the operator {node.target}")
        schema = node.target._schema.arguments
        given = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        values = {a.name: given.get(a.name, a.default_value) for a in schema}
        return rule(self, *values.values())

    def value(self, x: Any, like: Value | None = None) -> Value:
        """x as a Value; a number has the rank of `like`."""
        if isinstance(x, Value):
            return x
        if isinstance(x, torch.Tensor):
            return self.graph.constant(x.detach().numpy())
        return self.graph.constant(np.full((1,) * (like.rank if like is not None else 0), x, np.float32))

    def float(self, x: Any) -> Value:
        x = self.value(x)
        return x.apply("to_float") if x.dtype != "float32" else x

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the operator's (first) value."""
        value = self.node.meta["val"]
        return tuple((value[0] if isinstance(value, tuple | list) else value).shape)

    @property
    def dtype(self) -> torch.dtype:
        value = self.node.meta["val"]
        return (value[0] if isinstance(value, tuple | list) else value).dtype

    def uniform(self, shape: Sequence[int]) -> Value:
        """Numbers of [0, 1) that the runtime draws for each step."""
        self.noise.append(self.graph.input(f"noise.{len(self.noise)}", tuple(shape)))
        return self.noise[-1]


Row = Callable[..., Any]
ATEN: dict[Any, Row] = {}
"""By operator overload. What stands here is not decomposed further by PyTorch."""
RANDOM: set[Any] = set()


def row(*overloads: Any) -> Callable[[Row], Row]:
    def enter(function: Row) -> Row:
        ATEN.update(dict.fromkeys(overloads, function))
        return function

    return enter


def axes_of(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(sorted({d % rank for d in dims})) if rank else ()
