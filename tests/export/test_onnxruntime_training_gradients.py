"""The gradients that onnxruntime-training makes against eager PyTorch's, by operator, all in one graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from edgestill.export.targets.onnxruntime_training import build_train_step
from edgestill.export.targets.onnxruntime_training_operators import (
    DIFFERENTIABLE,
    GradientError,
    check_gradients,
)
from edgestill.runtime.engines import onnxruntime_training as engine
from edgestill.runtime.engines import onnxruntime_training_worker as worker

needs_training_build = pytest.mark.skipif(engine.check() is not None, reason=str(engine.check()))

Node = tuple[str, list[str], list[str], dict[str, object]]
RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """`nodes` compute y from x0, x1, … and constants; `eager` does the same in PyTorch."""

    name: str
    nodes: list[Node]
    inputs: list[np.ndarray]
    eager: Callable[..., torch.Tensor]
    constants: dict[str, np.ndarray] = field(default_factory=dict)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def floats(*values: float) -> np.ndarray:
    return np.array(values if len(values) > 1 else values[0], np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def one(
    op: str, eager: Callable[..., torch.Tensor], *inputs: np.ndarray, constants=None, **attributes
) -> Case:
    constants = constants or {}
    names = [*(f"x{i}" for i in range(len(inputs))), *constants]
    label = "-".join([op, *(f"{key}{value}" for key, value in attributes.items())])
    return Case(label, [(op, names, ["y"], attributes)], list(inputs), eager, constants)


def conv(kernel: int, pad: int, stride: int, groups: int, dilation: int = 1, channels=(4, 8), size=9) -> Case:
    def eager(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, pad, dilation, groups)

    weight = normal(channels[1], channels[0] // groups, kernel, kernel)
    return one("Conv", eager, normal(2, channels[0], size, size), weight, normal(channels[1]),
               kernel_shape=[kernel] * 2, pads=[pad] * 4, strides=[stride] * 2, group=groups,
               dilations=[dilation] * 2)  # fmt: skip


def max_pool(kernel: int, stride: int, pad: int, x: np.ndarray) -> Case:
    return one("MaxPool", lambda x: F.max_pool2d(x, kernel, stride, pad), x,
               kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)  # fmt: skip


def avg_pool(kernel: int, stride: int, pad: int, count_padding: bool) -> Case:
    def eager(x):
        return F.avg_pool2d(x, kernel, stride, pad, count_include_pad=count_padding)

    return one("AveragePool", eager, normal(2, 3, 9, 9), kernel_shape=[kernel] * 2, strides=[stride] * 2,
               pads=[pad] * 4, count_include_pad=int(count_padding))  # fmt: skip


def ties(*shape: int) -> np.ndarray:
    """Zeros and ones, as images after ReLU have many: only the first maximum may take the gradient."""
    return RANDOM.integers(0, 2, shape).astype(np.float32)


def normalization_cases() -> Iterator[Case]:
    weight, bias = normal(6), normal(6)
    yield Case(
        "BatchNormalization",
        [("BatchNormalization", ["x0", "x1", "x2", "m", "v"], ["y", "bm", "bv"],
          {"training_mode": 1, "momentum": 0.0, "epsilon": 1e-5}),],
        [normal(4, 6, 5, 5), weight, bias],
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        {"m": "input", "v": "input"},
    )  # fmt: skip
    grouped = {"s": integers(4, 2, -1), "back": integers(4, 6, 5, 5)}
    yield Case(
        "GroupNorm-decomposed",
        [
            ("Reshape", ["x0", "s"], ["r"], {}), ("ReduceMean", ["r", "axis"], ["mean"], {"keepdims": 1}),
            ("Sub", ["r", "mean"], ["c"], {}), ("Mul", ["c", "c"], ["cc"], {}),
            ("ReduceMean", ["cc", "axis"], ["var"], {"keepdims": 1}), ("Add", ["var", "eps"], ["ve"], {}),
            ("Sqrt", ["ve"], ["sd"], {}), ("Reciprocal", ["sd"], ["inv"], {}),
            ("Mul", ["c", "inv"], ["n"], {}),
            ("Reshape", ["n", "back"], ["o"], {}), ("Mul", ["o", "x1"], ["p"], {}),
            ("Add", ["p", "x2"], ["y"], {}),
        ],
        [normal(4, 6, 5, 5), weight.reshape(6, 1, 1), bias.reshape(6, 1, 1)],
        lambda x, w, b: F.group_norm(x, 2, w.flatten(), b.flatten()),
        grouped | {"axis": integers(2), "eps": floats(1e-5)},
    )  # fmt: skip
    yield Case(
        "GroupNorm-by-LayerNormalization",
        [
            ("Reshape", ["x0", "s"], ["r"], {}),
            ("LayerNormalization", ["r", "ones", "zeros"], ["n", "mean", "inv"], {"axis": -1}),
            ("Reshape", ["n", "back"], ["o"], {}), ("Mul", ["o", "x1"], ["p"], {}),
            ("Add", ["p", "x2"], ["y"], {}),
        ],
        [normal(4, 6, 5, 5), weight.reshape(6, 1, 1), bias.reshape(6, 1, 1)],
        lambda x, w, b: F.group_norm(x, 2, w.flatten(), b.flatten()),
        grouped | {"ones": np.ones(75, np.float32), "zeros": np.zeros(75, np.float32)},
    )  # fmt: skip


def loss_cases() -> Iterator[Case]:
    soft = torch.softmax(torch.tensor(normal(4, 10)), 1)
    weights = floats(1, 0, 0.5, 2).reshape(4, 1)
    yield Case(
        "weighted-soft-cross-entropy",
        [("LogSoftmax", ["x0"], ["l"], {"axis": -1}), ("Mul", ["l", "t"], ["lt"], {}),
         ("ReduceSum", ["lt", "axis"], ["r"], {"keepdims": 1}), ("Mul", ["r", "w_"], ["y"], {}),],
        [normal(4, 10)],
        lambda x: -F.cross_entropy(x, soft, reduction="none")[:, None] * torch.tensor(weights),
        {"t": soft.numpy(), "axis": integers(1), "w_": weights},
    )  # fmt: skip
    yield Case(
        "kl-at-temperature",
        [("Div", ["x0", "T"], ["s"], {}), ("LogSoftmax", ["s"], ["l"], {"axis": -1}),
         ("Sub", ["lt", "l"], ["d"], {}), ("Mul", ["t", "d"], ["y"], {}),],
        [normal(4, 10)],
        lambda x: F.kl_div(F.log_softmax(x / 4, 1), soft, reduction="none"),
        {"T": floats(4), "t": soft.numpy(), "lt": soft.log().numpy()},
    )  # fmt: skip
    yield Case(
        "mse",
        [("Sub", ["x0", "t"], ["d"], {}), ("Mul", ["d", "d"], ["dd"], {}),
         ("ReduceMean", ["dd", "axis"], ["y"], {"keepdims": 0}),],
        [normal(4, 10)],
        lambda x: F.mse_loss(x, soft, reduction="none").mean(1),
        {"t": soft.numpy(), "axis": integers(1)},
    )  # fmt: skip


def activation_cases() -> Iterator[Case]:
    wide = 4 * normal(2, 3, 8, 8)
    yield one("Relu", F.relu, np.concatenate([wide.reshape(-1), np.zeros(5, np.float32)]))
    yield one("Clip", F.relu6, wide, constants={"low": floats(0), "high": floats(6)})
    yield Case(
        "hardswish",
        [("Add", ["x0", "three"], ["a"], {}), ("Clip", ["a", "low", "high"], ["g"], {}),
         ("Mul", ["x0", "g"], ["xg"], {}), ("Mul", ["xg", "sixth"], ["y"], {}),],
        [wide],
        F.hardswish,
        {"three": floats(3), "low": floats(0), "high": floats(6), "sixth": floats(1 / 6)},
    )  # fmt: skip
    yield Case(
        "residual",
        [("Relu", ["x0"], ["r"], {}), ("Mul", ["r", "x1"], ["b"], {}), ("Add", ["b", "x0"], ["y"], {})],
        [normal(3, 4), normal(3, 4)],
        lambda x, w: F.relu(x) * w + x,
    )
    yield Case(
        "mask",
        [("Greater", ["x0", "zero"], ["m"], {}), ("Cast", ["m"], ["f"], {"to": TensorProto.FLOAT}),
         ("Mul", ["x0", "f"], ["y"], {}),],
        [normal(3, 4)],
        F.relu,
        {"zero": floats(0)},
    )  # fmt: skip
    for op, eager in (("Sigmoid", torch.sigmoid), ("Tanh", torch.tanh), ("LeakyRelu", F.leaky_relu),
                      ("Exp", torch.exp), ("Neg", torch.neg), ("Abs", torch.abs),
                      ("Erf", torch.erf)):  # fmt: skip
        yield one(op, eager, normal(3, 4))
    yield one("Softmax", lambda x: F.softmax(x, 1), normal(3, 4), axis=1)
    for op, eager in (("Sqrt", torch.sqrt), ("Log", torch.log), ("Reciprocal", torch.reciprocal)):
        yield one(op, eager, np.abs(normal(3, 4)) + 0.5)


def shape_cases() -> Iterator[Case]:
    for op, eager in (("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul), ("Div", torch.div)):
        for other in ((2, 3, 4, 4), (1, 3, 1, 1), (1,)):
            yield one(op, eager, normal(2, 3, 4, 4), normal(*other))
    yield one("Max", torch.maximum, normal(3, 4), normal(3, 4))
    yield one("Min", torch.minimum, normal(3, 4), normal(3, 4))
    for axes in ((2, 3), (1,), (0, 2, 3)):
        for op, eager in (("ReduceSum", torch.sum), ("ReduceMean", torch.mean)):
            yield one(op, lambda x, f=eager, a=axes: f(x, a, keepdim=True), normal(2, 3, 4, 4),
                      constants={"axes": integers(*axes)}, keepdims=1)  # fmt: skip
    yield one("Gemm", lambda x, w, b: F.linear(x, w, b), normal(3, 4), normal(5, 4), normal(5), transB=1)
    yield one("MatMul", torch.matmul, normal(2, 4, 5), normal(2, 5, 6))
    yield one("Flatten", lambda x: x.flatten(1), normal(2, 3, 4), axis=1)
    yield one("Transpose", lambda x: x.permute(0, 2, 3, 1), normal(2, 3, 4, 5), perm=[0, 2, 3, 1])
    yield one("Reshape", lambda x: x.reshape(2, 12), normal(2, 3, 4), constants={"s": integers(2, 12)})
    yield one("Squeeze", lambda x: x.squeeze(1), normal(2, 1, 4), constants={"s": integers(1)})
    yield one("Unsqueeze", lambda x: x.unsqueeze(1), normal(2, 4), constants={"s": integers(1)})
    yield one("Concat", lambda a, b: torch.cat([a, b], 1), normal(2, 3, 4), normal(2, 2, 4), axis=1)
    cut = {"start": integers(1), "stop": integers(4), "axis": integers(1)}
    yield one("Slice", lambda x: x[:, 1:4], normal(2, 5, 4), constants=cut)
    yield one("Pad", lambda x: F.pad(x, [1, 2, 1, 2]), normal(1, 2, 4, 4),
              constants={"p": integers(0, 0, 1, 1, 0, 0, 2, 2)})  # fmt: skip
    yield one("GlobalAveragePool", lambda x: F.adaptive_avg_pool2d(x, 1), normal(2, 3, 4, 4))


CASES = [
    conv(3, 1, 1, 1), conv(3, 1, 2, 1), conv(3, 1, 2, 1, size=8), conv(1, 0, 2, 1), conv(5, 2, 1, 1),
    conv(3, 1, 1, 2), conv(3, 1, 2, 4, channels=(4, 4), size=8), conv(3, 1, 1, 4, channels=(4, 8)),
    conv(3, 1, 1, 1, dilation=2), conv(3, 0, 3, 1),
    max_pool(2, 2, 0, normal(2, 3, 9, 9)), max_pool(3, 2, 1, normal(2, 3, 9, 9)),
    max_pool(2, 2, 0, ties(2, 3, 8, 8)), max_pool(3, 2, 1, ties(2, 3, 8, 8)),
    max_pool(3, 1, 1, ties(2, 3, 8, 8)),
    avg_pool(2, 2, 0, True), avg_pool(3, 2, 1, True), avg_pool(3, 2, 1, False),
    *normalization_cases(), *loss_cases(), *activation_cases(), *shape_cases(),
]  # fmt: skip


def value(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)


def forward_of(cases: list[Case]) -> tuple[onnx.ModelProto, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One forward model whose loss is the sum over the cases of Σ y·w; its inputs; eager's gradients."""
    nodes, initializers, feeds, gradients, terms = [], [], {}, {}, []
    random = np.random.default_rng(1)  # the same weights whichever tests a process has run before
    for index, case in enumerate(cases):
        tensors = [torch.tensor(x, requires_grad=True) for x in case.inputs]
        y = case.eager(*tensors)
        weight = random.standard_normal(y.shape).astype(np.float32)
        (y * torch.tensor(weight)).sum().backward()
        at = f"{index}.{case.name}."
        for i, tensor in enumerate(tensors):
            feeds[f"{at}x{i}"], gradients[f"{at}x{i}"] = case.inputs[i], tensor.grad.numpy()
        feeds[f"{at}w"] = weight
        for name, constant in case.constants.items():
            if isinstance(constant, str):
                feeds[at + name] = np.full(case.inputs[1].shape, 7, np.float32)
            else:
                initializers.append(numpy_helper.from_array(constant, at + name))
        for op, inputs, outputs, attributes in case.nodes:
            nodes.append(helper.make_node(op, [at + n for n in inputs], [at + n for n in outputs],
                                          name=f"{at}{len(nodes)}", **attributes))  # fmt: skip
        nodes.append(helper.make_node("Mul", [f"{at}y", f"{at}w"], [f"{at}yw"], name=f"{at}Mul"))
        nodes.append(helper.make_node("ReduceSum", [f"{at}yw"], [f"{at}sum"], name=f"{at}Sum", keepdims=0))
        terms.append(f"{at}sum")
    total = terms[0]
    for index, term in enumerate(terms[1:]):
        last = index == len(terms) - 2
        nodes.append(
            helper.make_node("Add", [total, term], ["total" if last else f"total{index}"], name=f"t{index}")
        )
        total = nodes[-1].output[0]
    initializers.append(numpy_helper.from_array(integers(1), "vector"))
    nodes.append(helper.make_node("Reshape", [total, "vector"], ["loss"], name="loss"))
    graph = helper.make_graph(nodes, "cases", [value(name, array) for name, array in feeds.items()],
                              [value("loss", np.zeros(1))], initializers)  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model, feeds, gradients


