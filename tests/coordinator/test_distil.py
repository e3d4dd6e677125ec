"""Step 5: the global student's training from aggregated outputs, against NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgestill.coordinator.distillation.global_student import DistilResult, distil, evaluate_global
from edgestill.coordinator.task.task import Distil
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import DataError, Interrupted, StateError, TrainingError, UsageError
from edgestill.runtime.training.teacher import encode_all
from tests.support.handmade_bundle import (
    BATCH,
    CHANNELS,
    CLASSES,
    LATENT,
    SIZE,
    reference_step,
    write_handmade_bundle,
)

SAMPLES = 20
SETTINGS = Distil(epochs=2, learning_rate=0.02, alpha=1.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_handmade_bundle(tmp_path_factory.mktemp("handmade") / "global"))


@pytest.fixture(scope="module")
def transfer() -> Transfer:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (SAMPLES, CHANNELS, SIZE, SIZE), dtype=np.uint8)
    return Transfer(images, draw.integers(0, CLASSES, SAMPLES))


@pytest.fixture(scope="module")
def aggregated() -> dict[str, np.ndarray]:
    return {"latents": np.random.default_rng(1).standard_normal((SAMPLES, LATENT)).astype(np.float32)}


def distilled(
    bundle: Bundle, transfer: Transfer, aggregated: Mapping[str, np.ndarray], **given
) -> DistilResult:
    settings = replace(SETTINGS, **given.pop("settings", {}))
    state = given.pop("state", bundle.initial_state())
    engine = open_engine(bundle, threads=1)
    return distil(bundle, engine, state, transfer, aggregated, settings, given.pop("seed", 3), **given)


def assert_same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize(("labelled", "alpha"), [(True, 1.0), (True, 0.3), (False, 1.0), (False, 0.3)])
def test_distillation_follows_numpy(
    bundle: Bundle, transfer: Transfer, aggregated: dict[str, np.ndarray], labelled: bool, alpha: float
) -> None:
    given = transfer if labelled else Transfer(transfer.images)
    engine, seen = open_engine(bundle, threads=1), []
    step = engine.train_step
    engine.train_step = lambda inputs: (seen.append({n: a.copy() for n, a in inputs.items()}), step(inputs))[
        1
    ]
    settings = replace(SETTINGS, alpha=alpha)
    result = distil(bundle, engine, bundle.initial_state(), given, aggregated, settings, 3)
    rows = {image.tobytes(): row for row, image in enumerate(transfer.images)}
    state, losses, visited = bundle.initial_state(), [], []
    for batch in seen:
        chosen = [rows[image.tobytes()] for image in batch["images"]]
        visited += chosen
        # the aggregate's row and the label of every image, and weights as the contract has them
        inputs = batch | {
            "teacher_latents": aggregated["latents"][chosen],
            "teacher_weights": np.ones(BATCH),
            "labels": transfer.labels[chosen],
            "label_weights": np.full(BATCH, float(labelled and alpha < 1)),
            "alpha": np.array([alpha if labelled else 1.0]),
            "learning_rate": np.array([0.02]),
            "momentum": np.array([0.9]),
            "weight_decay": np.array([0.0]),
        }
        state, metrics = reference_step(state, inputs)
        losses.append(float(metrics["loss"][0]))
    assert (result.steps, len(seen)) == (6, 6) and set(visited[:24]) == set(range(SAMPLES))
    assert result.loss == pytest.approx(np.mean(losses[3:]), rel=1e-4)
    for name, array in result.state.items():
        np.testing.assert_allclose(array, state[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_outputs_are_the_new_states(
    bundle: Bundle, transfer: Transfer, aggregated: dict[str, np.ndarray]
) -> None:
    result = distilled(bundle, transfer, aggregated)
    engine = open_engine(bundle, threads=1)
    engine.load_state(result.state)
    outputs = encode_all(engine, transfer.images, BATCH)
    assert_same(result.outputs, {"latents": outputs.latents, "logits": outputs.logits})
    assert result.outputs["latents"].shape == (SAMPLES, LATENT)


def test_the_same_arguments_give_the_same_bits(
    bundle: Bundle, transfer: Transfer, aggregated: dict[str, np.ndarray]
) -> None:
    first, second = (distilled(bundle, transfer, aggregated) for _ in range(2))
    assert_same(first.state, second.state)
    assert_same(first.outputs, second.outputs)
    other = distilled(bundle, transfer, aggregated, seed=4)
    assert np.any(other.outputs["latents"] != first.outputs["latents"])


def test_the_global_student_comes_to_its_devices_outputs(
    bundle: Bundle, transfer: Transfer, tmp_path: Path
) -> None:
    teacher = Bundle.open(write_handmade_bundle(tmp_path / "teacher", seed=7))
    engine = open_engine(teacher, threads=1)
    wanted = encode_all(engine, transfer.images, BATCH).latents
    before = distilled(bundle, transfer, {"latents": wanted}, settings={"learning_rate": 0.0})
    after = distilled(bundle, transfer, {"latents": wanted}, settings={"epochs": 60})
    far, near = (np.square(result.outputs["latents"] - wanted).mean() for result in (before, after))
    assert near < 0.05 * far
    # a second round goes on from the state of the first, slots included
    again = distilled(bundle, transfer, {"latents": wanted}, state=after.state)
    assert again.loss < before.loss / 10


def test_a_deadline_ends_it(bundle: Bundle, transfer: Transfer, aggregated: dict[str, np.ndarray]) -> None:
    asked = iter([False, True])
    with pytest.raises(Interrupted, match="stopped after step 2 of 6"):
        distilled(bundle, transfer, aggregated, should_stop=lambda: next(asked))


def test_what_does_not_fit_is_refused(
    bundle: Bundle, transfer: Transfer, aggregated: dict[str, np.ndarray], tmp_path: Path
) -> None:
    plain = Bundle.open(write_handmade_bundle(tmp_path / "ce", objective="ce"))
    small = Transfer(np.zeros((SAMPLES, 1, SIZE, SIZE), np.uint8))
    for arguments, changes, error, message in (
        ((plain, transfer, aggregated), {}, UsageError, "objective ce takes no teacher"),
        (
            (bundle, transfer, {"logits": aggregated["latents"][:, :CLASSES]}),
            {},
            UsageError,
            "learns from latents",
        ),
        ((bundle, transfer, {"latents": aggregated["latents"][1:]}), {}, UsageError, "latents of shape"),
        ((bundle, small, aggregated), {}, DataError, "the bundle takes"),
        ((bundle, transfer, aggregated), {"settings": {"epochs": 0}}, UsageError, "0 epochs"),
        (
            (bundle, transfer, aggregated),
            {"settings": {"alpha": 2.0}},
            UsageError,
            "alpha 2.0 is out of range",
        ),
        ((bundle, transfer, aggregated), {"state": {}}, StateError, "global student's state"),
        (
            (bundle, transfer, aggregated),
            {"settings": {"learning_rate": 1000.0, "epochs": 50}},
            TrainingError,
            "loss|finite",
        ),
    ):
        with pytest.raises(error, match=message):
            distilled(*arguments, **changes)


def test_evaluation_against_numpy(bundle: Bundle, transfer: Transfer) -> None:
    engine = open_engine(bundle, threads=1)
    engine.load_state(bundle.initial_state())
    logits = encode_all(engine, transfer.images, BATCH).logits.astype(np.float64)
    found = evaluate_global(bundle, engine, bundle.initial_state(), transfer)
    right = logits.argmax(axis=1) == transfer.labels
    assert found.accuracy == pytest.approx(right.mean())
    assert found.per_class == pytest.approx([right[transfer.labels == k].mean() for k in range(CLASSES)])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.loss == pytest.approx(
        -np.log(probabilities[np.arange(SAMPLES), transfer.labels]).mean(), rel=1e-4
    )
    for labels in (None, np.full(SAMPLES, CLASSES), np.full(SAMPLES, -1)):
        with pytest.raises(UsageError, match="labels"):
            evaluate_global(bundle, engine, bundle.initial_state(), Transfer(transfer.images, labels))
