"""What is done together: which elementwise operators are one program, what such a program sums on the way, computes
again instead of keeping it, or reads out of a pooling's winners; and in which order all that runs.

A node's level is the longest way to it, where steps within a shape's elementwise operators are free: so nothing outside
a group lies between two of its nodes, and groups of one level may stand in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgestill.export.lowering.graph import Graph, Node, Value
from edgestill.export.lowering.operators import ELEMENTWISE

CHEAP = frozenset(
    "add subtract multiply maximum minimum relu clamp abs greater greater_equal equal where masked to_float".split()
)
"""What takes less time than to write its result and to read it again."""
MOST_AGAIN = 8
"""At most so many steps are computed again instead of keeping a value."""
_WITH_STRIDES = frozenset("matmul slice reshape transpose expand".split())
"""Besides programs."""
SMALL = 16
"""A tensor that is so many times smaller than what a program goes through costs nothing to read."""


@dataclass
class Group:
    """Elementwise operators and sums of their columns, in order; `stored` names the results that others read."""

    nodes: list[Node]
    stored: set[str]

    @property
    def shape(self) -> tuple[int, ...]:
        return space_of(self.nodes[0])


def is_mapped(node: Node | None) -> bool:
    return (
        node is not None
        and node.operator in ELEMENTWISE
        and node.operator not in ("to_integer", "stop_gradient")
        and node.outputs[0].dtype == "float32"
    )


def summed_columns(node: Node) -> int:
    """Of a sum over all axes but the last ones: how many elements these have. 0 of other nodes, and of few columns."""
    if node.operator != "reduce_sum" or node.attributes["axes"] != tuple(range(len(node.attributes["axes"]))):
        return 0
    columns = math.prod(node.inputs[0].shape[len(node.attributes["axes"]) :])
    return columns if 8 <= columns <= 4096 and columns < node.inputs[0].size else 0


def space_of(node: Node) -> tuple[int, ...] | None:
    """The shape that a program goes through for this node; None of what is in none."""
    if is_mapped(node):
        return node.outputs[0].shape
    return node.inputs[0].shape if summed_columns(node) else None


def number_of(value: Value) -> float | None:
    """Of a constant of one element."""
    if value.constant is None or value.constant.size != 1:
        return None
    return float(value.constant.reshape(()))


def side_by_side(node: Node) -> bool:
    """Whether a pooling's windows meet every pixel of the image once."""
    a, image = node.attributes, node.inputs[0].shape if node.operator == "max_pool2d" else node.outputs[0].shape
    return (
        tuple(a["kernel"]) == tuple(a["stride"])
        and not np.any(a["padding"])
        and tuple(a["dilation"]) == (1, 1)
        and not any(size % k for size, k in zip(image[1:3], a["kernel"], strict=True))
        and math.prod(a["kernel"]) <= 256
    )


