"""Whole networks: random ones against float64 autograd, those of the corpus on the engines themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st

from edgestill.export.lowering.graph import Graph, LoweringError, run_graph
from edgestill.export.targets import onnxruntime
from edgestill.runtime.engines.registry import engine_status
from tests.support.lowering import (
    Studied,
    assert_as_exact_as_eager,
    exact_constants,
    of_the_corpus,
    place,
    run_onnx,
    studied,
    study,
)
from tests.support.networks import BEYOND_EXPORT, NETWORKS
from tests.support.random_networks import MAKERS, draw

# Shrinking takes minutes and hardly makes a network smaller; `note` and the blob say what failed.
RANDOM = settings(
    deadline=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[check for check in HealthCheck if check != HealthCheck.filter_too_much],
)
EXACT = 1e-6
"""Of a tensor's largest entry: a few of PyTorch's own kernels, as of CELU's gradient, take their numbers in float32."""


def check_random(seed: int, most_layers: int = 4) -> None:
    """The network as captured, and as lowered for ONNX Runtime, both in float64."""
    with exact_constants():
        _check_random(seed, most_layers)


def _check_random(seed: int, most_layers: int) -> None:
    drawn = draw(np.random.default_rng(seed), most_layers)
    note(f"{drawn.names} on {drawn.shape}")
    samples = {"images": torch.randn(3, *drawn.shape, generator=torch.Generator().manual_seed(seed))}
    case = study(drawn.student, samples, moves=4)
    assert all(bool(tensor.isfinite().all()) for tensor in case.eager.values())
    assume(not case.lies_at_a_jump(EXACT))
    case.check(run_graph(case.graph, case.inputs), EXACT)
    case.check(run_graph(onnxruntime.lower(case.graph), case.inputs), EXACT)


@settings(RANDOM, max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_random_network_equals_autograd(seed: int) -> None:
    check_random(seed)


@pytest.mark.long
@pytest.mark.timeout(7200)
@settings(RANDOM, max_examples=2000)
@given(seed=st.integers(0, 2**32 - 1))
def test_many_random_networks_equal_autograd(seed: int) -> None:
    check_random(seed, 7)


@pytest.mark.parametrize(("seed", "most_layers", "at_a_jump"), [(7936963, 7, True), (7936963, 2, False)])
def test_a_jump_that_rounding_decides_is_known(seed: int, most_layers: int, at_a_jump: bool) -> None:
    """The floor of what a batch normalization makes of a mean that is zero but for rounding."""
    drawn = draw(np.random.default_rng(seed), most_layers)
    assert ("detached" in drawn.names) == at_a_jump
    case = study(drawn.student, {"images": torch.randn(3, *drawn.shape)}, moves=4)
    assert case.lies_at_a_jump(EXACT) == at_a_jump


def test_random_networks_are_made_of_everything() -> None:
    counted: Counter[str] = Counter()
    for seed in range(300):
        counted.update(draw(np.random.default_rng(seed)).names)
    assert counted.keys() == MAKERS.keys()


def check_engine(name: str, run) -> None:
    """Rounding may decide a kink, on which a few seeds in a hundred lie; a wrong operator fails on every seed."""
    for seed in range(3):
        try:
            assert_as_exact_as_eager(run(studied(name, seed=seed)), studied(name, seed=seed))
            return
        except AssertionError as error:
            last = error
    raise last


@pytest.mark.contract
@pytest.mark.parametrize("name", of_the_corpus(120, "engines"))
def test_onnx_runtime_computes_a_network(name: str) -> None:
    check_engine(name, lambda case: run_onnx(onnxruntime.lower(case.graph), case.inputs))


# ExecuTorch: exporting a step takes seconds


def of_executorch() -> list:
    """Three networks in CI, some forty in `long`, by the hash of the name; small ones among the layers."""
    order = sorted(
        (n for n in NETWORKS if n not in BEYOND_EXPORT), key=lambda name: (place(name, "executorch"), name)
    )
    return [
        pytest.param(name, marks=[] if i < 3 else [pytest.mark.long, pytest.mark.timeout(900)])
        for i, name in enumerate(order[:43])
    ]


def run_executorch(graph: Graph, case: Studied, folder: Path) -> dict[str, torch.Tensor]:
    from executorch.runtime import Runtime

    from edgestill.export.targets import executorch

    lowered = executorch.lower(graph)
    record = executorch._emit_graph(lowered, folder / "graph.pte")
    assert record["inputs"] == [v.name for v in lowered.inputs] and record["outputs"] == list(lowered.outputs)
    assert record["operators"].get("xnnpack.delegate", 0) >= 1
    inputs = [case.inputs[v.name] for v in lowered.inputs]
    inputs = [t.float() if t.is_floating_point() else t for t in inputs]
    results = Runtime.get().load_program(folder / "graph.pte").load_method("forward").execute(inputs)
    return dict(zip(lowered.outputs, (t.clone() for t in results), strict=True))


@pytest.mark.contract
@pytest.mark.skipif(not engine_status("executorch").usable, reason=str(engine_status("executorch").reason))
@pytest.mark.parametrize("name", of_executorch())
def test_executorch_computes_a_network(name: str, tmp_path: Path) -> None:
    check_engine(name, lambda case: run_executorch(case.graph, case, tmp_path))


def test_an_operator_that_an_artifact_may_not_hold_is_refused() -> None:
    graph = Graph(path="perception.2")
    graph.output("y", graph.input("x", (2, 3)).apply("softplus"))
    with pytest.raises(
        LoweringError, match=r"perception\.2: the operator softplus is outside of the set"
    ) as error:
        run_onnx(graph, {"x": torch.zeros(2, 3)})
    assert error.value.hint
