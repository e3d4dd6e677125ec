"""Bundles exported for onnxruntime-training against eager PyTorch in float64, step by step.

The oracle starts every step from the engine's own state: a difference of 1e-7 before ReLU or pooling can
choose another branch, so that two float32 runs drift apart although every single step is right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.objectives import Objective
from edgestill.export.optimizers import Optimizer
from edgestill.export.step import InputOptions
from edgestill.export.targets.onnxruntime_training import build_train_step
from edgestill.export.targets.onnxruntime_training_operators import GradientError
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines import onnxruntime_training as engine
from tests.support.export_oracle import contrastive_rows, locality_rows

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(engine.check() is not None, reason=str(engine.check())),
]

BATCH, LATENT, CLASSES = 6, 8, 5
SGD = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-4, "weight_decay": 0.1}
# A larger epsilon than usual: with 1e-8 a weight's first step is ± the rate, even if its gradient is noise.


def options(student: str, objective: Objective, optimizer: Optimizer, **changed: object) -> ExportOptions:
    return ExportOptions(
        student=student,
        latent_size=LATENT,
        classes=CLASSES,
        batch=BATCH,
        input=InputOptions(shape=(3, 16, 16)),
        objective=objective,
        optimizer=optimizer,
        engines=("onnxruntime-training",),
        **changed,
    )


CONFIGURATIONS = {
    "cnn3-both-kl": options("cnn3", Objective("both", "kl"), Optimizer("sgd")),
    "cnn3-crd-sgd": options(
        "cnn3", Objective("crd", negatives=20, features=7, teacher_latent_size=4), Optimizer("sgd")
    ),
    "cnn3-crd-frozen-adamw": options(
        "cnn3", Objective("crd", negatives=9, features=16), Optimizer("adamw"), freeze=("perception",)
    ),
    "cnn3-lpd-sgd": options("cnn3", Objective("lpd"), Optimizer("sgd")),
    "cnn3-lkd-sgd": options("cnn3", Objective("lkd"), Optimizer("sgd")),
    "resnet8-kd-adamw": options("resnet8", Objective("kd", "mse"), Optimizer("adamw")),
    "mobilenet-tiny-ce-nesterov": options("mobilenet-tiny", Objective("ce"), Optimizer("sgd", nesterov=True)),
    "cnn4-group-kl": options("cnn4", Objective("kd", "kl"), Optimizer("sgd"), normalization="group"),
    "cnn3-none": options("cnn3", Objective("ce"), Optimizer("sgd"), normalization="none"),
    "cnn3-frozen-start": options("cnn3", Objective("lkd"), Optimizer("sgd"), freeze=("perception:2",)),
    "cnn3-frozen-middle": options("cnn3", Objective("lkd"), Optimizer("sgd"), freeze=("perception.1",)),
}


def batch(configuration: ExportOptions, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    inputs = {
        "images": random.integers(0, 256, (BATCH, *configuration.input.shape), dtype=np.uint8),
        "labels": random.integers(0, CLASSES, BATCH),
        "label_weights": np.array([1, 0, 0.5, 2, 1, 1], np.float32),
    }
    numbers = SGD if configuration.optimizer.name == "sgd" else ADAMW
    objective = configuration.objective
    if objective.needs_teacher:
        for taken, name, size in (
            (objective.takes_latents, "latents", LATENT),
            (objective.takes_logits, "logits", CLASSES),
        ):
            if taken:
                inputs[f"teacher_{name}"] = random.standard_normal((BATCH, size)).astype(np.float32)
        inputs["teacher_weights"] = np.array([1, 1, 0, 2, 0.25, 1], np.float32)
        numbers = numbers | {"alpha": 0.3}
    if objective.name == "both":
        numbers = numbers | {"logit_share": 0.7}
    if objective.name == "crd":
        size = objective.teacher_latent_size or LATENT
        inputs["teacher_latents"] = random.standard_normal((BATCH, size)).astype(np.float32)
        inputs["teacher_negatives"] = random.standard_normal((objective.negatives, size)).astype(np.float32)
        numbers = numbers | {"temperature": 0.07}
    if objective.name == "lpd":
        inputs["neighbour_weights"] = random.random((BATCH, BATCH)).astype(np.float32)
    if objective.kd_loss == "kl":
        numbers = numbers | {"temperature": 4.0}
    return inputs | {name: np.array([number], np.float32) for name, number in numbers.items()}


def heads_of(state: dict[str, np.ndarray]) -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(torch.from_numpy(a).double()) for n, a in state.items() if n.startswith("crd.")}


def eager_losses(
    student: nn.Module,
    configuration: ExportOptions,
    inputs: dict[str, torch.Tensor],
    heads: dict[str, torch.Tensor],
):
    """(loss, ce_loss, distillation_loss or None, latents, logits) with the formulas of docs/bundle.md."""
    given = configuration.input
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (given.mean, given.std))
    latents = student.representation(student.perception((inputs["images"] / 255 - mean) / std))
    logits = student.output(latents)
    w = inputs["label_weights"]
    ce = (F.cross_entropy(logits, inputs["labels"].long(), reduction="none") * w).sum() / w.sum()
    objective = configuration.objective
    if not objective.needs_teacher:
        return ce, ce, None, latents, logits
    if objective.name == "crd":
        rows = contrastive_rows(inputs, heads, latents)
    elif objective.name == "lpd":
        rows = locality_rows(inputs["neighbour_weights"], latents)
    elif objective.name == "lkd":
        rows = F.mse_loss(latents, inputs["teacher_latents"], reduction="none").mean(1)
    elif objective.kd_loss == "mse":
        rows = F.mse_loss(logits, inputs["teacher_logits"], reduction="none").mean(1)
    else:
        t = inputs["temperature"]
        teacher = F.softmax(inputs["teacher_logits"] / t, 1)
        rows = F.kl_div(F.log_softmax(logits / t, 1), teacher, reduction="none").sum(1) * t * t
    if objective.name == "both":
        of_latents = F.mse_loss(latents, inputs["teacher_latents"], reduction="none").mean(1)
        rows = (1 - inputs["logit_share"]) * of_latents + inputs["logit_share"] * rows
    v = inputs["teacher_weights"]
    distillation = (rows * v).sum() / v.sum()
    return (1 - inputs["alpha"]) * ce + inputs["alpha"] * distillation, ce, distillation, latents, logits


def eager_step(
    configuration: ExportOptions, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray], step: int
):
    """One step of a fresh student and a fresh torch.optim from `state`: (next state, metrics), float64."""
    student = configuration.build().double().train()
    own = student.state_dict()
    student.load_state_dict(
        {n: torch.from_numpy(state[n]).to(t) if n in state else t for n, t in own.items()}
    )
    frozen = [
        name
        for name, _ in student.named_parameters()
        if not any(name in s for s in state if "optimizer." in s)
    ]
    for name, module in student.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" in frozen:
            module.eval()
    heads = heads_of(state)
    parameters = {name: p for name, p in student.named_parameters() if name not in frozen} | heads
    number = {name: float(array[0]) for name, array in inputs.items() if array.shape == (1,)}
    if configuration.optimizer.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters.values(), number["learning_rate"], number["momentum"],
            weight_decay=number["weight_decay"], nesterov=configuration.optimizer.nesterov,
        )  # fmt: skip
        slots = {"momentum": "momentum_buffer"}
    else:
        optimizer = torch.optim.AdamW(
            parameters.values(), number["learning_rate"], (number["beta1"], number["beta2"]),
            number["epsilon"], number["weight_decay"],
        )  # fmt: skip
        slots = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    for name, parameter in parameters.items():
        for ours, theirs in slots.items():
            slot = torch.from_numpy(state[f"optimizer.{ours}.{name}"]).double()
            optimizer.state[parameter][theirs] = slot
        optimizer.state[parameter]["step"] = torch.tensor(float(step))
    tensors = {
        name: torch.from_numpy(array).double() if array.dtype != np.int64 else torch.from_numpy(array)
        for name, array in inputs.items()
    }
    losses = eager_losses(student, configuration, tensors, heads)
    losses[0].backward()
    optimizer.step()
    tensors = student.state_dict() | heads
    after = {name: t.detach().numpy() for name, t in tensors.items() if name in state}
    for name, parameter in parameters.items():
        for ours, theirs in slots.items():
            after[f"optimizer.{ours}.{name}"] = optimizer.state[parameter][theirs].numpy()
    names = ("loss", "ce_loss", "distillation_loss", "latents", "logits")
    return after, {n: v.detach().numpy() for n, v in zip(names, losses, strict=True) if v is not None}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_step_equals_eager_pytorch(name: str, tmp_path: Path) -> None:
    given = CONFIGURATIONS[name]
    bundle = Bundle.open(export_bundle(given, tmp_path / "bundle"))
    configuration = ExportOptions(**{**vars(given), "input": bundle.input})
    opened = engine.open(bundle, threads=1)
    try:
        for step in range(4):
            inputs, state = batch(configuration, step), opened.state()
            expected, metrics = eager_step(configuration, state, inputs, step)
            got = opened.train_step(inputs)
            for metric, value in metrics.items():
                np.testing.assert_allclose(
                    got[metric].reshape(value.shape),
                    value,
                    rtol=1e-4,
                    atol=1e-5,
                    err_msg=f"step {step}: {metric}",
                )
            after = opened.state()
            for tensor, value in expected.items():
                scale = np.abs(value).max() + 1e-6
                np.testing.assert_allclose(
                    after[tensor], value, rtol=0, atol=2e-4 * scale, err_msg=f"step {step}: {tensor}"
                )
                written = next(spec.written for spec in bundle.state_specs if spec.name == tensor)
                assert written != np.array_equal(after[tensor], state[tensor]), f"step {step}: {tensor}"
        student = configuration.build().double().eval()
        own, state, images = student.state_dict(), opened.state(), inputs["images"]
        student.load_state_dict({n: torch.from_numpy(state[n]) if n in state else t for n, t in own.items()})
        with torch.no_grad():
            tensors = {n: torch.from_numpy(a).double() for n, a in inputs.items()}
            _, _, _, latents, logits = eager_losses(student, configuration, tensors, heads_of(state))
        for ours, eager in zip(opened.encode(images), (latents, logits), strict=True):
            np.testing.assert_allclose(ours, eager.numpy(), rtol=1e-4, atol=1e-4)
    finally:
        opened.close()


def test_the_graphs_are_named_and_ordered_as_the_bundle_says(tmp_path: Path) -> None:
    given = CONFIGURATIONS["resnet8-kd-adamw"]
    bundle = Bundle.open(export_bundle(given, tmp_path / "bundle"))
    spec = bundle.graph(engine.NAME, "train_step")
    model = onnx.load(bundle.file(spec.file))
    assert [value.name for value in model.graph.input] == list(spec.inputs)
    assert [value.name for value in model.graph.output] == list(spec.outputs)
    order = [s.name for s in bundle.state_specs] + [s.name for s in bundle.inputs("train_step")]
    assert list(spec.inputs) == [name for name in order if name in set(spec.inputs)]
    written = ["next." + s.name for s in bundle.state_specs if s.written]
    assert list(spec.outputs) == written + [s.name for s in bundle.outputs("train_step")]
    assert spec.operators["ConvGrad"] == spec.operators["Conv"]


def test_freezing_leaves_out_gradients(tmp_path: Path) -> None:
    counts = {}
    for name in ("cnn3-lkd-sgd", "cnn3-frozen-start"):
        bundle = Bundle.open(export_bundle(CONFIGURATIONS[name], tmp_path / name))
        counts[name] = bundle.graph(engine.NAME, "train_step").operators
    assert counts["cnn3-lkd-sgd"]["ConvGrad"] == 3
    assert counts["cnn3-frozen-start"]["ConvGrad"] == 1
    assert sum(counts["cnn3-frozen-start"].values()) < sum(counts["cnn3-lkd-sgd"].values())


def model(op: str, inputs: list[str], output: str) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (*inputs, output)]
    node = helper.make_node(op, inputs[:2], [output])
    graph = helper.make_graph([node], op, values[:-1], values[-1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


FORWARD = model("Mul", ["a", "x", "b"], "loss")
OPTIMIZER = model("Sub", ["a", "gradient.a"], "next.a")


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(GradientError, match="no input c"):
        build_train_step(FORWARD, ["c"], OPTIMIZER, ["next.a"])
    with pytest.raises(GradientError, match="neither .* has next.b"):
        build_train_step(FORWARD, ["a"], OPTIMIZER, ["next.a", "next.b"])
    with pytest.raises(GradientError, match="needs x, which `inputs` leaves out"):
        build_train_step(FORWARD, ["a"], OPTIMIZER, ["next.a", "loss"], inputs=["a"])
    with pytest.raises(GradientError, match="b"):
        build_train_step(FORWARD, ["a", "b"], OPTIMIZER, ["next.a"])
    with pytest.raises(GradientError, match="holds Mod"):
        build_train_step(FORWARD, ["a"], model("Mod", ["a", "gradient.a"], "next.a"), ["next.a"])
    newer = model("Sub", ["a", "gradient.a"], "next.a")
    newer.opset_import[0].version = 22
    with pytest.raises(GradientError, match="at most 20"):
        build_train_step(FORWARD, ["a"], newer, ["next.a"])
    newer.opset_import[0].version = 20
    with pytest.raises(GradientError, match="opset 18, the optimizer 20"):
        build_train_step(FORWARD, ["a"], newer, ["next.a"])


def test_inputs_that_nothing_reads_are_left_out_and_the_order_is_kept() -> None:
    step = build_train_step(FORWARD, ["a"], OPTIMIZER, ["loss", "next.a"], inputs=["x", "b", "a"])
    assert [value.name for value in step.graph.input] == ["x", "a"]
    assert [value.name for value in step.graph.output] == ["loss", "next.a"]