class Fusion:
    """Finds what of a graph is done together."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.kept = {value.name for value in graph.outputs.values()}
        self.squares: dict[str, Value] = {}
        """Sums of squares of the distances from the columns' means: of what, by the sum's name."""
        self.scaled: dict[str, tuple[Value, Value]] = {}
        """Products, of an image and a factor a channel, that only poolings read, by name."""
        self.pooled: dict[str, Value] = {}
        """Gradients of poolings that need the winners alone: what the pooling gave, by the gradient's name."""
        self._find_squares()
        self._find_pooled()

    def takes(self, node: Node) -> Sequence[Value]:
        """What a node reads, as it is done."""
        name = node.outputs[0].name
        if name in self.squares:
            return [self.squares[name]]
        if name in self.pooled:
            return [node.inputs[0], self.pooled[name]]
        if node.operator == "max_pool2d" and node.inputs[0].name in self.scaled:
            return self.scaled[node.inputs[0].name]
        return node.inputs

    def items(self) -> list[Node | Group]:
        """Nodes and groups in the order in which they run; what nothing needs is left out."""
        items = self._grouped()
        self._compute_again(items)
        return self._needed(items)

    def parts(self) -> dict[str, tuple[Value, int, int, Value]]:
        """What may be made where it is joined with others, by name: the part as it is joined, where it begins, along
        which axis, and the whole. Who else reads it must not mind that it lies apart, unless it does not."""
        readers, found = self.graph.readers(), {}
        for node in self.graph.nodes:
            if node.operator != "concat" or node.outputs[0].dtype != "float32":
                continue
            axis, start = node.attributes["axis"], 0
            dense = math.prod(node.outputs[0].shape[:axis]) == 1
            for part in node.inputs:
                value, reader = part, node
                while value.operator == "reshape" and readers[value.name] == [reader]:
                    value, reader = value.node.inputs[0], value.node
                others = [other for other in readers[value.name] if other is not reader]
                made = is_mapped(value.node) or (value.operator == "concat" if value.node else False)
                made = made or (dense and value.operator == "matmul")
                fits = dense or all(is_mapped(other) or other.operator in _WITH_STRIDES for other in others)
                if made and fits and value.name not in found and value.name not in self.kept:
                    found[value.name] = (part, start, axis, node.outputs[0])
                start += part.shape[axis]
        return found

    # --- patterns ----------------------------------------------------------------------------------------------------
    def _find_squares(self) -> None:
        """Σ (x − Σx/n)²: found on the way, from the distances from a row."""
        for node in self.graph.nodes:
            if not summed_columns(node) or not (square := _node(node.inputs[0], "multiply")):
                continue
            if square.inputs[0] is not square.inputs[1] or not (left := _node(square.inputs[0], "subtract")):
                continue
            x, mean = left.inputs
            share = _node(mean, "multiply")
            if x.shape != node.inputs[0].shape or not share:
                continue
            for total, number in (share.inputs, share.inputs[::-1]):
                by = number_of(number)
                whole = total.node is not None and total.node.operator == "reduce_sum" and total.node.inputs[0] is x
                if whole and total.node.attributes == node.attributes and by is not None:
                    if math.isclose(by * x.size, total.size, rel_tol=1e-6):
                        self.squares[node.outputs[0].name] = x

    def _find_pooled(self) -> None:
        readers = self.graph.readers()
        for node in self.graph.nodes:
            if node.operator == "max_pool2d_grad":
                y = node.inputs[2].node
                if y is not None and y.operator == "max_pool2d" and y.inputs[0] is node.inputs[1]:
                    if all(y.attributes[key] == node.attributes[key] for key in y.attributes):
                        self.pooled[node.outputs[0].name] = y.outputs[0]
        for node in self.graph.nodes:
            if node.operator != "max_pool2d" or not (product := _node(node.inputs[0], "multiply")):
                continue
            x = node.inputs[0]
            alone = x.name not in self.kept and all(
                reader.operator == "max_pool2d" or reader.outputs[0].name in self.pooled for reader in readers[x.name]
            )
            for image, factor in (product.inputs, product.inputs[::-1]):
                if alone and image.shape == x.shape and factor.size == factor.shape[-1] == x.shape[-1]:
                    self.scaled[x.name] = (image, factor)
                    break

    # --- groups ------------------------------------------------------------------------------------------------------
    def _grouped(self) -> list[Node | Group]:
        level: dict[str, int] = {}
        items: dict[tuple, list[Node]] = {}
        order: dict[tuple, tuple[int, int]] = {}
        for i, node in enumerate(self._live()):
            space, own = space_of(node), 0
            for value in self.takes(node):
                if value.node is not None:
                    together = space is not None and is_mapped(value.node) and value.shape == space
                    own = max(own, level[value.node.outputs[0].name] + (not together))
            for value in node.outputs:
                level[value.name] = own
            key = ("map", own, space) if space is not None else ("node", i)
            items.setdefault(key, []).append(node)
            order.setdefault(key, (own, i))
        result: list[Node | Group] = []
        for key in sorted(items, key=order.__getitem__):
            if key[0] == "node":
                result.append(items[key][0])
            else:
                result.extend(Group(nodes, set()) for nodes in self._connected(items[key]))
        return result

    def _live(self) -> list[Node]:
        needed, live = set(self.kept), []
        for node in reversed(self.graph.nodes):
            if any(value.name in needed for value in node.outputs):
                live.append(node)
                needed.update(value.name for value in self.takes(node))
        return live[::-1]

    def _connected(self, nodes: list[Node]) -> list[list[Node]]:
        """Those that pass values to one another, or read the same whole tensor, each in order."""
        parent = {id(node): node for node in nodes}
        own = {node.outputs[0].name: node for node in nodes}
        space = space_of(nodes[0])

        def root(node: Node) -> Node:
            while parent[id(node)] is not node:
                node = parent[id(node)]
            return node

        for node in nodes:
            for value in self.takes(node):
                if value.shape == space:
                    parent[id(root(own.setdefault(value.name, node)))] = root(node)
        groups: dict[int, list[Node]] = {}
        for node in nodes:
            groups.setdefault(id(root(node)), []).append(node)
        return list(groups.values())

    # --- computed again ----------------------------------------------------------------------------------------------
    def _compute_again(self, items: list[Node | Group]) -> None:
        """Puts cheap steps into every program that reads their result, where that reads no more than before."""
        anchored = {value.name for value in self.graph.inputs} | self.kept
        for item in items:
            nodes = [item] if isinstance(item, Node) else [n for n in item.nodes if not is_mapped(n)]
            anchored |= {value.name for node in nodes for value in node.outputs}
            if isinstance(item, Node):
                anchored |= {value.name for value in self.takes(item)}
        place = {id(node): i for i, node in enumerate(self.graph.nodes)}
        for group in (item for item in items if isinstance(item, Group)):
            space = group.shape
            if math.prod(space) < 1024:
                continue
            changed = True
            while changed:
                changed = False
                for value in self._outside(group):
                    if value.shape != space or value.name in anchored:
                        continue
                    again = self._again(value, group, anchored)
                    if again:
                        own = {id(node) for node in group.nodes}
                        group.nodes += [node for node in again if id(node) not in own]
                        group.nodes.sort(key=lambda node: place[id(node)])
                        changed = True
                        break

    def _outside(self, group: Group) -> list[Value]:
        own = {value.name for node in group.nodes for value in node.outputs}
        found = {value.name: value for node in group.nodes for value in self.takes(node) if value.name not in own}
        return list(found.values())

    def _again(self, wanted: Value, group: Group, anchored: set[str]) -> list[Node] | None:
        """The steps to a value from what is there anyway; None where they are many, or read more than one tensor."""
        there = {value.name for value in self._outside(group)} - {wanted.name}
        there |= {value.name for node in group.nodes for value in node.outputs}
        steps: dict[int, Node] = {}
        new: set[str] = set()
        pending = [wanted]
        while pending:
            value = pending.pop()
            if value is not wanted:
                if value.constant is not None or value.name in there or value.size * SMALL <= wanted.size:
                    continue
                if value.name in anchored:
                    new.add(value.name)
                    continue
            node = value.node
            if not is_mapped(node) or node.operator not in CHEAP or value.shape != wanted.shape:
                return None
            steps[id(node)] = node
            if len(steps) > MOST_AGAIN:
                return None
            pending.extend(node.inputs)
        return list(steps.values()) if len(new) <= 1 else None

    # --- what is needed ----------------------------------------------------------------------------------------------
    def _needed(self, items: list[Node | Group]) -> list[Node | Group]:
        needed = set(self.kept)
        result: list[Node | Group] = []
        for item in reversed(items):
            if isinstance(item, Node):
                if any(value.name in needed for value in item.outputs):
                    needed.update(value.name for value in self.takes(item))
                    result.append(item)
                continue
            item.stored = {value.name for node in item.nodes for value in node.outputs} & needed
            wanted, nodes = set(item.stored), []
            for node in reversed(item.nodes):
                if node.outputs[0].name in wanted:
                    nodes.append(node)
                    wanted.update(value.name for value in self.takes(node))
            if nodes:
                item.nodes = nodes[::-1]
                needed.update(value.name for value in self._outside(item))
                result.append(item)
        return result[::-1]


def _node(value: Value, operator: str) -> Node | None:
    return value.node if value.operator == operator else None
