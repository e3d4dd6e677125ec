"""The Python API: docs/python.md as it stands, and what the page promises."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edgestill
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import DataError, EngineError, StateError, UsageError
from edgestill.runtime.opened_bundle import OpenedBundle
from edgestill.runtime.training.trainer import StepRecord
from tests.support.handmade_bundle import BATCH, CHANNELS, CLASSES, LATENT, SIZE, write_handmade_bundle

MINE = """
from edgestill.export.students import ARCHITECTURES, StudentOptions

def make(latent_size=6):
    return ARCHITECTURES["cnn3"](StudentOptions((3, 16, 16), latent_size, 3, (2, 2, 2)))
"""
PAGE = Path(__file__).resolve().parent.parent / "docs/python.md"


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, CHANNELS, SIZE, SIZE), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count) % CLASSES


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[OpenedBundle]:
    with edgestill.open(write_handmade_bundle(tmp_path / "ce", objective="ce"), threads=1) as opened:
        yield opened


@pytest.mark.contract
def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    y = np.arange(30) % 10
    np.savez(tmp_path / "photos.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    assert "<instance:LeafNet of leaf-bundle on onnxruntime, objective ce>" in capsys.readouterr().out
    with Bundle.open("leaf-bundle") as bundle:
        assert (bundle.latent_size, bundle.classes) == (32, 10)


def test_the_page_names_every_member_and_setting() -> None:
    text = PAGE.read_text(encoding="utf-8")
    members = [name for name in vars(OpenedBundle) if not name.startswith("_")]
    assert members and all(f"`.{name}" in text for name in members)
    settings = OpenedBundle.steps.__kwdefaults__
    assert settings and all(f"`{name}`" in text for name in settings)


def test_nothing_imports_torch_before_an_export() -> None:
    script = (
        "import sys, edgestill; assert callable(edgestill.export) and callable(edgestill.open); "
        "import edgestill.export; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_training_is_that_of_the_command_and_goes_on_from_the_state(plain: OpenedBundle) -> None:
    seen: list[StepRecord] = []
    records = plain.train((images(20), labels(20)), epochs=2, learning_rate=0.01, progress=seen.append)
    assert [record.step for record in records] == list(range(1, 7)) and seen == records
    after = plain.state()
    again = plain.train((images(20), labels(20)), epochs=2, learning_rate=0.01)
    assert again[0].loss < records[0].loss
    plain.load_state(plain.bundle.initial_state())
    plain.train((images(20), labels(20)), epochs=2, learning_rate=0.01)
    assert all((plain.state()[name] == array).all() for name, array in after.items())


def test_a_checkpoint_is_gone_on_from(plain: OpenedBundle, tmp_path: Path) -> None:
    data, path = (images(20), labels(20)), tmp_path / "run.safetensors"
    initial = plain.state()
    plain.train(data, epochs=2)
    whole = plain.state()
    plain.load_state(initial)
    for record in plain.steps(data, epochs=2, checkpoint=path, checkpoint_every=1):
        if record.step == 2:
            break
    plain.load_state(initial)
    rest = plain.train(data, epochs=2, checkpoint=path)
    assert [record.step for record in rest] == [3, 4, 5, 6]
    assert all((plain.state()[name] == array).all() for name, array in whole.items())


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, 2 * BATCH + 3])
def test_any_number_of_samples_is_predicted(plain: OpenedBundle, count: int) -> None:
    given = images(count, seed=count)
    latents, logits = plain.predict(given)
    assert latents.shape == (count, LATENT) and logits.shape == (count, CLASSES)
    engine = open_engine(plain.bundle, threads=1)
    for sample, latent in zip(given, latents, strict=True):  # one by one, as an oracle for the batching
        np.testing.assert_allclose(
            engine.encode(np.stack([sample] * BATCH))[0][0], latent, rtol=1e-5, atol=1e-6
        )
    engine.close()


def test_classes_are_the_largest_logits_with_their_softmax(plain: OpenedBundle) -> None:
    given = images(5)
    logits = plain.predict(given).logits.astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = plain.classify(given)
    assert [(one.sample, one.class_name) for one in found] == [
        (str(place), str(row.argmax())) for place, row in enumerate(shares)
    ]
    np.testing.assert_allclose([one.probability for one in found], shares.max(axis=1), rtol=1e-6)


def test_pictures_of_another_size_are_scaled_if_asked_to(plain: OpenedBundle, tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(images(1)[0].transpose(1, 2, 0))
    picture.resize((3 * SIZE, 3 * SIZE), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    picture.save(tmp_path / "small.png")
    with pytest.raises(DataError, match="large.png"):
        plain.classify(tmp_path / "large.png")
    with edgestill.open(plain.bundle.source, threads=1, resize=True) as scaling:
        large, small = scaling.classify(tmp_path)
    assert (Path(large.sample).name, Path(small.sample).name) == ("large.png", "small.png")
    assert [small] == plain.classify(tmp_path / "small.png")


def test_evaluation_against_predictions(plain: OpenedBundle, tmp_path: Path) -> None:
    x, y = images(30), labels(30)
    right = plain.predict(x).logits.argmax(axis=1) == y
    assert plain.evaluate((x, y)).accuracy == pytest.approx(right.mean())
    np.savez(tmp_path / "d.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    assert plain.evaluate(tmp_path / "d.npz").accuracy == pytest.approx(right[20:].mean())


def test_states_are_files_and_arrays(plain: OpenedBundle, tmp_path: Path) -> None:
    plain.train((images(9), labels(9)))
    path = plain.save(tmp_path / "s.safetensors")
    state = plain.state()
    assert wire.load(path).arrays.keys() == state.keys()
    with edgestill.open(plain.bundle.source) as other:
        other.load_state(path)
        assert all((other.state()[name] == array).all() for name, array in state.items())
        other.load_state(plain.bundle.initial_state())
        assert any((other.state()[name] != array).any() for name, array in state.items())
        with pytest.raises(StateError, match="is missing"):
            other.load_state({})


def test_a_teacher_is_a_bundle_a_name_or_arrays(tmp_path: Path) -> None:
    student, teacher = (write_handmade_bundle(tmp_path / name, seed=i) for i, name in enumerate("st"))
    data, transfer, states = (images(12), labels(12)), images(10, seed=1), []
    with edgestill.open(teacher, threads=1) as opened:
        state = opened.save(tmp_path / "t.safetensors")
        latents = {"latents": opened.predict(data[0]).latents}
        for given in (opened, teacher, f"{teacher}:{state}"):
            with edgestill.open(student, threads=1) as one:
                one.train(data, teacher=given, transfer=transfer, transfer_fraction=0.25, alpha=0.8)
                states.append(one.state())
    assert all((one[name] == states[0][name]).all() for one in states for name in one)
    with edgestill.open(student, threads=1) as one:
        one.train(data, teacher=latents)
        one.train(data, alpha=0.0)  # labels alone
        with pytest.raises(UsageError, match="needs a teacher"):
            one.train(data)
        with pytest.raises(UsageError, match="given as arrays, of the data alone"):
            one.train(data, teacher=latents, transfer=transfer)


def test_mistakes_are_named(plain: OpenedBundle, tmp_path: Path) -> None:
    for data, error, message in (
        ((images(4), labels(3)), DataError, "not 4 integers"),
        ((images(4)[:, :1], labels(4)), DataError, "data: samples have shape"),
        (((images(4), images(4)), labels(4)), DataError, "2 tensors, the bundle takes 1"),
        (images(4), UsageError, "give a path, or samples and labels|data of type ndarray"),
        ("absent.npz", UsageError, "no data called"),
    ):
        with pytest.raises(error, match=message):
            plain.train(data)
    with pytest.raises(UsageError, match="takes no temperature"):
        plain.train((images(4), labels(4)), temperature=1.0)
    with pytest.raises(UsageError, match="no hyperparameter is called 'lr'"):
        plain.train((images(4), labels(4)), lr=1.0)
    with pytest.raises(UsageError, match="no graphs for engine executorch"):
        edgestill.open(plain.bundle.source, engine="executorch")
    plain.close()
    with pytest.raises(EngineError, match="closed"):
        plain.predict(images(4))


@pytest.mark.contract
def test_instances_factories_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from edgestill.export.lowering.graph import LoweringError
    from edgestill.export.students import ARCHITECTURES, StudentOptions, build_student

    small = {"input_shape": (3, 16, 16), "batch": 4, "engines": ("onnxruntime",), "objective": "ce"}
    module = ARCHITECTURES["cnn3"](StudentOptions((3, 16, 16), 7, 5, (2, 3, 4)))
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with edgestill.export(module, tmp_path / "instance", **small) as opened:
        bundle = opened.bundle
        assert (bundle.student.name, bundle.latent_size, bundle.classes) == ("instance:Student", 7, 5)
        state = opened.state()
        assert all((state[name] == tensor.numpy()).all() for name, tensor in weights.items() if name in state)
        opened.train((np.zeros((8, 3, 16, 16), np.uint8), np.arange(8) % 5))
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())
    with pytest.raises(UsageError, match="exported as an instance of Student") as error:
        build_student("instance:Student", StudentOptions((3, 16, 16), 7, 5))
    assert "--student" in error.value.hint
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    import mine  # type: ignore[import-not-found]

    for student, name in (
        (mine.make, "mine:make"),
        (lambda: mine.make(), "instance:Student"),
        ("mine:make", None),
    ):
        sizes = {"latent_size": 6, "classes": 3} if name is None else {}
        with edgestill.export(student, tmp_path / f"f{name}", **small, **sizes) as opened:
            assert (opened.bundle.latent_size, opened.bundle.classes) == (6, 3)
            assert opened.bundle.student.name == (name or "mine:make")
    for student, message in ((3, "a student of type int"), (torch.nn.Linear(2, 2), "no module perception")):
        with pytest.raises(UsageError, match=message):
            edgestill.export(student, tmp_path / "no", **small)
    with pytest.raises(LoweringError, match=r"cannot trace the student on images \[32, 1, 16, 16\]"):
        edgestill.export(module, tmp_path / "no", input_shape=(1, 16, 16), objective="ce")
