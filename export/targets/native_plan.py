"""From a lowered graph to a plan: which kernel, in which order, and where each value lies in one arena.

Elementwise operators of one shape that follow one another become one program, which reads transposes, slices and
repetitions of what it takes in place. The plan's words are explained beside the kernels
(edge_runtime/native/library/kernels.c).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgestill.export.lowering.graph import Graph, LoweringError, Node, Value
from edgestill.export.lowering.operators import ELEMENTWISE

MAGIC, VERSION, ALIGNMENT = 0x314E414C504C5345, 1, 64
KERNELS = tuple(
    "copy map reduce product conv conv_grad depthwise pool rows index winograd winograd_grad".split()
)
STEPS = (
    "add subtract multiply divide maximum minimum greater greater_equal equal masked where relu clamp_low clamp_high "
    "abs exp log sqrt rsqrt power erf tanh sigmoid softplus sin cos atan floor number multiply_add"
).split()
REGISTERS, BLOCK, LANES, TASK_ROWS, GATHERED, RANK = 48, 256, 16, 96, 32, 6
MAP_TASK, SUM_ROWS = 16 * BLOCK, 128
SPOTS, TILE_BYTES = 36, 2**19
MOST_LOADS, MOST_STORES, MOST_STEPS = 20, 12, 120  # of a program; they leave registers for what is in between
PARTIAL_BYTES = 4 * 2**20
"""At most so much memory takes what weight gradients sum up before they are added."""
ITEM_BYTES = {"float32": 4, "int64": 8, "uint8": 1}
_KINDS = {"float32": 0, "uint8": 1, "int64": 2}


@dataclass(frozen=True)
class View:
    """A tensor in place: where its first element lies and how far apart its elements are, counted in elements."""

    base: str  # the value whose memory it is
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dense(self) -> bool:
        return _squeezed(self.shape, self.strides) == _squeezed(self.shape, _dense(self.shape))


@dataclass
class Call:
    """A kernel call. Arguments are words, or a view (base and offset, filled in when places are known)."""

    kernel: str
    arguments: list[int | View | None]
    reads: list[str]
    writes: list[str]
    what: str


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _squeezed(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the axes that matter, neighbours joined where they lie end to end."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def _bits(number: float) -> int:
    return struct.unpack("<i", struct.pack("<f", number))[0]


class Plan:
    """The plan of a graph. Bases: the arena, the constants, then the graph's inputs and outputs in their order."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.calls: list[Call] = []
        self.views: dict[str, View] = {}
        self.sizes: dict[str, int] = {}  # bytes in the arena, by name
        self.outside: dict[str, int] = {}  # base of what is not in the arena
        self.constants: dict[str, tuple[int, np.ndarray]] = {}
        self.constant_bytes = self.scratch = 0
        self.named = 0
        _Scheduler(self).schedule()
        self._place()

    # --- values ------------------------------------------------------------------------------------------------------
    def view(self, value: Value) -> View:
        """Where a value is, as its producer left it."""
        if value.name not in self.views:
            if value.constant is None:
                raise KeyError(value.name)
            array = np.ascontiguousarray(value.constant)
            self.constants[value.name] = (self.constant_bytes, array)
            self.constant_bytes += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            self.views[value.name] = View(value.name, value.dtype, value.shape, _dense(value.shape))
        return self.views[value.name]

    def dense(self, value: Value) -> View:
        """Where a value lies end to end; copied there where it does not."""
        view = self.view(value)
        if not view.dense:
            view = self.views[value.name] = self.copied(view, "transpose")
        return View(view.base, view.dtype, value.shape, _dense(value.shape), view.offset)

    def copied(self, view: View, what: str) -> View:
        """End to end, elsewhere."""
        to = self.new(view.shape, view.dtype)
        self.copy(view, to, what)
        return to

    def new(self, shape: Sequence[int], dtype: str = "float32") -> View:
        self.named += 1
        name = f"memory {self.named}"
        self.sizes[name] = max(math.prod(shape), 1) * ITEM_BYTES[dtype]
        return View(name, dtype, tuple(shape), _dense(shape))

    def result(self, value: Value) -> View:
        """Memory for a value: its own output's, or the arena's."""
        view = self.new(value.shape, value.dtype)
        self.views[value.name] = view
        return view

    def call(self, kernel: str, what: str, reads: Iterable[View], writes: Iterable[View], arguments: list) -> None:
        self.calls.append(Call(kernel, arguments, [v.base for v in reads], [v.base for v in writes], what))

    def copy(self, source: View, to: View, what: str, fill: float | None = None, filled: View | None = None) -> None:
        item = ITEM_BYTES[source.dtype]
        axes = _joint_axes(source.shape, source.strides, to.strides)
        if len(axes) > RANK:
            raise LoweringError(f"a {what} of {len(axes)} axes is more than the engine native copies at once")
        axes = [(1, 0, 0)] * (RANK - len(axes)) + axes
        if axes[0][0] == 1:  # the first axis is what threads share
            split = max(range(RANK), key=lambda i: (axes[i][0] > 1 and i < RANK - 1, -i)) if len(axes) > 1 else 0
            if axes[split][0] > 1 and split < RANK - 1:
                axes = [axes[split], *axes[:split], *axes[split + 1 :]]
        count = 0 if fill is None else math.prod(filled.shape)
        bits = 0 if fill is None else (_bits(fill) if source.dtype == "float32" else int(fill))
        words = [source, to, item, bits, count, len(axes)]
        for i in range(3):
            words += [axis[i] * (item if i else 1) for axis in axes]
        if fill is not None:  # the filled whole begins where the copied part's memory does
            nothing = [*[1] * RANK, *[0] * 2 * RANK]
            self.call("copy", what, [], [filled], [filled, filled, item, bits, count, RANK, *nothing])
            words[4] = 0
        self.call("copy", what, [source], [to], words)

    # --- places ------------------------------------------------------------------------------------------------------
    def _place(self) -> None:
        """Offsets in the arena: each value at the lowest place that is free from its first use to its last."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, call in enumerate(self.calls):
            for name in (*call.reads, *call.writes):
                first.setdefault(name, i)
                last[name] = i
        self.offsets: dict[str, int] = {}
        taken: list[tuple[int, int, int, int]] = []
        order = sorted((name for name in self.sizes if name in first), key=lambda n: (-self.sizes[n], first[n]))
        end = 0
        for name in order:
            size = -(-self.sizes[name] // ALIGNMENT) * ALIGNMENT
            overlapping = sorted(
                (start, stop) for start, stop, begin, until in taken if begin <= last[name] and until >= first[name]
            )
            place = 0
            for start, stop in overlapping:
                if start - place >= size:
                    break
                place = max(place, stop)
            self.offsets[name] = place
            taken.append((place, place + size, first[name], last[name]))
            end = max(end, place + size)
        self.arena_bytes = end

    def _word(self, argument: int | View | None) -> list[int]:
        if argument is None:
            return [-1, 0]
        if isinstance(argument, View):
            offset = argument.offset * ITEM_BYTES[argument.dtype]
            if argument.base in self.outside:
                return [self.outside[argument.base], offset]
            if argument.base in self.constants:
                return [1, self.constants[argument.base][0] + offset]
            return [0, self.offsets[argument.base] + offset]
        return [int(argument)]

    def to_bytes(self) -> bytes:
        graph = self.graph
        bases = [(self.arena_bytes, 1), (self.constant_bytes, 0)]
        bases += [(value.size * ITEM_BYTES[value.dtype], 0) for value in graph.inputs]
        bases += [(value.size * ITEM_BYTES[value.dtype], 1) for value in graph.outputs.values()]
        words: list[int] = []
        for call in self.calls:
            body = [word for argument in call.arguments for word in self._word(argument)]
            words += [KERNELS.index(call.kernel), len(body), *body]
        head = [MAGIC, VERSION, len(bases), self.arena_bytes, self.scratch, len(self.calls), self.constant_bytes, 0]
        head += [word for base in bases for word in base]
        head[7] = len(head) + len(words)
        constants = bytearray(self.constant_bytes)
        for offset, array in self.constants.values():
            constants[offset : offset + array.nbytes] = array.tobytes()
        return struct.pack(f"<{head[7]}q", *head, *words) + bytes(constants)

    def kernels(self) -> dict[str, int]:
        return dict(sorted(Counter(call.kernel for call in self.calls).items()))


def _joint_axes(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """(size, stride of each) of the axes that matter, neighbours joined where they lie end to end in all."""
    axes: list[tuple[int, ...]] = []
    for size, *apart in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1:], apart, strict=True)):
            axes[-1] = (axes[-1][0] * size, *apart)
        else:
            axes.append((size, *apart))
    return axes


class _Scheduler:
    """Goes through the graph: groups elementwise operators, and lets each other one append its calls."""

    def __init__(self, plan: Plan):
        self.plan, self.graph = plan, plan.graph

    def schedule(self) -> None:
        plan, graph = self.plan, self.graph
        for i, value in enumerate(graph.inputs):
            plan.outside[value.name] = 2 + i
            plan.views[value.name] = View(value.name, value.dtype, value.shape, _dense(value.shape))
        self.readers = graph.readers()
        self.kept = {value.name for value in graph.outputs.values()}
        for item in _grouped(graph):
            if isinstance(item, list):
                self._program(item)
            else:
                self._node(item)
        for i, (name, value) in enumerate(graph.outputs.items()):
            plan.outside["output " + name] = 2 + len(graph.inputs) + i
            to = View("output " + name, value.dtype, value.shape, _dense(value.shape))
            plan.copy(plan.view(value), to, "output")

    def _program(self, nodes: list[Node]) -> None:
        """One program, or two one after the other where it would be too long."""
        own = {id(node) for node in nodes}
        results = [node.outputs[0].name for node in nodes]
        stored = {n for n in results if n in self.kept or any(id(r) not in own for r in self.readers.get(n, ()))}
        inputs = {value.name for node in nodes for value in node.inputs}.difference(results)
        if len(nodes) == 1 or (len(inputs) <= MOST_LOADS and len(stored) <= MOST_STORES and len(nodes) <= MOST_STEPS):
            if _Program(self.plan, nodes, stored).emit():
                return
        half = len(nodes) // 2
        self._program(nodes[:half])
        self._program(nodes[half:])

    def _node(self, node: Node) -> None:
        rule = _RULES.get(node.operator)
        if rule is None:
            raise LoweringError(f"{node.path}: the engine native has no kernel for {node.operator}")
        rule(self.plan, node, *node.inputs)


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


def _grouped(graph: Graph) -> list[Node | list[Node]]:
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
class _Program:
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
                views.append(_broadcast(plan, value, shape))
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
                    code += [STEPS.index("number"), register[_name(operand)], 0, 0, 0, _bits(_number(operand))]
                    count += 1
            used = [register[_name(operand)] for operand in operands]
            for name in {_name(operand) for operand in operands}:
                if last[name] == i and name not in needed and register[name] >= loads:
                    free.append(register.pop(name))
            if not free:
                return False
            register[to] = free.pop()
            code += [STEPS.index(operator), register[to], *(used + [0, 0, 0])[:3], _bits(number)]
            count += 1
        stores = [(value, plan.result(value)) for node in nodes for value in node.outputs if value.name in self.stored]
        axes = _joint_axes(shape, *(view.strides for view in views), _dense(shape))
        if len(axes) > 4:  # broadcast along more axes than a program goes through: then end to end
            views = [view if view.dense else plan.copied(view, "expand") for view in views]
            axes = _joint_axes(shape, *(view.strides for view in views), _dense(shape))
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


def _broadcast(plan: Plan, value: Value, shape: tuple[int, ...]) -> View:
    view = plan.view(value)
    extra = len(shape) - len(view.shape)
    strides = [0] * extra + [s if n > 1 else 0 for n, s in zip(view.shape, view.strides, strict=True)]
    return View(view.base, view.dtype, shape, tuple(strides), view.offset)


# --- what is no elementwise operator ----------------------------------------------------------------------------------
def _reshape(plan: Plan, node: Node, x: Value) -> None:
    view = plan.view(x)
    strides = _reshaped(view.shape, view.strides, node.outputs[0].shape)
    if strides is None:
        view = plan.dense(x)
        strides = _dense(node.outputs[0].shape)
    value = node.outputs[0]
    plan.views[value.name] = View(view.base, view.dtype, value.shape, strides, view.offset)


def _reshaped(shape: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of the same memory in another shape; None where that cannot be said."""
    axes = _squeezed(shape, strides)
    result: list[int] = []
    rest = axes.pop() if axes else (1, 1)
    for size in reversed(new):
        if size == 1:
            result.append(0)
            continue
        if rest[0] == 1:
            if not axes:
                return None
            rest = axes.pop()
        if rest[0] % size:
            return None
        result.append(rest[1])
        rest = (rest[0] // size, rest[1] * size)
    return tuple(result[::-1])


def _seen(plan: Plan, node: Node, strides: Sequence[int], view: View, offset: int = 0) -> None:
    value = node.outputs[0]
    plan.views[value.name] = View(view.base, view.dtype, value.shape, tuple(strides), view.offset + offset)


def _transpose(plan: Plan, node: Node, x: Value) -> None:
    view = plan.view(x)
    _seen(plan, node, [view.strides[axis] for axis in node.attributes["permutation"]], view)


def _slice(plan: Plan, node: Node, x: Value) -> None:
    view, a = plan.view(x), node.attributes
    strides = list(view.strides)
    strides[a["axis"]] *= a["step"]
    _seen(plan, node, strides, view, a["start"] * view.strides[a["axis"]])


def _expand(plan: Plan, node: Node, x: Value) -> None:
    _seen(plan, node, _broadcast(plan, x, node.outputs[0].shape).strides, plan.view(x))


def _same(plan: Plan, node: Node, x: Value) -> None:
    plan.views[node.outputs[0].name] = plan.view(x)


def _concat(plan: Plan, node: Node, *parts: Value) -> None:
    to, axis, start = plan.result(node.outputs[0]), node.attributes["axis"], 0
    for part in parts:
        place = View(to.base, to.dtype, part.shape, to.strides, start * to.strides[axis])
        plan.copy(plan.view(part), place, "concat")
        start += part.shape[axis]


def _pad(plan: Plan, node: Node, x: Value) -> None:
    to, a = plan.result(node.outputs[0]), node.attributes
    offset = sum(begin * stride for begin, stride in zip(a["begins"], to.strides, strict=True))
    place = View(to.base, to.dtype, x.shape, to.strides, offset)
    plan.copy(plan.view(x), place, "pad", a["value"], to)


def _reduce(plan: Plan, node: Node, x: Value) -> None:
    """A run of neighbouring axes at a time, the last one first."""
    shape, view = list(x.shape), plan.dense(x)
    axes = [axis for axis in node.attributes["axes"] if shape[axis] > 1]
    while axes:
        stop = axes[-1] + 1
        start = stop - 1
        while start > 0 and (start - 1 in axes or shape[start - 1] == 1):
            start -= 1
        outer, size, inner = (math.prod(part) for part in (shape[:start], shape[start:stop], shape[stop:]))
        shape[start:stop] = [1] * (stop - start)
        axes = [axis for axis in axes if axis < start]
        to = plan.new(shape)
        part = plan.new((outer * max(-(-size // (4096 if inner == 1 else 128)), 1), inner))
        maximum = int(node.operator == "reduce_max")
        plan.call("reduce", node.operator, [view], [to, part], [view, to, part, maximum, outer, size, inner])
        view = to
    plan.views[node.outputs[0].name] = View(view.base, view.dtype, tuple(shape), _dense(shape), view.offset)


def _matmul(plan: Plan, node: Node, a: Value, b: Value) -> None:
    value = node.outputs[0]
    batch = value.shape[:-2]
    left, right = (_matrix(plan, v, batch, node.attributes[f"transpose_{side}"]) for v, side in ((a, "a"), (b, "b")))
    m, k, n = value.shape[-2], left[0].shape[-1], value.shape[-1]
    batches = math.prod(batch)
    if right[1] == 0 and left[1] in (0, m * left[0].strides[-2]) and batches > 1 and left[1]:
        batches, m, left, right = 1, batches * m, (left[0], 0), right  # rows of all batches meet one matrix
    to = plan.result(value)
    panels = -(-n // LANES)
    packed = plan.new((batches if right[1] else 1, panels * LANES, k))
    tiles = batches * -(-m // TASK_ROWS)
    each = max(1, min(panels, panels * tiles // 16))
    (lv, ls), (rv, rs) = left, right
    plan.call(
        "product", "matmul", [lv, rv], [to, packed],
        [lv, rv, to, packed, batches, m, n, k, ls, *lv.strides[-2:], rs, *rv.strides[-2:], each],
    )  # fmt: skip


def _matrix(plan: Plan, value: Value, batch: tuple[int, ...], turned: bool) -> tuple[View, int]:
    """The view of a matrix of each batch, turned where asked, and how far apart the batches are."""
    view = plan.view(value)
    stride = _batch_stride(view, batch)
    if stride is None:
        view = _broadcast(plan, value, (*batch, *value.shape[-2:]))
        view = plan.copied(view, "expand")
        stride = math.prod(view.shape[-2:])
    if turned:
        order = [*range(len(view.shape) - 2), len(view.shape) - 1, len(view.shape) - 2]
        shape, strides = (tuple(of[i] for i in order) for of in (view.shape, view.strides))
        view = View(view.base, view.dtype, shape, strides, view.offset)
    return view, stride


def _batch_stride(view: View, batch: tuple[int, ...]) -> int | None:
    own = view.shape[:-2]
    if math.prod(own) == 1:
        return 0
    if (1,) * (len(batch) - len(own)) + own != batch:
        return None
    axes = _squeezed(own, view.strides[:-2])
    return axes[0][1] if len(axes) == 1 else None


def _windows(plan: Plan, x: Value, to: Value, weight: Value | None, a: dict, kernel, groups: int, adjoint: bool):
    """The words that convolutions and pooling share; x and to are the images that the kernel calls so."""
    pads, dilation = a["padding"], a.get("dilation", (1, 1))
    strides = plan.view(weight).strides if weight is not None else (0, 0, 0, 0)
    words = [*x.shape, *to.shape[1:], *kernel, *a["stride"], pads[0][0], pads[1][0], *dilation, groups, *strides]
    return [*words, int(adjoint)]


def _conv2d(plan: Plan, node: Node, x: Value, weight: Value, *bias: Value) -> None:
    adjoint, a, value = node.operator == "conv2d_transpose", node.attributes, node.outputs[0]
    groups, kernel = a["groups"], weight.shape[2:]
    image, offset = plan.dense(x), plan.dense(bias[0]) if bias else None
    to, filters = plan.result(value), plan.view(weight)
    words = _windows(plan, x, value, weight, a, kernel, groups, adjoint)
    depthwise = groups == x.shape[3] == value.shape[3]
    into, out, taps = x.shape[3] // groups, value.shape[3] // groups, math.prod(kernel)
    reads = [image, filters, *([offset] if bias else [])]
    if depthwise and groups > 1:
        packed = plan.new((taps, groups))
        plan.scratch = max(plan.scratch, taps * 16)
        plan.call(
            "depthwise", node.operator, reads, [to, packed],
            [image, filters, to, offset, packed, *words, int(adjoint), 1],
        )  # fmt: skip
        return
    if _has_winograd(a, kernel, x.shape[3], value.shape):
        wide = -(-out // LANES) * LANES
        packed = plan.new((SPOTS, into, wide))
        tiles = max(12, min(48, TILE_BYTES // (SPOTS * 4 * (into + wide)) // 12 * 12))
        plan.scratch = max(plan.scratch, SPOTS * tiles * (into + wide) * 4)
        arguments = [image, filters, to, offset, packed, *words, tiles]
        plan.call("winograd", node.operator, reads, [to, packed], arguments)
        return
    packed = plan.new((groups, -(-out // LANES) * LANES, taps * into))
    scratch = taps * TASK_ROWS * 8 + (TASK_ROWS * taps * into * 4 if into < GATHERED else 0) + into * 4
    plan.scratch = max(plan.scratch, -(-scratch // ALIGNMENT) * ALIGNMENT)
    plan.call("conv", node.operator, reads, [to, packed], [image, filters, to, offset, packed, *words])


def _conv2d_weight_grad(plan: Plan, node: Node, x: Value, dy: Value, weight: Value) -> None:
    a, value = node.attributes, node.outputs[0]
    groups, kernel = a["groups"], weight.shape[2:]
    image, slope, to = plan.dense(x), plan.dense(dy), plan.result(value)
    words = _windows(plan, x, dy, None, a, kernel, groups, False)
    words[-5:-1] = to.strides
    depthwise = groups == x.shape[3] == dy.shape[3] and groups > 1
    if kernel == (1, 1) and groups == 1 and a["stride"] == (1, 1) and x.shape[:3] == dy.shape[:3]:
        pixels, into, out = math.prod(x.shape[:3]), x.shape[3], dy.shape[3]
        packed, tiles = plan.new((-(-into // LANES) * LANES, pixels)), -(-out // TASK_ROWS)
        each = max(1, -(-into // LANES) * tiles // 16)
        arguments = [slope, image, to, packed, 1, out, into, pixels, 0, 1, out, 0, into, 1, each]
        plan.call("product", node.operator, [slope, image], [to, packed], arguments)
        return
    if _has_winograd(a, kernel, x.shape[3], dy.shape):
        tiles = dy.shape[0] * -(-dy.shape[1] // 4) * -(-dy.shape[2] // 4)
        wide = -(-dy.shape[3] // LANES) * LANES
        work = plan.new((SPOTS, tiles * (x.shape[3] + wide) + x.shape[3] * wide))
        plan.call(
            "winograd_grad", node.operator, [image, slope], [to, work], [image, slope, to, None, work, *words, 1]
        )  # fmt: skip
        return
    each = 4 * value.size
    parts = max(1, min(x.shape[0], PARTIAL_BYTES // each))
    images = -(-x.shape[0] // parts)
    partial = plan.new((-(-x.shape[0] // images), each // 4))
    tail = [2, images] if depthwise else [images]
    plan.call(
        "depthwise" if depthwise else "conv_grad", node.operator, [image, slope], [to, partial],
        [image, slope, to, None, partial, *words, *tail],
    )  # fmt: skip


def _has_winograd(a: dict, kernel: tuple[int, int], channels: int, result: tuple[int, ...]) -> bool:
    """Whether F(4×4, 3×3) pays: with few channels or pixels its transforms cost more than they save."""
    plain = a["groups"] == 1 and kernel == (3, 3) and a["stride"] == (1, 1) and a["dilation"] == (1, 1)
    return plain and min(channels, result[3]) >= 16 and min(result[1:3]) >= 4


def _pool(plan: Plan, node: Node, *inputs: Value) -> None:
    value, a = node.outputs[0], node.attributes
    what = ("max_pool2d", "max_pool2d_grad", "avg_pool2d", "avg_pool2d_grad").index(node.operator)
    to, backward = plan.result(value), what & 1
    small = inputs[0] if backward else value
    large = value if backward else inputs[0]
    x = plan.dense(inputs[1]) if what == 1 else plan.dense(inputs[0])
    dy = plan.dense(inputs[0]) if backward else x
    words = _windows(plan, large, small, None, a, a["kernel"], 1, False)
    plan.call("pool", node.operator, [x, dy], [to], [x, dy, to, None, None, *words, what])


def _rows(plan: Plan, node: Node, x: Value) -> None:
    what = ("softmax", "log_softmax", "standardize").index(node.operator)
    view, results = plan.dense(x), [plan.result(value) for value in node.outputs]
    number = _bits(node.attributes.get("eps", 0.0))
    size = x.shape[-1]
    arguments = [view, results[0], results[-1], what, x.size // size, size, number]
    plan.call("rows", node.operator, [view], results, arguments)


def _indexed(plan: Plan, node: Node, *inputs: Value) -> None:
    what = ("gather", "scatter_add", "argmax", "one_hot", "to_integer").index(node.operator)
    value, x, views = node.outputs[0], inputs[0], [plan.dense(v) for v in inputs]
    to = plan.result(value)
    outer = size = inner = 1
    count = x.size
    if what < 3:
        axis = node.attributes["axis"]
        size = value.shape[axis] if what == 1 else x.shape[axis]
        outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
        count = inputs[1].size if what < 2 else 1
    elif what == 3:
        size = node.attributes["classes"]
    index = views[1] if what < 2 else views[0]
    plan.call("index", node.operator, views, [to], [views[0], index, to, what, outer, size, count, inner])


_RULES = {
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "expand": _expand,
    "stop_gradient": _same,
    "concat": _concat,
    "pad": _pad,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "matmul": _matmul,
    "conv2d": _conv2d,
    "conv2d_transpose": _conv2d,
    "conv2d_weight_grad": _conv2d_weight_grad,
    "max_pool2d": _pool,
    "max_pool2d_grad": _pool,
    "avg_pool2d": _pool,
    "avg_pool2d_grad": _pool,
    "softmax": _rows,
    "log_softmax": _rows,
    "standardize": _rows,
    "gather": _indexed,
    "scatter_add": _indexed,
    "argmax": _indexed,
    "one_hot": _indexed,
    "to_integer": _indexed,
}

TAKEN = frozenset(_RULES) | (ELEMENTWISE.keys() - {"stop_gradient"})
"""Operators that a plan can be made of."""
