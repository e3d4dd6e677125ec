"""Engine `native`: the graph as a plan for libedgestill (docs/native.md), channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgestill.export.lowering.graph import Graph, LoweringError, Node, Value
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.rewrite import EXPANSIONS, batch_norm, channelwise, rewrite_fully
from edgestill.export.step.graphs import build_encode, build_train_step
from edgestill.export.step.spec import StepSpec
from edgestill.export.targets.native_fusion import Fusion, Group
from edgestill.export.targets.native_graph import join_shapes, join_slopes, move_parts
from edgestill.export.targets.native_kernels import RULES
from edgestill.export.targets.native_plan import Plan, View, dense_strides
from edgestill.export.targets.native_programs import MOST_LOADS, MOST_STEPS, MOST_STORES, Program


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.plan` and `encode.plan` into `folder`; returns what the manifest says of each graph."""
    records = {}
    for name, graph in (("train_step", build_train_step(spec)), ("encode", build_encode(spec))):
        graph = lower(graph)
        plan = make_plan(graph)
        (folder / f"{name}.plan").write_bytes(plan.to_bytes())
        records[name] = {
            "file": f"{name}.plan",
            "inputs": [value.name for value in graph.inputs],
            "outputs": list(graph.outputs),
            "operators": plan.kernels(),
            "planned_memory_bytes": plan.arena_bytes,
        }
    return records


def lower(graph: Graph) -> Graph:
    """The graph in operators that the library has a kernel for, channels last."""
    return join_shapes(move_parts(join_slopes(cancel_turns(rewrite_fully(graph, REWRITES)))))


def make_plan(graph: Graph) -> Plan:
    """The plan of a lowered graph. Errors: LoweringError for an operator without a kernel."""
    plan = Plan(graph)
    _Scheduler(plan).schedule()
    plan.place()
    return plan


