"""ONNX Runtime's training build: the step with its own kernels for the gradients of convolution, pooling and BatchNorm.

They are operators of the domain com.microsoft that only this build runs, in an ordinary InferenceSession; what stands
around them is plain ONNX. So everything that is an operator of the Graph and has a kernel here is kept.
"""

from __future__ import annotations

from pathlib import Path

from onnx import helper

from edgestill.export.lowering.graph import Graph, Node
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.rewrite import EXPANSIONS, rewrite_fully
from edgestill.export.step.graphs import build_encode, build_train_step
from edgestill.export.step.spec import StepSpec
from edgestill.export.targets.onnx_emitter import MICROSOFT, TYPES, Rule, Writer, convolution, pooling, write

KEPT = ("batch_norm", "batch_norm_grad", "standardize")


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.onnx` and `encode.onnx` into `folder`; returns what the manifest says of each graph."""
    graphs = {"train_step": build_train_step(spec, fused=False), "encode": build_encode(spec)}
    return write({name: lower(graph) for name, graph in graphs.items()}, folder, GRADIENTS)


def lower(graph: Graph) -> Graph:
    """The graph in operators that the training build has."""
    return cancel_turns(rewrite_fully(graph, {name: r for name, r in EXPANSIONS.items() if name not in KEPT}))


def _weight_grad(w: Writer, node: Node, x: list[str], y: str) -> None:
    outputs = ["", y, w.name(node.outputs[1])]
    inputs = [x[1], x[0], x[2]]
    w.emit("ConvGrad", inputs, outputs, domain=MICROSOFT, **convolution(node, node.inputs[2].shape[2:]))


def _batch_norm_grad(w: Writer, node: Node, x: list[str], y: str) -> None:
    dy, image, weight, mean, variance = x
    eps = node.attributes["eps"]
    root = w.emit("Sqrt", [w.emit("Add", [variance, w.number(eps)], f"{y}.shifted")], f"{y}.root")
    inverse = w.emit("Reciprocal", [root], f"{y}.inverse")
    outputs = [w.name(value) for value in node.outputs]
    w.emit(
        "BatchNormalizationGrad", [dy, image, weight, mean, inverse], outputs, domain=MICROSOFT, epsilon=eps
    )


def _max_pool(w: Writer, node: Node, x: list[str], y: str) -> None:
    w.emit("MaxPool", x, [y, y + ".indices"], **pooling(node))


def _max_pool_grad(w: Writer, node: Node, x: list[str], y: str) -> None:
    # Without the recorded type of its output, which nothing infers, loading crashes.
    w.types.append(helper.make_tensor_value_info(y, TYPES["float32"], node.outputs[0].shape))
    w.emit("MaxPoolGrad", [x[0], x[2] + ".indices"], y, **pooling(node))


GRADIENTS: dict[str, Rule] = {
    "conv2d_weight_grad": _weight_grad,
    "batch_norm_grad": _batch_norm_grad,
    "max_pool2d": _max_pool,
    "max_pool2d_grad": _max_pool_grad,
}
