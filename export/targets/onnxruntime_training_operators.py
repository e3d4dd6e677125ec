"""What onnxruntime-training 1.19.2 differentiates rightly, measured against eager PyTorch, and what not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import helper

from edgestill.runtime.errors import EdgestillError

DIFFERENTIABLE = frozenset(
    (
        "Abs Add AveragePool BatchNormalization Cast Clip Concat Conv Div Dropout Erf Exp Expand Flatten "
        "Gather GatherElements Gelu Gemm GlobalAveragePool Identity LayerNormalization LeakyRelu Log "
        "LogSoftmax MatMul Max MaxPool Min Mul Neg Pad Pow Reciprocal ReduceL2 ReduceLogSumExp ReduceMean "
        "ReduceSum Relu Reshape Sigmoid Slice Softmax Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where"
    ).split()
)
"""Operators that may lie between a trainable input and the loss.

The builder itself refuses others (Elu, Einsum, GlobalMaxPool, GroupNormalization, HardSigmoid, HardSwish,
InstanceNormalization, Mish, PRelu, ReduceMax, ReduceSumSquare, Softplus, Sum, ...); of some it makes a
gradient that no CPU kernel runs (ConvTranspose, Resize); of some a wrong one without a word
(`_wrong_gradient`; Split with an output that nobody reads).
"""

FLAT = frozenset("Equal Greater GreaterOrEqual Less LessOrEqual Shape Size".split())
"""Operators whose derivative is zero or that have none; the builder stops at them, as it should."""


ARTIFACT = DIFFERENTIABLE | frozenset(
    (
        "And AveragePoolGrad BatchNormInternal BatchNormalizationGrad BroadcastGradientArgs ConcatTraining "
        "ConvGrad DivGrad Equal FusedMatMul Greater GreaterOrEqual LayerNormalizationGrad LeakyReluGrad Less "
        "LessOrEqual LogSoftmaxGrad_13 MaxPoolGrad OneHot ReluGrad Scale Shape SigmoidGrad Sign Size "
        "SliceGrad SoftmaxGrad_13 SplitTraining Sum TanhGrad"
    ).split()
)
"""All that a training step may hold: what stands between parameters and loss, what the builder writes for it,
and what loss and optimizer need besides."""


class GradientError(EdgestillError):
    """A forward graph of which the gradient builder makes no training step."""


def check_gradients(graph: onnx.GraphProto, trainable: Iterable[str]) -> None:
    """Refuses a forward graph in which some gradient would be missing or wrong. Errors: GradientError."""
    for node in _between(graph, trainable):
        reason = _wrong_gradient(node)
        if node.op_type not in DIFFERENTIABLE | FLAT or node.domain:
            reason = "onnxruntime-training has no proven gradient for it"
        if reason:
            raise GradientError(
                f"{_named(node)}: {reason}",
                "write it with other operators: " + ", ".join(sorted(DIFFERENTIABLE)),
            )
    _check_statistics(graph)


def check_artifact(graph: onnx.GraphProto) -> None:
    """Refuses a finished step with an operator outside of ARTIFACT. Errors: GradientError."""
    strangers = sorted({node.op_type for node in graph.node} - ARTIFACT)
    if strangers:
        raise GradientError(
            f"the training step holds {', '.join(strangers)}, outside of the set of proven operators",
            "write the forward graph with other operators",
        )


def needed_nodes(
    nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes on which the outputs depend, in order; and the outputs with all names that these read."""
    needed = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(name for name in node.input if name)
    return kept[::-1], needed


def attributes_of(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _named(node: onnx.NodeProto) -> str:
    return f"{node.op_type} ({node.name or node.output[0]})"


def _between(graph: onnx.GraphProto, trainable: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes between a trainable input and the loss."""
    reached = set(trainable)
    for node in graph.node:
        if reached.intersection(node.input) and node.op_type not in FLAT:
            reached.update(node.output)
    nodes, _ = needed_nodes(graph.node, ["loss"])
    return [node for node in nodes if reached.intersection(node.input)]


def _wrong_gradient(node: onnx.NodeProto) -> str | None:
    """Why the builder fails on this use of an operator, or makes a wrong gradient and says nothing."""
    attributes = attributes_of(node)
    if node.op_type == "BatchNormalization" and not attributes.get("training_mode"):
        return "its gradient is that of training_mode 1; write inference mode as a product and a sum"
    if node.op_type == "AveragePool" and attributes.get("ceil_mode") and attributes.get("count_include_pad"):
        return "ceil_mode with count_include_pad divides by wrong counts; leave out one of them"
    if node.op_type == "LayerNormalization" and len(node.output) < 3:
        return "its gradient needs all three outputs to be named"
    return None


def _check_statistics(graph: onnx.GraphProto) -> None:
    """Refuses a training BatchNormalization whose running outputs are not the batch's own mean and variance
    (momentum 0), or whose running inputs, which name its scratch memory, are constant or not its own."""
    seen = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        attributes = attributes_of(node)
        if node.op_type != "BatchNormalization" or not attributes.get("training_mode"):
            continue
        momentum, statistics = attributes.get("momentum", 0.9), list(node.input[3:5])
        if momentum != 0:
            raise GradientError(
                f"{_named(node)} has momentum {momentum:g}, not 0",
                "write the running update as nodes behind it",
            )
        if len(seen.union(statistics)) < len(seen) + 2:
            raise GradientError(
                f"{_named(node)}: {', '.join(statistics)} are constant or normalise elsewhere too",
                "give it the state's running mean and variance",
            )
        seen.update(statistics)
