"""Noise of a training step: the same numbers everywhere, and a dropout student that goes on as if never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.benchmarks.workload import make_batches, read_manifest
from edgestill.coordinator.distillation.global_student import distil
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import Transfer, train_locally
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import Interrupted
from edgestill.runtime.randomness import NOISE, noise
from edgestill.runtime.training.hyperparameters import TrainingSettings
from edgestill.runtime.training.plan import Run, TrainSettings, plan
from edgestill.runtime.training.trainer import prepare, train
from tests.support.handmade_bundle import BATCH, CLASSES, LATENT, SIZE, reference_step, write_handmade_bundle

SEEDS = st.integers(0, 2**63 - 1)
STEPS = st.integers(0, 2**40)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """One block of Philox4x64-10 in plain Python. Source: Salmon et al. 2011, table 2."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 2**64 - 1
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & mask, (a >> 64) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


@pytest.mark.tiny
@given(SEEDS, STEPS, st.integers(0, 99), st.lists(st.integers(1, 5), max_size=3))
def test_noise_is_the_upper_24_bits_of_philox(seed: int, step: int, index: int, shape: list[int]) -> None:
    numbers = noise(seed, step, f"noise.{index}", tuple(shape))
    blocks = [philox((block, 0, index, step), (seed, NOISE)) for block in range(1, 2 + numbers.size // 4)]
    expected = [raw // 2**40 / 2**24 for block in blocks for raw in block]
    assert numbers.dtype == np.float32 and numbers.shape == tuple(shape)
    assert numbers.reshape(-1).tolist() == expected[: numbers.size]
    assert (numbers >= 0).all() and (numbers < 1).all()


@pytest.mark.tiny
@given(st.sets(st.tuples(SEEDS, STEPS, st.integers(0, 99)), min_size=2, max_size=5))
def test_no_two_addresses_share_their_noise(addresses: set[tuple[int, int, int]]) -> None:
    drawn = [noise(seed, step, f"noise.{index}", (8,)).tobytes() for seed, step, index in addresses]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.tiny
def test_noise_stays_what_it_is() -> None:
    """Recorded numbers: a run resumed by a newer version must not see others."""
    assert (noise(7, 3, "noise.1", (4,)) * 2**24).tolist() == GOLDEN


GOLDEN = [4523817, 7200270, 2449518, 10396519]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_handmade_bundle(tmp_path / "bundle", objective="ce", dropout=True))


def run_of(bundle: Bundle, epochs: int = 3) -> Run:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3 * BATCH, 3, SIZE, SIZE), dtype=np.uint8)
    data = Dataset(images, random.integers(0, CLASSES, len(images)), ())
    return plan(bundle, data, TrainSettings(epochs, seed=11, hyperparameters={"learning_rate": 0.02}))


def test_steps_with_dropout_follow_numpy_and_inference_has_none(tmp_path: Path) -> None:
    bundle = Bundle.open(write_handmade_bundle(tmp_path / "bundle", dropout=True))
    random, engine, state = np.random.default_rng(1), open_engine(bundle, threads=1), bundle.initial_state()
    for step in range(3):
        inputs = {
            spec.name: np.full(spec.shape, 0.3, np.float32)
            if spec.shape == (1,)
            else random.integers(0, CLASSES, spec.shape).astype(spec.numpy_dtype)
            for spec in bundle.inputs("train_step")
        }
        inputs["noise.0"] = noise(0, step, "noise.0", bundle.noise_specs[0].shape)
        state, metrics = reference_step(state, inputs)
        actual = engine.train_step(inputs)
        np.testing.assert_allclose(actual["loss"], metrics["loss"], rtol=1e-4)
        np.testing.assert_allclose(actual["latents"], metrics["latents"], rtol=1e-4, atol=1e-4)
    plain = {name: array for name, array in inputs.items() if name != "noise.0"}
    latents, _ = engine.encode(inputs["images"])
    np.testing.assert_allclose(
        latents, reference_step(engine.state(), plain)[1]["latents"], rtol=1e-4, atol=1e-4
    )


def test_noise_changes_with_the_step_and_the_seed_alone(bundle: Bundle) -> None:
    run, name = run_of(bundle), "noise.0"
    again = run_of(bundle)
    assert np.array_equal(run.inputs(4)[name], again.inputs(4)[name])
    assert not np.array_equal(run.inputs(4)[name], run.inputs(5)[name])
    assert 0.2 < (run.inputs(4)[name] < 0.25).mean() < 0.3
    batch = make_batches(read_manifest(bundle.path), seed=11)[2]
    np.testing.assert_array_equal(batch[name], run.inputs(2)[name])


KILLED = """
import os, signal, sys
from pathlib import Path
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.training.trainer import prepare, train
from tests.runtime.test_noise import run_of
run, path = run_of(Bundle.open(sys.argv[1])), Path(sys.argv[2])
engine = open_engine(run.bundle, threads=1)
for record in train(engine, run, path, first_step=prepare(engine, run, path), checkpoint_every=2):
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.contract
def test_a_killed_dropout_run_goes_on_to_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    run, whole, parts = run_of(bundle), tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    engine = open_engine(bundle, threads=1)
    list(train(engine, run, whole, first_step=prepare(engine, run, whole)))
    command = [sys.executable, "-c", KILLED, str(bundle.path), str(parts)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60).returncode == -9
    assert parts.read_bytes() != whole.read_bytes()
    first = prepare(engine, run, parts)
    assert first == 4
    list(train(engine, run, parts, first_step=first))
    assert parts.read_bytes() == whole.read_bytes()
    assert wire.load(parts).arrays.keys() == bundle.initial_state().keys()


def test_a_device_that_was_stopped_goes_on_with_the_noise_of_its_steps(
    bundle: Bundle, tmp_path: Path
) -> None:
    data, engine = run_of(bundle).plan.dataset, open_engine(bundle, threads=1)

    def train_on(path: Path | None, stop: bool = False) -> dict[str, np.ndarray]:
        how = (None, None, LocalSettings(epochs=2), 5, bundle.initial_state(), path, lambda: stop)
        return train_locally(engine, bundle, data, *how).state

    whole = train_on(None)
    for _ in range(3):
        with pytest.raises(Interrupted):
            train_on(tmp_path / "part.safetensors", stop=True)
    resumed = train_on(tmp_path / "part.safetensors")
    assert all(resumed[name].tobytes() == whole[name].tobytes() for name in whole)


def test_step_5_draws_its_noise_from_the_seed(tmp_path: Path) -> None:
    bundle = Bundle.open(write_handmade_bundle(tmp_path / "bundle", dropout=True))
    random = np.random.default_rng(2)
    transfer = Transfer(random.integers(0, 256, (BATCH, 3, SIZE, SIZE), dtype=np.uint8))
    latents = {"latents": random.standard_normal((BATCH, LATENT)).astype(np.float32)}
    engine, losses = open_engine(bundle, threads=1), []
    for seed in (4, 4, 5):  # one batch, so that the order of its samples matters to nothing but rounding
        result = distil(bundle, engine, bundle.initial_state(), transfer, latents, TrainingSettings(), seed)
        losses.append(result.loss)
    assert losses[0] == losses[1] and abs(losses[2] - losses[0]) > 1e-3 * losses[0]
