"""Passes over a whole graph for `native`: elementwise operators on one shape, slopes known beforehand, joined parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgestill.export.lowering.graph import Graph, Node, Value
from edgestill.export.lowering.layout import axis_groups
from edgestill.export.lowering.rewrite import rewrite
from edgestill.export.targets.native_fusion import is_mapped

Shape = tuple[int, ...]
Of = Callable[[Value], Value]


# --- one shape -------------------------------------------------------------------------------------------------------
def join_shapes(graph: Graph) -> Graph:
    """Elementwise operators on the shape that all who read them reshape them to, so that they are one program with what
    follows: a layer's sum with its bias on [B, T, C], not on [B·T, C]."""
    wanted = _wanted_shapes(graph)

    def make(node: Node, of: Of) -> list[Value]:
        inputs, attributes = [of(value) for value in node.inputs], node.attributes
        shape, to = node.outputs[0].shape, wanted.get(node.outputs[0].name)
        if to is not None and node.operator == "reshape":
            attributes = {"shape": to}
        elif to is not None:
            inputs = [x.reshape(*_followed(v.shape, shape, to)) for v, x in zip(node.inputs, inputs, strict=True)]
        else:
            inputs = [x.reshape(*v.shape) for v, x in zip(node.inputs, inputs, strict=True)]
        return inputs[0].graph.apply_many(node.operator, *inputs, **attributes)

    return _remade(graph, make)


def _remade(graph: Graph, make: Callable[[Node, Of], Sequence[Value]]) -> Graph:
    """The graph anew, each node as `make` says: it takes the old node and what gives the new value of an old one."""
    new = Graph()
    made = {v.name: new.input(v.name, v.shape, v.dtype) for v in graph.inputs}

    def of(value: Value) -> Value:
        return new.constant(value.constant) if value.constant is not None else made[value.name]

    for node in graph.nodes:
        new.path = node.path
        made.update((old.name, value) for old, value in zip(node.outputs, make(node, of), strict=True))
    for name, value in graph.outputs.items():
        new.output(name, of(value).reshape(*value.shape))
    new.prune()
    return new


def _wanted_shapes(graph: Graph) -> dict[str, Shape]:
    """Of values on another shape than their own: by name, that of all who read them."""
    readers, kept = graph.readers(), {value.name for value in graph.outputs.values()}
    wanted: dict[str, Shape] = {}
    for node in reversed(graph.nodes):
        value = node.outputs[0]
        if value.name in kept or not (is_mapped(node) or node.operator == "reshape"):
            continue
        shapes = {_shape_for(reader, value, wanted) for reader in readers.get(value.name, [])}
        shape = shapes.pop() if len(shapes) == 1 else None
        if shape is None or [n for n in shape if n > 1] == [n for n in value.shape if n > 1]:
            continue
        if node.operator == "reshape" or all(_followed(v.shape, value.shape, shape) for v in node.inputs):
            wanted[value.name] = shape
    return wanted


def _shape_for(reader: Node, value: Value, wanted: dict[str, Shape]) -> Shape:
    to = reader.outputs[0]
    if reader.operator == "reshape" or (is_mapped(reader) and value.shape == to.shape):
        return wanted.get(to.name, to.shape)
    return value.shape


def _followed(shape: Shape, whole: Shape, to: Shape) -> Shape | None:
    """What an operand's shape, which is repeated to `whole`, becomes where that becomes `to`; None where it is repeated
    along a part of an axis."""
    if 0 in whole:
        return None
    shape, result = (1,) * (len(whole) - len(shape)) + shape, [1] * len(to)
    for old, new in axis_groups(whole, to):
        sizes = math.prod(shape[axis] for axis in old)
        if sizes == math.prod(whole[axis] for axis in old):
            for axis in new:
                result[axis] = to[axis]
        elif sizes != 1:
            return None
    return tuple(result)


