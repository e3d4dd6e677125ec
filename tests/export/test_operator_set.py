"""Only operators that are written down here and in the lowering ever reach an artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgestill.export.exporter import ExportOptions
from edgestill.export.lowering.graph import Graph
from edgestill.export.lowering.onnx_emitter import RULES
from edgestill.export.lowering.operators import OPERATORS
from edgestill.export.optimizers import Optimizer
from edgestill.export.step import InputOptions
from edgestill.export.student import ARCHITECTURES
from edgestill.export.targets import onnx
from tests.support.export_networks import OBJECTIVES
from tests.support.export_oracle import prepare

# Of ONNX opset 18. All are inference operators; BatchNormalization in training mode is one of them.
ONNX_OPERATORS = set(
    "Add AveragePool BatchNormalization Cast Clip Concat Conv ConvTranspose Div Exp Gemm GreaterOrEqual "
    "HardSigmoid Identity Log LogSoftmax MatMul Max MaxPool Mul OneHot Pad Reciprocal ReduceMean ReduceSum "
    "Relu Reshape Slice Softmax Sqrt Sub Transpose".split()
)
SMALL_WIDTHS = {"cnn3": (4, 5, 6), "cnn4": (4, 5, 6, 4), "cnn5": (4, 5, 6, 4, 7)}


def options(name: str, **changed: object) -> ExportOptions:
    return ExportOptions(
        student=name,
        widths=SMALL_WIDTHS.get(name, (4, 6, 8)),
        latent_size=6,
        classes=3,
        batch=4,
        input=InputOptions((3, 16, 16)),
        **changed,
    )


def test_an_operator_outside_the_set_is_refused() -> None:
    graph = Graph()
    x = graph.input("x", (2, 3))
    with pytest.raises(ValueError, match="'gather' is not in the set"):
        graph.apply("gather", x)
    assert graph.nodes == []


def test_every_operator_of_the_set_has_its_onnx_spelling() -> None:
    assert OPERATORS.keys() - RULES.keys() == set()


@pytest.mark.parametrize("normalization", ["batch", "group", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_onnx_graphs_hold_no_other_operator(name: str, normalization: str, tmp_path: Path) -> None:
    for i, objective in enumerate(OBJECTIVES):
        optimizer = Optimizer("adamw" if i % 2 else "sgd", nesterov=i == 0)
        given = options(name, normalization=normalization, objective=objective, optimizer=optimizer)
        records = onnx.emit(prepare(given)[0], tmp_path)
        for graph in records.values():
            assert graph["operators"].keys() <= ONNX_OPERATORS
            assert graph["planned_memory_bytes"] > 0
        assert (
            sum(records["encode"]["operators"].values())
            < sum(records["train_step"]["operators"].values()) / 2
        )


# graphs


def test_equal_nodes_are_shared_and_unneeded_ones_dropped() -> None:
    graph = Graph()
    x, y = graph.input("x", (2, 3)), graph.input("y", (2, 3))
    assert (x + y) is (x + y) and (x + y) is not (y + x)
    graph.output("out", (x + y) * 2.0)
    _ = y * 7.0
    graph.prune({"x", "y"})
    assert graph.operators() == {"add": 1, "multiply": 1}
    assert [value.name for value in graph.inputs] == ["x", "y"]
    graph.outputs = {"out": x * 2.0}
    graph.prune({"x", "y"})
    assert [value.name for value in graph.inputs] == ["x"]


def test_an_input_that_nothing_reads_stays_unless_it_is_optional() -> None:
    graph = Graph()
    x = graph.input("x", (2,))
    graph.input("unread", (2,))
    graph.output("out", x + 1.0)
    graph.prune(set())
    assert [value.name for value in graph.inputs] == ["x", "unread"]


def test_the_peak_of_live_memory_by_hand() -> None:
    graph = Graph()
    x = graph.input("x", (10,))
    a = x + 1.0  # 40 bytes
    b = a * 2.0  # a and b: 80 bytes, then a is done with
    c = graph.apply("concat", b, b, axis=0)  # b and c: 120 bytes
    graph.output("out", c * 3.0)  # c and out: 160 bytes
    graph.prune(set())
    assert graph.peak_live_bytes() == 160


OPERANDS = {
    "positive": [np.array([-1, -1e-30, 0, 1e-30, 2], np.float32)],
    "greater_equal": [np.array([1, 2, 3], np.float32), np.array([2, 2, 2], np.float32)],
}


@pytest.mark.parametrize(
    ("operator", "expected"), [("positive", [0, 0, 0, 1, 1]), ("greater_equal", [0, 1, 1])]
)
def test_masks_are_exact(operator: str, expected: list[float]) -> None:
    tensors = [torch.from_numpy(array) for array in OPERANDS[operator]]
    np.testing.assert_array_equal(OPERATORS[operator](*tensors).numpy(), expected)