def gradients_as_state(gradients: dict[str, np.ndarray]) -> onnx.ModelProto:
    """An "optimizer" that puts out the gradients themselves."""
    nodes = [helper.make_node("Identity", [f"gradient.{name}"], [f"next.{name}"]) for name in gradients]
    graph = helper.make_graph(
        nodes,
        "identity",
        [value(f"gradient.{name}", array) for name, array in gradients.items()],
        [value(f"next.{name}", array) for name, array in gradients.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(gradients of onnxruntime-training, gradients of eager PyTorch) by input."""
    forward, feeds, expected = forward_of(CASES)
    outputs = [f"next.{name}" for name in expected] + ["loss"]
    model = build_train_step(forward, list(expected), gradients_as_state(expected), outputs)
    path = tmp_path_factory.mktemp("gradients") / "step.onnx"
    path.write_bytes(model.SerializeToString())
    process = engine.WorkerProcess([str(engine.find_interpreter()), "-I", worker.__file__, "1"])
    try:
        process.call("load_state", {name: feeds[name] for name in expected})
        process.call("open", graph="step", path=str(path))
        rest = {name: array for name, array in feeds.items() if name not in expected}
        process.call(
            "run", {n: a for n, a in rest.items() if n in {i.name for i in model.graph.input}}, graph="step"
        )
        return process.call("state")[1], expected
    finally:
        process.close()


@needs_training_build
@pytest.mark.contract
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_gradient_equals_eager_pytorch(built, index: int) -> None:
    got, expected = built
    names = [name for name in expected if name.startswith(f"{index}.")]
    assert names
    for name in names:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=2e-6 * scale, err_msg=name)


REFUSED = {
    "operator without a gradient": (("HardSwish", ["x0"], ["y"], {}), "HardSwish"),
    "inference normalization": (
        ("BatchNormalization", ["x0", "x1", "x2", "m", "v"], ["y"], {}), "training_mode 1"),
    "normalization with momentum": (
        ("BatchNormalization", ["x0", "x1", "x2", "m", "v"], ["y", "a", "b"], {"training_mode": 1}),
        "momentum 0.9"),
    "normalization with one tensor for both statistics": (
        ("BatchNormalization", ["x0", "x1", "x2", "m", "m"], ["y", "a", "b"],
         {"training_mode": 1, "momentum": 0.0}), "normalise elsewhere too"),
    "average over partial windows": (
        ("AveragePool", ["x0"], ["y"], {"kernel_shape": [2, 2], "ceil_mode": 1, "count_include_pad": 1}),
        "counts"),
    "layer normalization without its statistics": (
        ("LayerNormalization", ["x0", "x1"], ["y"], {}), "all three outputs"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_gradients_are_refused_before_the_builder_sees_them(what: str) -> None:
    (op, inputs, outputs, attributes), reason = REFUSED[what]
    nodes = [helper.make_node(op, inputs, outputs, name="suspect", **attributes),
             helper.make_node("ReduceSum", ["y"], ["loss"], keepdims=0)]  # fmt: skip
    graph = helper.make_graph(nodes, "refused", [value(name, normal(2, 3)) for name in inputs], [])
    with pytest.raises(GradientError, match=reason) as caught:
        check_gradients(graph, ["x0"])
    assert "suspect" in caught.value.message
    assert caught.value.hint


def test_an_operator_beside_the_path_of_gradients_is_free() -> None:
    nodes = [helper.make_node("HardSwish", ["frozen"], ["h"]), helper.make_node("Mul", ["h", "x0"], ["y"]),
             helper.make_node("ReduceSum", ["y"], ["loss"], keepdims=0)]  # fmt: skip
    graph = helper.make_graph(nodes, "beside", [value(name, normal(2, 3)) for name in ("frozen", "x0")], [])
    check_gradients(graph, ["x0"])
    with pytest.raises(GradientError, match="HardSwish"):
        check_gradients(graph, ["frozen"])


def test_the_set_of_operators_names_real_ones() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert known >= DIFFERENTIABLE


def test_the_worker_of_the_gradients_needs_no_package_of_ours() -> None:
    source = Path(sys.modules["edgestill.export.targets.onnxruntime_training"].__file__)
    text = source.with_name("onnxruntime_training_worker.py").read_text()
    imported = {
        line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported <= {"__future__", "json", "sys", "pathlib", "onnxruntime"}
