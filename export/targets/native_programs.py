"""Programs: elementwise operators of one shape that follow one another, run on a block of elements after another.

They read transposes, slices and repetitions of what they take in place, and sum columns on the way.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from edgestill.export.lowering.graph import Graph, Node, Value
from edgestill.export.lowering.operators import ELEMENTWISE
from edgestill.export.targets.native_plan import Plan, View, bits_of, broadcast, dense_strides, joint_axes

STEPS = (
    "add subtract multiply divide maximum minimum greater greater_equal equal masked where relu clamp_low clamp_high "
    "abs exp log sqrt rsqrt power erf tanh sigmoid softplus sin cos atan floor number multiply_add"
).split()
REGISTERS, BLOCK = 48, 256
MAP_TASK, SUM_ROWS = 16 * BLOCK, 128
MOST_LOADS, MOST_STORES, MOST_STEPS = 20, 12, 120
"""Of a program; they leave registers for what is in between."""
_KINDS = {"float32": 0, "uint8": 1, "int64": 2}


def _is_mapped(node: Node) -> bool:
    return node.operator in ELEMENTWISE and node.operator not in ("to_integer", "stop_gradient") and (
        node.outputs[0].dtype == "float32"
    )


def _summed_columns(node: Node) -> int:
    """Of a sum over all axes but the last ones: how many elements these have. 0 of other nodes, and of few columns."""
    if node.operator != "reduce_sum" or node.attributes["axes"] != tuple(range(len(node.attributes["axes"]))):
        return 0
    columns = math.prod(node.inputs[0].shape[len(node.attributes["axes"]) :])
    return columns if 8 <= columns <= 4096 and columns < node.inputs[0].size else 0


def _space(node: Node) -> tuple[int, ...] | None:
    """The shape that a program goes through for this node; None of what is in none."""
    if _is_mapped(node):
        return node.outputs[0].shape
    return node.inputs[0].shape if _summed_columns(node) else None


def grouped(graph: Graph) -> list[Node | list[Node]]:
    """Nodes and groups of elementwise ones in an order in which they can run.

    A node's level is the longest way to it, where steps within a shape's elementwise operators are free: so nothing
    outside a group lies between two of its nodes, and groups of one level may stand in any order.
    """
    level: dict[str, int] = {}
    items: dict[tuple, list[Node]] = {}
    order: dict[tuple, tuple[int, int]] = {}
    for i, node in enumerate(graph.nodes):
        space = _space(node)
        own = 0
        for value in node.inputs:
            if value.node is None:
                continue
            together = space is not None and _is_mapped(value.node) and value.shape == space
            own = max(own, level[value.node.outputs[0].name] + (not together))
        for value in node.outputs:
            level[value.name] = own
        key = ("map", own, space) if space is not None else ("node", i)
        items.setdefault(key, []).append(node)
        order.setdefault(key, (own, i))
    result: list[Node | list[Node]] = []
    for key in sorted(items, key=order.__getitem__):
        if key[0] == "node":
            result.append(items[key][0])
        else:
            result.extend(_connected(items[key]))
    return result


def _connected(nodes: list[Node]) -> list[list[Node]]:
    """Those that pass values to one another, or read the same whole tensor, each in order."""
    parent = {id(node): node for node in nodes}
    own = {node.outputs[0].name: node for node in nodes}
    space = _space(nodes[0])

    def root(node: Node) -> Node:
        while parent[id(node)] is not node:
            node = parent[id(node)]
        return node

    for node in nodes:
        for value in node.inputs:
            if value.shape == space:
                parent[id(root(own.setdefault(value.name, node)))] = root(node)
    groups: dict[int, list[Node]] = {}
    for node in nodes:
        groups.setdefault(id(root(node)), []).append(node)
    return list(groups.values())


@dataclass
class Program:
    """Elementwise operators that run on a block of elements after another."""

    plan: Plan
    nodes: list[Node]
    stored: set[str]  # results that others read
    loads: dict[str, Value] = field(default_factory=dict)

    def emit(self) -> bool:
        """Appends the call; not where there are too few registers."""
        plan, shape = self.plan, _space(self.nodes[0])
        own = {node.outputs[0].name for node in self.nodes}
        joined = self._multiply_adds()
        sums = [node for node in self.nodes if node.operator == "reduce_sum"]
        nodes = [n for n in self.nodes if n.outputs[0].name not in joined.values() and n not in sums]
        needed = self.stored | {node.inputs[0].name for node in sums}
        views: list[View] = []
        register: dict[str, int] = {}
        for node in self.nodes:
            for value in node.inputs:
                if value.name in own or value.name in register or _number(value) is not None:
                    continue
                register[value.name] = len(views)
                views.append(broadcast(plan, value, shape))
        last: dict[str, int] = {}
        steps: list[tuple[str, str, list[Value | float], float]] = []
        for node in nodes:
            steps += self._steps(node, joined)
        for i, (_, _, operands, _) in enumerate(steps):
            last.update((_name(operand), i) for operand in operands)
        free = list(range(REGISTERS - 1, len(views) - 1, -1))
        loads = len(views)
        code: list[int] = []
        count = 0
        for i, (operator, to, operands, number) in enumerate(steps):
            for operand in operands:
                if not free:
                    return False
                if not isinstance(operand, str) and _name(operand) not in register:
                    register[_name(operand)] = free.pop()
                    code += [STEPS.index("number"), register[_name(operand)], 0, 0, 0, bits_of(_number(operand))]
                    count += 1
            used = [register[_name(operand)] for operand in operands]
            for name in {_name(operand) for operand in operands}:
                if last[name] == i and name not in needed and register[name] >= loads:
                    free.append(register.pop(name))
            if not free:
                return False
            register[to] = free.pop()
            code += [STEPS.index(operator), register[to], *(used + [0, 0, 0])[:3], bits_of(number)]
            count += 1
        stores = [(value, plan.result(value)) for node in nodes for value in node.outputs if value.name in self.stored]
        axes = joint_axes(shape, *(view.strides for view in views), dense_strides(shape))
        if len(axes) > 4:  # broadcast along more axes than a program goes through: then end to end
            views = [view if view.dense else plan.copied(view, "expand") for view in views]
            axes = joint_axes(shape, *(view.strides for view in views), dense_strides(shape))
        axes = [(1, *[0] * (len(views) + 1))] * (4 - len(axes)) + axes
        columns = _summed_columns(sums[0]) if sums else 1
        words: list[Any] = [math.prod(shape), *(axis[0] for axis in axes)]
        words += [loads, count, len(stores), len(sums), columns]
        for i, view in enumerate(views):
            words += [view, _KINDS[view.dtype], *(axis[1 + i] for axis in axes)]
        words += code
        for value, view in stores:
            words += [view, register[value.name]]
        rows = columns * max(1, min(MAP_TASK // columns, SUM_ROWS))
        written = [view for _, view in stores]
        for node in sums:
            to, partial = plan.result(node.outputs[0]), plan.new((-(-math.prod(shape) // rows), columns))
            words += [register[node.inputs[0].name], to, partial]
            written += [to, partial]
        plan.scratch = max(plan.scratch, REGISTERS * BLOCK * 4)
        plan.call("map", "map", views, written, words)
        return True

    def _multiply_adds(self) -> dict[str, str]:
        """Sums that take a product of their own program that nothing else reads: the sum's name → the product's."""
        uses = Counter(value.name for node in self.nodes for value in node.inputs)
        products = {n.outputs[0].name: n for n in self.nodes if n.operator == "multiply"}
        found: dict[str, str] = {}
        for node in self.nodes:
            if node.operator == "add":
                for value in node.inputs:
                    if value.name in products and uses[value.name] == 1 and value.name not in self.stored:
                        found[node.outputs[0].name] = value.name
                        break
        return found

    def _steps(self, node: Node, joined: dict[str, str]) -> list[tuple[str, str, list, float]]:
        to, inputs, a = node.outputs[0].name, list(node.inputs), node.attributes
        if to in joined:
            product = next(value for value in inputs if value.name == joined[to])
            other = inputs[1] if inputs[0] is product else inputs[0]
            return [("multiply_add", to, [*product.node.inputs, other], 0.0)]
        if node.operator == "clamp":
            steps, source = [], inputs[0]
            for bound, operator in ((a["low"], "clamp_low"), (a["high"], "clamp_high")):
                if math.isfinite(bound):
                    steps.append((operator, to, [source], bound))
                    source = to
            return steps or [("clamp_high", to, [source], math.inf)]
        if node.operator == "power":
            whole = {2.0: "multiply", 0.5: "sqrt", -0.5: "rsqrt"}.get(a["exponent"])
            if whole == "multiply":
                return [(whole, to, inputs * 2, 0.0)]
            return [(whole, to, inputs, 0.0)] if whole else [("power", to, inputs, a["exponent"])]
        if node.operator == "to_float":
            return [("clamp_high", to, inputs, math.inf)]
        return [(node.operator, to, inputs, 0.0)]


def _name(operand: Value | str) -> str:
    return operand if isinstance(operand, str) else operand.name


def _number(value: Value | str) -> float | None:
    if isinstance(value, str) or value.constant is None or value.constant.size != 1:
        return None
    return float(value.constant.reshape(()))
