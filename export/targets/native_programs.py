"""Programs: elementwise operators of one shape that follow one another, run on a block of elements after another.

They read transposes, slices and repetitions of what they take in place, and sum columns on the way. Which operators
those are is found in native_fusion.py.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from edgestill.export.lowering.graph import Node, Value
from edgestill.export.targets.native_fusion import Fusion, is_mapped, number_of, space_of, summed_columns
from edgestill.export.targets.native_plan import (
    Plan,
    Unpooled,
    View,
    bits_of,
    broadcast,
    dense_strides,
    joint_axes,
    runs_of,
)

STEPS = (
    "add subtract multiply divide maximum minimum greater greater_equal equal masked where relu clamp_low clamp_high "
    "abs exp log sqrt rsqrt power erf tanh sigmoid softplus sin cos atan floor number multiply_add masked_above"
).split()
REGISTERS, BLOCK = 48, 512
MAP_TASK, SUM_ROWS, LANES = 8 * BLOCK, 128, 16
MOST_LOADS, MOST_STORES, MOST_STEPS = 20, 12, 120
"""Of a program; they leave registers for what is in between."""
_KINDS = {"float32": 0, "uint8": 1, "int64": 2}
UNPOOLED = 3


@dataclass
class Program:
    """Elementwise operators that run on a block of elements after another."""

    plan: Plan
    fusion: Fusion
    nodes: list[Node]
    stored: set[str]  # results that others read
    loads: dict[str, Value] = field(default_factory=dict)

    def emit(self) -> bool:
        """Appends the call; not where there are too few registers."""
        plan, shape = self.plan, space_of(self.nodes[0])
        own = {node.outputs[0].name for node in self.nodes}
        joined = self._multiply_adds() | self._masks()
        sums = [node for node in self.nodes if not is_mapped(node)]
        nodes = [n for n in self.nodes if n.outputs[0].name not in joined.values() and n not in sums]
        summed = {node.outputs[0].name: self.fusion.takes(node)[0].name for node in sums}
        needed = self.stored | set(summed.values())
        views: list[View] = []
        register: dict[str, int] = {}
        for node in self.nodes:
            for value in self.fusion.takes(node):
                if value.name in own or value.name in register or number_of(value) is not None:
                    continue
                register[value.name] = len(views)
                views.append(plan.unpooled.get(value.name) or broadcast(plan, value, shape))
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
                    code += [STEPS.index("number"), register[_name(operand)], 0, 0, 0, bits_of(number_of(operand))]
                    count += 1
            used = [register[_name(operand)] for operand in operands]
            for name in dict.fromkeys(map(_name, operands)):
                if last[name] == i and name not in needed and register[name] >= loads:
                    free.append(register.pop(name))
            if not free:
                return False
            register[to] = free.pop()
            code += [STEPS.index(operator), register[to], *(used + [0, 0, 0])[:3], bits_of(number)]
            count += 1
        stored = [value for node in nodes for value in node.outputs if value.name in self.stored]
        stores = [(value, plan.result(value, runs=True)) for value in stored]
        views = [self._placed(view, shape) for view in views]
        axes = _axes(shape, views)
        if len(axes) > 4:  # broadcast along more axes than a program goes through: then end to end
            views = [view if _is_plain(view) else plan.copied(view, "expand") for view in views]
            axes = _axes(shape, views)
        axes = [(1, *[0] * (len(views) + 1))] * (4 - len(axes)) + axes
        columns = summed_columns(sums[0]) if sums else 1
        totals = self._totals(sums, summed)
        words: list[Any] = [math.prod(shape), *(axis[0] for axis in axes)]
        words += [loads, count, len(stores), len(totals), columns]
        reads: list[View] = []
        for i, view in enumerate(views):
            if isinstance(view, Unpooled):
                words += [view.dy, UNPOOLED, *view.sizes, view.winners]
                reads += [view.dy, view.winners]
            else:
                words += [view, _KINDS[view.dtype], *(axis[1 + i] for axis in axes), 0, 0]
                reads.append(view)
        words += code
        for value, view in stores:
            words += [view, register[value.name], *runs_of(view)]
        written = [view for _, view in stores]
        rows = max(1, min(MAP_TASK // columns, SUM_ROWS * max(1, LANES // columns)))
        parts = -(-math.prod(shape) // (columns * rows))
        for name, total, squares in totals:
            partial = plan.new((parts, (3 if squares else 1) * columns))
            results = [value and plan.result(value) for value in (total, squares)]
            words += [register[name], int(squares is not None), *results, partial]
            written += [partial, *(view for view in results if view)]
        plan.scratch = max(plan.scratch, REGISTERS * BLOCK * 4)
        alone = [to for _, to in stores if to.dense and plan.sizes.get(to.base) == 4 * to.size]
        over = [(view, to) for view in views for to in alone if _is_plain(view) and view.dtype == "float32"]
        plan.call("map", "map", reads, written, words, over)
        return True

    def _placed(self, view: View | Unpooled, shape: tuple[int, ...]) -> View | Unpooled:
        """Unpooled where the program goes through whole images, else read out of memory."""
        if isinstance(view, Unpooled) and view.shape != shape:
            return broadcast(self.plan, view.value, shape)
        return view

    def _totals(self, sums: list[Node], summed: dict[str, str]) -> list[tuple[str, Value | None, Value | None]]:
        """What is summed, its sum and the sum of its squares around the mean: both at once, where both are wanted."""
        plain = {summed[n.outputs[0].name]: n.outputs[0] for n in sums if n.outputs[0].name not in self.fusion.squares}
        found = []
        for node in sums:
            value, of = node.outputs[0], summed[node.outputs[0].name]
            if value.name in self.fusion.squares:
                found.append((of, plain.pop(of, None), value))
        return found + [(of, value, None) for of, value in plain.items()]

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

    def _masks(self) -> dict[str, str]:
        """What is masked where another value is above a number: the result's name → the comparison's."""
        uses = Counter(value.name for node in self.nodes for value in node.inputs)
        above = {
            node.outputs[0].name
            for node in self.nodes
            if node.operator == "greater" and number_of(node.inputs[1]) is not None
        }
        masked = (node for node in self.nodes if node.operator == "masked")
        found = {node.outputs[0].name: node.inputs[1].name for node in masked if node.inputs[1].name in above}
        return {to: mask for to, mask in found.items() if uses[mask] == 1 and mask not in self.stored}

    def _steps(self, node: Node, joined: dict[str, str]) -> list[tuple[str, str, list, float]]:
        to, inputs, a = node.outputs[0].name, list(node.inputs), node.attributes
        if to in joined and node.operator == "masked":
            compared, number = inputs[1].node.inputs
            return [("masked_above", to, [inputs[0], compared], number_of(number))]
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


def _is_plain(view: View | Unpooled) -> bool:
    return isinstance(view, View) and view.dense


def _axes(shape: tuple[int, ...], views: list[View | Unpooled]) -> list[tuple[int, ...]]:
    dense = dense_strides(shape)
    return joint_axes(shape, *(view.strides if isinstance(view, View) else dense for view in views), dense)
