"""Bundles as `edgestill export` writes them: whole or not at all, true to their manifest, reproducible."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from edgestill.export.exporter import ExportOptions, export_bundle, prepare_step
from edgestill.export.step.graphs import build_train_step, count_flops
from edgestill.export.targets import TargetError
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer
from edgestill.runtime.cli import main
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import UsageError
from tests.support.export_oracle import prepare

SMALL = ExportOptions(
    widths=(4, 6, 8),
    latent_size=6,
    classes=3,
    batch=4,
    input=InputSpec((3, 16, 16)),
    engines=("onnxruntime",),
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_is_what_its_manifest_says(tmp_path: Path) -> None:
    options = replace(
        SMALL, optimizer=Optimizer("adamw"), objective=Objective("kd", "kl"), freeze=("perception:1",)
    )
    folder = export_bundle(options, tmp_path / "deep" / "bundle")
    spec, student = prepare(options)
    manifest = json.loads((folder / "manifest.json").read_text())
    contents = files_of(folder)
    assert contents.keys() == {
        "manifest.json", "state.safetensors", "onnxruntime/train_step.onnx", "onnxruntime/encode.onnx"
    }  # fmt: skip
    for name, record in manifest["files"].items():
        assert record == {
            "sha256": hashlib.sha256(contents[name]).hexdigest(), "size_bytes": len(contents[name])
        }  # fmt: skip
    with Bundle.open(folder) as bundle:
        assert bundle.engines == ("onnxruntime",)
        assert bundle.student.parameters == sum(p.numel() for p in student.parameters())
        assert (bundle.batch, bundle.latent_size, bundle.classes) == (4, 6, 3)
        assert (bundle.objective.name, bundle.objective.kd_loss) == ("kd", "kl")
        assert bundle.optimizer.name == "adamw" and bundle.manifest.freeze == ("perception:1",)
        assert manifest["flops_per_step"] == count_flops(build_train_step(spec)) and manifest["parity"] == {}
        # another implementation reads the state; it is what PyTorch built from the seed, and zero slots
        state, own = load_file(folder / "state.safetensors"), student.state_dict()
        assert state.keys() == {s.name for s in bundle.state_specs}
        for given in bundle.state_specs:
            expected = np.zeros(given.shape) if given.role == "slot" else own[given.name].numpy()
            np.testing.assert_array_equal(state[given.name], expected, err_msg=given.name)
            assert given.written != given.name.startswith("perception.0.")
        for name in ("train_step", "encode"):
            graph = bundle.graph("onnxruntime", name)
            model = onnx.load(folder / graph.file)
            assert [value.name for value in model.graph.input] == list(graph.inputs)
            assert [value.name for value in model.graph.output] == list(graph.outputs)
            assert sum(graph.operators.values()) == len(model.graph.node)
            assert graph.planned_memory_bytes > 0


def test_every_input_of_the_step_stands_in_the_manifest_as_documented(tmp_path: Path) -> None:
    """Names, order and shapes of docs/bundle.md."""
    batch = [("images", [4, 3, 16, 16]), ("labels", [4]), ("label_weights", [4])]
    teacher = [("teacher_weights", [4]), ("alpha", [1])]
    rows = {
        "lkd": ("teacher_latents", [4, 6]),
        "mse": ("teacher_logits", [4, 3]),
        "kl": ("teacher_logits", [4, 3]),
    }
    sgd = [(name, [1]) for name in ("learning_rate", "momentum", "weight_decay")]
    adamw = [(name, [1]) for name in ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay")]
    for objective, expected in {
        Objective("ce"): batch,
        Objective("lkd"): [*batch, rows["lkd"], *teacher],
        Objective("kd", "mse"): [*batch, rows["mse"], *teacher],
        Objective("kd", "kl"): [*batch, rows["kl"], *teacher, ("temperature", [1])],
        Objective("lpd"): [*batch, ("neighbour_weights", [4, 4]), *teacher],
        Objective("crd", negatives=9, teacher_latent_size=5): [
            *batch,
            ("teacher_latents", [4, 5]),
            ("teacher_negatives", [9, 5]),
            *teacher,
            ("temperature", [1]),
        ],
        Objective("both", "mse"): [*batch, rows["lkd"], rows["mse"], *teacher, ("logit_share", [1])],
        Objective("both", "kl"): [
            *batch,
            rows["lkd"],
            rows["kl"],
            *teacher,
            ("logit_share", [1]),
            ("temperature", [1]),
        ],
    }.items():
        for optimizer, numbers in (("sgd", sgd), ("adamw", adamw)):
            options = replace(SMALL, objective=objective, optimizer=Optimizer(optimizer))
            given = prepare_step(options, options.build()).step_inputs()
            assert [(spec.name, list(spec.shape)) for spec in given] == expected + numbers
            assert all(spec.unit for spec in given)


def test_the_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (files_of(export_bundle(SMALL, tmp_path / name)) for name in ("a", "b"))
    assert first == second
    other = files_of(export_bundle(replace(SMALL, seed=1), tmp_path / "c"))
    assert {name for name in first if first[name] != other[name]} == {"state.safetensors", "manifest.json"}


def test_the_floating_point_operations_of_w1() -> None:
    """FINDINGS' workload: 1.976 GFLOP a step, by hand from the sizes of its layers."""
    spec = prepare(ExportOptions())[0]
    convolutions = [(32, 3, 32), (64, 32, 16), (128, 64, 8)]
    forward = [o * i * 9 * size * size for o, i, size in convolutions] + [128 * 16 * 128, 128 * 10]
    assert count_flops(build_train_step(spec)) == 2 * 32 * (3 * sum(forward) - forward[0]) == 1_975_762_944


