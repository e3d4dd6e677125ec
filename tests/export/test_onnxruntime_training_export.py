"""Bundles for ONNX Runtime's training build: its own kernels for gradients, run and compared with eager PyTorch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.parity.verify import verify_bundle
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer
from edgestill.runtime.engines.registry import engine_status

ENGINE = "onnxruntime-training"
needs_training_build = pytest.mark.skipif(
    not engine_status(ENGINE).usable, reason=str(engine_status(ENGINE).reason)
)


def options(student: str, objective: Objective, optimizer: Optimizer, **changed: object) -> ExportOptions:
    return ExportOptions(
        student=student, latent_size=8, classes=5, batch=6, input=InputSpec((3, 16, 16)), objective=objective,
        optimizer=optimizer, engines=(ENGINE,), **changed,
    )  # fmt: skip


SGD, ADAMW = Optimizer("sgd"), Optimizer("adamw")
CONFIGURATIONS = {
    "cnn3-lkd-sgd": options("cnn3", Objective("lkd"), SGD),
    "resnet8-kd-adamw": options("resnet8", Objective("kd", "mse"), ADAMW),
    "mobilenet-tiny-ce-nesterov": options("mobilenet-tiny", Objective("ce"), Optimizer("sgd", nesterov=True)),
    "cnn4-group-kl": options("cnn4", Objective("kd", "kl"), SGD, normalization="group"),
    "cnn3-crd-frozen-adamw": options(
        "cnn3", Objective("crd", negatives=9, features=16), ADAMW, freeze=("perception",)
    ),
    "cnn3-frozen-middle": options("cnn3", Objective("lpd"), SGD, freeze=("perception.1",)),
}


@needs_training_build
@pytest.mark.contract
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_step_equals_eager_pytorch(name: str, tmp_path: Path) -> None:
    path = export_bundle(CONFIGURATIONS[name], tmp_path / "bundle")
    entry = verify_bundle(path, steps=4, threads=1)[ENGINE]
    assert entry["ok"], {key: value for key, value in entry.items() if key not in ("tensors", "losses")}


def test_the_graphs_are_named_and_ordered_as_the_bundle_says(tmp_path: Path) -> None:
    with Bundle.open(export_bundle(CONFIGURATIONS["resnet8-kd-adamw"], tmp_path / "bundle")) as bundle:
        spec = bundle.graph(ENGINE, "train_step")
        model = onnx.load(bundle.file(spec.file))
        assert [value.name for value in model.graph.input] == list(spec.inputs)
        assert [value.name for value in model.graph.output] == list(spec.outputs)
        written = ["next." + s.name for s in bundle.state_specs if s.written]
        assert list(spec.outputs) == written + [s.name for s in bundle.outputs("train_step")]
        assert spec.operators["ConvGrad"] == spec.operators["Conv"]
        assert spec.operators["BatchNormalizationGrad"] == spec.operators["BatchNormalization"] > 0
        own = {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
        assert own == {"ConvGrad", "BatchNormalizationGrad"}
        assert (
            not {
                node.op_type
                for node in onnx.load(bundle.file(bundle.graph(ENGINE, "encode").file)).graph.node
            }
            & own
        )


def test_freezing_leaves_out_gradients(tmp_path: Path) -> None:
    counts = {}
    for freeze in ((), ("perception:2",)):
        given = options("cnn3", Objective("lkd"), SGD, freeze=freeze)
        with Bundle.open(export_bundle(given, tmp_path / str(len(freeze)))) as bundle:
            counts[freeze] = bundle.graph(ENGINE, "train_step").operators
    assert [operators["ConvGrad"] for operators in counts.values()] == [3, 1]
    assert counts[()]["MaxPoolGrad"] == 3
