"""The eager reference against steps written by hand from docs/bundle.md: autograd.grad, no torch.optim."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgestill.export.exporter import ExportOptions
from edgestill.export.parity.reference import load_student_state
from edgestill.export.students import Student
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer
from tests.support.export_oracle import (
    NUMBERS,
    Arrays,
    assert_close,
    assert_step_equals_eager,
    contrastive_rows,
    locality_rows,
    make_inputs,
    prepare,
    reference,
    weighted_mean,
)
from tests.support.parity_students import TwoInputs

pytestmark = pytest.mark.unit
PLAIN = ExportOptions(latent_size=5, classes=4, batch=6, input=InputSpec((3, 6, 6)))
TWO = replace(
    PLAIN,
    input=InputSpec((2, 9), "float32", name="window"),
    more_inputs=(InputSpec((5,), "int64", name="tokens"),),
    split=("head",),
)


def plain() -> Student:
    torch.manual_seed(0)
    perception = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.BatchNorm2d(4))
    return Student(perception, nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), nn.Linear(5, 4))


def by_hand(
    options: ExportOptions, student: nn.Module, heads: Arrays, batches: list[Arrays]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and parameters after steps on the batches."""
    student = copy.deepcopy(student).double().train()
    extra = {name: torch.tensor(array).double().requires_grad_() for name, array in heads.items()}
    parameters = dict(student.named_parameters()) | extra
    first, second = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    form = options.input
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (form.mean, form.std))
    losses, name = [], options.objective.name
    for t, arrays in enumerate(batches, 1):
        given = {n: torch.tensor(a) if a.dtype == np.int64 else torch.tensor(a).double() for n, a in arrays.items()}
        h = {n: float(a[0]) for n, a in arrays.items() if a.shape == (1,)}
        latents = student.representation(student.perception((given["images"] / 255 - mean) / std))
        logits = student.output(latents)
        loss = weighted_mean(-torch.log_softmax(logits, 1)[range(6), given["labels"]], given["label_weights"])
        if name != "ce":
            if name == "lkd":
                rows = (latents - given["teacher_latents"]).square().mean(1)
            elif name == "kd":
                q, p = (torch.softmax(x / h["temperature"], 1) for x in (logits, given["teacher_logits"]))
                rows = h["temperature"] ** 2 * (p * (p / q).log()).sum(1)
            elif name == "crd":
                rows = contrastive_rows(given, extra, latents)
            else:
                rows = locality_rows(given["neighbour_weights"], latents)
            loss = (1 - h["alpha"]) * loss + h["alpha"] * weighted_mean(rows, given["teacher_weights"])
        losses.append(loss.item())
        rate, decay = h["learning_rate"], h["weight_decay"]
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            if options.optimizer.clips:
                norm = torch.cat([g.flatten() for g in gradients]).norm()
                gradients = [g * min(1.0, h["clip_norm"] / (norm + 1e-6)) for g in gradients]
            for n, g in zip(parameters, gradients, strict=True):
                p, m, v = parameters[n], first[n], second[n]
                if options.optimizer.name == "sgd":
                    g = g + decay * p
                    m.mul_(h["momentum"]).add_(g)
                    p -= rate * (g + h["momentum"] * m if options.optimizer.nesterov else m)
                else:
                    m.mul_(h["beta1"]).add_((1 - h["beta1"]) * g)
                    v.mul_(h["beta2"]).add_((1 - h["beta2"]) * g * g)
                    root = (v / (1 - h["beta2"] ** t)).sqrt() + h["epsilon"]
                    p.mul_(1 - rate * decay).sub_(rate * m / (1 - h["beta1"] ** t) / root)
    return losses, parameters


