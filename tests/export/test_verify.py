"""`edgestill verify`: passes what is right on every seed, records it, and finds what is wrong or tampered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.parity.reference import ReferenceStep, rebuild_student
from edgestill.export.parity.verify import _samples, compare, draw_batches, verify_bundle
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer
from edgestill.runtime.bundle.writer import write_manifest, zip_bundle
from edgestill.runtime.cli import main
from edgestill.runtime.engines.registry import ENGINES
from edgestill.runtime.errors import EngineError, UsageError

SMALL = ExportOptions(widths=(4, 8, 8), latent_size=8, batch=8, engines=("onnxruntime",))
BIASED = replace(
    SMALL, student="tests.support.parity_students:biased", widths=None, input=InputSpec((3, 12, 12)), latent_size=6
)
STEP = "onnxruntime/train_step.onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(SMALL, tmp_path_factory.mktemp("export") / "bundle")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(export_bundle(BIASED, tmp_path_factory.mktemp("export") / "biased"))


@pytest.fixture(scope="module")
def biased_adamw(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = replace(BIASED, optimizer=Optimizer("adamw"))
    return Bundle.open(export_bundle(options, tmp_path_factory.mktemp("export") / "adamw"))


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def verify(path: Path, *arguments: str) -> int:
    return main(["verify", str(path), "--steps", "5", "--threads", "1", *arguments])


def test_a_right_bundle_passes_on_real_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(folder), "--steps", "20", "--threads", "1", "--json"]
    assert main(command) == 0
    out, _ = capsys.readouterr()
    report = json.loads(out)
    assert list(report) == ["engines"] and list(report["engines"]) == ["onnxruntime"]
    entry = report["engines"]["onnxruntime"]
    assert entry["ok"] is True and entry["steps"] == 20
    assert 0 <= entry["loss_max_abs"] <= 1e-4 and 0 < entry["state_max_rel"] and 0 < entry["multiple"] <= 6
    assert entry["same_class"] >= 0.99 and entry["latents_max_abs"] < 1e-3
    assert len(entry["losses"]) == 20 and entry["drift"] < 0.01 * entry["losses"][0]
    with Bundle.open(folder) as bundle:  # whose digests still fit
        assert {spec.name for spec in bundle.state_specs} < entry["tensors"].keys()
    assert json.loads((folder / "manifest.json").read_text())["parity"] == report["engines"]


def test_the_table_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder) == 0
    out, err = capsys.readouterr()
    assert "onnxruntime: largest difference from float64 over 5 steps" in out
    assert "ok   onnxruntime" in out and "optimizer.momentum.output.weight" in out
    assert "onnxruntime beside eager PyTorch: 5 steps" in err


def test_an_engine_that_cannot_be_opened_keeps_no_other_from_its_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(bundle: Bundle, name: str, threads: int):
        raise EngineError(f"{name} is not installed", "pip install it")

    assert verify(folder) == 0
    before = json.loads((folder / "manifest.json").read_text())["parity"]
    monkeypatch.setattr("edgestill.export.parity.verify.open_engine", refuse)
    capsys.readouterr()
    assert verify(folder, "--json") == 1
    entry = json.loads(capsys.readouterr().out)["engines"]["onnxruntime"]
    assert entry == {"ok": False, "error": "onnxruntime is not installed", "hint": "pip install it"}
    assert json.loads((folder / "manifest.json").read_text())["parity"] == before
    assert verify(folder) == 1 and "not compared: onnxruntime is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["packed.zip", "packed"])
def test_a_zipped_bundle_is_verified_and_packed_again(name: str, folder: Path, tmp_path: Path) -> None:
    packed = zip_bundle(folder, tmp_path / name)
    assert verify(packed) == 0
    with Bundle.open(packed) as bundle:
        assert json.loads((bundle.path / "manifest.json").read_text())["parity"]["onnxruntime"]["ok"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", name]


# what is right


def judge(bundle: Bundle, engine: Callable, seed: int, steps: int = 5) -> dict:
    random = np.random.default_rng(seed)
    student = rebuild_student(bundle)
    batches = draw_batches(bundle, *_samples(bundle, student, None, random, print), random)
    engines = {"onnxruntime": engine(bundle, student)}
    return compare(bundle, engines, lambda: rebuild_student(bundle), batches, steps)["onnxruntime"]


def in_another_layout(bundle: Bundle, student: torch.nn.Module) -> ReferenceStep:
    return ReferenceStep(bundle, student.to(memory_format=torch.channels_last))


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(6))
def test_what_only_rounding_tells_apart_passes(seed: int, biased: Bundle, biased_adamw: Bundle) -> None:
    for bundle in (biased, biased_adamw):
        record = judge(bundle, in_another_layout, seed)
        assert record["ok"], (record["worst"], record["multiple"])


VARIANTS = {
    "adamw-biased-dropout": {**vars(BIASED), "optimizer": Optimizer("adamw")},
    "kl-adamw-frozen": {
        "objective": Objective("kd", "kl"), "optimizer": Optimizer("adamw"), "freeze": ("perception:1",)
    },
    "ce-adamw-clipped": {"objective": Objective("ce"), "optimizer": Optimizer("adamw", clips=True)},
    "mse-nesterov-group": {
        "objective": Objective("kd", "mse"), "optimizer": Optimizer("sgd", True), "normalization": "group"
    },
    "crd-other-teacher": {
        "objective": Objective("crd", negatives=40, features=16, teacher_latent_size=5),
        "optimizer": Optimizer("adamw"),
    },
    "lpd": {"objective": Objective("lpd")},
    "ce-resnet8": {"objective": Objective("ce"), "student": "resnet8", "widths": (4, 6, 8)},
    "gru-windows": {
        "student": "gru", "widths": (4, 6), "input": InputSpec((3, 16), "float32", name="windows"), "classes": 6,
    },
    "split-two-inputs": {
        "student": "tests.support.parity_students:TwoInputs", "widths": None, "split": ("head",),
        "input": InputSpec((2, 9), "float32", name="window"),
        "more_inputs": (InputSpec((5,), "int64", name="tokens"),),
    },
    "grey-odd-size": {"input": InputSpec((1, 21, 19)), "classes": 3},
}  # fmt: skip


@pytest.mark.contract
@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_is_verified(name: str, tmp_path: Path) -> None:
    path = export_bundle(replace(SMALL, **VARIANTS[name]), tmp_path / "bundle")
    for seed in range(3):
        entry = verify_bundle(path, steps=5, threads=1, seed=seed)["onnxruntime"]
        assert entry["ok"], {key: value for key, value in entry.items() if key != "tensors"}


def test_a_users_own_student_is_found_again_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self, latent_size, classes):\n"
        "        super().__init__()\n"
        "        convolution = nn.Conv2d(3, 4, 3, stride=2, padding=1)\n"
        "        self.perception = nn.Sequential(convolution, nn.Hardswish(), nn.AvgPool2d(4))\n"
        "        self.representation = nn.Sequential(nn.Flatten(), nn.Linear(64, latent_size))\n"
        "        self.output = nn.Linear(latent_size, classes)\n"
    )
    (tmp_path / "own.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    options = replace(SMALL, student="own.py:Own", widths=None)
    path = export_bundle(options, tmp_path / "bundle")
    assert verify(path) == 0
    (tmp_path / "own.py").rename(tmp_path / "moved.py")
    assert verify(path) == 2
    assert "no file own.py" in capsys.readouterr().err
    assert verify(path, "--student", "moved.py:Own") == 0


# what is wrong


class Faulty(ReferenceStep):
    """Eager float32 with a wrong gradient of one parameter, or the gradients of two mixed up."""

    def __init__(self, bundle: Bundle, student: torch.nn.Module, fault: Callable, *names: str) -> None:
        self.fault, self.names = fault, names
        super().__init__(bundle, student)

    def _update(self, numbers) -> None:
        self.fault(*(self.parameters[name].grad for name in self.names))
        super()._update(numbers)


def scale(gradient: torch.Tensor) -> None:
    gradient *= 1.05


def forget_a_row(gradient: torch.Tensor) -> None:
    gradient[0] = 0


def swap(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


TRAINED = [
    f"perception.{place}" for place in ("0.0.weight", "0.1.weight", "0.1.bias", "1.0.weight", "1.1.weight", "1.1.bias")
] + [f"{layer}.{part}" for layer in ("representation.2", "output") for part in ("weight", "bias")]
"""All but the biases that BatchNorm takes away, whose gradient is nothing but rounding."""


@pytest.mark.unit
@pytest.mark.parametrize("fault", [scale, forget_a_row], ids=lambda fault: fault.__name__)
def test_a_wrong_gradient_of_any_tensor_is_found(
    fault: Callable, biased: Bundle, biased_adamw: Bundle
) -> None:
    with_update = {name for name, p in rebuild_student(biased).named_parameters()}
    assert with_update - set(TRAINED) == {"perception.0.0.bias", "perception.1.0.bias"}
    for i, name in enumerate(TRAINED):
        for bundle in (biased, biased_adamw):
            record = judge(bundle, lambda b, s, name=name: Faulty(b, s, fault, name), seed=i, steps=3)
            assert not record["ok"] and name in record["worst"], (name, record["worst"], record["multiple"])
            assert record["multiple"] > 10 * ENGINES["onnxruntime"].tolerance


@pytest.mark.unit
def test_mixed_up_gradients_are_found(biased: Bundle) -> None:
    for names in (("perception.0.1.weight", "perception.0.1.bias"), ("perception.1.1.weight", "perception.1.1.bias")):
        record = judge(biased, lambda b, s, names=names: Faulty(b, s, swap, *names), seed=0, steps=3)
        assert not record["ok"] and record["worst"].endswith(names), record["worst"]


@pytest.mark.unit
def test_a_step_that_diverges_in_pytorch_itself_is_no_fault_of_an_engine(biased: Bundle) -> None:
    student = rebuild_student(biased)
    random = np.random.default_rng(0)
    batches = (
        batch | {"learning_rate": np.full(1, 1e30, np.float32)}
        for batch in draw_batches(biased, *_samples(biased, student, None, random, print), random)
    )
    with pytest.raises(UsageError, match="NaN or infinity in step"):
        engines = {"onnxruntime": ReferenceStep(biased, student)}
        compare(biased, engines, lambda: rebuild_student(biased), batches, 5)


def change_initializer(model: onnx.ModelProto) -> None:
    """The first constant of more than one number is 1 % off."""
    for tensor in model.graph.initializer:
        data = numpy_helper.to_array(tensor)
        if data.dtype == np.float32 and data.size > 1:
            tensor.CopyFrom(numpy_helper.from_array(data * np.float32(1.01), tensor.name))
            return
    raise AssertionError("no constant to change")


def swap_losses(model: onnx.ModelProto) -> None:
    """`ce_loss` and `distillation_loss` change places."""
    names = {"ce_loss": "distillation_loss", "distillation_loss": "ce_loss"}
    for node in model.graph.node:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = names.get(value, value)


def forget_an_update(model: onnx.ModelProto) -> None:
    """The output bias stays what it was."""
    for node in model.graph.node:
        for i, value in enumerate(node.output):
            if value == "next.output.bias":
                node.output[i] = "unused"
    model.graph.node.append(onnx.helper.make_node("Identity", ["output.bias"], ["next.output.bias"]))


def rewrite(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Changes the training step and makes the manifest fit again: only the arithmetic is wrong."""
    model = onnx.load(folder / STEP)
    change(model)
    onnx.save(model, folder / STEP)
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))


