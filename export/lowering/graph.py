"""A small graph of forward operators: built by the formulations, written out by the emitters.

Shapes are static. Equal nodes are shared as they are built, and `prune` drops what no output needs, so a formulation
may compute every gradient it knows and leave it to the graph to keep only those that are asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.operators import DTYPES, OPERATORS

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a graph: what a node computes, an input, or a constant."""

    graph: Graph
    name: str
    shape: tuple[int, ...]
    dtype: str
    constant: np.ndarray | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __add__(self, other: Value | float) -> Value:
        return self.graph.apply("add", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self.graph.apply("subtract", self, other)

    def __rsub__(self, other: float) -> Value:
        return self.graph.apply("subtract", other, self)

    def __mul__(self, other: Value | float) -> Value:
        return self.graph.apply("multiply", self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self.graph.apply("divide", self, other)

    def __rtruediv__(self, other: float) -> Value:
        return self.graph.apply("divide", other, self)

    def __neg__(self) -> Value:
        return self * -1.0

    def __matmul__(self, other: Value) -> Value:
        return self.graph.apply("matmul", self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def reshape(self, *shape: int) -> Value:
        if -1 in shape:
            known = -int(np.prod(shape))
            shape = tuple(self.size // known if size == -1 else size for size in shape)
        return self if shape == self.shape else self.graph.apply("reshape", self, shape=shape)

    def transpose(self, *permutation: int) -> Value:
        if permutation == tuple(range(len(self.shape))):
            return self
        return self.graph.apply("transpose", self, permutation=permutation)

    def narrow(self, axis: int, start: int, stop: int) -> Value:
        """The part start … stop − 1 of an axis."""
        if start == 0 and stop == self.shape[axis]:
            return self
        return self.graph.apply("slice", self, axis=axis, start=start, stop=stop)


@dataclass(frozen=True)
class Node:
    operator: str
    inputs: tuple[Value, ...]
    attributes: dict[str, Any]
    outputs: tuple[Value, ...]


@dataclass
class Graph:
    inputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: dict[str, Value] = field(default_factory=dict)
    _seen: dict[tuple, Any] = field(default_factory=dict)

    def input(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Value:
        value = Value(self, name, tuple(shape), dtype)
        self.inputs.append(value)
        return value

    def constant(self, data: np.ndarray | float) -> Value:
        data = np.asarray(data, np.float32)
        key = ("constant", data.shape, data.tobytes())
        if key not in self._seen:
            self._seen[key] = Value(self, f"constant_{len(self._seen)}", data.shape, "float32", data)
        return self._seen[key]

    def apply(self, operator: str, *inputs: Value | float, **attributes: Any) -> Value:
        """The value of one operator; numbers become constants of the rank of the other operand."""
        (value,) = self.apply_many(operator, *inputs, **attributes)
        return value

    def apply_many(self, operator: str, *inputs: Value | float, **attributes: Any) -> tuple[Value, ...]:
        """All values of an operator that has several."""
        if operator not in OPERATORS:
            raise ValueError(f"{operator!r} is not in the set of operators that an artifact may contain")
        if operator == "pad" and min(*attributes["begins"], *attributes["ends"]) < 0:
            raise ValueError(f"pad by {attributes}: engines refuse a negative size")
        rank = max((len(value.shape) for value in inputs if isinstance(value, Value)), default=0)
        values = tuple(
            value if isinstance(value, Value) else self.constant(np.full((1,) * rank, value))
            for value in inputs
        )
        key = (operator, tuple(value.name for value in values), repr(sorted(attributes.items())))
        if key not in self._seen:
            outputs = tuple(
                Value(self, f"{operator}_{len(self._seen)}" + (f"_{i}" if i else ""), shape, dtype)
                for i, (shape, dtype) in enumerate(_infer(operator, values, attributes))
            )
            self.nodes.append(Node(operator, values, attributes, outputs))
            self._seen[key] = outputs
        return self._seen[key]

    def output(self, name: str, value: Value) -> None:
        self.outputs[name] = value

    def prune(self, optional_inputs: set[str]) -> None:
        """Drops the nodes that no output needs, and those of `optional_inputs` that nothing reads any more."""
        needed = {value.name for value in self.outputs.values()}
        kept = []
        for node in reversed(self.nodes):
            if any(value.name in needed for value in node.outputs):
                kept.append(node)
                needed.update(value.name for value in node.inputs)
        self.nodes = kept[::-1]
        self.inputs = [v for v in self.inputs if v.name in needed or v.name not in optional_inputs]

    def peak_live_bytes(self) -> int:
        """The most that intermediate values take at once in this order of nodes, without inputs, outputs and reuse
        within a node: what a memory planner needs at least."""
        last = {value.name: i for i, node in enumerate(self.nodes) for value in node.inputs}
        kept = {value.name for value in self.outputs.values()}
        live = peak = 0
        sizes: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            for value in node.outputs:
                sizes[value.name] = (
                    0 if node.operator == "reshape" else value.size * np.dtype(value.dtype).itemsize
                )
                live += sizes[value.name]
            peak = max(peak, live)
            for name in {value.name for value in node.inputs} & sizes.keys() - kept:
                live -= sizes[name] if last[name] == i else 0
        return peak

    def operators(self) -> dict[str, int]:
        return dict(sorted(Counter(node.operator for node in self.nodes).items()))


def _infer(
    operator: str, values: tuple[Value, ...], attributes: dict[str, Any]
) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of an operator's values, from running it on tensors without data."""
    if operator == "one_hot":  # its meaning counts on real memory
        return [((values[0].size, attributes["classes"]), "float32")]
    meta = [torch.empty(value.shape, dtype=DTYPES[value.dtype], device="meta") for value in values]
    results = OPERATORS[operator](*meta, **attributes)
    results = results if isinstance(results, tuple) else (results,)
    return [(tuple(result.shape), _NAMES[result.dtype]) for result in results]
