"""The engine registry, and the ONNX Runtime engine against the same step in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.registry import ENGINES, available_engines, open_engine
from edgestill.runtime.errors import EngineError, UsageError
from tests.support.handmade_bundle import BATCH, CLASSES, LATENT, SIZE, reference_step, write_handmade_bundle


def random_inputs(seed: int, alpha: float = 0.4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "images": random.integers(0, 256, (BATCH, 3, SIZE, SIZE), dtype=np.uint8),
        "labels": random.integers(0, CLASSES, BATCH),
        "label_weights": random.random(BATCH).astype(np.float32),
        "teacher_latents": random.standard_normal((BATCH, LATENT)).astype(np.float32),
        "teacher_weights": random.random(BATCH).astype(np.float32),
        "alpha": np.array([alpha], np.float32),
        "learning_rate": np.array([0.05], np.float32),
        "momentum": np.array([0.9], np.float32),
        "weight_decay": np.array([0.01], np.float32),
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_handmade_bundle(tmp_path / "bundle"))


def test_steps_follow_numpy(bundle: Bundle) -> None:
    engine = open_engine(bundle, "onnxruntime", threads=1)
    expected = bundle.initial_state()
    for seed in range(5):
        inputs = random_inputs(seed)
        if seed == 2:  # a sum of weights that is zero makes its term zero
            inputs["teacher_weights"][:] = 0
        expected, metrics = reference_step(expected, inputs)
        actual = engine.train_step(inputs)
        for name, value in metrics.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for name, value in engine.state().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    engine.close()


def test_results_are_copies_that_later_steps_leave_alone(bundle: Bundle) -> None:
    engine = open_engine(bundle, "onnxruntime", threads=1)
    metrics, state = engine.train_step(random_inputs(0)), engine.state()
    before = {name: array.copy() for name, array in (metrics | state).items()}
    engine.train_step(random_inputs(1))
    engine.train_step(random_inputs(2))
    for name, array in (metrics | state).items():
        np.testing.assert_array_equal(array, before[name])


def test_state_loaded_again_repeats_the_steps_bit_for_bit(bundle: Bundle) -> None:
    engine = open_engine(bundle, "onnxruntime", threads=1)
    engine.train_step(random_inputs(0))
    saved = engine.state()
    first = [engine.train_step(random_inputs(seed))["loss"] for seed in (1, 2, 3)]
    after = engine.state()
    engine.load_state(saved)
    assert [engine.train_step(random_inputs(seed))["loss"] for seed in (1, 2, 3)] == first
    for name, array in engine.state().items():
        np.testing.assert_array_equal(array, after[name])


def test_encode_sees_the_current_state(bundle: Bundle) -> None:
    engine = open_engine(bundle, "onnxruntime", threads=1)
    for seed in range(3):
        inputs = random_inputs(seed)
        latents, logits = engine.encode(inputs["images"])
        metrics = engine.train_step(inputs)  # its metrics are from before the update
        np.testing.assert_allclose(latents, metrics["latents"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logits, metrics["logits"], rtol=1e-5, atol=1e-6)


def test_the_first_usable_engine_of_the_bundle_is_chosen(bundle: Bundle) -> None:
    assert open_engine(bundle).name == "onnxruntime"


def test_an_engine_that_the_bundle_lacks_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no graphs for engine executorch") as error:
        open_engine(bundle, "executorch")
    assert "--engines onnxruntime,executorch" in error.value.hint
    with pytest.raises(UsageError, match="no engine is called 'tensorrt'"):
        open_engine(bundle, "tensorrt")


def test_an_engine_that_does_not_work_says_what_to_install(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgestill.runtime.engines.onnxruntime.check", lambda: "it is broken")
    with pytest.raises(EngineError, match="it is broken") as error:
        open_engine(bundle, "onnxruntime")
    assert "pip install 'edgestill[onnxruntime]'" in error.value.hint
    with pytest.raises(EngineError, match="no engine of this bundle works here"):
        open_engine(bundle)


def test_every_engine_has_a_status() -> None:
    statuses = {status.name: status for status in available_engines()}
    assert list(statuses) == list(ENGINES)
    assert statuses["onnxruntime"].usable and statuses["onnxruntime"].version
    for status in statuses.values():
        assert status.usable == (status.reason is None)
