"""The ExecuTorch engine against the same step in NumPy, and what it does when something does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.errors import EngineError
from tests.support.handmade_bundle import (
    BATCH,
    CLASSES,
    LATENT,
    SIZE,
    file_records,
    reference_step,
    write_manifest,
)
from tests.support.handmade_executorch import write_executorch_bundle

pytestmark = pytest.mark.contract


def random_inputs(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "images": random.integers(0, 256, (BATCH, 3, SIZE, SIZE), dtype=np.uint8),
        "labels": random.integers(0, CLASSES, BATCH),
        "label_weights": random.random(BATCH).astype(np.float32),
        "teacher_latents": random.standard_normal((BATCH, LATENT)).astype(np.float32),
        "teacher_weights": random.random(BATCH).astype(np.float32),
        "alpha": np.array([0.4], np.float32),
        "learning_rate": np.array([0.05], np.float32),
        "momentum": np.array([0.9], np.float32),
        "weight_decay": np.array([0.01], np.float32),
    }


@pytest.fixture(scope="module", params=["caller's buffers", "planned buffers"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("executorch") / "bundle"
    return Bundle.open(write_executorch_bundle(folder, planned_io=request.param == "planned buffers"))


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[Engine]:
    opened = open_engine(bundle, "executorch", threads=1)
    yield opened
    opened.close()


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_steps_follow_numpy(engine: Engine, bundle: Bundle) -> None:
    expected = bundle.initial_state()
    for seed in range(7):
        inputs = random_inputs(seed)
        if seed == 2:  # a sum of weights that is zero makes its term zero
            inputs["teacher_weights"][:] = 0
        expected, metrics = reference_step(expected, inputs)
        assert_close(engine.train_step(inputs), metrics)
        assert_close(engine.state(), expected)


def test_encode_sees_the_state_after_any_number_of_steps(engine: Engine) -> None:
    images = random_inputs(99)["images"]
    for seed in range(3):
        latents, logits = engine.encode(images)
        metrics = engine.train_step({**random_inputs(seed), "images": images})
        np.testing.assert_allclose(latents, metrics["latents"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logits, metrics["logits"], rtol=1e-5, atol=1e-5)


def test_results_are_copies_that_later_steps_leave_alone(engine: Engine) -> None:
    metrics, state = engine.train_step(random_inputs(0)), engine.state()
    before = {name: array.copy() for name, array in (metrics | state).items()}
    engine.train_step(random_inputs(1))
    engine.train_step(random_inputs(2))
    for name, array in (metrics | state).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_loaded_state_continues_bit_for_bit(engine: Engine, steps_before: int) -> None:
    engine.train_step(random_inputs(0))
    saved = engine.state()
    expected = [engine.train_step(random_inputs(seed))["loss"] for seed in (1, 2)]
    final = engine.state()
    for seed in range(steps_before):  # so that both sets of buffers get their turn
        engine.train_step(random_inputs(seed))
    engine.load_state(saved)
    np.testing.assert_array_equal(
        [engine.train_step(random_inputs(seed))["loss"] for seed in (1, 2)], expected
    )
    for name, value in engine.state().items():
        np.testing.assert_array_equal(value, final[name])


def test_state_moves_between_engines(engine: Engine, bundle: Bundle) -> None:
    other = open_engine(bundle, "onnxruntime", threads=1)
    engine.train_step(random_inputs(0))
    other.load_state(engine.state())
    assert_close(engine.train_step(random_inputs(1)), other.train_step(random_inputs(1)))
    assert_close(engine.state(), other.state())
    other.close()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": None}, "'labels' is missing"),
        ({"images": np.zeros((BATCH, 3, SIZE, SIZE), np.float32)}, "'images' is float32"),
        ({"alpha": np.float32(0.5)}, "'alpha' is float32[]"),
        ({"labels": np.zeros(BATCH + 1, np.int64)}, "'labels' is int64[9], not int64[8]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    engine: Engine, change: dict[str, np.ndarray | None], complaint: str
) -> None:
    before = engine.state()
    inputs = {name: value for name, value in {**random_inputs(0), **change}.items() if value is not None}
    with pytest.raises(EngineError) as caught:
        engine.train_step(inputs)
    assert complaint in caught.value.message
    for name, value in engine.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_closed_engine_says_so(bundle: Bundle) -> None:
    engine = open_engine(bundle, "executorch", threads=1)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.train_step(random_inputs(0))


def test_another_number_of_threads_is_refused_while_an_engine_is_open(bundle: Bundle) -> None:
    first = open_engine(bundle, "executorch", threads=1)
    first.train_step(random_inputs(0))
    with pytest.raises(EngineError, match="already runs a program with 1 thread"):
        open_engine(bundle, "executorch", threads=2)
    first.close()
    second = open_engine(bundle, "executorch", threads=2)
    second.train_step(random_inputs(0))
    second.close()


def test_a_graph_that_differs_from_the_manifest_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    subprocess.run(["cp", "-r", str(bundle.path), str(folder)], check=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    names = manifest["graphs"]["executorch"]["train_step"]["inputs"]
    names[0], names[1] = names[1], names[0]
    manifest["files"] = file_records(folder)
    write_manifest(folder, manifest)
    engine = open_engine(Bundle.open(folder), "executorch", threads=1)
    with pytest.raises(EngineError, match=r"train_step\.pte: input 0 is .*representation\.bias"):
        engine.train_step(random_inputs(0))
    engine.close()


# A fresh process, because imported modules and threads are a matter of the process.
DEVICE_SCRIPT = """
import json, os, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "executorch", "onnxruntime"):
            raise ImportError(f"a device has no {name}")

sys.meta_path.insert(0, Refuse())
import importlib.machinery, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    importlib.machinery.PathFinder.find_spec(name) if name == "executorch" else find_spec(name, package))
import numpy as np
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines import executorch
from edgestill.runtime.engines.registry import open_engine

folder, threads, inputs = sys.argv[1], int(sys.argv[2]), dict(np.load(sys.argv[3]))
engine = open_engine(Bundle.open(folder), "executorch", threads)
losses = [float(engine.train_step(inputs)["loss"][0]) for _ in range(3)]
engine.encode(inputs["images"])
count = len(os.listdir("/proc/self/task"))
print(json.dumps({"losses": losses, "threads": count, "reason": executorch.check()}))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_without_torch_trains_with_exactly_the_threads_asked_for(
    bundle: Bundle, engine: Engine, tmp_path: Path, threads: int
) -> None:
    inputs = random_inputs(5)
    np.savez(tmp_path / "inputs.npz", **inputs)
    ran = subprocess.run(
        [sys.executable, "-c", DEVICE_SCRIPT, str(bundle.path), str(threads), str(tmp_path / "inputs.npz")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    expected = [float(engine.train_step(inputs)["loss"][0]) for _ in range(3)]
    np.testing.assert_allclose(found["losses"], expected, rtol=1e-6)
    assert found["threads"] == threads
    assert found["reason"] is None
