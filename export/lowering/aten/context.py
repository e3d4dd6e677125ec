"""The table of rows, by ATen operator, and what a row is given.

A row is a function of the context and the operator's own arguments, in which tensors are Values; beside numbers of
floating point integers have become such, too, but for indices. What a row returns is brought to the shape of the
operator's result, so a row need not tell a view from a squeeze, nor keep or drop an axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from edgestill.export.lowering.graph import Graph, Value
from edgestill.runtime.errors import EdgestillError

INDICES = ("index", "indices", "offsets")
"""What ATen calls arguments that say where, not how much: they stay integers."""
WHOLE = (torch.int64, torch.int32)


class Refusal(EdgestillError):
    """Why an operator cannot be lowered as it is used here."""


@dataclass
class Context:
    """The graph that is built, and the node whose operator is read."""

    graph: Graph
    node: torch.fx.Node | None = None
    noise: list[Value] = field(default_factory=list)

    def compute(self, node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """By its row; by PyTorch itself, now, where nothing enters that is given at run time."""
        self.node = node
        operator, rule = node.target, ATEN.get(node.target)
        if isinstance(operator, torch._ops.HigherOrderOperator):
            raise Refusal(f"the control flow of torch's {operator.name()}")
        if rule is None and torch.Tag.nondeterministic_seeded in operator.tags:
            raise Refusal(f"the random operator {operator}", hint="draw with torch.rand, torch.randn or nn.Dropout")
        if operator not in RANDOM and not any(isinstance(leaf, Value) for leaf in tree_leaves((args, kwargs))):
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
            return operator(*args, **kwargs)
        if rule is None:
            raise Refusal(f"the operator {operator}")
        schema = operator._schema.arguments
        given = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        made = rule(self, *self._alike({a.name: given.get(a.name, a.default_value) for a in schema}).values())
        results = node.meta.get("val")
        if isinstance(made, list | tuple):
            return [_shaped(*pair) for pair in zip(made, results, strict=False)]
        return _shaped(made, results)

    def _alike(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with Values for tensors, and floating point where there are both."""
        arguments = tree_map_only(torch.Tensor, self.value, arguments)
        numbers = {name: value for name, value in arguments.items() if name not in INDICES}
        dtypes = {leaf.dtype for leaf in tree_leaves(numbers) if isinstance(leaf, Value)}
        if "float32" in dtypes or self.dtype not in WHOLE:
            arguments |= tree_map_only(Value, self.float, numbers)
        return arguments

    def value(self, x: Value | torch.Tensor | float) -> Value:
        return x if isinstance(x, Value) else self.graph.constant(torch.as_tensor(x).detach().numpy())

    def float(self, x: Value) -> Value:
        return x.apply("to_float") if x.dtype != "float32" else x

    @property
    def _result(self) -> torch.Tensor | None:
        value = self.node.meta.get("val")
        return value[0] if isinstance(value, tuple | list) else value

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the operator's (first) value."""
        return tuple(self._result.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """None of an operator that gives nothing."""
        return getattr(self._result, "dtype", None)

    def uniform(self, shape: Sequence[int] | None = None) -> Value:
        """Numbers of [0, 1) that the runtime draws for each step, as many as the operator's result has."""
        self.noise.append(self.graph.input(f"noise.{len(self.noise)}", tuple(shape or self.shape)))
        return self.noise[-1]


def _shaped(made: Any, result: Any) -> Any:
    if not isinstance(made, Value):
        return made
    if result.dtype in WHOLE and made.dtype == "float32":  # masks are float32, and make so what they meet
        made = made.apply("to_integer")
    return made.reshape(*result.shape)


def way_out(node: torch.fx.Node) -> str:
    """What to do instead of an operator that cannot be lowered, by what it takes and gives, or by its name."""
    tensors = [one for n in (node, *node.all_input_nodes) for one in tree_leaves(n.meta.get("val"))]
    sizes = [size for one in tensors for size in (one.shape if isinstance(one, torch.Tensor) else (one,))]
    found = [one for one in tensors if isinstance(one, torch.Tensor)]
    if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
        return "its number or shape depends on values: stay with tensors of fixed shapes, and torch.where with a mask"
    if any(one.dtype.is_complex for one in found):
        return "no complex numbers: compute spectrograms before the student, or say it with real and imaginary parts"
    if any(one.layout is not torch.strided for one in found):
        return "use dense tensors: to_dense()"
    named = (hint for names, hint in INSTEAD.items() if re.search(rf"\b_?({names})\b", str(node.target)))
    return next(named, INSTEAD[""])


INSTEAD = {
    "cond": "compute both results and take torch.where(mask, a, b)",
    "while_loop|scan|map_impl|associative_scan": "write a Python loop of a fixed number of steps",
    "sort|topk|kthvalue|median|mode|cummax|cummin|searchsorted|bucketize|histc": "use max, argmax, or comparisons",
    "scatter|scatter_add|scatter_reduce|index_put|index_add|masked_scatter": "assign by constants or by a mask, or "
    "multiply with F.one_hot(index, n)",
    "cdist|det|inverse|linalg\\w*|svd": "say it with products and sums",
    "": "write it with other operators (docs/lowering.md lists what can be lowered), compute it before the student, or "
    "leave it out",
}
"""By the names of operators, or for all others."""
Row = Callable[..., Any]
ATEN: dict[Any, Row] = {}
"""By operator overload. What stands here is not decomposed further by PyTorch."""
RANDOM: set[Any] = set()
"""Operators that draw, also where nothing else is given at run time."""


def rows(table: Mapping[str, Row], random: bool = False) -> None:
    """Enters rows by ATen's names, `silu` or with its overload `add.Tensor`; several share a row side by side."""
    for names, rule in table.items():
        for name in names.split():
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            ATEN[operator] = rule
            if random:
                RANDOM.add(operator)


def row(names: str) -> Callable[[Row], Row]:
    def enter(function: Row) -> Row:
        rows({names: function})
        return function

    return enter


def axes_of(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Axes from 0 on; all of them where none is named."""
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    return tuple(sorted({d % rank for d in dims}))