# --- slopes ----------------------------------------------------------------------------------------------------------
def join_slopes(graph: Graph) -> Graph:
    """dy·a + dy·b as dy·(a + b) where neither depends on dy: one tensor is then kept for the gradient, not two or
    three, as of GELU, whose slope is found together with it."""
    while True:
        new = _joined_slopes(graph)
        if new.operators() == graph.operators():
            return graph
        graph = new


def _joined_slopes(graph: Graph) -> Graph:
    readers = graph.readers()
    alone = {name for name, found in readers.items() if len(found) == 1}
    alone -= {value.name for value in graph.outputs.values()}
    place = {value.name: i for i, node in enumerate(graph.nodes) for value in node.outputs}
    sums: dict[str, tuple[Value, list[Value], list[Value]]] = {}
    for node in graph.nodes:
        value = node.outputs[0]
        if node.operator == "add" and value.dtype == "float32":
            if (found := _common_factor(value, alone, place)) is not None:
                sums[value.name] = found

    def make(node: Node, of: Of) -> Sequence[Value]:
        inputs = [of(value) for value in node.inputs]
        if node.outputs[0].name not in sums:
            return inputs[0].graph.apply_many(node.operator, *inputs, **node.attributes)
        dy, *terms = sums[node.outputs[0].name]
        products = []
        for factors in terms:
            product = of(factors[0]) if factors else inputs[0].graph.constant([1.0]).reshape(*(1,) * dy.rank)
            for factor in factors[1:]:
                product = product * of(factor)
            products.append(product)
        return [of(dy) * (products[0] + products[1])]

    return _remade(graph, make)


def _common_factor(
    total: Value, alone: set[str], place: dict[str, int]
) -> tuple[Value, list[Value], list[Value]] | None:
    """Of the sum of two products: what both have and nothing else in them depends on, and the rest of each."""
    if any(value.operator != "multiply" or value.name not in alone for value in total.node.inputs):
        return None
    terms = [_factors(value, alone) for value in total.node.inputs]
    both = {v.name: v for v in terms[0] if v.shape == total.shape and any(v is other for other in terms[1])}
    for dy in sorted(both.values(), key=lambda v: -place.get(v.name, -1)):
        rests = [_without(factors, dy) for factors in terms]
        if dy.node is not None and not any(_depends(value, dy, place) for rest in rests for value in rest):
            return dy, *rests
    return None


def _factors(value: Value, alone: set[str]) -> list[Value]:
    if value.operator != "multiply" or value.name not in alone:
        return [value]
    return [factor for operand in value.node.inputs for factor in _factors(operand, alone)]


def _without(factors: Sequence[Value], one: Value) -> list[Value]:
    at = next(i for i, value in enumerate(factors) if value is one)
    return [*factors[:at], *factors[at + 1 :]]


def _depends(value: Value, on: Value, place: dict[str, int]) -> bool:
    pending, seen = [value], {value.name}
    while pending:
        value = pending.pop()
        if value is on:
            return True
        if value.node is not None and place[value.name] > place[on.name]:
            new = [operand for operand in value.node.inputs if operand.name not in seen]
            seen.update(operand.name for operand in new)
            pending += new
    return False


# --- parts of a whole ------------------------------------------------------------------------------------------------
def move_parts(graph: Graph) -> Graph:
    """Splits, turns and parts of what is joined as what is joined of splits, turns and parts, which are free: so what
    is shuffled and halved is moved once."""
    moved = True
    while moved:
        readers, kept = graph.readers(), {value.name for value in graph.outputs.values()}
        moves = _Moves({name: found for name, found in readers.items() if name not in kept})
        graph = rewrite(graph, {"reshape": moves.reshape, "transpose": moves.transpose, "slice": moves.slice})
        moved = moves.made > 0
    return graph


