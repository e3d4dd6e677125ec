"""A lowered graph as an ONNX model, operator by operator (https://onnx.ai/onnx/operators/, opset 18)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgestill.export.lowering.graph import Graph, LoweringError, Node, Value

OPSET = 18
MICROSOFT = "com.microsoft"
IR_VERSION = 9  # the newest that onnxruntime-training 1.19 reads
TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}


class Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.renamed: dict[str, str] = {}
        self.types: list[onnx.ValueInfoProto] = []  # of values whose operator infers none
        self.counted: Counter[str] = Counter()
        self.masks: dict[str, str] = {}  # values that are 1 or 0, and the truth values that they are made of

    def name(self, value: Value) -> str:
        if value.constant is not None:
            self.initializers.setdefault(value.name, numpy_helper.from_array(value.constant, value.name))
        return self.renamed.get(value.name, value.name)

    def mask(self, value: Value) -> str:
        """Truth values of a mask, without a detour over numbers where a comparison made them."""
        name = self.name(value)
        if value.constant is not None:
            return self._initializer(name + ".truth", value.constant != 0)
        if name not in self.masks:
            self.masks[name] = self.emit("Cast", [name], name + ".truth", to=TensorProto.BOOL)
        return self.masks[name]

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


def _batch_norm(w: Writer, node: Node, x: list[str], y: str) -> None:
    # With momentum 0 the "running" outputs are the batch's own mean and biased variance. ONNX Runtime writes them over
    # the running inputs, so these must be values that no other node reads: not initializers, not the state itself.
    zero = w.number(0.0)
    if any(value.constant is not None for value in node.inputs[1:]):
        source = w.emit("ReduceSum", [x[0], w.integers(0, 2, 3)], f"{y}.source", keepdims=0)
        seeds = [w.emit("Mul", [source, zero], f"{y}.seed_0"), w.emit("Sub", [source] * 2, f"{y}.seed_1")]
    else:
        seeds = [w.emit("Mul", [name, zero], f"{y}.seed_{i}") for i, name in enumerate(x[1:])]
    w.emit(
        "BatchNormalization",
        [*x, *seeds],
        [w.name(value) for value in node.outputs],
        epsilon=node.attributes["eps"],
        momentum=0.0,
        training_mode=1,
    )


def _standardize(w: Writer, node: Node, x: list[str], y: str) -> None:
    ones = w._initializer(f"ones_{node.inputs[0].shape[-1]}", np.ones(node.inputs[0].shape[-1], np.float32))
    outputs = [y, y + ".mean", w.name(node.outputs[1])]
    w.emit("LayerNormalization", [*x, ones], outputs, axis=-1, epsilon=node.attributes["eps"])


Rule = Callable[[Writer, Node, list[str], str], None]


def _plain(op: str, **attributes: object) -> Rule:
    """The operands as they are; attributes are numbers, or what is made of the node."""

    def rule(w: Writer, node: Node, x: list[str], y: str) -> None:
        w.emit(op, x, y, **{key: value(node) if callable(value) else value for key, value in attributes.items()})

    return rule


def _with_integers(op: str, *names: str, **attributes: object) -> Rule:
    """Attributes of the node, a whole number or some each, as further inputs."""

    def rule(w: Writer, node: Node, x: list[str], y: str) -> None:
        numbers = [np.atleast_1d(node.attributes[name]).tolist() for name in names]
        w.emit(op, [*x, *(w.integers(*those) for those in numbers)], y, **attributes)

    return rule


def _compare(op: str) -> Rule:
    def rule(w: Writer, node: Node, x: list[str], y: str) -> None:
        w.masks[y] = w.emit(op, x, y + ".truth")
        if w.counted[node.outputs[0].name]:
            w.emit("Cast", [w.masks[y]], y, to=TensorProto.FLOAT)

    return rule


def _where(w: Writer, node: Node, x: list[str], y: str) -> None:
    w.emit("Where", [w.mask(node.inputs[0]), *x[1:]], y)


def _by_truth(node: Node) -> bool:
    """Whether a `masked` asks what is true. Where it may, it multiplies, which is quicker; but 0·∞ is NaN."""
    return not node.inputs[0].finite


def _masked(w: Writer, node: Node, x: list[str], y: str) -> None:
    if _by_truth(node):
        w.emit("Where", [w.mask(node.inputs[1]), x[0], w.number(0.0)], y)
    else:
        w.emit("Mul", x, y)


def _matmul(w: Writer, node: Node, x: list[str], y: str) -> None:
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


def _one_hot(w: Writer, node: Node, x: list[str], y: str) -> None:
    values = w._initializer("off_on", np.array([0, 1], np.float32))
    w.emit("OneHot", [x[0], w.integers(node.attributes["classes"]), values], y)


def sides(padding) -> list[int]:
    """((top, bottom), (left, right)) → ONNX's begins, then ends."""
    return [side[i] for i in range(2) for side in padding]


