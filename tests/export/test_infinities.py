"""Infinities on the way of finite gradients: what eager PyTorch keeps from the rest, every engine keeps from it, too.

A root's slope at zero is infinite, and a mask before it takes it out again; −∞ marks what a maximum is not to see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.lowering.graph import Graph, run_graph
from edgestill.export.students import Student
from edgestill.export.targets import executorch, native, onnxruntime
from edgestill.runtime.engines.registry import engine_status
from tests.export.test_networks import run_executorch
from tests.support.lowering import Studied, assert_alike, of_the_corpus, run_onnx, study
from tests.support.lowering import studied as networks_studied
from tests.support.native.plans import run_native
from tests.support.networks.network import Apply

SHAPE = (4, 8, 8)
Function = Callable[[torch.Tensor], torch.Tensor]


def dead(x: torch.Tensor) -> torch.Tensor:
    """A ReLU of which every other channel gives nothing but zeros, and the left half of the others."""
    return torch.relu(x - 9 * ((torch.arange(4) % 2).reshape(-1, 1, 1) + (torch.arange(8) < 4)))


def checked(x: torch.Tensor) -> torch.Tensor:
    """−∞ on the dark fields of a chess board."""
    places = torch.arange(8)
    return x.masked_fill((places + places.reshape(-1, 1)) % 2 == 0, -torch.inf)


def beside(x: torch.Tensor) -> torch.Tensor:
    """−∞ in the left half."""
    return x.masked_fill(torch.arange(8) < 4, -torch.inf)


FUNCTIONS: dict[str, Function] = {
    "root-of-relu": lambda x: torch.relu(x) ** 0.5,
    "power-of-relu": lambda x: torch.relu(x) ** 0.3,
    "root-of-clamp": lambda x: x.clamp(0, 1).sqrt(),
    "root-of-relu6": lambda x: F.relu6(x).sqrt(),
    "root-of-choice": lambda x: torch.where(x > 0, x, 0.0).sqrt(),
    "root-of-maximum": lambda x: dead(x).maximum(dead(x.flip(2))).sqrt(),
    "root-of-minimum": lambda x: dead(x).minimum(dead(x.flip(2))).sqrt(),
    "root-of-mean": lambda x: dead(x).mean((2, 3)).sqrt(),
    "root-of-largest": lambda x: dead(x).amax((2, 3)).sqrt(),
    "root-of-pooled-halves": lambda x: F.max_pool2d(dead(x), 2).sqrt(),
    "root-of-pooled-tiles": lambda x: F.max_pool2d(dead(x), 4).sqrt(),
    "root-of-overlapping": lambda x: F.max_pool2d(dead(x), 3, 2, 1).sqrt(),
    "root-of-large-overlapping": lambda x: F.max_pool2d(dead(x), 5, 2, 2).sqrt(),
    "root-of-averages": lambda x: F.avg_pool2d(dead(x), 3, 2, 1).sqrt(),
    "root-of-averaged-halves": lambda x: F.avg_pool2d(dead(x), 2).sqrt(),
    "root-of-uneven-averages": lambda x: F.adaptive_avg_pool2d(dead(x), 3).sqrt(),
    "root-of-sums": lambda x: dead(x).cumsum(3).sqrt(),
    "root-of-upsampled": lambda x: F.interpolate(dead(x), scale_factor=2).sqrt(),
    "root-of-indexed": lambda x: dead(x)[:, [3, 1, 0, 0]].sqrt(),
    "root-of-looked-up": lambda x: dead(x).index_select(2, x.detach().argmax(2).flatten()[:5]).sqrt(),
    "root-of-padded": lambda x: F.pad(dead(x), (1, 2, 1, 0)).sqrt()[:, :, 1:, 1:9],
    "masked-overlapping": lambda x: F.max_pool2d(checked(x), 3, 2),
    "masked-overlapping-padded": lambda x: F.max_pool2d(checked(x), 3, 2, 1),
    "masked-large-overlapping": lambda x: F.max_pool2d(checked(x), 5, 2, 2),
    "masked-halves": lambda x: F.max_pool2d(checked(x), 2),
    "masked-tiles": lambda x: F.max_pool2d(checked(x), 4),
    "masked-whole-windows": lambda x: F.max_pool2d(beside(x), 3, 2, 1).relu(),
    "masked-whole-halves": lambda x: F.max_pool2d(beside(x), 2).relu(),
    "masked-adaptive": lambda x: F.adaptive_max_pool2d(checked(x), 3),
    "masked-largest": lambda x: checked(x).amax(2),
    "masked-range": lambda x: checked(x).max(2).values - (-checked(-x)).min(2).values,
    "masked-maximum": lambda x: checked(x).maximum(checked(x.flip(1))).relu(),
    "masked-softmax": lambda x: checked(x).softmax(3),
    "masked-log-sum-exp": lambda x: checked(x).logsumexp(3),
    "masked-hardtanh": lambda x: F.hardtanh(checked(x)),
    "masked-elu": lambda x: F.elu(checked(x)) + F.softplus(checked(x)),
    "masked-sigmoid": lambda x: checked(x).sigmoid() + checked(x).tanh() + checked(x).exp(),
}

SHORT = ("root-of-relu", "root-of-averages", "root-of-looked-up", "masked-whole-windows", "masked-maximum")
"""Of `FUNCTIONS` for ExecuTorch in CI, where exporting takes seconds."""


class Shifted(nn.Module):
    def __init__(self, function: Function):
        super().__init__()
        self.shift, self.function = nn.Parameter(torch.zeros(SHAPE)), Apply(function)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x + self.shift)


@lru_cache(maxsize=64)
def studied(name: str) -> Studied:
    torch.manual_seed(0)
    samples = {"images": torch.randn(3, *SHAPE)}
    size = FUNCTIONS[name](samples["images"]).flatten(1).shape[1]
    head = nn.Sequential(nn.Flatten(), nn.Linear(size, 5))
    case = study(Student(Shifted(FUNCTIONS[name]), head, nn.Linear(5, 3)), samples)
    assert all(bool(tensor.isfinite().all()) for tensor in case.eager.values())
    return case


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph(name: str) -> None:
    case = studied(name)
    case.check(run_graph(case.graph, case.inputs))


def assert_bounded(graph: Graph, inputs: dict[str, torch.Tensor]) -> None:
    """Every number is as bounds.py says that it is."""
    whole = Graph(graph.inputs, graph.nodes, {v.name: v for node in graph.nodes for v in node.outputs})
    for name, tensor in run_graph(whole, inputs).items():
        value = whole.outputs[name]
        assert not value.finite or bool(tensor.isfinite().all()), f"{value.operator} is not finite"
        if value.finite and tensor.numel():
            assert float(tensor.min()) >= value.least, f"{value.operator} is below {value.least}"


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "lower",
    [lambda graph: graph, onnxruntime.lower, executorch.lower],
    ids=["captured", "onnxruntime", "executorch"],
)
def test_what_is_known_of_infinities_holds(name: str, lower: Callable[[Graph], Graph]) -> None:
    case = studied(name)
    assert_bounded(lower(case.graph), case.inputs)


@pytest.mark.parametrize("name", of_the_corpus(60, "bounds"))
def test_what_is_known_of_a_network_holds(name: str) -> None:
    case = networks_studied(name)
    assert_bounded(onnxruntime.lower(case.graph), case.inputs)
    assert_bounded(executorch.lower(case.graph), case.inputs)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet-v1", "densenet", "lstm", "vit", "transformer-har"])
def test_masks_of_ordinary_networks_multiply(name: str) -> None:
    """Which is quicker than to choose, and XNNPACK has no choice."""
    lowered = onnxruntime.lower(networks_studied(name).graph)
    masked = [node for node in lowered.nodes if node.operator == "masked"]
    assert all(node.inputs[0].finite for node in masked)
    assert "where" not in executorch.lower(networks_studied(name).graph).operators()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_onnx_runtime(name: str) -> None:
    case = studied(name)
    assert_alike(run_onnx(onnxruntime.lower(case.graph), case.inputs), case.eager, 1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_native(name: str, tmp_path: Path) -> None:
    case = studied(name)
    assert_alike(run_native(native.lower(case.graph), case.inputs, tmp_path), case.eager, 1e-5)


@pytest.mark.skipif(not engine_status("executorch").usable, reason=str(engine_status("executorch").reason))
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in FUNCTIONS]
)
def test_executorch(name: str, tmp_path: Path) -> None:
    case = studied(name)
    assert_alike(run_executorch(case.graph, case, tmp_path), case.eager, 1e-5)