def test_a_zipped_bundle_holds_the_same_files(tmp_path: Path) -> None:
    folder = export_bundle(SMALL, tmp_path / "folder")
    packed = export_bundle(SMALL, tmp_path / "bundle.zip")
    assert packed.read_bytes() == export_bundle(SMALL, tmp_path / "again.zip").read_bytes()
    with zipfile.ZipFile(packed) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files_of(folder)
    with Bundle.open(packed) as bundle:
        engine = open_engine(bundle, "onnxruntime", threads=1)
        assert engine.state().keys() == {spec.name for spec in bundle.state_specs}
        engine.close()


def write_bundle(path: Path) -> None:
    export_bundle(SMALL, path)


def write_foreign_manifest(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"name": "a web page", "icons": []}')


def write_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def write_file(path: Path) -> None:
    path.write_text("mine")


def test_an_older_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    for name in ("bundle", "bundle.zip"):
        path = export_bundle(SMALL, tmp_path / name)
        with pytest.raises(UsageError, match="exists already") as error:
            export_bundle(replace(SMALL, seed=1), path)
        assert "--overwrite" in error.value.hint
        export_bundle(replace(SMALL, seed=1, batch=5), path, overwrite=True)
        with Bundle.open(path) as bundle:
            assert bundle.batch == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.zip"]


