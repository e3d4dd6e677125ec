"""Step 3 of a round: against NumPy, between objectives, resumed, and refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle, InputSpec, Objective, Optimizer
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import (
    LocalResult,
    Transfer,
    own_outputs,
    parameters_of,
    train_locally,
    with_parameters,
)
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import DataError, Interrupted, StateError, TrainingError, UsageError
from tests.support.handmade_bundle import (
    BATCH,
    CHANNELS,
    CLASSES,
    LATENT,
    PARAMETERS,
    SIZE,
    reference_step,
    write_handmade_bundle,
)

SETTINGS = LocalSettings(epochs=3, learning_rate=0.02, alpha=0.4, transfer_fraction=0.375, checkpoint_every=4)
SEED = 11


@pytest.fixture(scope="module")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_handmade_bundle(tmp_path_factory.mktemp("handmade") / "lkd"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One student with each objective, of the same initial weights; `adamw` is `lkd` with AdamW."""
    folder = tmp_path_factory.mktemp("exported")
    options = ExportOptions(
        latent_size=LATENT, classes=CLASSES, batch=BATCH, widths=(3, 3, 3),
        input=InputSpec((CHANNELS, 16, 16)), engines=("onnxruntime",),
    )  # fmt: skip
    kinds = {
        "lkd": replace(options, objective=Objective("lkd")),
        "kd": replace(options, objective=Objective("kd", "mse")),
        "both": replace(options, objective=Objective("both", "mse")),
        "adamw": replace(options, objective=Objective("lkd"), optimizer=Optimizer("adamw")),
    }
    return {name: Bundle.open(export_bundle(given, folder / name)) for name, given in kinds.items()}


def images(samples: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (samples, CHANNELS, size, size), dtype=np.uint8)


def private(samples: int, size: int = SIZE) -> Dataset:
    return Dataset(images(samples, size), np.random.default_rng(1).integers(0, CLASSES, samples), ())


