"""Engine `native`: the graph as a plan for libedgestill (docs/native.md), channels last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgestill.export.lowering.graph import Graph, Node, Value
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.rewrite import EXPANSIONS, rewrite_fully
from edgestill.export.step.graphs import build_encode, build_train_step
from edgestill.export.step.spec import StepSpec
from edgestill.export.targets.native_plan import Plan


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.plan` and `encode.plan` into `folder`; returns what the manifest says of each graph."""
    records = {}
    for name, graph in (("train_step", build_train_step(spec)), ("encode", build_encode(spec))):
        graph = lower(graph)
        plan = Plan(graph)
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
    return cancel_turns(rewrite_fully(graph, REWRITES))


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


_OWN = ("avg_pool2d_grad", "standardize", "softplus", "stop_gradient")
REWRITES = {name: rule for name, rule in EXPANSIONS.items() if name not in _OWN} | {
    "conv2d": _turned(1),
    "conv2d_transpose": _turned(1),
    "conv2d_weight_grad": conv2d_weight_grad,
    "max_pool2d": _turned(1),
    "max_pool2d_grad": _turned(3),
    "avg_pool2d": _turned(1),
    "avg_pool2d_grad": _turned(1),
    "reduce_mean": reduce_mean,
    "normalize": normalize,
}
