"""Exported ExecuTorch programs: what is delegated, and steps on the engine itself against eager PyTorch in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from torch import nn

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.objectives import Objective
from edgestill.export.optimizers import Optimizer
from edgestill.export.step import InputOptions
from edgestill.export.student import ARCHITECTURES
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.registry import engine_status, open_engine
from tests.support.export_networks import Case, cases, is_well_posed
from tests.support.export_oracle import Eager, assert_close, make_inputs, prepare

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(
        not engine_status("executorch").usable, reason=str(engine_status("executorch").reason)
    ),
]

# What ExecuTorch's portable kernels compute outside the pieces that XNNPACK takes: labels to one-hot rows.
PORTABLE_OPERATORS = {"_to_dim_order_copy", "arange", "eq", "view_copy"}
CNN3 = ExportOptions(widths=(4, 8, 8), latent_size=8, batch=8, engines=("executorch",))
SMALL_WIDTHS = {"cnn3": (4, 5, 6), "cnn4": (4, 5, 6, 4), "cnn5": (4, 5, 6, 4, 7)}


@dataclass(frozen=True)
class Given(ExportOptions):
    """Options whose student is at hand."""

    module: nn.Module | None = None

    def build(self) -> nn.Module:
        return self.module


def check_delegation(operators: dict[str, int]) -> None:
    portable = {name for name in operators if not name.startswith("xnnpack.")}
    assert portable <= PORTABLE_OPERATORS
    assert 1 <= operators["xnnpack.delegate"] <= 3


def check_steps(bundle: Bundle, eager: Eager, batches: list[dict[str, np.ndarray]], tolerance: float) -> None:
    """Losses, latents, parameters and running statistics of consecutive steps, and then inference."""
    engine = open_engine(bundle, "executorch", threads=1)
    try:
        for step, inputs in enumerate(batches):
            metrics = eager.train_step(inputs)
            assert_close(engine.train_step(inputs), metrics, tolerance, 0.1, f"step {step}: metrics")
            wanted = {name: a for name, a in eager.state().items() if not name.startswith("optimizer.")}
            assert_close(engine.state(), wanted, tolerance, 0.1, f"step {step}: state")
        encodings = zip(("latents", "logits"), engine.encode(batches[-1]["images"]), strict=True)
        wanted = dict(zip(("latents", "logits"), eager.encode(batches[-1]["images"]), strict=True))
        assert_close(dict(encodings), wanted, 5 * tolerance, 0.1, "inference")
    finally:
        engine.close()


def test_a_step_of_cnn3_is_at_most_three_delegated_pieces_and_right(tmp_path: Path) -> None:
    spec, student = prepare(CNN3)
    candidates = (make_inputs(spec, seed) for seed in range(100))
    batches = [next(b for b in candidates if is_well_posed(student, spec, b["images"]))]
    with Bundle.open(export_bundle(CNN3, tmp_path / "bundle")) as bundle:
        for name in ("train_step", "encode"):
            graph = bundle.graph("executorch", name)
            check_delegation(dict(graph.operators))
            assert graph.planned_memory_bytes > 0
        check_steps(bundle, Eager(student, spec), batches, 2e-3)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("normalization", ["batch", "group", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_built_in_students(name: str, normalization: str, tmp_path: Path) -> None:
    options = ExportOptions(
        student=name,
        widths=SMALL_WIDTHS.get(name, (4, 6, 8)),
        normalization=normalization,
        latent_size=6,
        classes=3,
        batch=4,
        input=InputOptions((3, 16, 16)),
        objective=Objective("kd", "kl"),
        optimizer=Optimizer("adamw" if normalization == "group" else "sgd"),
        engines=("executorch",),
    )
    spec, student = prepare(options)
    candidates = (make_inputs(spec, seed) for seed in range(100))
    batches = [next(b for b in candidates if is_well_posed(student, spec, b["images"]))]
    with Bundle.open(export_bundle(options, tmp_path / "bundle")) as bundle:
        check_delegation(dict(bundle.graph("executorch", "train_step").operators))
        check_steps(bundle, Eager(student, spec), batches, 2e-3)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(
    max_examples=6,
    deadline=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_random_students(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    spec, student = prepare(case.options, case.student)
    inputs = make_inputs(spec, case.seed)
    assume(is_well_posed(student, spec, inputs["images"]))
    note(repr(case))
    options = Given(**(vars(case.options) | {"engines": ("executorch",)}), module=student)
    with Bundle.open(export_bundle(options, tmp_path_factory.mktemp("random") / "bundle")) as bundle:
        check_delegation(dict(bundle.graph("executorch", "train_step").operators))
        check_steps(bundle, Eager(student, spec), [inputs], 2e-3)