def convolution(node: Node, kernel: tuple[int, int]) -> dict:
    """ONNX's attributes of a convolution."""
    a = node.attributes
    names = {"strides": a["stride"], "pads": sides(a["padding"]), "dilations": a["dilation"]}
    return names | {"group": a["groups"], "kernel_shape": kernel}


def _conv_transpose(w: Writer, node: Node, x: list[str], y: str) -> None:
    a, kernel = node.attributes, node.inputs[1].shape[2:]
    left_over = [
        a["size"][i]
        - ((node.inputs[0].shape[2 + i] - 1) * a["stride"][i] - sum(a["padding"][i]))
        - (a["dilation"][i] * (kernel[i] - 1) + 1)
        for i in range(2)
    ]
    w.emit("ConvTranspose", x, y, output_padding=left_over, **convolution(node, kernel))


def pooling(node: Node) -> dict:
    """ONNX's attributes of a pooling."""
    a = node.attributes
    sizes = {"kernel_shape": a["kernel"], "strides": a["stride"], "pads": sides(a["padding"])}
    return sizes | ({"dilations": a["dilation"]} if "dilation" in a else {})


def _clip(w: Writer, node: Node, x: list[str], y: str) -> None:
    bounds = [node.attributes[key] for key in ("low", "high")]
    w.emit("Clip", [*x, *(w.number(bound) if np.isfinite(bound) else "" for bound in bounds)], y)


def _pad(w: Writer, node: Node, x: list[str], y: str) -> None:
    a = node.attributes
    w.emit("Pad", [*x, w.integers(*a["begins"], *a["ends"]), w.number(a["value"])], y)


def _scatter_add(w: Writer, node: Node, x: list[str], y: str) -> None:
    rows, axis, size = node.inputs[0], node.attributes["axis"], node.attributes["size"]
    shape = (*rows.shape[:axis], size, *rows.shape[axis + 1 :])
    zeros = w.emit("ConstantOfShape", [w.integers(*shape)], y + ".zeros")
    column = w.emit("Reshape", [x[1], w.integers(*(-1 if i == axis else 1 for i in range(rows.rank)))], y + ".column")
    places = w.emit("Expand", [column, w.integers(*rows.shape)], y + ".places")
    w.emit("ScatterElements", [zeros, places, x[0]], y, axis=axis, reduction="add")


def _axis(node: Node) -> int:
    return node.attributes["axis"]


