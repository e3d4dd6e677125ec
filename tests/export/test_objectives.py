"""Objectives, optimizers and frozen parts of lowered steps against eager PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgestill.export.exporter import ExportOptions
from edgestill.export.objectives import Objective, batch_inputs
from edgestill.export.optimizers import Optimizer
from edgestill.export.step import InputOptions, StepSpec
from edgestill.export.student import Student
from edgestill.runtime.errors import UsageError
from tests.support.export_networks import OBJECTIVES, randomise
from tests.support.export_oracle import (
    LAYOUTS,
    NUMBERS,
    Arrays,
    Eager,
    Lowered,
    assert_close,
    assert_step_equals_eager,
    make_inputs,
    prepare,
)

LATENT_SIZE, CLASSES = 6, 5
OPTIONS = ExportOptions(
    latent_size=LATENT_SIZE, classes=CLASSES, batch=5, input=InputOptions((2, 6, 7), "float32")
)


def smooth_student() -> Student:
    """No ReLU and no maximum, so that many steps in float32 and in float64 stay close."""
    student = Student(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(4, 4, 2, stride=2), nn.GroupNorm(2, 4)),
            nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.AvgPool2d(3)),
        ),
        nn.Sequential(nn.Flatten(), nn.Linear(3, LATENT_SIZE)),
        nn.Linear(LATENT_SIZE, CLASSES),
    )
    randomise(student, seed=6)
    return student


def assert_steps_equal_eager(
    options: ExportOptions, layout: str, steps: int, numbers: dict[str, float]
) -> None:
    spec, student = prepare(options, smooth_student())
    lowered, eager, state = Lowered.of(layout, spec), Eager(student, spec), spec.initial_state()
    for step in range(steps):
        inputs = make_inputs(spec, 100 + step, numbers | {"learning_rate": 0.02 * (step + 1)})
        metrics = eager.train_step(inputs)
        state, ours = lowered.train_step(state, inputs)
        assert_close(ours, metrics, 1e-4, 1e-2, f"{layout}, step {step}: metrics")
        assert_close(state, eager.state(), 1e-4, 1e-2, f"{layout}, step {step}: state")
    if options.optimizer.name == "adamw":
        for i in (1, 2):
            wanted = 1 - np.float64(np.float32(numbers[f"beta{i}"])) ** steps
            np.testing.assert_allclose(state[f"optimizer.bias_correction{i}"], [wanted], rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        (Optimizer("sgd"), {"momentum": 0.0}),
        (Optimizer("sgd"), {"momentum": 0.9, "weight_decay": 0.05}),
        (Optimizer("sgd", nesterov=True), {"momentum": 0.8, "weight_decay": 0.05}),
        (Optimizer("adamw"), {"weight_decay": 0.1}),
        (Optimizer("adamw"), {"beta1": 0.8, "beta2": 0.999, "weight_decay": 0.0}),
    ],
)
def test_five_steps_of_an_optimizer(optimizer: Optimizer, numbers: dict[str, float], layout: str) -> None:
    assert_steps_equal_eager(replace(OPTIONS, optimizer=optimizer), layout, 5, NUMBERS | numbers)


WEIGHTS = (
    {},
    {"alpha": 0.0},
    {"alpha": 1.0},
    {"alpha": 0.7, "temperature": 0.5},
    {"logit_share": 0.0},
    {"alpha": 1.0, "logit_share": 1.0},
)


def names_of(objective: Objective) -> set[str]:
    return {spec["name"] for spec in batch_inputs(objective, 1, (1, 1, 1), "float32", 1, 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("objective", "numbers"),
    [
        pytest.param(objective, numbers, id=f"{objective.name}-{objective.kd_loss}-{numbers}")
        for objective in OBJECTIVES
        for numbers in WEIGHTS
        if numbers.keys() <= names_of(objective)
    ],
)
def test_objectives_at_any_weight(objective: Objective, numbers: dict[str, float], layout: str) -> None:
    assert_steps_equal_eager(replace(OPTIONS, objective=objective), layout, 2, NUMBERS | numbers)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("objective", "which"),
    [
        pytest.param(objective, which, id=f"{objective.name}-{objective.kd_loss}-{which}")
        for objective in OBJECTIVES
        for which in (["label_weights", "teacher_weights"] if objective.needs_teacher else ["label_weights"])
    ],
)
def test_a_term_without_samples_is_zero(objective: Objective, which: str, layout: str) -> None:
    spec, student = prepare(replace(OPTIONS, objective=objective), smooth_student())
    inputs = make_inputs(spec, 1)
    inputs[which] = np.zeros_like(inputs[which])
    eager = Eager(student, spec)
    metrics = eager.train_step(inputs)
    state, ours = Lowered.of(layout, spec).train_step(spec.initial_state(), inputs)
    assert ours["ce_loss" if which == "label_weights" else "distillation_loss"] == 0
    assert_close(ours, metrics, 1e-4, 1e-2, layout)
    assert_close(state, eager.state(), 1e-4, 1e-2, layout)
    assert all(np.isfinite(array).all() for array in state.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_logits_do_not_overflow(layout: str) -> None:
    student = smooth_student()
    with torch.no_grad():
        student.output.weight *= 1000
    spec, _ = prepare(replace(OPTIONS, objective=Objective("kd", "kl")), student)
    inputs = make_inputs(spec, 2)
    inputs["teacher_logits"] *= 1000
    metrics = Eager(student, spec).train_step(inputs)
    state, ours = Lowered.of(layout, spec).train_step(spec.initial_state(), inputs)
    assert np.abs(metrics["logits"]).max() > 200
    assert_close(ours, metrics, 1e-4, 1e-2, layout)
    assert all(np.isfinite(array).all() for array in state.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_of_weight_zero_count_only_in_batch_normalization(layout: str) -> None:
    """Labels and teacher outputs of samples with weight zero change no bit of the step."""
    spec, _ = prepare(OPTIONS, smooth_student())
    inputs = make_inputs(spec, 3)
    for name in ("label_weights", "teacher_weights"):
        inputs[name] = np.array([1, 0, 2, 0, 1], np.float32)
    other = dict(inputs, labels=inputs["labels"].copy(), teacher_latents=inputs["teacher_latents"].copy())
    other["labels"][[1, 3]] = (other["labels"][[1, 3]] + 1) % CLASSES
    other["teacher_latents"][[1, 3]] += 1
    lowered = Lowered.of(layout, spec)
    first, _ = lowered.train_step(spec.initial_state(), inputs)
    second, _ = lowered.train_step(spec.initial_state(), other)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


# freezing


FREEZES = {
    "all of the perception": (("perception",), ("perception.",)),
    "two blocks": (("perception:2",), ("perception.0.", "perception.1.")),
    "a block in the middle": (("perception.1",), ("perception.1.",)),
    "block and head": (("perception:1", "output"), ("perception.0.", "output.")),
    "the head": (("representation", "output"), ("representation.", "output.")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FREEZES)
def test_freezing(case: str, layout: str) -> None:
    freeze, prefixes = FREEZES[case]
    options = replace(OPTIONS, freeze=freeze)
    spec, student = prepare(options, smooth_student())
    whole, _ = prepare(OPTIONS, smooth_student())
    lowered = Lowered.of(layout, spec)
    assert len(lowered.step.nodes) < len(Lowered.of(layout, whole).step.nodes)
    frozen = {name for name in spec.initial if name.startswith(prefixes)}
    assert not [name for name in lowered.step.outputs if name.removeprefix("next.") in frozen]
    specs = {given["name"]: given for given in spec.state_specs()}
    assert {n for n, given in specs.items() if not given["written"]} == frozen
    slots = {n.removeprefix("optimizer.momentum.") for n in specs if n.startswith("optimizer.")}
    assert slots == spec.initial.keys() - spec.statistics - frozen
    inputs = make_inputs(spec, 4)
    state, _ = lowered.train_step(spec.initial_state(), inputs)
    for name in frozen:
        np.testing.assert_array_equal(state[name], spec.initial[name], err_msg=name)
    for name in spec.initial.keys() - frozen:  # but the gradient of a bias before BatchNorm is zero
        assert name.endswith(".bias") or (state[name] != spec.initial[name]).any(), name
    assert_step_equals_eager(spec, student, layout, inputs)


def test_a_frozen_start_needs_fewer_operations_and_a_frozen_end_does_not_stop_gradients() -> None:
    def flops(*freeze: str) -> int:
        return prepare(replace(OPTIONS, freeze=freeze), smooth_student())[0].flops()

    assert flops("perception") < flops("perception:2") < flops("perception:1") < flops()
    # Without a frozen part: forward, weight gradients, and input gradients of all but the first convolution.
    assert flops() == by_hand(smooth_student(), OPTIONS)
    assert flops("output") == flops() - 2 * OPTIONS.batch * LATENT_SIZE * CLASSES


def by_hand(student: Student, options: ExportOptions) -> int:
    """From hooks on the layers of a real forward pass."""
    total = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        multiplications = output.numel() * module.weight[0].numel()
        total.append(2 * multiplications * (2 if not total else 3))

    for module in student.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    student(torch.zeros(options.batch, *options.input.shape))
    return sum(total)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("perceptron", "no module 'perceptron'"),
        ("perception:4", "perception has 3 blocks"),
        ("perception:0", "perception has 3 blocks"),
        ("perception:two", "perception has 3 blocks"),
    ],
)
def test_a_freeze_that_names_nothing_is_refused(freeze: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        prepare(replace(OPTIONS, freeze=(freeze,)), smooth_student())
    assert error.value.hint


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves nothing to train"):
        prepare(replace(OPTIONS, freeze=("perception", "representation", "output")), smooth_student())


def check_specs_agree_with_graph(spec: StepSpec, lowered: Lowered, inputs: Arrays) -> None:
    state, metrics = lowered.train_step(spec.initial_state(), inputs)
    for given in spec.metrics():
        assert metrics[given["name"]].shape == tuple(given["shape"])
    for given in spec.state_specs():
        assert state[given["name"]].shape == tuple(given["shape"])
        assert state[given["name"]].dtype == given["dtype"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_shapes_and_names_are_those_of_the_manifest(optimizer: str, layout: str) -> None:
    spec, _ = prepare(replace(OPTIONS, optimizer=Optimizer(optimizer)), smooth_student())
    lowered = Lowered.of(layout, spec)
    inputs = make_inputs(spec, 6)
    assert [v.name for v in lowered.step.inputs if v.name in inputs] == list(inputs)
    written = ["next." + given["name"] for given in spec.state_specs() if given["written"]]
    assert list(lowered.step.outputs) == written + [given["name"] for given in spec.metrics()]
    assert list(lowered.encoder.outputs) == ["latents", "logits"]
    check_specs_agree_with_graph(spec, lowered, inputs)