@pytest.mark.parametrize("write", [write_foreign_manifest, write_notes, write_file])
@pytest.mark.parametrize("name", ["output", "output.zip"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_anything_else_is_never_replaced(
    write: Callable[[Path], None], name: str, overwrite: bool, tmp_path: Path
) -> None:
    write(tmp_path / name)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="exists already") as error:
        export_bundle(SMALL, tmp_path / name, overwrite=overwrite)
    assert error.value.hint == "give another --output"
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with Bundle.open(export_bundle(SMALL, tmp_path / "bundle")) as bundle:
        assert bundle.engines == ("onnxruntime",)


def test_nothing_is_left_when_a_target_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(spec: object, folder: Path) -> dict:
        (folder / "half").write_text("written")
        raise TargetError("the compiler gave up", hint="try again")

    export_bundle(SMALL, tmp_path / "bundle")
    before = files_of(tmp_path)
    monkeypatch.setattr("edgestill.export.targets.onnxruntime.emit", fail)
    for name in ("bundle", "new", "new.zip"):
        with pytest.raises(TargetError, match="gave up"):
            export_bundle(SMALL, tmp_path / name, overwrite=True)
    assert files_of(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_failing_move_leaves_the_older_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_bundle(SMALL, tmp_path / "bundle")
    before, replace_path = files_of(folder), Path.replace

    def fail_into_place(path: Path, target: Path) -> Path:
        if path.name == "bundle" and Path(target) == folder and path.parent != folder.parent:
            raise OSError("disk full")
        return replace_path(path, target)

    monkeypatch.setattr(Path, "replace", fail_into_place)
    with pytest.raises(OSError, match="disk full"):
        export_bundle(replace(SMALL, seed=1), folder, overwrite=True)
    assert files_of(folder) == before


# the command line


COMMAND = (
    "export --student cnn3 --widths 4,6,8 --latent-size 6 --classes 3 --batch 4 --input-shape 3,16,16".split()
)


def test_export_prints_one_object_or_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    assert main([*COMMAND, "--engines", "onnxruntime", "--output", str(output), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["bundle"] == str(output) and result["engines"] == ["onnxruntime"] and result["seconds"] >= 0
    assert "lowering the training step for onnxruntime" in err
    assert main([*COMMAND, "--engines", "onnxruntime", "--output", str(output), "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and f"next: `edgestill verify {output}`" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--engines", "tensorrt"], 2, "no engine is called 'tensorrt'"),
        (["--kd-loss", "kl"], 2, "--kd-loss is for --objective kd"),
        (["--negatives", "9"], 2, "--negatives is for --objective crd, not lkd"),
        (["--optimizer", "adamw", "--nesterov"], 2, "--nesterov is for --optimizer sgd"),
        (["--input-shape", "3,32"], 2, "cannot take inputs of (3, 32)"),
        (["--input-shape", "3,0,16"], 2, "need sizes of at least 1"),
        (["--also-input", "tokens:int64"], 2, "invalid"),
        (["--split", "head"], 2, "--split names 'head'"),
        (["--seed", "-1"], 2, "--seed -1 is out of range"),
        (["--input-shape", "3,x,32"], 2, "invalid"),
        (["--latent-size", "0"], 2, "--latent-size must be at least 1"),
        (["--widths", "4,6"], 2, "cnn3 has 3 blocks"),
        (["--freeze", "perception:9"], 2, "perception has 3 blocks"),
        (["--normalization", "layer"], 2, "invalid choice"),
        (["--student", "cnn9"], 2, "no student is called 'cnn9'"),
        (["--unknown"], 2, "unrecognized arguments"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = [] if "--engines" in arguments else ["--engines", "onnxruntime"]
    assert main([*COMMAND, "--output", str(tmp_path / "bundle"), *engines, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_student_that_cannot_be_lowered_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student.py").write_text(
        "import torch\nfrom torch import nn\nfrom edgestill.export.students import Student\n"
        "class Sorted(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.sort(1).values\n"
        "def build():\n"
        "    head = nn.Sequential(Sorted(), nn.Flatten(), nn.Linear(4 * 14 * 14, 6))\n"
        "    return Student(nn.Conv2d(3, 4, 3), head, nn.Linear(6, 3))\n"
    )
    output, student = tmp_path / "bundle", f"{tmp_path / 'student.py'}:build"
    base = [part for part in COMMAND if part not in ("--widths", "4,6,8")]
    assert main([*base, "--student", student, "--output", str(output), "--engines", "onnxruntime"]) == 1
    err = capsys.readouterr().err
    assert "representation.0 (Sorted): the operator aten.sort" in err
    assert "hint: use max, argmax, or comparisons" in err and not output.exists()


def test_a_bundle_names_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--student", "cnn3", "--widths", "4,6,8", "--latent-size", "6", "--batch", "4",
             "--input-shape", "3,16,16", "--engines", "native", "--class-names", "apple,Banana, cherry"]  # fmt: skip
    assert main([*words, "--output", str(tmp_path / "b")]) == 0
    with Bundle.open(tmp_path / "b") as bundle:
        assert bundle.classes == 3 and bundle.class_names == ("apple", "Banana", "cherry")
    # an edgestill that would go by the order of folders refuses it
    assert json.loads((tmp_path / "b/manifest.json").read_text())["format_version"] == 3
    assert main([*words, "--classes", "4", "--output", str(tmp_path / "c")]) == 2
    assert "--class-names gives 3 names, --classes 4" in capsys.readouterr().err
