"""A lowered graph as an ONNX model, operator by operator (https://onnx.ai/onnx/operators/, opset 18)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgestill.export.lowering.graph import Graph, Node, Value

OPSET = 18
IR_VERSION = 9  # the newest that onnxruntime-training 1.19 reads
TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.renamed: dict[str, str] = {}

    def name(self, value: Value) -> str:
        if value.constant is not None:
            self.initializers.setdefault(value.name, numpy_helper.from_array(value.constant, value.name))
        return self.renamed.get(value.name, value.name)

    def integers(self, *numbers: int) -> str:
        return self._initializer("integers_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def number(self, number: float) -> str:
        return self._initializer(f"number_{number!r}", np.array(number, np.float32))

    def _initializer(self, name: str, data: np.ndarray) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(data, name))
        return name

    def emit(self, op: str, inputs: list[str], output: str | list[str], **attributes) -> str:
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}_{len(self.nodes)}", **attributes))
        return outputs[0]


def _normalize_by_batch(w: _Writer, node: Node, x: list[str], y: str) -> None:
    # With momentum 0 the "running" outputs are the batch's own mean and biased variance. ONNX Runtime writes them over
    # the running inputs, so these must be values that no other node reads: not initializers, not the state itself.
    zero = w.number(0.0)
    seeds = [w.emit("Mul", [name, zero], f"{y}.seed_{i}") for i, name in enumerate(x[3:])]
    w.emit(
        "BatchNormalization",
        [*x[:3], *seeds],
        [w.name(value) for value in node.outputs],
        epsilon=node.attributes["eps"],
        momentum=0.0,
        training_mode=1,
    )


Rule = Callable[[_Writer, Node, list[str], str], None]


def _plain(op: str) -> Rule:
    return lambda w, node, x, y: w.emit(op, x, y)


def _compare(op: str) -> Rule:
    def rule(w: _Writer, node: Node, x: list[str], y: str) -> None:
        w.emit("Cast", [w.emit(op, x, y + ".mask")], y, to=TensorProto.FLOAT)

    return rule


def _reduce(op: str) -> Rule:
    return lambda w, node, x, y: w.emit(op, [*x, w.integers(*node.attributes["axes"])], y, keepdims=1)


def _matmul(w: _Writer, node: Node, x: list[str], y: str) -> None:
    flags = [bool(node.attributes.get(flag)) for flag in ("transpose_a", "transpose_b")]
    ranks = [len(value.shape) for value in node.inputs]
    if any(flags) and ranks == [2, 2]:
        w.emit("Gemm", x, y, transA=int(flags[0]), transB=int(flags[1]))
        return
    for i, flag in enumerate(flags):
        if flag:  # onnxruntime folds the transposition into its product
            order = [*range(ranks[i] - 2), ranks[i] - 1, ranks[i] - 2]
            x[i] = w.emit("Transpose", [x[i]], f"{y}.transposed_{i}", perm=order)
    w.emit("MatMul", x, y)


def _one_hot(w: _Writer, node: Node, x: list[str], y: str) -> None:
    values = w._initializer("off_on", np.array([0, 1], np.float32))
    w.emit("OneHot", [x[0], w.integers(node.attributes["classes"]), values], y)


def _conv(w: _Writer, node: Node, x: list[str], y: str) -> None:
    a = node.attributes
    w.emit(
        "Conv",
        x,
        y,
        strides=a["stride"],
        pads=[*a["padding"]] * 2,
        dilations=a["dilation"],
        group=a["groups"],
        kernel_shape=node.inputs[1].shape[2:],
    )


def _conv_transpose(w: _Writer, node: Node, x: list[str], y: str) -> None:
    a = node.attributes
    w.emit(
        "ConvTranspose",
        x,
        y,
        strides=a["stride"],
        pads=[*a["padding"]] * 2,
        dilations=a["dilation"],
        group=a["groups"],
        output_padding=a["output_padding"],
        kernel_shape=node.inputs[1].shape[2:],
    )


def _max_pool(w: _Writer, node: Node, x: list[str], y: str) -> None:
    a = node.attributes
    w.emit(
        "MaxPool",
        x,
        y,
        kernel_shape=a["kernel"],
        strides=a["stride"],
        pads=[*a["padding"]] * 2,
        dilations=a["dilation"],
    )


def _avg_pool(w: _Writer, node: Node, x: list[str], y: str) -> None:
    a = node.attributes
    w.emit(
        "AveragePool",
        x,
        y,
        kernel_shape=a["kernel"],
        strides=a["stride"],
        pads=[*a["padding"]] * 2,
        count_include_pad=1,
    )


RULES: dict[str, Rule] = {
    "add": _plain("Add"),
    "subtract": _plain("Sub"),
    "multiply": _plain("Mul"),
    "divide": _plain("Div"),
    "maximum": _plain("Max"),
    "relu": _plain("Relu"),
    "clamp": lambda w, n, x, y: w.emit(
        "Clip", [*x, *(w.number(n.attributes[k]) for k in ("low", "high"))], y
    ),
    "greater_equal": _compare("GreaterOrEqual"),
    "positive": lambda w, n, x, y: w.emit("HardSigmoid", x, y, alpha=1e38, beta=0.0),
    "exp": _plain("Exp"),
    "log": _plain("Log"),
    "sqrt": _plain("Sqrt"),
    "rsqrt": lambda w, n, x, y: w.emit("Reciprocal", [w.emit("Sqrt", x, y + ".root")], y),
    "to_float": lambda w, n, x, y: w.emit("Cast", x, y, to=TensorProto.FLOAT),
    "one_hot": _one_hot,
    "matmul": _matmul,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_mean": _reduce("ReduceMean"),
    "softmax": lambda w, n, x, y: w.emit("Softmax", x, y, axis=-1),
    "log_softmax": lambda w, n, x, y: w.emit("LogSoftmax", x, y, axis=-1),
    "reshape": lambda w, n, x, y: w.emit("Reshape", [*x, w.integers(*n.outputs[0].shape)], y),
    "transpose": lambda w, n, x, y: w.emit("Transpose", x, y, perm=n.attributes["permutation"]),
    "slice": lambda w, n, x, y: w.emit(
        "Slice", [*x, *(w.integers(n.attributes[k]) for k in ("start", "stop", "axis"))], y
    ),
    "concat": lambda w, n, x, y: w.emit("Concat", x, y, axis=n.attributes["axis"]),
    "pad": lambda w, n, x, y: w.emit(
        "Pad",
        [
            *x,
            w.integers(*n.attributes["begins"], *n.attributes["ends"]),
            w.number(n.attributes.get("value", 0.0)),
        ],
        y,
    ),
    "conv2d": _conv,
    "conv2d_transpose": _conv_transpose,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "normalize": lambda w, n, x, y: w.emit("BatchNormalization", x, y, epsilon=n.attributes["eps"]),
    "normalize_by_batch": _normalize_by_batch,
}


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """The model, checked by ONNX; inputs and outputs carry the graph's names, shapes and dtypes."""
    writer = _Writer()
    exposed: set[str] = set()
    for name, value in graph.outputs.items():
        # A value that is an input, or is put out twice, keeps its own name and is copied to the output.
        if value not in graph.inputs and value.constant is None and value.name not in exposed:
            writer.renamed[value.name] = name
            exposed.add(value.name)
    for node in graph.nodes:
        inputs = [writer.name(value) for value in node.inputs]
        RULES[node.operator](writer, node, inputs, writer.name(node.outputs[0]))
    for name, value in graph.outputs.items():
        if writer.name(value) != name:
            writer.emit("Identity", [writer.name(value)], name)
    model = helper.make_model(
        helper.make_graph(
            writer.nodes,
            "edgestill",
            [helper.make_tensor_value_info(v.name, TYPES[v.dtype], v.shape) for v in graph.inputs],
            [helper.make_tensor_value_info(n, TYPES[v.dtype], v.shape) for n, v in graph.outputs.items()],
            list(writer.initializers.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="edgestill",
    )
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return model