class _Moves:
    """Rules that move what is joined towards the end of a graph; `made` counts how often they did."""

    def __init__(self, readers: dict[str, list[Node]]):
        self.readers, self.made = readers, 0

    def reshape(self, node: Node, x: Value) -> Value | None:
        if x.operator != "concat" or len(self._readers(node)) != 1 or x.size == 0:
            return None
        axis, shape = x.node.attributes["axis"], node.attributes["shape"]
        old, new = next(group for group in axis_groups(x.shape, shape) if axis in group[0])
        if not new or any(x.shape[other] > 1 for other in old if other < axis):
            return None
        long = next((other for other in new if shape[other] > 1), new[0])
        sizes = [math.prod(part.shape[other] for other in old) for part in x.node.inputs]
        rest = math.prod(shape[other] for other in new) // shape[long]
        if any(size % rest for size in sizes):
            return None
        self.made += 1
        shapes = [(*shape[:long], size // rest, *shape[long + 1 :]) for size in sizes]
        parts = [part.reshape(*own) for part, own in zip(x.node.inputs, shapes, strict=True)]
        return x.graph.apply("concat", *parts, axis=long)

    def transpose(self, node: Node, x: Value) -> Value | None:
        if x.operator != "concat" or len(self._readers(node)) != 1:
            return None
        self.made += 1
        order = node.attributes["permutation"]
        parts = [part.transpose(*order) for part in x.node.inputs]
        return x.graph.apply("concat", *parts, axis=order.index(x.node.attributes["axis"]))

    def slice(self, node: Node, x: Value) -> Value | None:
        axis, start, stop, step = (node.attributes[key] for key in ("axis", "start", "stop", "step"))
        if step != 1 or x.size == 0:
            return None
        if x.operator == "reshape":
            return self._slice_of_split(node, x.node.inputs[0], x.shape)
        if x.operator == "transpose":
            self.made += 1
            order = x.node.attributes["permutation"]
            return x.node.inputs[0].narrow(order[axis], start, stop).transpose(*order)
        sizes = [r.outputs[0].size if r.operator == "slice" else x.size for r in self._readers(node)]
        once = sizes and sum(sizes) <= x.size
        if is_mapped(x.node) and once:
            self.made += 1
            inputs = [_narrowed(value, axis - x.rank, start, stop) for value in x.node.inputs]
            return x.graph.apply(x.operator, *inputs, **x.node.attributes)
        if x.operator != "concat":
            return None
        parts, joined = x.node.inputs, x.node.attributes["axis"]
        if joined != axis:
            if not once:
                return None
            self.made += 1
            return x.graph.apply("concat", *(part.narrow(axis, start, stop) for part in parts), axis=joined)
        begin = 0
        for part in parts:
            if begin <= start and stop <= begin + part.shape[axis]:
                self.made += 1
                return part.narrow(axis, start - begin, stop - begin)
            begin += part.shape[axis]
        return None

    def _slice_of_split(self, node: Node, x: Value, shape: Shape) -> Value | None:
        """Of an axis that is joined of several ones: of the first of these."""
        axis, start, stop = (node.attributes[key] for key in ("axis", "start", "stop"))
        old, new = next(group for group in axis_groups(x.shape, shape) if axis in group[1])
        if any(shape[other] > 1 for other in new if other != axis) or not old:
            return None
        first = next((other for other in old if x.shape[other] > 1), old[0])
        rest = shape[axis] // x.shape[first]
        if x.shape[first] == shape[axis] or start % rest or stop % rest:
            return None
        self.made += 1
        return x.narrow(first, start // rest, stop // rest).reshape(*node.outputs[0].shape)

    def _readers(self, node: Node) -> list[Node]:
        return self.readers.get(node.inputs[0].name, [])


def _narrowed(x: Value, axis: int, start: int, stop: int) -> Value:
    """A part along an axis, counted from the last one, of what may be repeated along it."""
    axis += x.rank
    return x if axis < 0 or x.shape[axis] == 1 else x.narrow(axis, start, stop)