@pytest.mark.parametrize("change", [change_initializer, swap_losses, forget_an_update])
def test_wrong_arithmetic_is_found(
    change: Callable[[onnx.ModelProto], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(folder, change)
    assert verify(folder, "--json") == 1
    entry = json.loads(capsys.readouterr().out)["engines"]["onnxruntime"]
    assert entry["ok"] is False
    assert json.loads((folder / "manifest.json").read_text())["parity"]["onnxruntime"]["ok"] is False
    assert verify(folder) == 1
    assert "FAIL onnxruntime" in capsys.readouterr().out


def test_the_step_of_another_optimizer_is_found(folder: Path, tmp_path: Path) -> None:
    other = export_bundle(replace(SMALL, optimizer=Optimizer("sgd", nesterov=True)), tmp_path / "nesterov")
    shutil.copy(other / STEP, folder / STEP)
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    assert verify(folder) == 1


def change_a_byte(folder: Path) -> None:
    data = bytearray((folder / STEP).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / STEP).write_bytes(data)


def append_a_byte(folder: Path) -> None:
    with (folder / "state.safetensors").open("ab") as file:
        file.write(b"x")


def remove_a_file(folder: Path) -> None:
    (folder / STEP).unlink()


def add_a_file(folder: Path) -> None:
    (folder / "onnxruntime" / "more.onnx").write_bytes(b"more")


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_a_digest(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["files"][STEP].update(sha256="0" * 64))


def name_a_file_outside(folder: Path) -> None:
    (folder.parent / "outside.onnx").write_bytes((folder / STEP).read_bytes())

    def point_outside(manifest: dict) -> None:
        manifest["graphs"]["onnxruntime"]["train_step"]["file"] = "../outside.onnx"
        manifest["files"]["../outside.onnx"] = manifest["files"].pop(STEP)

    edit(folder, point_outside)


def link_a_file_outside(folder: Path) -> None:
    outside = folder.parent / "outside.onnx"
    (folder / STEP).rename(outside)
    (folder / STEP).symlink_to(outside)


TAMPERED = {
    change_a_byte: f"{STEP} has been changed",
    append_a_byte: "state.safetensors has",
    remove_a_file: f"{STEP} is missing",
    add_a_file: "onnxruntime/more.onnx is not listed",
    change_a_digest: f"{STEP} has been changed",
    name_a_file_outside: "../outside.onnx",
    link_a_file_outside: f"{STEP} is not a file inside the bundle",
}


@pytest.mark.parametrize("damage", TAMPERED, ids=lambda damage: damage.__name__)
def test_a_tampered_bundle_is_refused(
    damage: Callable[[Path], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    before = (folder / "manifest.json").read_bytes()
    assert verify(folder, "--json") == 1
    out, err = capsys.readouterr()
    assert out == "" and TAMPERED[damage] in err and "hint:" in err
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, "--steps must be at least 1"),
        (["--engines", "executorch"], 2, "no graphs for 'executorch'"),
        (["--data", "nowhere.npz"], 2, "no data called 'nowhere.npz'"),
        (["--student", "resnet8"], 2, "resnet8 is not the student"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(folder, *arguments) == code
    assert message in capsys.readouterr().err


def test_no_bundle_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path / "nowhere") == 2
    assert "no such bundle" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no graphs for"):
        verify_bundle(export_bundle(SMALL, tmp_path / "bundle"), 1, ("onnxruntime-training",))
