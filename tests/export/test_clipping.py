"""Gradients clipped by their global norm in the graph, on every engine, against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.parity.reference import ReferenceStep, rebuild_student
from edgestill.export.parity.verify import draw_batches
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer
from edgestill.runtime.engines.registry import ENGINES, engine_status, open_engine

SMALL = ExportOptions(
    widths=(4, 6, 8), latent_size=8, classes=4, batch=8, input=InputSpec((3, 16, 16)), objective=Objective("ce"),
    engines=tuple(ENGINES), freeze=("perception:1",),
)  # fmt: skip


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    options = replace(SMALL, optimizer=Optimizer(request.param, clips=True))
    with Bundle.open(export_bundle(options, tmp_path_factory.mktemp("clipped") / "bundle")) as opened:
        yield opened


def batches(bundle: Bundle, norms: list[float]) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    samples = random.integers(0, 256, (32, *bundle.input.shape), dtype=np.uint8)
    drawn = draw_batches(bundle, [samples], random.integers(0, bundle.classes, 32), random)
    # a large epsilon: with a small one, AdamW's step is the same for a gradient of any length
    given = {"epsilon": 1e-2} if bundle.optimizer.name == "adamw" else {}
    numbers = [given | {"clip_norm": norm} for norm in norms]
    return [next(drawn) | {n: np.array([value], np.float32) for n, value in some.items()} for some in numbers]


@pytest.mark.contract
@pytest.mark.parametrize("engine_name", ENGINES)
def test_steps_of_an_engine(bundle: Bundle, engine_name: str) -> None:
    """A norm that cuts much, one that cuts a little, and one that cuts nothing; frozen parameters do not count."""
    if not (status := engine_status(engine_name)).usable:
        pytest.skip(f"{engine_name} does not work here: {status.reason}")
    eager = ReferenceStep(bundle, rebuild_student(bundle), torch.float64)
    engine = open_engine(bundle, engine_name, threads=1)
    try:
        before = bundle.initial_state()
        for batch in batches(bundle, [1e-3, 0.5, 1e6]):
            engine.train_step(batch)
            eager.train_step(batch)
            found, wanted = engine.state(), eager.state()
            for name, array in wanted.items():
                # of the update, not of the tensor: a clipped one is far smaller
                update = np.abs(array - before[name]).max()
                assert np.abs(found[name] - array).max() <= 1e-3 * update + 2e-7 * np.abs(array).max(), name
            before = wanted
    finally:
        engine.close()


@pytest.mark.contract
def test_a_norm_that_is_never_reached_changes_nothing(tmp_path: Path) -> None:
    """Bit for bit on `native`; and without the option no operator is added."""
    states, operators = [], []
    for clips in (False, True):
        options = replace(SMALL, engines=("native",), optimizer=Optimizer("sgd", clips=clips))
        with Bundle.open(export_bundle(options, tmp_path / str(clips))) as bundle:
            engine = open_engine(bundle, "native", threads=1)
            for batch in batches(bundle, [1e6, 1e6]):
                engine.train_step(batch if clips else {n: a for n, a in batch.items() if n != "clip_norm"})
            states.append(engine.state())
            engine.close()
            operators.append(sum(bundle.graph("native", "train_step").operators.values()))
            manifest = json.loads((tmp_path / str(clips) / "manifest.json").read_text())
            assert manifest["format_version"] == (3 if clips else 2)
            assert ("clip_norm" in {spec.name for spec in bundle.inputs("train_step")}) is clips
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name)
    assert operators[0] < operators[1]
