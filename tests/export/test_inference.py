"""`edgestill export --inference`: models in the stock engines against a bundle's `encode` and softmax."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from edgestill.runtime.cli import main
from edgestill.runtime.data.classes import names_as_metadata
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.training.evaluation import probabilities
from edgestill.runtime.training.teacher import encode_all

pytestmark = pytest.mark.contract
NAMES = ("apple", "banana, ripe", "Dattel ü")
COMMON = {"classes": 3, "latent_size": 6, "batch": 4, "objective": Objective("ce"), "engines": ("native",)}
STUDENTS = {
    "images": ExportOptions(widths=(4, 5, 6), input=InputSpec((3, 16, 16)), **COMMON),
    "windows": ExportOptions(
        student="gru", widths=(4, 6), input=InputSpec((3, 16), "float32", name="windows"), **COMMON
    ),
    "split": ExportOptions(
        student="tests.support.parity_students:TwoInputs", split=("head",),
        input=InputSpec((2, 9), "float32", name="window"),
        more_inputs=(InputSpec((5,), "int64", name="tokens"),), **COMMON,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a student, exported once."""
    folder = tmp_path_factory.mktemp("bundles")
    return cache(lambda name: export_bundle(STUDENTS[name], folder / name))


@pytest.fixture
def work(
    request: pytest.FixtureRequest,
    bundles: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with a bundle `b`, and a state of it after some random walk, statistics and all."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundles(getattr(request, "param", "images")), "b")
    draw = np.random.default_rng(0)
    with Bundle.open("b") as bundle:
        state = {
            name: (array * draw.uniform(0.5, 1.5, array.shape)).astype(np.float32) + np.float32(0.01)
            for name, array in bundle.initial_state().items()
        }
    wire.save(Path("s.safetensors"), state, names_as_metadata(NAMES))
    return tmp_path


def export(output: str, *more: str) -> int:
    return main(["export", "--inference", "--bundle", "b", "--state", "s.safetensors", "--output", output, *more])


def drawn(bundle: Bundle, count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    makers = {
        "uint8": lambda shape: random.integers(0, 256, shape, dtype=np.uint8),
        "int64": lambda shape: random.integers(0, 3, shape),
        "float32": lambda shape: random.standard_normal(shape).astype(np.float32),
    }
    return {spec.name: makers[spec.dtype]((count, *spec.shape)) for spec in bundle.samples}


def encoded(bundle: Bundle, samples: dict[str, np.ndarray]) -> np.ndarray:
    """Softmax of what the bundle's own graph gives, on the state's weights."""
    engine = open_engine(bundle, "native", threads=1)
    engine.load_state(bundle.check_state(wire.load(Path("s.safetensors")).arrays))
    first, *more = samples.values()
    try:
        return probabilities(encode_all(engine, first, bundle.batch, tuple(more)).logits)
    finally:
        engine.close()


@pytest.mark.parametrize("work", STUDENTS, indirect=True)
def test_onnx_takes_any_number_of_samples(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("m.onnx", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"model": "m.onnx", "size_bytes": Path("m.onnx").stat().st_size}
    onnx.checker.check_model("m.onnx", full_check=True)
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    with Bundle.open("b") as bundle:
        assert [one.name for one in session.get_inputs()] == list(bundle.sample_names)
        for count in (1, 2, 5):
            samples = drawn(bundle, count)
            (found,) = session.run(["probabilities"], samples)
            np.testing.assert_allclose(found, encoded(bundle, samples), rtol=1e-3, atol=1e-6)
        uint8 = bundle.input.dtype == "uint8"
    assert (session.get_inputs()[0].type == "tensor(uint8)") is uint8
    about = session.get_modelmeta()
    assert json.loads(about.custom_metadata_map["class_names"]) == list(NAMES)
    assert about.producer_name == "edgestill"
    # nothing of the machine that wrote it
    assert str(Path(__file__).parents[2]).encode() not in Path("m.onnx").read_bytes()


def test_the_same_classes_as_predict(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has the model and its metadata alone says what `edgestill predict` says."""
    assert export("m.onnx") == 0
    with Bundle.open("b") as bundle:
        samples = drawn(bundle, 6)
    np.savez("x.npz", x=samples["images"])
    capsys.readouterr()
    assert main("predict b --state s.safetensors --data x.npz --threads 1 --json".split()) == 0
    *said, _ = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    (found,) = session.run(None, samples)
    assert [one["class"] for one in said] == [names[n] for n in found.argmax(axis=1)]
    np.testing.assert_allclose([one["probabilities"] for one in said], found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch", [[], ["--batch", "3"]])
def test_pte_in_stock_executorch(batch: list[str], work: Path) -> None:
    from executorch.runtime import Runtime

    assert export("m.pte", *batch) == 0
    program = Runtime.get().load_program("m.pte")
    with Bundle.open("b") as bundle:
        samples = drawn(bundle, int(batch[-1]) if batch else 1)
        (found,) = program.load_method("forward").execute([torch.from_numpy(samples["images"])])
        np.testing.assert_allclose(found.numpy(), encoded(bundle, samples), rtol=1e-3, atol=1e-6)
    (names,) = program.load_method("class_names").execute([])
    assert json.loads(names) == list(NAMES)


def test_a_fixed_batch_and_the_initial_state(work: Path) -> None:
    assert main("export --inference --bundle b --output m.onnx --batch 2".split()) == 0
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [2, 3, 16, 16]
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["0", "1", "2"]


def test_a_state_that_names_fewer_classes_than_there_are_outputs(work: Path) -> None:
    wire.save(
        Path("s.safetensors"), wire.load(Path("s.safetensors")).arrays, names_as_metadata(("apple", "fig"))
    )
    assert export("m.onnx") == 0
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["apple", "fig", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bundle b --output m.tflite", "ending in .onnx or .pte"),
        ("--bundle b --output there.onnx", "there.onnx exists already"),
        ("--bundle b --output b", "which format?"),
        ("--output m.onnx", "--bundle BUNDLE"),
        ("--bundle b --output m.onnx --objective ce", "--objective with --inference"),
        ("--bundle b --output m.onnx --stat s.safetensors", "unrecognized arguments: --stat"),
        ("--bundle b --output m.onnx --batch 0", "at least 1"),
        ("--bundle b --output m.onnx --state none", "no such state"),
        ("--bundle nowhere --output m.onnx", "no such bundle"),
        ("--bundle b --output b/m.onnx", "--output b/m.onnx lies in the bundle"),
        ("--bundle b --output none/m.onnx", "--output none/m.onnx: no folder none"),
    ],
)
def test_mistakes(words: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.onnx").write_bytes(b"kept")
    assert main(["export", "--inference", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert Path("there.onnx").read_bytes() == b"kept" and not list(Path().rglob("m.onnx"))


def test_options_of_inference_alone(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("--student cnn3 --bundle b", "--student cnn3 --state s.safetensors", ""):
        assert main(["export", "--output", "o", *words.split()]) == 2
    said = capsys.readouterr().err
    assert "--bundle without --inference" in said and "--state without --inference" in said
    assert "which student?" in said


def test_a_module_is_found_again_by_its_factory(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle of a module that was exported as it stood does not say how to build it."""
    torch.manual_seed(0)
    module = ExportOptions(widths=(4, 5, 6), input=InputSpec((3, 16, 16)), **COMMON).build()
    export_bundle(ExportOptions(student=module, input=InputSpec((3, 16, 16)), **COMMON), Path("i"))
    words = "export --inference --bundle i --output m.onnx".split()
    assert main(words) == 2
    assert "--student" in capsys.readouterr().err
    Path("mine.py").write_text(
        "from edgestill.export.students import StudentOptions, build_student\n"
        "def build(latent_size, classes):\n"
        "    options = StudentOptions((3, 16, 16), latent_size, classes, (4, 5, 6))\n"
        "    return build_student('cnn3', options, 9)\n"
    )
    assert main([*words, "--student", "mine.py:build"]) == 0
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    with Bundle.open("i") as bundle:
        wire.save(Path("s.safetensors"), bundle.initial_state())
        wanted = encoded(bundle, {"images": images})
    np.testing.assert_allclose(session.run(None, {"images": images})[0], wanted, rtol=1e-3, atol=1e-6)
