"""The layout pass: turns (transposes) move past everything that they can move past, until they meet and cancel.

Every value is known as a turn of another one that is really computed. An elementwise operator computes on what its
operands are turns of; a reduction, a slice, a pad or a concatenation does with its axes renamed. A turn becomes a node
only where an operator wants the order as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        if self.order == order:
            return self.base
        back = inverse_permutation(order)
        return self.base.transpose(*(self.order[axis] for axis in back))


def cancel_turns(graph: Graph) -> Graph:
    """The graph with as few transposed elements as moving the transposes finds; never with more."""
    new = Graph()
    known = {v.name: _plain(new.input(v.name, v.shape, v.dtype)) for v in graph.inputs}

    def of(value: Value) -> Turned:
        return _plain(new.constant(value.constant)) if value.constant is not None else known[value.name]

    for node in graph.nodes:
        new.path = node.path
        inputs = [of(value) for value in node.inputs]
        rule = _elementwise if node.operator in ELEMENTWISE else _RULES.get(node.operator)
        made = rule(new, node, inputs) if rule is not None else None
        if made is not None:
            known[node.outputs[0].name] = made
            continue
        results = new.apply_many(node.operator, *(x.plain() for x in inputs), **node.attributes)
        known.update((old.name, _plain(value)) for old, value in zip(node.outputs, results, strict=True))
    for name, value in graph.outputs.items():
        new.output(name, of(value).plain())
    new.prune()
    return new if _moved(new) <= _moved(graph) else graph


def _moved(graph: Graph) -> int:
    """Elements that transposes move."""
    return sum(node.outputs[0].size for node in graph.nodes if node.operator == "transpose")


def _plain(value: Value) -> Turned:
    return Turned(value, tuple(range(value.rank)))


def _chosen(inputs: list[Turned]) -> tuple[int, ...]:
    """The order of the largest operand that is turned, so that the least is moved."""
    rank = max(len(x.order) for x in inputs)
    turned = [x for x in inputs if not x.is_plain and len(x.order) == rank]
    return max(turned, key=lambda x: x.base.size).order if turned else tuple(range(rank))


def _of_rank(x: Turned, rank: int) -> Turned:
    missing = rank - len(x.order)
    return x if not missing else _plain(x.plain().reshape(*(1,) * missing, *x.plain().shape))


def _elementwise(graph: Graph, node: Node, inputs: list[Turned]) -> Turned:
    order = _chosen(inputs)
    bases = [_of_rank(x, len(order)).based_on(order) for x in inputs]
    return Turned(graph.apply(node.operator, *bases, **node.attributes), order)


def _transpose(graph: Graph, node: Node, inputs: list[Turned]) -> Turned:
    (x,) = inputs
    return Turned(x.base, tuple(x.order[axis] for axis in node.attributes["permutation"]))


def _reduce(graph: Graph, node: Node, inputs: list[Turned]) -> Turned:
    (x,) = inputs
    axes = tuple(sorted(x.order[axis] for axis in node.attributes["axes"]))
    return Turned(x.base.apply(node.operator, axes=axes), x.order)


def _slice(graph: Graph, node: Node, inputs: list[Turned]) -> Turned:
    (x,) = inputs
    attributes = dict(node.attributes)
    return Turned(x.base.apply("slice", **attributes | {"axis": x.order[attributes["axis"]]}), x.order)


def _pad(graph: Graph, node: Node, inputs: list[Turned]) -> Turned:
    (x,) = inputs
    back = inverse_permutation(x.order)
    begins, ends = (tuple(node.attributes[key][axis] for axis in back) for key in ("begins", "ends"))
    return Turned(x.base.apply("pad", begins=begins, ends=ends, value=node.attributes["value"]), x.order)


def _expand(graph: Graph, node: Node, inputs: list[Turned]) -> Turned:
    (x,) = inputs
    back = inverse_permutation(x.order)
    return Turned(x.base.expand(*(node.attributes["shape"][axis] for axis in back)), x.order)


def _concat(graph: Graph, node: Node, inputs: list[Turned]) -> Turned:
    order = _chosen(inputs)
    bases = [x.based_on(order) for x in inputs]
    return Turned(graph.apply("concat", *bases, axis=order[node.attributes["axis"]]), order)


def _reshape(graph: Graph, node: Node, inputs: list[Turned]) -> Turned | None:
    """Moves past a turn where it splits and joins only axes that lie side by side in what is really there."""
    (x,), shape = inputs, node.attributes["shape"]
    if x.is_plain:
        return None
    old = node.inputs[0].shape
    moving = [axis for axis in x.order if x.base.shape[axis] != 1]
    if moving == sorted(moving):
        return _plain(x.base.reshape(*shape))
    groups = _groups(old, shape)
    if groups is None:
        return None
    places = []
    for axes, _ in groups:
        inside = [x.order[axis] for axis in axes if old[axis] != 1]
        if inside and inside != list(range(inside[0], inside[0] + len(inside))):
            between = set(range(inside[0], inside[-1] + 1)) - set(inside)
            if inside != sorted(inside) or any(x.base.shape[axis] != 1 for axis in between):
                return None
        places.append(inside[0] if inside else min((x.order[axis] for axis in axes), default=0))
    sequence = sorted(range(len(groups)), key=lambda i: places[i])
    base_shape, positions, start = [], {}, 0
    for i in sequence:
        outputs = groups[i][1]
        for k, axis in enumerate(outputs):
            positions[axis] = start + k
        start += len(outputs)
        base_shape += [shape[axis] for axis in outputs]
    return Turned(x.base.reshape(*base_shape), tuple(positions[axis] for axis in range(len(shape))))


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """The smallest runs of axes with the same product before and after a reshape."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        axes, outputs, a, b = [], [], 1, 1
        while not axes or not outputs or a != b:
            if i < len(old) and (a <= b or j >= len(new)):
                a *= old[i]
                axes.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                outputs.append(j)
                j += 1
            else:
                break
        if a != b or 0 in (a, b):
            return None
        groups.append((axes, outputs))
    return groups


_RULES = {
    "transpose": _transpose,
    "reduce_sum": _reduce,
    "reduce_mean": _reduce,
    "reduce_max": _reduce,
    "slice": _slice,
    "pad": _pad,
    "expand": _expand,
    "concat": _concat,
    "reshape": _reshape,
}
