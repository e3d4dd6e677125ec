"""Samples of any rank and of several tensors: read, batched, trained on and refused; a student that takes two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgestill.coordinator.task.creation import make_task
from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.runtime.bundle.bundle import Bundle, InputSpec, Objective
from edgestill.runtime.cli import main
from edgestill.runtime.data.augmentation import check_augmentation
from edgestill.runtime.data.dataset import Dataset, load_splits, load_transfer_samples
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import Transfer, check_transfer, train_locally
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import DataError, EngineError, UsageError
from edgestill.runtime.training.batches import BatchPlan, TransferSet
from edgestill.runtime.training.evaluation import evaluate
from edgestill.runtime.training.teacher import TeacherOutputs, encode_all
from tests.support.sensor_and_text import CHANNELS, LENGTH, TOKENS, VOCABULARY

BATCH, CLASSES = 4, 3
WINDOWS = InputSpec((CHANNELS, LENGTH), "float32", name="windows")
WORDS = InputSpec((TOKENS,), "int64", name="tokens")


def arrays_of(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Labels that can be told from either tensor."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    windows = random.standard_normal((count, CHANNELS, LENGTH)) + 2 * labels[:, None, None]
    tokens = (labels[:, None] + random.integers(0, 2, (count, TOKENS))).astype(np.int32)
    return {"x": windows, "x.tokens": tokens, "y": labels}


def load(folder: Path, **arrays: np.ndarray) -> Dataset:
    np.savez(folder / "d.npz", **arrays)
    return load_splits(folder / "d.npz", WINDOWS, CLASSES, more=(WORDS,)).train


def test_several_tensors_are_read_selected_and_told_apart(tmp_path: Path) -> None:
    arrays = arrays_of(6)
    data = load(tmp_path, **arrays)
    windows, tokens = data.samples
    np.testing.assert_array_equal(windows, arrays["x"].astype(np.float32))
    np.testing.assert_array_equal(tokens, arrays["x.tokens"])
    assert (windows.dtype, tokens.dtype) == (np.float32, np.int64)
    part = data.select(np.array([4, 1]))
    np.testing.assert_array_equal(part.more[0], arrays["x.tokens"][[4, 1]])
    other = arrays | {"x.tokens": 1 - arrays["x.tokens"] % 2}
    assert load(tmp_path, **other).digest != data.digest
    transfer = load_transfer_samples(tmp_path / "d.npz", WINDOWS, more=(WORDS,))
    assert [array.shape for array in transfer] == [(6, CHANNELS, LENGTH), (6, TOKENS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.tokens": None}, "no array 'x.tokens'"),
        ({"x.tokens": np.zeros((5, TOKENS), int)}, "d.npz: train: tokens: 5 samples, the first tensor has 6"),
        ({"x.tokens": np.zeros((6, TOKENS))}, "tokens: samples are float64, the bundle takes int64"),
        ({"x.tokens": np.full((6, TOKENS), -1)}, "tokens: token -1 is not from 0 up"),
        ({"x.tokens": np.full((6, TOKENS), 2**63, np.uint64)}, f"token {2**63}"),
        ({"x.tokens": np.zeros((6, TOKENS + 1), int)}, "shape 6, the bundle takes 5 of int64"),
        ({"x": np.zeros((6, LENGTH, CHANNELS))}, "shape 12x3, the bundle takes 3x12 of float32"),
        ({"x": np.zeros((6, CHANNELS, LENGTH), np.uint8)}, "samples are uint8, the bundle takes float32"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    arrays = {name: array for name, array in (arrays_of(6) | change).items() if array is not None}
    with pytest.raises(DataError) as caught:
        load(tmp_path, **arrays)
    assert message in caught.value.message and caught.value.hint


def test_images_cannot_feed_several_tensors_nor_be_windows(tmp_path: Path) -> None:
    image = InputSpec((3, 32, 32), "uint8", (0.5,) * 3, (0.25,) * 3)
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="takes 2 tensors a sample") as caught:
        load_splits(tmp_path / "folder", image, 10, more=(WORDS,))
    assert "x_train.tokens" in caught.value.hint
    with pytest.raises(DataError, match=r"images cannot feed a bundle that takes float32\[3, 12\]"):
        load_splits(tmp_path / "folder", WINDOWS, 10)


@pytest.mark.parametrize("shapes", [((3, 12),), ((5,),), ((3, 2, 8, 8),), ((3, 8, 8), (3, 8, 8))])
@pytest.mark.parametrize("name", ["flip", "crop"])
def test_only_one_image_a_sample_is_augmented(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(UsageError, match=f"--augment {name}") as caught:
        check_augmentation((name,), *shapes)
    assert "leave --augment out" in caught.value.hint
    check_augmentation((), *shapes)
    check_augmentation((name,), (3, 8, 8), (5,))


def test_a_batch_mixes_all_tensors_of_private_and_transfer_samples(tmp_path: Path) -> None:
    data, other = load(tmp_path, **arrays_of(6)), load(tmp_path, **arrays_of(5, seed=1))
    outputs = TeacherOutputs.zeros(5, 2, CLASSES)
    plan = BatchPlan(
        data, BATCH, 0, transfer=TransferSet(other.images, outputs, other.more), transfer_count=1,
        teacher_sizes=(2, CLASSES), names=("windows", "tokens"),
    )  # fmt: skip
    rows = [
        {(window.tobytes(), text.tobytes()) for window, text in zip(*one.samples, strict=True)}
        for one in (data, other)
    ]
    for step in range(7):
        batch = plan.inputs(step)
        pairs = [(w.tobytes(), t.tobytes()) for w, t in zip(batch["windows"], batch["tokens"], strict=True)]
        assert set(pairs[:3]) <= rows[0] and pairs[3] in rows[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(
        "tests.support.sensor_and_text:student", latent_size=6, classes=CLASSES, batch=BATCH, input=WINDOWS,
        more_inputs=(WORDS,), objective=Objective("ce"), engines=("onnxruntime", "executorch"),
    )  # fmt: skip
    return Bundle.open(export_bundle(options, tmp_path_factory.mktemp("samples") / "bundle"))


@pytest.mark.contract
def test_two_engines_of_a_dropout_student_agree_given_the_same_noise(bundle: Bundle, tmp_path: Path) -> None:
    data = load(tmp_path, **arrays_of(24))
    settings, states = LocalSettings(epochs=2, learning_rate=0.05), []
    for name in bundle.engines:
        engine = open_engine(bundle, name, threads=1)
        result = train_locally(
            engine, bundle, data, None, None, settings, 5, bundle.initial_state(), tmp_path / name
        )
        states.append(result.state)
        found = encode_all(engine, data.images, BATCH, data.more)
        again = encode_all(engine, data.images, BATCH, data.more)
        np.testing.assert_array_equal(found.latents, again.latents)  # inference takes no noise
        with pytest.raises(EngineError, match=r"takes 2 tensors of a sample \(windows, tokens\), 1 given"):
            engine.encode(data.images[:BATCH])
        engine.close()
    for tensor, array in states[0].items():
        np.testing.assert_allclose(array, states[1][tensor], rtol=1e-3, atol=1e-4, err_msg=tensor)


@pytest.mark.contract
def test_train_evaluate_and_inspect_take_all_tensors(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = arrays_of(60)
    split = {f"{name[0]}_{part}{name[1:]}": array[rows] for name, array in arrays.items()
             for part, rows in (("train", slice(40)), ("test", slice(40, None)))}  # fmt: skip
    data, state = str(tmp_path / "d.npz"), str(tmp_path / "s.safetensors")
    np.savez(data, **split)
    train = ["train", str(bundle.path), "--data", data, "--state", state, "--epochs", "8", "--lr", "0.05"]
    assert main([*train, "--engine", "onnxruntime", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert summary["accuracy"] >= 0.8
    assert main(["evaluate", str(bundle.path), "--data", data, "--state", state, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["accuracy"]
    assert main([*train, "--augment", "flip", "--restart"]) == 2
    assert "samples of 3x12" in capsys.readouterr().err
    assert main(["inspect", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    assert "4 x 3x12 float32, tokens 5 int64" in text and "noise       64 numbers a step" in text
    assert main(["inspect", str(bundle.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["more_inputs"] == [{"name": "tokens", "shape": [TOKENS], "dtype": "int64"}]
    assert report["noise"] == [[4, 8], [4, 8]] and max(arrays["x.tokens"].ravel()) < VOCABULARY


@pytest.mark.contract
def test_a_transfer_set_holds_one_tensor_of_any_rank(bundle: Bundle, tmp_path: Path) -> None:
    tokens = np.arange(20, dtype=np.int64).reshape(4, 5)
    Transfer(tokens).save(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(Transfer.load(tmp_path / "t.safetensors").images, tokens)
    with pytest.raises(DataError, match=r"the bundle takes 2 \(windows, tokens\)"):
        check_transfer(bundle, Transfer(tokens))
    description = {
        "name": "birds",
        "bundles": [str(bundle.path)],
        "transfer": str(tmp_path / "t.safetensors"),
    }
    with pytest.raises(UsageError, match=r"takes 2 tensors a sample \(windows, tokens\)") as caught:
        make_task(description, lambda path: "0" * 64)
    assert "edgestill train" in caught.value.hint


@pytest.mark.contract
def test_evaluation_sees_every_tensor(bundle: Bundle, tmp_path: Path) -> None:
    data = load(tmp_path, **arrays_of(9))
    engine = open_engine(bundle, "onnxruntime", threads=1)
    losses = {
        evaluate(engine, one, BATCH, CLASSES).loss for one in (data, replace(data, more=(data.more[0] * 0,)))
    }
    assert len(losses) == 2
    engine.close()
