"""The eager reference against the bundle's definition of a step, in float64 and without torch.optim."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgestill.benchmarks.eager import EagerStep
from edgestill.benchmarks.workload import hyperparameters, make_batches
from edgestill.export.parts import Parts, frozen_names, resting_norms
from edgestill.runtime.errors import UsageError
from tests.support import bench_fakes

STEPS = 4


class LocalStudent(nn.Module):
    """Two blocks with BatchNorm and pooling, l = 5, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.perception = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2)),
        )
        self.representation = nn.Sequential(nn.Flatten(), nn.Linear(8 * 2 * 2, 5))
        self.output = nn.Linear(5, 4)


def make(frozen: tuple[str, ...] = (), **options: Any) -> tuple[Parts, dict[str, Any]]:
    torch.manual_seed(0)
    student = LocalStudent()
    manifest = bench_fakes.manifest(**options)
    names = frozen_names(student, frozen) if frozen else frozenset()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in names)
    return Parts(student, resting_norms(student, names)).train(), manifest


def distillation(
    manifest: dict[str, Any],
    batch: dict[str, torch.Tensor],
    latents: torch.Tensor,
    logits: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """docs/bundle.md's D for weights of one."""
    if manifest["objective"]["name"] == "lkd":
        return ((latents - batch["teacher_latents"]) ** 2).mean(1).mean()
    teacher = batch["teacher_logits"]
    if manifest["objective"]["kd_loss"] == "mse":
        return ((logits - teacher) ** 2).mean(1).mean()
    p = torch.softmax(teacher / temperature, 1)
    q = torch.softmax(logits / temperature, 1)
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


def train_by_definition(
    student: nn.Module, manifest: dict[str, Any], batches: list[dict[str, np.ndarray]]
) -> list[float]:
    """Steps as docs/bundle.md writes them: float64, torch.autograd.grad, optimizers from their formulas."""
    student.double().train()
    values = hyperparameters(manifest)
    parameters = list(student.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    mean, std = (
        torch.tensor(manifest["input"][key], dtype=torch.float64).view(1, -1, 1, 1) for key in ("mean", "std")
    )
    losses = []
    for step, arrays in enumerate(batches, 1):
        batch = {name: torch.tensor(array) for name, array in arrays.items()}
        batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
        images = batch["images"]
        if images.dtype == torch.uint8:
            images = (images.double() / 255 - mean) / std
        latents = student.representation(student.perception(images))
        logits = student.output(latents)
        ce = -torch.log_softmax(logits, 1)[torch.arange(len(logits)), batch["labels"]].mean()
        loss = ce
        if manifest["objective"]["name"] != "ce":
            alpha = values["alpha"]
            loss = (1 - alpha) * ce + alpha * distillation(
                manifest, batch, latents, logits, values["temperature"]
            )
        gradients = torch.autograd.grad(loss, parameters)
        losses.append(loss.item())
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                if manifest["optimizer"]["name"] == "sgd":
                    m.mul_(values["momentum"]).add_(g + values["weight_decay"] * p)
                    p.sub_(values["learning_rate"] * m)
                else:
                    p.mul_(1 - values["learning_rate"] * values["weight_decay"])
                    m.mul_(values["beta1"]).add_((1 - values["beta1"]) * g)
                    v.mul_(values["beta2"]).add_((1 - values["beta2"]) * g * g)
                    m_hat, v_hat = m / (1 - values["beta1"] ** step), v / (1 - values["beta2"] ** step)
                    p.sub_(values["learning_rate"] * m_hat / (v_hat.sqrt() + values["epsilon"]))
    return losses


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "ce"},
        {"objective": "kd"},
        {"optimizer": "adamw"},
        {"dtype": "float32"},
        {"objective": "kd", "kd_loss": "kl"},
    ],
    ids=lambda options: "-".join(options.values()) or "w1",
)
def test_eager_step_is_the_bundles_step(options: dict[str, str], channels_last: bool) -> None:
    kd_loss = options.pop("kd_loss", None) if "kd_loss" in options else None
    student, manifest = make(**options)
    if kd_loss:
        manifest["objective"] = {"name": "kd", "kd_loss": kd_loss}
    oracle = copy.deepcopy(student)
    batches = make_batches(manifest, seed=3, count=STEPS)
    expected = train_by_definition(oracle, manifest, batches)
    step = EagerStep(student, manifest, channels_last=channels_last)
    losses = [step.train_step(batch)["loss"] for batch in batches]
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for (name, own), reference in zip(student.named_parameters(), oracle.parameters(), strict=True):
        scale = reference.abs().max().item()
        # BatchNorm makes the gradient of a convolution's bias zero but for rounding, which AdamW blows up
        if not (manifest["optimizer"]["name"] == "adamw" and name.endswith("0.bias")):
            assert (own - reference).abs().max().item() < 1e-4 * scale, name


@pytest.mark.parametrize("name", ["crd", "lpd"])
def test_what_it_cannot_compute_is_refused(name: str) -> None:
    student, manifest = make()
    manifest["objective"] = {"name": name, "kd_loss": None}
    with pytest.raises(UsageError, match=f"objective {name}"):
        EagerStep(student, manifest)


def test_frozen_parameters_and_statistics_stay() -> None:
    student, manifest = make(frozen=("perception:1",))
    before = copy.deepcopy(student.state_dict())
    step = EagerStep(student, manifest)
    for batch in make_batches(manifest, 0):
        step.train_step(batch)
    changed = {
        name
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, before[name]) and "num_batches" not in name
    }
    assert not [name for name in changed if name.startswith("perception.0.")]
    assert {
        "perception.1.0.weight",
        "perception.1.2.running_mean",
        "representation.1.weight",
        "output.bias",
    } <= changed