RULES: dict[str, Rule] = {
    "add": _plain("Add"),
    "subtract": _plain("Sub"),
    "multiply": _plain("Mul"),
    "divide": _plain("Div"),
    "maximum": _plain("Max"),
    "minimum": _plain("Min"),
    "relu": _plain("Relu"),
    "clamp": _clip,
    "abs": _plain("Abs"),
    "exp": _plain("Exp"),
    "log": _plain("Log"),
    "sqrt": _plain("Sqrt"),
    "rsqrt": lambda w, n, x, y: w.emit("Reciprocal", [w.emit("Sqrt", x, y + ".root")], y),
    "power": lambda w, n, x, y: w.emit("Pow", [*x, w.number(n.attributes["exponent"])], y),
    "erf": _plain("Erf"),
    "tanh": _plain("Tanh"),
    "sigmoid": _plain("Sigmoid"),
    "sin": _plain("Sin"),
    "cos": _plain("Cos"),
    "atan": _plain("Atan"),
    "floor": _plain("Floor"),
    "greater": _compare("Greater"),
    "greater_equal": _compare("GreaterOrEqual"),
    "equal": _compare("Equal"),
    "where": _where,
    "masked": _masked,
    "to_float": _plain("Cast", to=TensorProto.FLOAT),
    "to_integer": _plain("Cast", to=TensorProto.INT64),
    "reduce_sum": _with_integers("ReduceSum", "axes", keepdims=1),
    "reduce_mean": _with_integers("ReduceMean", "axes", keepdims=1),
    "reduce_max": _with_integers("ReduceMax", "axes", keepdims=1),
    "argmax": _plain("ArgMax", axis=_axis, keepdims=1),
    "matmul": _matmul,
    "softmax": _plain("Softmax", axis=-1),
    "log_softmax": _plain("LogSoftmax", axis=-1),
    "standardize": _standardize,
    "reshape": _with_integers("Reshape", "shape"),
    "transpose": _plain("Transpose", perm=lambda node: node.attributes["permutation"]),
    "slice": _with_integers("Slice", "start", "stop", "axis", "step"),
    "concat": _plain("Concat", axis=_axis),
    "pad": _pad,
    "expand": _with_integers("Expand", "shape"),
    "gather": _plain("Gather", axis=_axis),
    "scatter_add": _scatter_add,
    "one_hot": _one_hot,
    "conv2d": lambda w, n, x, y: w.emit("Conv", x, y, **convolution(n, n.inputs[1].shape[2:])),
    "conv2d_transpose": _conv_transpose,
    "max_pool2d": lambda w, n, x, y: w.emit("MaxPool", x, y, **pooling(n)),
    "avg_pool2d": lambda w, n, x, y: w.emit("AveragePool", x, y, count_include_pad=1, **pooling(n)),
    "normalize": lambda w, n, x, y: w.emit("BatchNormalization", x, y, epsilon=n.attributes["eps"]),
    "batch_norm": _batch_norm,
}


def _read_as_numbers(graph: Graph) -> Counter[str]:
    """How often each value is read other than as a mask."""
    counted = Counter(value.name for value in graph.outputs.values())
    for node in graph.nodes:
        masks = {"where": node.inputs[:1], "masked": node.inputs[1:] if _by_truth(node) else ()}
        counted.update(v.name for v in node.inputs if v not in masks.get(node.operator, ()))
    return counted


def write(graphs: Mapping[str, Graph], folder: Path, more_rules: Mapping[str, Rule] = {}) -> dict[str, dict]:  # noqa: B006
    """Each graph as a file of its name in the folder; returns what the manifest says of it."""
    records = {}
    for name, graph in graphs.items():
        model = to_onnx(graph, more_rules)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        records[name] = {
            "file": f"{name}.onnx",
            "inputs": [value.name for value in graph.inputs],
            "outputs": list(graph.outputs),
            "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
            "planned_memory_bytes": None if more_rules else graph.peak_live_bytes(),
        }
    return records


def to_onnx(graph: Graph, more_rules: Mapping[str, Rule] = {}) -> onnx.ModelProto:  # noqa: B006 - never written
    """The model, checked by ONNX; inputs and outputs carry the graph's names, shapes and dtypes."""
    writer = Writer()
    exposed: set[str] = set()
    for name, value in graph.outputs.items():
        # A value that is an input, or is put out twice, keeps its own name and is copied to the output.
        if value not in graph.inputs and value.constant is None and value.name not in exposed:
            writer.renamed[value.name] = name
            exposed.add(value.name)
    writer.counted = _read_as_numbers(graph)
    rules = {**RULES, **more_rules}
    for node in graph.nodes:
        inputs = [writer.name(value) for value in node.inputs]
        if node.operator not in rules:
            raise LoweringError(
                f"{node.path}: the operator {node.operator} is outside of the set of an ONNX artifact",
                hint="the engine's rewrites must replace it (docs/extending.md)",
            )
        rules[node.operator](writer, node, inputs, writer.name(node.outputs[0]))
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
            value_info=writer.types,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), *([helper.make_opsetid(MICROSOFT, 1)] if more_rules else [])],
        producer_name="edgestill",
    )
    model.ir_version = IR_VERSION
    if not more_rules:  # the checker knows no other domain's operators
        onnx.checker.check_model(model, full_check=True)
    return model