class _Scheduler:
    """Goes through the graph: groups elementwise operators, and lets each other one append its calls."""

    def __init__(self, plan: Plan):
        self.plan, self.graph = plan, plan.graph

    def schedule(self) -> None:
        plan, graph = self.plan, self.graph
        for i, value in enumerate(graph.inputs):
            plan.outside[value.name] = 2 + i
            plan.views[value.name] = View(value.name, value.dtype, value.shape, dense_strides(value.shape))
        for i, (name, value) in enumerate(graph.outputs.items()):
            plan.outside["output " + name] = 2 + len(graph.inputs) + i
            outside = View("output " + name, value.dtype, value.shape, dense_strides(value.shape))
            plan.direct.setdefault(value.name, outside)
        fusion = plan.fusion
        items = fusion.items()
        plan.loose = fusion.kept.union(
            value.name for item in items if isinstance(item, Node) for value in fusion.takes(item)
        )
        for item in items:
            if isinstance(item, Group):
                self._program(fusion, item.nodes, item.stored)
            else:
                self._node(item, fusion.takes(item))
        for name, value in graph.outputs.items():
            to = View("output " + name, value.dtype, value.shape, dense_strides(value.shape))
            if (view := plan.view(value)).base != to.base:
                plan.copy(view, to, "output")

    def _program(self, fusion: Fusion, nodes: list[Node], stored: set[str]) -> None:
        """One program, or two one after the other where it would be too long."""
        results = {node.outputs[0].name for node in nodes}
        inputs = {v.name for node in nodes for v in fusion.takes(node)} - results
        if len(nodes) == 1 or (len(inputs) <= MOST_LOADS and len(stored) <= MOST_STORES and len(nodes) <= MOST_STEPS):
            if Program(self.plan, fusion, nodes, stored).emit():
                return
        first, second = nodes[: len(nodes) // 2], nodes[len(nodes) // 2 :]
        passed = {v.name for node in second for v in fusion.takes(node)} | stored
        self._program(fusion, first, passed & {node.outputs[0].name for node in first})
        self._program(fusion, second, stored & {node.outputs[0].name for node in second})

    def _node(self, node: Node, inputs: Sequence[Value]) -> None:
        rule = RULES.get(node.operator)
        if rule is None:
            raise LoweringError(f"{node.path}: the engine native has no kernel for {node.operator}")
        rule(self.plan, node, *inputs)


def _last(x: Value) -> Value:
    return x.transpose(0, 2, 3, 1)


def _first(x: Value) -> Value:
    return x.transpose(0, 3, 1, 2)


def _turned(images: int) -> Callable[..., Value | None]:
    """The operator on images channels last, of which it takes so many."""

    def rule(node: Node, *inputs: Value) -> Value | None:
        if node.attributes.get("last"):
            return None
        turned = [_last(x) if i < images else x for i, x in enumerate(inputs)]
        return _first(turned[0].apply(node.operator, *turned[1:], **node.attributes, last=True))

    return rule


def conv2d_weight_grad(node: Node, x: Value, dy: Value, weight: Value) -> tuple[Value, Value] | None:
    if node.attributes.get("last"):
        return None
    x, dy = _last(x), _last(dy)
    attributes = node.attributes | {"bias": False, "last": True}
    dw, _ = x.graph.apply_many("conv2d_weight_grad", x, dy, weight, **attributes)
    return dw, dy.sum(0, 1, 2).reshape(-1)


def reduce_mean(node: Node, x: Value) -> Value:
    return x.sum(*node.attributes["axes"]) * (node.outputs[0].size / x.size)


def normalize(node: Node, x: Value, weight: Value, bias: Value, mean: Value, variance: Value) -> Value:
    scale = weight * (variance + node.attributes["eps"]).apply("rsqrt")
    mean, scale, bias = (v.reshape(1, -1, 1, 1) for v in (mean, scale, bias))
    return (x - mean) * scale + bias


def _largest(node: Node, x: Value, weight: Value) -> tuple[Value, Value]:
    """x, turned round where its weight is negative, and the largest of each window."""
    attributes = {key: value for key, value in node.attributes.items() if key != "eps"}
    zeros = x.graph.constant(np.zeros(weight.shape))
    turned = x * channelwise(weight.apply("greater_equal", zeros) * 2.0 - 1.0)
    return turned, turned.apply("max_pool2d", **attributes)


def pooled_batch_norm(node: Node, x: Value, weight: Value, bias: Value) -> tuple[Value, ...]:
    """Of x itself the largest are found: only these are normalized."""
    _, mean, variance = batch_norm(node, x, weight, bias)
    turned, largest = _largest(node, x, weight)
    scale = weight * (variance + node.attributes["eps"]).apply("rsqrt")
    y = (largest * turned.node.inputs[1] - channelwise(mean)) * channelwise(scale) + channelwise(bias)
    return y, mean, variance


def pooled_batch_norm_grad(node: Node, dy: Value, x: Value, weight: Value, mean: Value, variance: Value):
    """As batch_norm_grad, with all sums over the pooled size, because pooling passes each gradient on once."""
    turned, largest = _largest(node, x, weight)
    count = x.size // x.shape[1]
    inverse = (variance + node.attributes["eps"]).apply("rsqrt")
    scale, mean = weight * inverse, channelwise(mean)
    db = dy.sum(0, 2, 3).reshape(-1)
    dw = (dy * (largest * turned.node.inputs[1] - mean)).sum(0, 2, 3).reshape(-1) * inverse
    attributes = {key: value for key, value in node.attributes.items() if key != "eps"}
    unpooled = (dy * channelwise(scale)).apply("max_pool2d_grad", turned, largest, **attributes)
    slope, offset = scale * inverse * dw * (-1 / count), scale * db * (-1 / count)
    return unpooled + ((x - mean) * channelwise(slope) + channelwise(offset)), dw, db


_OWN = ("avg_pool2d_grad", "standardize", "softplus", "stop_gradient")
REWRITES = {name: rule for name, rule in EXPANSIONS.items() if name not in _OWN} | {
    "conv2d": _turned(1),
    "conv2d_transpose": _turned(1),
    "conv2d_weight_grad": conv2d_weight_grad,
    "max_pool2d": _turned(1),
    "max_pool2d_grad": _turned(3),
    "avg_pool2d": _turned(1),
    "avg_pool2d_grad": _turned(1),
    "pooled_batch_norm": pooled_batch_norm,
    "pooled_batch_norm_grad": pooled_batch_norm_grad,
    "reduce_mean": reduce_mean,
    "normalize": normalize,
}
