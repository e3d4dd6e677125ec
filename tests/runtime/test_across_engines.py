"""Runs on real bundles: bit-identical after a stop on each engine, and continued by another engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.cli import main
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.engines.registry import engine_status, open_engine
from edgestill.runtime.errors import Interrupted
from edgestill.runtime.training.evaluation import evaluate
from edgestill.runtime.training.plan import Run, TrainSettings, plan
from edgestill.runtime.training.schedule import Schedule
from edgestill.runtime.training.trainer import prepare, train

pytestmark = pytest.mark.contract
ROOT = Path(__file__).parents[2]
ENGINES = ("onnxruntime", "executorch")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """A small cnn3 with BatchNorm and objective `ce`, for both engines."""
    pytest.importorskip("torch", reason="exports")
    folder = tmp_path_factory.mktemp("export") / "bundle"
    command = "export --student cnn3 --widths 4,8,8 --latent-size 8 --batch 16 --objective ce"
    subprocess.run(
        [sys.executable, "-m", "edgestill.runtime.cli", *command.split(), "--engines", ",".join(ENGINES),
         "--output", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    with Bundle.open(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(bundle: Bundle) -> Run:
    data = load_splits("cifar10-mini", bundle.input, bundle.classes).train.take(160, seed=0)
    settings = TrainSettings(epochs=2, seed=1, schedule=Schedule("cosine", 2), augmentations=("flip", "crop"))
    return plan(bundle, data, settings)


def go_on(run: Run, engine_name: str, path: Path, stop_after: int | None = None) -> list[float]:
    """Losses of the steps that one process would make before it is stopped."""
    if not engine_status(engine_name).usable:
        pytest.skip(f"{engine_name} does not work here: {engine_status(engine_name).reason}")
    engine = open_engine(run.bundle, engine_name, threads=1)
    losses = []
    try:
        first, asked = prepare(engine, run, path), iter(range(1, 1000))
        for record in train(
            engine, run, path, first_step=first, should_stop=lambda: next(asked) == stop_after
        ):
            losses.append(record.loss)
    except Interrupted:
        assert len(losses) == stop_after
    finally:
        engine.close()
    return losses


@pytest.mark.parametrize("engine_name", ENGINES)
def test_a_stopped_run_ends_with_the_same_bytes(run: Run, tmp_path: Path, engine_name: str) -> None:
    whole = go_on(run, engine_name, tmp_path / "whole.safetensors")
    parts = [
        loss
        for stop in (3, 9, None)
        for loss in go_on(run, engine_name, tmp_path / "parts.safetensors", stop)
    ]
    assert parts == whole and len(whole) == 20
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(("first", "second"), [ENGINES, ENGINES[::-1]])
def test_another_engine_goes_on(run: Run, tmp_path: Path, first: str, second: str) -> None:
    whole = go_on(run, first, tmp_path / "whole.safetensors")
    mixed = go_on(run, first, tmp_path / "mixed.safetensors", 10) + go_on(
        run, second, tmp_path / "mixed.safetensors"
    )
    np.testing.assert_allclose(mixed, whole, rtol=1e-2)
    expected, actual = (wire.load(tmp_path / f"{name}.safetensors").arrays for name in ("whole", "mixed"))
    for name, array in expected.items():
        assert np.abs(actual[name] - array).max() <= 2e-2 * max(np.abs(array).max(), 1e-3), name


def test_engines_classify_alike(run: Run, tmp_path: Path) -> None:
    go_on(run, "onnxruntime", tmp_path / "state.safetensors")
    state = run.bundle.check_state(wire.load(tmp_path / "state.safetensors").arrays)
    data = load_splits("cifar10-mini", run.bundle.input, run.bundle.classes).test
    results = {}
    for name in ENGINES:
        engine = open_engine(run.bundle, name, threads=1)
        engine.load_state(state)
        results[name] = evaluate(engine, data, run.bundle.batch, run.bundle.classes)
        engine.close()
    moved = np.abs(results["onnxruntime"].confusion - results["executorch"].confusion).sum() / 2
    assert moved <= 0.01 * results["onnxruntime"].samples
    assert json.dumps(results["executorch"].as_json())


def test_engines_predict_alike(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go_on(run, "onnxruntime", tmp_path / "state.safetensors")
    found = {}
    for name in ENGINES:
        words = f"predict {run.bundle.source} --state {tmp_path / 'state.safetensors'} --data cifar10-mini --json"
        assert main([*words.split(), "--engine", name, "--threads", "1"]) == 0
        *lines, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert last["summary"]["engine"] == name and len(lines) == last["summary"]["samples"] == 600
        found[name] = np.array([line["probabilities"] for line in lines])
    one, other = found.values()
    assert np.abs(one - other).max() <= 1e-3 and np.allclose(one.sum(axis=1), 1)
