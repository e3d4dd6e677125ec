"""What the engine `native` does together: against the same graph in float64, and seen in the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph, run_graph
from edgestill.export.targets import native
from edgestill.export.targets.native_fusion import Fusion, Group
from tests.support.lowering import assert_alike
from tests.support.native.plans import run_native

SAME = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
HALVES = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def alike(graph: Graph, inputs: dict[str, torch.Tensor], folder: Path, tolerance: float = 2e-5) -> None:
    doubles = {name: value.double() for name, value in inputs.items()}
    expected = run_graph(graph, doubles)
    for threads in (1, 3):
        assert_alike(run_native(native.lower(graph), inputs, folder, threads), expected, tolerance)


@pytest.mark.parametrize("channels", [8, 16, 58, 300, 700])
def test_statistics_far_from_zero_do_not_cancel(channels: int, tmp_path: Path) -> None:
    """A naive Σx² − (Σx)²/n has no digit left of a variance 1e-8 of the mean's square."""
    graph = Graph()
    x = graph.input("x", (6, channels, 5, 5))
    mean = x.mean(0, 2, 3)
    graph.output("mean", mean)
    graph.output("variance", ((x - mean) * (x - mean)).mean(0, 2, 3))
    x = normal(0, 6, channels, 5, 5) + 1e4 * torch.sign(normal(1, 1, channels, 1, 1))
    found = run_native(native.lower(graph), {"x": x}, tmp_path)
    expected = x.double().var((0, 2, 3), correction=0, keepdim=True)
    assert float(((found["variance"] - expected) / expected).abs().max()) < 2e-3  # of what float32 holds of x − mean
    assert_alike({"m": found["mean"]}, {"m": x.double().mean((0, 2, 3), keepdim=True)}, 1e-6)


def pooled(factor: bool, overlapping: bool) -> tuple[Graph, dict[str, torch.Tensor]]:
    graph = Graph()
    x, w, s = graph.input("x", (2, 5, 12, 12)), graph.input("w", (18, 5, 3, 3)), graph.input("s", (1, 18, 1, 1))
    y = x.apply("conv2d", w, **SAME).apply("relu")
    y = y * s if factor else y
    pool = HALVES | ({"kernel": (3, 3), "padding": ((1, 1), (1, 1))} if overlapping else {})
    loss = ((y.apply("max_pool2d", **pool) * 0.5 + 1.0).apply("tanh")).sum(0, 1, 2, 3).reshape(1)
    graph.output("loss", loss)
    for name, value in gradients(graph, loss, [x, w]).items():
        graph.output("d" + name, value)
    return graph, {"x": normal(0, 2, 5, 12, 12), "w": normal(1, 18, 5, 3, 3) / 6, "s": normal(2, 1, 18, 1, 1)}


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("factor", [False, True])
def test_a_pooling_keeps_its_winners(factor: bool, overlapping: bool, tmp_path: Path) -> None:
    graph, inputs = pooled(factor, overlapping)
    alike(graph, inputs, tmp_path)
    pools = [call for call in native.make_plan(native.lower(graph)).calls if call.kernel == "pool"]
    assert len(pools) == 1 + overlapping  # side by side no gradient is written


def test_a_window_of_more_pixels_than_a_byte_counts(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", (2, 3, 20, 20))
    y = x.apply("max_pool2d", **HALVES | {"kernel": (20, 20), "stride": (20, 20)})
    graph.output("dx", gradients(graph, (y * y).sum(0, 1, 2, 3).reshape(1), [x])["x"])
    alike(graph, {"x": normal(0, 2, 3, 20, 20)}, tmp_path)


def test_cheap_steps_are_computed_again(tmp_path: Path) -> None:
    """relu(x) − mean and its mask are read forward and backward; only the image itself is kept."""
    graph, _ = pooled(False, False)
    items = Fusion(native.lower(graph)).items()
    stored = [name for item in items if isinstance(item, Group) and len(item.shape) == 4 for name in item.stored]
    assert len([name for name in stored if name.startswith(("greater", "masked"))]) <= 1


def test_an_output_that_is_two_and_one_that_is_read_again(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", (4, 33))
    y = x.apply("tanh")
    graph.output("first", y)
    graph.output("second", y)
    graph.output("turned", y.transpose(1, 0))
    graph.output("more", y.apply("matmul", y, transpose_a=False, transpose_b=True))
    alike(graph, {"x": normal(0, 4, 33)}, tmp_path)


def test_a_copy_of_many_axes(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", (2, 3, 2, 3, 2, 3, 2, 3))
    graph.output("y", x.transpose(7, 5, 3, 1, 6, 4, 2, 0).reshape(9, -1) * 1.0)
    alike(graph, {"x": normal(0, 2, 3, 2, 3, 2, 3, 2, 3)}, tmp_path)


@pytest.mark.parametrize(
    ("into", "out", "groups"), [(3, 8, 1), (8, 5, 1), (1, 1, 1), (10, 24, 2), (24, 44, 4), (7, 12, 1), (16, 26, 2)]
)
def test_few_channels(into: int, out: int, groups: int, tmp_path: Path) -> None:
    """Tiles of half a vector, last vectors that a pixel does not fill, statistics of several rows a vector, pooling."""
    graph = Graph()
    shapes = {"x": (3, into, 13, 12), "w": (out, into // groups, 3, 3), "b": (out,)}
    x, w, b = (graph.input(name, shape) for name, shape in shapes.items())
    y = x.apply("conv2d", w, b, **SAME | {"groups": groups}).apply("relu")
    mean = y.mean(0, 2, 3)
    graph.output("variance", ((y - mean) * (y - mean)).mean(0, 2, 3))
    pooled_ = y.apply("max_pool2d", **HALVES | {"kernel": (13, 2), "stride": (13, 2)}).apply("tanh")
    strided = y.apply("conv2d_transpose", w, size=(25, 23), **SAME | {"groups": groups, "stride": (2, 2)})
    loss = (strided * strided).mean(0, 1, 2, 3).reshape(1) + pooled_.sum(0, 1, 2, 3).reshape(1)
    for name, value in gradients(graph, loss, [x, w, b]).items():
        graph.output("d" + name, value)
    inputs = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    alike(graph, inputs | {"w": inputs["w"] / 6}, tmp_path)


@pytest.mark.parametrize("columns", [1, 3, 8, 10, 12, 24, 31])
def test_sums_of_few_columns(columns: int, tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", (5, columns, 21, 11))
    y = (x * 2.0).apply("tanh")
    graph.output("sum", y.sum(0, 2, 3))
    graph.output("squares", ((y - y.mean(0, 2, 3)) * (y - y.mean(0, 2, 3))).mean(0, 2, 3))
    alike(graph, {"x": normal(0, 5, columns, 21, 11)}, tmp_path)
