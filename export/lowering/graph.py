"""A graph of forward operators: what capture makes, gradients extend, rewrites change and emitters write.

Shapes are static. Building simplifies: equal nodes are shared, constants are folded, identities vanish, turns join
(simplify.py). So rules and rewrites may say things in the plainest way, and `prune` drops what no output needs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.bounds import is_finite, least
from edgestill.export.lowering.operators import DTYPES, OPERATORS
from edgestill.export.lowering.simplify import simplified
from edgestill.runtime.errors import EdgestillError

FOLDED_ELEMENTS = 2**22
FLOAT = np.float32
"""Of constants; tests that compute in float64 make it that, so that a graph is as exact as what it is compared with."""
_SPECS: dict[tuple, list[tuple[tuple[int, ...], str]]] = {}  # what `_infer` said before, which takes a millisecond
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class LoweringError(EdgestillError):
    """A student holds something that cannot be lowered to forward operators."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a graph: what a node computes, an input, or a constant."""

    graph: Graph
    name: str
    shape: tuple[int, ...]
    dtype: str
    constant: np.ndarray | None = None
    node: Node | None = None
    finite: bool = True  # certainly, and not below `least` (bounds.py)
    least: float = -math.inf

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def operator(self) -> str | None:
        """Of the node that computes it; None for inputs and constants."""
        return None if self.node is None else self.node.operator

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

    def apply(self, operator: str, *others: Value | float, **attributes: Any) -> Value:
        """One operator with this value as its first input."""
        return self.graph.apply(operator, self, *others, **attributes)

    def reshape(self, *shape: int) -> Value:
        if -1 in shape:
            known = -math.prod(shape)
            shape = tuple(self.size // known if size == -1 else size for size in shape)
        return self.graph.apply("reshape", self, shape=tuple(map(int, shape)))

    def transpose(self, *permutation: int) -> Value:
        return self.graph.apply("transpose", self, permutation=tuple(permutation))

    def swap(self) -> Value:
        """The last two axes exchanged."""
        last = self.rank - 1
        return self.transpose(*range(last - 1), last, last - 1)

    def narrow(self, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """The part start … stop − 1 of an axis."""
        return self.graph.apply("slice", self, axis=axis, start=start, stop=stop, step=step)

    def sum(self, *axes: int) -> Value:
        """Over the axes, which stay with size 1."""
        return self.graph.apply("reduce_sum", self, axes=tuple(sorted(axes)))

    def mean(self, *axes: int) -> Value:
        return self.graph.apply("reduce_mean", self, axes=tuple(sorted(axes)))

    def expand(self, *shape: int) -> Value:
        return self.graph.apply("expand", self, shape=tuple(shape))

    def pad(self, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Value:
        """`begins` and `ends` an axis; negative ones cut."""
        x = self
        for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            x = x.narrow(axis, max(-begin, 0), x.shape[axis] - max(-end, 0))
        begins, ends = (tuple(max(size, 0) for size in sizes) for sizes in (begins, ends))
        return x.graph.apply("pad", x, begins=begins, ends=ends, value=float(value))


@dataclass(frozen=True, eq=False)
class Node:
    operator: str
    inputs: tuple[Value, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[Value, ...]
    path: str = ""  # of the module in the student that it comes from


@dataclass
class Graph:
    inputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: dict[str, Value] = field(default_factory=dict)
    path: str = ""  # what new nodes are marked with
    _seen: dict[tuple, Any] = field(default_factory=dict)
    _named: int = 0
    _taken: set[str] = field(default_factory=set)

    def input(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Value:
        """Errors: ValueError for a name that something has: values are told apart by their names."""
        if name in self._taken:
            raise ValueError(f"two values of a graph are called {name!r}")
        self._taken.add(name)
        value = Value(self, name, tuple(shape), dtype)
        self.inputs.append(value)
        return value

    def constant(self, data: np.ndarray | float | torch.Tensor) -> Value:
        """float32, or int64 for whole numbers and truth values of arrays."""
        data = np.asarray(data)
        data = data.astype(np.int64 if data.dtype.kind in "iu" else FLOAT, order="C")
        key = ("constant", data.dtype.str, data.shape, data.tobytes())
        if key not in self._seen:
            dtype = "int64" if data.dtype == np.int64 else "float32"
            known = bool(np.isfinite(data).all()), float(data.min()) if data.size else math.inf
            self._seen[key] = Value(self, self._name("constant"), data.shape, dtype, data, None, *known)
        return self._seen[key]

    def apply(self, operator: str, *inputs: Value | float, **attributes: Any) -> Value:
        """The first value of an operator; numbers become constants of the rank of the other operand."""
        return self.apply_many(operator, *inputs, **attributes)[0]

    def apply_many(self, operator: str, *inputs: Value | float, **attributes: Any) -> tuple[Value, ...]:
        """All values of an operator that has several."""
        if operator not in OPERATORS:
            raise ValueError(f"{operator!r} is not in the set of operators that a graph may contain")
        known = [value for value in inputs if isinstance(value, Value)]
        rank = max((value.rank for value in known), default=0)
        kind = np.int64 if known and all(value.dtype == "int64" for value in known) else FLOAT
        if kind is np.int64 and any(int(n) != n for n in inputs if not isinstance(n, Value)):
            raise ValueError(f"{operator} of integers and a number that is none")
        values = tuple(
            value if isinstance(value, Value) else self.constant(np.full((1,) * rank, value, kind))
            for value in inputs
        )
        if (simpler := simplified(self, operator, values, attributes)) is not None:
            return simpler if isinstance(simpler, tuple) else (simpler,)
        key = (operator, tuple(value.name for value in values), repr(sorted(attributes.items())))
        if key not in self._seen:
            self._seen[key] = self._add(operator, values, attributes)
        return self._seen[key]

    def _add(self, operator: str, values: tuple[Value, ...], attributes: dict[str, Any]) -> tuple[Value, ...]:
        key = (operator, tuple((v.shape, v.dtype) for v in values), repr(sorted(attributes.items())))
        if (specs := _SPECS.get(key)) is None:
            specs = _SPECS[key] = _infer(operator, values, attributes)
        if operator != "stop_gradient" and all(value.constant is not None for value in values):
            if sum(math.prod(shape) for shape, _ in specs) <= FOLDED_ELEMENTS:
                results = run_operator(
                    operator, [torch.from_numpy(value.constant) for value in values], attributes
                )
                return tuple(self.constant(result.numpy()) for result in results)
        outputs: list[Value] = []
        node, own = Node(operator, values, attributes, (), self.path), self._name(operator)
        finite = is_finite(operator, values, attributes)
        for i, (shape, dtype) in enumerate(specs):
            known = finite, least(operator, values, attributes, i)
            outputs.append(Value(self, own + (f"_{i}" if i else ""), shape, dtype, None, node, *known))
        object.__setattr__(node, "outputs", tuple(outputs))  # node and values refer to each other
        self.nodes.append(node)
        return node.outputs

    def _name(self, kind: str) -> str:
        while (name := f"{kind}_{self._named}") in self._taken:
            self._named += 1
        self._taken.add(name)
        return name

    def output(self, name: str, value: Value) -> None:
        self.outputs[name] = value

    def prune(self, optional_inputs: set[str] = frozenset()) -> None:
        """Drops the nodes that no output needs, and those of `optional_inputs` that nothing reads any more."""
        needed = {value.name for value in self.outputs.values()}
        kept = []
        for node in reversed(self.nodes):
            if any(value.name in needed for value in node.outputs):
                kept.append(node)
                needed.update(value.name for value in node.inputs)
        self.nodes = kept[::-1]
        still = {id(node) for node in kept}
        self._seen = {  # what is dropped is made anew where it is asked for again
            key: made
            for key, made in self._seen.items()
            if isinstance(made, Value) or made[0].node is None or id(made[0].node) in still
        }
        self.inputs = [v for v in self.inputs if v.name in needed or v.name not in optional_inputs]

    def readers(self) -> dict[str, list[Node]]:
        """The nodes that read each value, by its name."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value.name, []).append(node)
        return found

    def peak_live_bytes(self) -> int:
        """The most that intermediate values take at once in this order of nodes, without inputs, outputs and reuse
        within a node: what a memory planner needs at least."""
        last = {value.name: i for i, node in enumerate(self.nodes) for value in node.inputs}
        kept = {value.name for value in self.outputs.values()}
        live = peak = 0
        sizes: dict[str, int] = {}
        root: dict[str, str] = {}  # a reshape's memory is that of what it reshapes
        for node in self.nodes:
            if node.operator == "reshape":
                own, of = node.outputs[0].name, node.inputs[0].name
                root[own] = of = root.get(of, of)
                last[of] = max(last.get(of, 0), last.get(own, 0))
                kept |= {of} if own in kept else set()
        for i, node in enumerate(self.nodes):
            for value in node.outputs:
                sizes[value.name] = (
                    0 if node.operator == "reshape" else value.size * np.dtype(value.dtype).itemsize
                )
                live += sizes[value.name]
            peak = max(peak, live)
            read = {root.get(value.name, value.name) for value in node.inputs}
            unread = {value.name for value in node.outputs if value.name not in last}
            for name in (read | unread) & sizes.keys() - kept:
                live -= sizes[name] if last.get(name, i) == i else 0
        return peak

    def operators(self) -> dict[str, int]:
        return dict(sorted(Counter(node.operator for node in self.nodes).items()))


def run_operator(
    operator: str, tensors: Sequence[torch.Tensor], attributes: Mapping[str, Any]
) -> tuple[torch.Tensor, ...]:
    """An operator's meaning on tensors."""
    results = OPERATORS[operator](*tensors, **attributes)
    return results if isinstance(results, tuple) else (results,)


def run_graph(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The graph's outputs in PyTorch, for comparison; float64 inputs make it compute in float64."""
    double = any(tensor.dtype == torch.float64 for tensor in inputs.values())
    values = dict(inputs)

    def of(value: Value) -> torch.Tensor:
        if value.constant is None:
            return values[value.name]
        tensor = torch.from_numpy(value.constant)
        return tensor.double() if double and tensor.is_floating_point() else tensor

    for node in graph.nodes:
        results = run_operator(node.operator, [of(value) for value in node.inputs], node.attributes)
        if double:
            results = tuple(t.double() if t.is_floating_point() else t for t in results)
        values.update((value.name, result) for value, result in zip(node.outputs, results, strict=True))
    return {name: of(value) for name, value in graph.outputs.items()}


def _infer(
    operator: str, values: tuple[Value, ...], attributes: dict[str, Any]
) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of an operator's values, from running it on tensors without data."""
    meta = [torch.empty(value.shape, dtype=DTYPES[value.dtype], device="meta") for value in values]
    return [
        (tuple(result.shape), _NAMES[result.dtype]) for result in run_operator(operator, meta, attributes)
    ]