def outputs_on(transfer: Transfer) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(2)
    shapes = {"latents": (len(transfer), LATENT), "logits": (len(transfer), CLASSES)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


class Recording:
    """An engine that also keeps what every step was given."""

    def __init__(self, bundle: Bundle) -> None:
        self.engine = open_engine(bundle, threads=1)
        self.batches: list[dict[str, np.ndarray]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    def train_step(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append({name: array.copy() for name, array in inputs.items()})
        return self.engine.train_step(inputs)


def trained(
    bundle: Bundle,
    dataset: Dataset,
    transfer: Transfer | None = None,
    outputs: Mapping[str, np.ndarray] | None = None,
    settings: LocalSettings = SETTINGS,
    state_path: Path | None = None,
    stops: Iterable[bool] = (),
    seed: int = SEED,
    state: Mapping[str, np.ndarray] | None = None,
) -> LocalResult:
    engine, asked = open_engine(bundle, threads=1), iter(stops)
    return train_locally(
        engine, bundle, dataset, transfer, outputs, settings, seed,
        bundle.initial_state() if state is None else state, state_path, should_stop=lambda: next(asked, False),
    )  # fmt: skip


def assert_same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


def assert_close(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=1e-3, atol=2e-5, err_msg=name)


# training


def test_a_round_follows_numpy(handmade: Bundle) -> None:
    transfer = Transfer(images(7, seed=3))
    engine, dataset = Recording(handmade), private(21)
    losses: list[float] = []
    result = train_locally(
        engine, handmade, dataset, transfer, {"latents": outputs_on(transfer)["latents"]}, SETTINGS, SEED,
        handmade.initial_state(), None, on_step=lambda record: losses.append(record.loss),
    )  # fmt: skip
    state = handmade.initial_state()
    for batch, loss in zip(engine.batches, losses, strict=True):
        assert float(batch["alpha"][0]) == pytest.approx(SETTINGS.alpha)
        assert (batch["label_weights"].sum(), batch["teacher_weights"].sum()) == (5, 3)
        state, metrics = reference_step(state, batch)
        assert loss == pytest.approx(float(metrics["loss"][0]), rel=1e-4)
    # 5 private samples a batch: 5 steps an epoch
    assert (result.steps, result.samples, len(losses)) == (15, 21, 15)
    assert result.loss == pytest.approx(np.mean(losses)) and result.step_ms > 0
    assert_close(result.state, state)


def test_without_global_outputs_a_distilling_bundle_learns_what_ce_learns(
    handmade: Bundle, tmp_path: Path
) -> None:
    plain = Bundle.open(write_handmade_bundle(tmp_path / "ce", objective="ce"))
    labels_alone = trained(handmade, private(21), Transfer(images(5)))
    assert_close(labels_alone.state, trained(plain, private(21)).state)
    # a bundle that takes no teacher learns from labels, whatever the task publishes
    transfer = Transfer(images(5))
    assert_same(
        trained(plain, private(21), transfer, outputs_on(transfer)).state, trained(plain, private(21)).state
    )


def test_fewer_samples_than_a_batch(handmade: Bundle) -> None:
    transfer = Transfer(images(2, seed=3))
    for samples in (1, 4):
        result = trained(handmade, private(samples), transfer, outputs_on(transfer))
        assert (result.steps, result.samples) == (3, samples)
        assert any(np.any(result.state[name] != array) for name, array in handmade.initial_state().items())


def test_objectives_agree_where_they_mean_the_same(exported: dict[str, Bundle]) -> None:
    transfer = Transfer(images(9, 16, seed=3))
    outputs = outputs_on(transfer)
    settings = replace(SETTINGS, epochs=1)

    def end(name: str, outputs: Mapping[str, np.ndarray], **changes: float) -> dict[str, np.ndarray]:
        return trained(exported[name], private(20, 16), transfer, outputs, replace(settings, **changes)).state

    latents, logits = ({name: outputs[name]} for name in ("latents", "logits"))
    assert_close(end("both", latents), end("lkd", latents))
    assert_close(end("both", logits), end("kd", logits))
    assert_close(end("both", outputs, logit_share=0.0), end("lkd", outputs))
    assert_close(end("both", outputs, logit_share=1.0), end("kd", outputs))
    mixed = end("both", outputs)["output.weight"]
    for name in ("lkd", "kd"):
        assert np.abs(mixed - end(name, outputs)["output.weight"]).max() > 1e-4


def test_adamw_takes_what_it_knows_and_keeps_its_defaults(exported: dict[str, Bundle]) -> None:
    transfer = Transfer(images(9, 16, seed=3))
    engine = Recording(exported["adamw"])
    settings = replace(SETTINGS, learning_rate=0.003, weight_decay=0.1, epochs=1)
    train_locally(
        engine, exported["adamw"], private(8, 16), transfer, outputs_on(transfer), settings, SEED,
        exported["adamw"].initial_state(), None,
    )  # fmt: skip
    wanted = {"learning_rate": 0.003, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    numbers = {name: float(array[0]) for name, array in engine.batches[0].items() if array.shape == (1,)}
    assert numbers == pytest.approx(wanted | {"alpha": SETTINGS.alpha}) and "momentum" not in numbers


# resuming


@hypothesis.settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_a_training_stopped_anywhere_ends_with_the_same_bytes(
    handmade: Bundle, tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("resumed")
    transfer = Transfer(images(7, seed=3))
    given = (handmade, private(21), transfer, outputs_on(transfer), replace(SETTINGS, augment="flip"))
    whole = trained(*given, folder / "whole.safetensors")
    path, made = folder / "parts.safetensors", 0
    for stop in stops:
        made += stop
        if made < whole.steps:
            with pytest.raises(Interrupted):
                trained(*given, path, stops=[*[False] * (stop - 1), True])
    last = trained(*given, path)
    assert_same(last.state, whole.state)
    assert path.read_bytes() == (folder / "whole.safetensors").read_bytes()
    # found finished: nothing is trained again
    again = trained(*given, path)
    assert (again.steps, again.loss, again.step_ms) == (whole.steps, None, None)
    assert_same(again.state, whole.state)


def test_without_a_path_no_file_is_written(
    handmade: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_file = trained(handmade, private(21), state_path=tmp_path / "state.safetensors")
    monkeypatch.setattr(wire, "save", None)
    monkeypatch.chdir(tmp_path)
    assert_same(trained(handmade, private(21)).state, with_file.state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    with pytest.raises(Interrupted, match=r"^stopped after step 1 of 9$"):
        trained(handmade, private(21), stops=[True])


@pytest.mark.parametrize("change", ["seed", "state", "outputs", "transfer", "alpha", "data", "damage"])
def test_a_file_of_another_training_is_replaced(handmade: Bundle, tmp_path: Path, change: str) -> None:
    path, transfer = tmp_path / "state.safetensors", Transfer(images(7, seed=3))
    settings, seed, state, outputs, dataset = (
        SETTINGS,
        SEED,
        handmade.initial_state(),
        outputs_on(transfer),
        private(21),
    )
    with pytest.raises(Interrupted):
        trained(handmade, dataset, transfer, outputs, settings, path, [False, False, True], seed, state)
    match change:
        case "seed":
            seed += 1
        case "state":
            state["output.bias"] = state["output.bias"] + 1
        case "outputs":
            outputs["latents"] = outputs["latents"] + 1
        case "transfer":
            transfer = Transfer(images(7, seed=4))
        case "alpha":
            settings = replace(settings, alpha=0.7)
        case "data":
            dataset = private(20)
        case "damage":
            path.write_bytes(path.read_bytes()[:-1])
    result = trained(handmade, dataset, transfer, outputs, settings, path, seed=seed, state=state)
    fresh = trained(handmade, dataset, transfer, outputs, settings, None, seed=seed, state=state)
    assert_same(result.state, fresh.state)


def test_slots_go_on_from_round_to_round(handmade: Bundle) -> None:
    first = trained(handmade, private(21))
    second = trained(handmade, private(21), state=first.state)
    slots = [name for name in first.state if name.startswith("optimizer.")]
    forgotten = first.state | {name: np.zeros_like(first.state[name]) for name in slots}
    assert np.any(
        trained(handmade, private(21), state=forgotten).state["output.bias"] != second.state["output.bias"]
    )


# what is exchanged


def test_own_outputs_are_the_students(handmade: Bundle) -> None:
    transfer, state = Transfer(images(11, seed=3)), handmade.initial_state()
    engine = open_engine(handmade, threads=1)
    both = own_outputs(engine, handmade, transfer, "both")
    # the reference step's metrics are from before its update
    blank = {
        "labels": np.zeros(BATCH, np.int64), "label_weights": np.ones(BATCH), "teacher_weights": np.ones(BATCH),
        "teacher_latents": np.zeros((BATCH, LATENT)),
        **{name: np.zeros(1) for name in ("alpha", "learning_rate", "momentum", "weight_decay")},
    }  # fmt: skip
    for start in (0, 3):
        metrics = reference_step(state, blank | {"images": transfer.images[start : start + BATCH]})[1]
        for name, array in both.items():
            np.testing.assert_allclose(array[start : start + BATCH], metrics[name], rtol=1e-4, atol=1e-4)
    assert {name: array.shape for name, array in both.items()} == {
        "latents": (11, LATENT),
        "logits": (11, CLASSES),
    }
    assert_same(own_outputs(engine, handmade, transfer, "latents"), {"latents": both["latents"]})
    assert_same(own_outputs(engine, handmade, transfer, "logits"), {"logits": both["logits"]})
    parameters = own_outputs(engine, handmade, None, "parameters")
    assert_same(parameters, {name: state[name] for name in PARAMETERS})


def test_received_parameters_start_the_slots_anew(exported: dict[str, Bundle]) -> None:
    for name in ("lkd", "adamw"):
        bundle = exported[name]
        state = trained(bundle, private(20, 16)).state
        received = {key: array + 1 for key, array in parameters_of(bundle, state).items()}
        assert any(key.endswith("running_var") for key in received)
        assert not any(key.startswith("optimizer.") for key in received)
        merged = with_parameters(bundle, state, received)
        assert_same({key: merged[key] for key in received}, received)
        slots = merged.keys() - received.keys()
        assert (
            slots and all(not merged[key].any() for key in slots) and any(state[key].any() for key in slots)
        )


def test_parameters_that_do_not_fit_are_refused(handmade: Bundle) -> None:
    state = handmade.initial_state()
    good = parameters_of(handmade, state)
    for bad, message in (
        ({name: good[name] for name in list(good)[1:]}, "is missing"),
        (good | {"output.bias": np.zeros(CLASSES + 1, np.float32)}, "'output.bias' is float32"),
        (good | {"output.bias": np.zeros(CLASSES)}, "'output.bias' is float64"),
        (good | {"more": np.zeros(1, np.float32)}, "'more' is not in the bundle"),
        (good | {"optimizer.momentum.output.bias": good["output.bias"]}, "the optimizer's"),
    ):
        with pytest.raises(StateError, match=message):
            with_parameters(handmade, state, bad)


# refusals


def test_what_does_not_fit_together_is_refused(handmade: Bundle, exported: dict[str, Bundle]) -> None:
    transfer = Transfer(images(7, seed=3))
    outputs = outputs_on(transfer)
    short = {"latents": outputs["latents"][1:]}
    for arguments, error, message in (
        ((transfer, {"logits": outputs["logits"]}), UsageError, "lkd learns from latents, not from logits"),
        ((transfer, short), UsageError, r"latents of shape \[6, 5\], not \[7, 5\]"),
        ((None, outputs), UsageError, "without a transfer set"),
        (
            (Transfer(images(7, 8)), outputs),
            DataError,
            r"uint8\[3, 8, 8\], the bundle takes uint8\[3, 6, 6\]",
        ),
        ((transfer, outputs, replace(SETTINGS, epochs=0)), UsageError, "0 epochs"),
        ((transfer, outputs, replace(SETTINGS, alpha=1.5)), UsageError, "alpha 1.5 is out of range"),
        (
            (transfer, outputs, replace(SETTINGS, transfer_fraction=1.0)),
            UsageError,
            "transfer fraction of 1.0",
        ),
        ((transfer, outputs, replace(SETTINGS, augment="turn")), UsageError, "'turn'"),
    ):
        with pytest.raises(error, match=message):
            trained(handmade, private(21), *arguments)
    with pytest.raises(DataError, match="no samples to train on"):
        trained(handmade, private(0))
    with pytest.raises(UsageError, match="kd learns from logits"):
        trained(exported["kd"], private(9, 16), Transfer(images(7, 16)), {"latents": outputs["latents"]})
    with pytest.raises(StateError, match="is missing"):
        trained(handmade, private(21), state=parameters_of(handmade, handmade.initial_state()))


@pytest.mark.parametrize("with_file", [True, False])
def test_a_training_that_diverges_leaves_nothing_behind(
    handmade: Bundle, tmp_path: Path, with_file: bool
) -> None:
    path = tmp_path / "state.safetensors" if with_file else None
    with pytest.raises(TrainingError):
        diverging = replace(SETTINGS, learning_rate=1000, epochs=100, checkpoint_every=10_000)
        trained(handmade, private(21), settings=diverging, state_path=path)
    assert list(tmp_path.iterdir()) == []
