"""The layout pass: turns (transposes) move past everything that they can move past, until they meet and cancel.

Every value is known as a turn of another one that is really computed. An elementwise operator computes on what its
operands are turns of; a reduction, a slice, a pad or a concatenation does with its axes renamed. A turn becomes a node
only where an operator wants the order as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from edgestill.export.lowering.graph import Graph, Node, Value
from edgestill.export.lowering.operators import ELEMENTWISE
from edgestill.export.lowering.simplify import inverse_permutation


@dataclass(frozen=True)
class Turned:
    """The value `base.transpose(*order)`."""

    base: Value
    order: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    def plain(self) -> Value:
        return self.base if self.is_plain else self.base.transpose(*self.order)

    def based_on(self, order: tuple[int, ...]) -> Value:
        """What this is the turn `order` of."""
        return self.base.transpose(*(self.order[axis] for axis in inverse_permutation(order)))

    def of_base(self, by_axis: Sequence[int]) -> tuple[int, ...]:
        """A number an axis, in the order of the base's axes."""
        return tuple(by_axis[axis] for axis in inverse_permutation(self.order))


def cancel_turns(graph: Graph) -> Graph:
    """The graph with as few transposed elements as moving the transposes finds; never with more."""
    new = Graph()
    known = {v.name: _plain(new.input(v.name, v.shape, v.dtype)) for v in graph.inputs}

    def of(value: Value) -> Turned:
        return _plain(new.constant(value.constant)) if value.constant is not None else known[value.name]

    for node in graph.nodes:
        new.path = node.path
        inputs = [of(value) for value in node.inputs]
        if (made := _moved_past(node, inputs)) is not None:
            known[node.outputs[0].name] = made
            continue
        results = new.apply_many(node.operator, *(x.plain() for x in inputs), **node.attributes)
        known.update((old.name, _plain(value)) for old, value in zip(node.outputs, results, strict=True))
    for name, value in graph.outputs.items():
        new.output(name, of(value).plain())
    new.prune()
    return new if _turned_elements(new) <= _turned_elements(graph) else graph


def _turned_elements(graph: Graph) -> int:
    return sum(node.outputs[0].size for node in graph.nodes if node.operator == "transpose")


def _plain(value: Value) -> Turned:
    return Turned(value, tuple(range(value.rank)))


def _moved_past(node: Node, inputs: list[Turned]) -> Turned | None:
    """The node's value as a turn, computed from their bases; None where it wants the order as it is."""
    if node.operator in ELEMENTWISE or node.operator == "concat":
        return _jointly(node, inputs)
    x = inputs[0] if inputs else None
    if node.operator == "transpose":
        return Turned(x.base, tuple(x.order[axis] for axis in node.attributes["permutation"]))
    if node.operator == "reshape":
        return _reshape(x, node.attributes["shape"])
    if renamed := _RENAMED.get(node.operator):
        return Turned(x.base.apply(node.operator, **{**node.attributes, **renamed(x, node.attributes)}), x.order)
    return None


_RENAMED: dict[str, Callable[[Turned, Mapping[str, Any]], dict[str, Any]]] = {
    "slice": lambda x, a: {"axis": x.order[a["axis"]]},
    "pad": lambda x, a: {side: x.of_base(a[side]) for side in ("begins", "ends")},
    "expand": lambda x, a: {"shape": x.of_base(a["shape"])},
} | dict.fromkeys(
    ("reduce_sum", "reduce_mean", "reduce_max"),
    lambda x, a: {"axes": tuple(sorted(x.order[axis] for axis in a["axes"]))},
)
"""The attributes that name axes, as they are in the base."""


def _jointly(node: Node, inputs: list[Turned]) -> Turned:
    """In the order of the largest operand that is turned, so that the least is moved."""
    rank = node.outputs[0].rank
    turned = [x for x in inputs if not x.is_plain and len(x.order) == rank]
    order = max(turned, key=lambda x: x.base.size).order if turned else tuple(range(rank))
    bases = [_of_rank(x, rank).based_on(order) for x in inputs]
    axis = {"axis": order[node.attributes["axis"]]} if node.operator == "concat" else {}
    return Turned(bases[0].graph.apply(node.operator, *bases, **{**node.attributes, **axis}), order)


def _of_rank(x: Turned, rank: int) -> Turned:
    missing = rank - len(x.order)
    return x if not missing else _plain(x.plain().reshape(*(1,) * missing, *x.plain().shape))


def _reshape(x: Turned, shape: tuple[int, ...]) -> Turned | None:
    """Moves past a turn: what is split or joined lies side by side in what is really there, or is laid so, while all
    else stays where it is."""
    if x.is_plain or 0 in shape:
        return None
    long = [axis for axis in range(x.base.rank) if x.base.shape[axis] != 1]  # others may lie anywhere
    groups = []
    for axes, outputs in axis_groups([x.base.shape[axis] for axis in x.order], shape):
        groups.append(([long.index(x.order[axis]) for axis in axes if x.order[axis] in long], outputs))
    groups.sort(key=lambda group: max(group[0], default=-1))  # where its last axis is
    places = [place for group, _ in groups for place in group]
    base = x.base
    if places != sorted(places):
        others = [axis for axis in range(base.rank) if axis not in long]
        base = base.transpose(*others, *(long[place] for place in places))
    moved = [axis for _, outputs in groups for axis in outputs]
    return Turned(base.reshape(*(shape[axis] for axis in moved)), inverse_permutation(moved))


def axis_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes with the same product before and after a reshape."""
    ends = [np.cumprod(shape).tolist() for shape in (old, new)]
    common = sorted({0, 1} | set(ends[0]) & set(ends[1]))
    return [
        tuple([axis for axis, end in enumerate(side) if start < end <= stop] for side in ends)
        for start, stop in pairwise(common)
    ]