OPTIONS = {
    "ce": {"objective": Objective("ce")},
    "lkd-nesterov": {"optimizer": Optimizer("sgd", True)},
    "lkd-clipped": {"optimizer": Optimizer("sgd", clips=True)},
    "kl-adamw": {"objective": Objective("kd", "kl"), "optimizer": Optimizer("adamw")},
    "crd-adamw": {
        "objective": Objective("crd", negatives=7, features=6, teacher_latent_size=3),
        "optimizer": Optimizer("adamw"),
    },
    "lpd": {"objective": Objective("lpd")},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_by_hand(name: str) -> None:
    options = replace(PLAIN, **OPTIONS[name])
    spec, student = prepare(options, plain())
    options = replace(options, input=spec.samples[0])
    batches = [make_inputs(spec, seed) for seed in range(3)]
    heads = {n: a for n, a in spec.initial.items() if n.startswith("crd.")}
    losses, parameters = by_hand(options, student, heads, batches)
    step = reference(spec, options, student)
    found = [float(step.train_step(batch)["loss"][0]) for batch in batches]
    np.testing.assert_allclose(found, losses, rtol=1e-10)
    assert_close(step.state(), {n: p.detach().numpy() for n, p in parameters.items()}, 1e-9, 1e-6, name)


@pytest.mark.parametrize("optimizer", [Optimizer("sgd"), Optimizer("adamw")], ids=lambda o: o.name)
def test_a_step_from_a_given_state_goes_on_where_another_stopped(optimizer: Optimizer) -> None:
    options = replace(PLAIN, optimizer=optimizer)
    spec, student = prepare(options, plain())
    whole, parts = reference(spec, options, student), reference(spec, options, student)
    for seed in range(4):
        batch, before = make_inputs(spec, seed), whole.state()
        whole.train_step(batch)
        parts.train_step(make_inputs(spec, 99))  # whatever it did before
        parts.load_state(before)
        parts.train_step(batch)
        assert_close(parts.state(), whole.state(), 1e-12, 1e-12, f"step {seed}")


def test_momentum_zero_keeps_the_gradient() -> None:
    spec, student = prepare(PLAIN, plain())
    step = reference(spec, PLAIN, student)
    step.train_step(make_inputs(spec, 0, NUMBERS | {"momentum": 0.0, "weight_decay": 0.0}))
    state, before = step.state(), spec.initial_state()
    moved = (before["output.bias"] - state["output.bias"]) / np.float32(0.05)
    np.testing.assert_allclose(state["optimizer.momentum.output.bias"], moved, rtol=1e-6)


def test_several_inputs_tied_weights_and_a_split() -> None:
    torch.manual_seed(0)
    spec, student = prepare(TWO, TwoInputs(5, 4))
    assert "embed.weight" in spec.initial and "tied.weight" not in spec.initial
    assert_step_equals_eager(spec, TWO, student, make_inputs(spec, 0))


def test_dropout_takes_the_given_numbers() -> None:
    student = plain()
    student.representation.append(nn.Dropout(0.5))
    spec, student = prepare(PLAIN, student)
    step, inputs = reference(spec, PLAIN, student), make_inputs(spec, 0)
    latents = step.train_step(inputs)["latents"]
    np.testing.assert_array_equal(latents != 0, inputs["noise.0"] < 0.5)
    assert all((array != 0).all() for array in step.encode(inputs["images"]))
    assert_step_equals_eager(spec, PLAIN, student, inputs)


def test_what_is_frozen_stays() -> None:
    student = plain()
    student.output.bias.requires_grad_(False)
    options = replace(PLAIN, freeze=("perception",))
    spec, student = prepare(options, student)
    step = reference(spec, options, student)
    before = step.state()
    step.train_step(make_inputs(spec, 0))
    changed = {n for n, a in step.state().items() if (a != before[n]).any() and not n.startswith("optimizer.")}
    assert changed == {"representation.1.weight", "representation.1.bias", "output.weight"}
    assert_step_equals_eager(spec, options, student, make_inputs(spec, 0))


def test_a_state_is_loaded_by_pytorch_names() -> None:
    source, target = TwoInputs(5, 4), TwoInputs(5, 4)
    state = {name: tensor.detach().numpy() for name, tensor in source.named_parameters()}
    load_student_state(target, state | {"norm.running_mean": np.ones(5, np.float32)})
    assert torch.equal(target.embed.weight, source.embed.weight) and target.norm.running_mean.sum() == 5
    del state["head.bias"]
    with pytest.raises(KeyError, match=r"head\.bias"):
        load_student_state(target, state)
