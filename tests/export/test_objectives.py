"""Objectives, optimizers and frozen parts of lowered steps against eager PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgestill.export.exporter import ExportOptions, default_input
from edgestill.export.lowering.graph import Graph
from edgestill.export.step.graphs import build_train_step, count_flops
from edgestill.export.step.objectives import objective_inputs
from edgestill.export.students import ARCHITECTURES, Student
from edgestill.export.targets import onnxruntime
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer
from edgestill.runtime.errors import UsageError
from tests.support.export_oracle import (
    NUMBERS,
    Lowered,
    assert_close,
    assert_step_equals_eager,
    make_inputs,
    prepare,
    reference,
)
from tests.support.lowering import run_onnx

OBJECTIVES = (
    Objective("ce"),
    Objective("kd", "mse"),
    Objective("kd", "kl"),
    Objective("lkd"),
    Objective("both", "mse"),
    Objective("both", "kl"),
    Objective("crd", negatives=7, features=6, teacher_latent_size=3),
    Objective("lpd"),
)
LATENT_SIZE, CLASSES = 6, 5
OPTIONS = ExportOptions(
    latent_size=LATENT_SIZE, classes=CLASSES, batch=5, input=InputSpec((2, 6, 7), "float32")
)


def smooth_student() -> Student:
    """Convolutions and both normalizations in three blocks, with random factors and running statistics."""
    torch.manual_seed(6)
    student = Student(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(4, 4, 2, stride=2), nn.GroupNorm(2, 4)),
            nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.AvgPool2d(3)),
        ),
        nn.Sequential(nn.Flatten(), nn.Linear(3, LATENT_SIZE)),
        nn.Linear(LATENT_SIZE, CLASSES),
    )
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            if name.endswith(("0.1.weight", "1.1.weight", "2.1.weight", "running_mean")):
                tensor.normal_()
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    return student


def assert_steps_equal_eager(options: ExportOptions, steps: int, numbers: dict[str, float]) -> None:
    spec, student = prepare(options, smooth_student())
    lowered, eager, state = Lowered(spec), reference(spec, options, student), spec.initial_state()
    for step in range(steps):
        inputs = make_inputs(spec, 100 + step, numbers | {"learning_rate": 0.02 * (step + 1)})
        state, ours = lowered.train_step(state, inputs)
        assert_close(ours, eager.train_step(inputs), 1e-5, 1e-2, f"step {step}: metrics")
        assert_close(state, eager.state(), 1e-5, 1e-2, f"step {step}: state")
    if options.optimizer.name == "adamw":
        for i in (1, 2):
            wanted = 1 - np.float64(np.float32(numbers[f"beta{i}"])) ** steps
            np.testing.assert_allclose(state[f"optimizer.bias_correction{i}"], [wanted], rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        (Optimizer("sgd"), {"momentum": 0.0}),
        (Optimizer("sgd"), {"momentum": 0.9, "weight_decay": 0.05}),
        (Optimizer("sgd", nesterov=True), {"momentum": 0.8, "weight_decay": 0.05}),
        (Optimizer("adamw"), {"weight_decay": 0.1, "epsilon": 1e-3}),
        (Optimizer("adamw"), {"beta1": 0.8, "beta2": 0.999, "weight_decay": 0.0, "epsilon": 1e-3}),
    ],
)
def test_five_steps_of_an_optimizer(optimizer: Optimizer, numbers: dict[str, float]) -> None:
    assert_steps_equal_eager(replace(OPTIONS, optimizer=optimizer), 5, NUMBERS | numbers)


WEIGHTS = (
    {},
    {"alpha": 0.0},
    {"alpha": 1.0},
    {"alpha": 0.7, "temperature": 0.5},
    {"logit_share": 0.0},
    {"alpha": 1.0, "logit_share": 1.0},
)


def names_of(objective: Objective) -> set[str]:
    return {spec.name for spec in objective_inputs(objective, 1, 1, 1)}


@pytest.mark.parametrize(
    ("objective", "numbers"),
    [
        pytest.param(objective, numbers, id=f"{objective.name}-{objective.kd_loss}-{numbers}")
        for objective in OBJECTIVES
        for numbers in WEIGHTS
        if numbers.keys() <= names_of(objective)
    ],
)
def test_objectives_at_any_weight(objective: Objective, numbers: dict[str, float]) -> None:
    assert_steps_equal_eager(replace(OPTIONS, objective=objective), 2, NUMBERS | numbers)


@pytest.mark.parametrize(
    ("objective", "which"),
    [
        pytest.param(objective, which, id=f"{objective.name}-{objective.kd_loss}-{which}")
        for objective in OBJECTIVES
        for which in (["label_weights", "teacher_weights"] if objective.needs_teacher else ["label_weights"])
    ],
)
def test_a_term_without_samples_is_zero(objective: Objective, which: str) -> None:
    options = replace(OPTIONS, objective=objective)
    spec, student = prepare(options, smooth_student())
    inputs = make_inputs(spec, 1)
    inputs[which] = np.zeros_like(inputs[which])
    eager = reference(spec, options, student)
    metrics = eager.train_step(inputs)
    state, ours = Lowered(spec).train_step(spec.initial_state(), inputs)
    assert ours["ce_loss" if which == "label_weights" else "distillation_loss"] == 0
    assert_close(ours, metrics, 1e-5, 1e-2, which)
    assert_close(state, eager.state(), 1e-5, 1e-2, which)
    assert all(np.isfinite(array).all() for array in state.values())


def test_large_logits_do_not_overflow() -> None:
    """In float32, by ONNX Runtime."""
    student = smooth_student()
    with torch.no_grad():
        student.output.weight *= 1000
    options = replace(OPTIONS, objective=Objective("kd", "kl"))
    spec, _ = prepare(options, student)
    inputs = make_inputs(spec, 2)
    inputs["teacher_logits"] *= 1000
    metrics = reference(spec, options, student).train_step(inputs)
    graph = onnxruntime.lower(build_train_step(spec))
    found = run_onnx(graph, {n: torch.from_numpy(a) for n, a in (spec.initial_state() | inputs).items()})
    assert np.abs(metrics["logits"]).max() > 200
    assert_close({n: t.numpy() for n, t in found.items()}, metrics, 1e-4, 1e-2, "metrics")
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_samples_of_weight_zero_count_only_in_batch_normalization() -> None:
    """Labels and teacher outputs of samples with weight zero change no bit of the step."""
    spec, _ = prepare(OPTIONS, smooth_student())
    inputs = make_inputs(spec, 3)
    for name in ("label_weights", "teacher_weights"):
        inputs[name] = np.array([1, 0, 2, 0, 1], np.float32)
    other = dict(inputs, labels=inputs["labels"].copy(), teacher_latents=inputs["teacher_latents"].copy())
    other["labels"][[1, 3]] = (other["labels"][[1, 3]] + 1) % CLASSES
    other["teacher_latents"][[1, 3]] += 1
    lowered = Lowered(spec)
    first, _ = lowered.train_step(spec.initial_state(), inputs)
    second, _ = lowered.train_step(spec.initial_state(), other)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_small_parameters_updated_as_one_vector_are_what_they_were(optimizer: str) -> None:
    spec, _ = prepare(replace(OPTIONS, optimizer=Optimizer(optimizer)), smooth_student())
    inputs, states = make_inputs(spec, 5), []
    for size in (0, 30, 10**6):
        lowered = Lowered(spec)
        lowered.step = build_train_step(spec, size)
        states.append(lowered.train_step(spec.initial_state(), inputs)[0])
    for state in states[1:]:
        assert_close(state, states[0], 1e-7, 1e-6, "joint update")


# freezing


FREEZES = {
    "all of the perception": (("perception",), ("perception.",)),
    "two blocks": (("perception:2",), ("perception.0.", "perception.1.")),
    "a block in the middle": (("perception.1",), ("perception.1.",)),
    "block and head": (("perception:1", "output"), ("perception.0.", "output.")),
    "the head": (("representation", "output"), ("representation.", "output.")),
}


@pytest.mark.parametrize("case", FREEZES)
def test_freezing(case: str) -> None:
    freeze, prefixes = FREEZES[case]
    options = replace(OPTIONS, freeze=freeze)
    spec, student = prepare(options, smooth_student())
    whole, _ = prepare(OPTIONS, smooth_student())
    lowered = Lowered(spec)
    assert len(lowered.step.nodes) < len(Lowered(whole).step.nodes)
    frozen = {name for name in spec.initial if name.startswith(prefixes)}
    assert not [name for name in lowered.step.outputs if name.removeprefix("next.") in frozen]
    specs = {given.name: given for given in spec.state_specs()}
    assert {n for n, given in specs.items() if not given.written} == frozen
    slots = {n.removeprefix("optimizer.momentum.") for n in specs if n.startswith("optimizer.")}
    assert slots == spec.initial.keys() - spec.statistics - frozen
    inputs = make_inputs(spec, 4)
    state, _ = lowered.train_step(spec.initial_state(), inputs)
    for name in frozen:
        np.testing.assert_array_equal(state[name], spec.initial[name], err_msg=name)
    for name in spec.initial.keys() - frozen:  # but the gradient of a bias before BatchNorm is zero
        assert name.endswith(".bias") or (state[name] != spec.initial[name]).any(), name
    assert_step_equals_eager(spec, options, student, inputs)


def test_a_frozen_start_needs_fewer_operations_and_a_frozen_end_does_not_stop_gradients() -> None:
    def flops(*freeze: str) -> int:
        return count_flops(build_train_step(prepare(replace(OPTIONS, freeze=freeze), smooth_student())[0]))

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
    with pytest.raises(UsageError, match="nothing of the student is left to train"):
        prepare(replace(OPTIONS, freeze=("perception", "representation", "output")), smooth_student())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_shapes_and_names_are_those_of_the_manifest(optimizer: str) -> None:
    spec, _ = prepare(replace(OPTIONS, optimizer=Optimizer(optimizer)), smooth_student())
    lowered, inputs = Lowered(spec), make_inputs(spec, 6)
    assert [v.name for v in lowered.step.inputs if v.name in inputs] == list(inputs)
    written = ["next." + given.name for given in spec.state_specs() if given.written]
    assert list(lowered.step.outputs) == written + [given.name for given in spec.metrics()]
    assert list(lowered.encoder.outputs) == ["latents", "logits"]
    for given in spec.metrics():
        assert lowered.step.outputs[given.name].shape == given.shape
    for given in spec.state_specs():
        value = lowered.step.outputs.get(f"next.{given.name}")
        assert (value is not None) == given.written
        assert value is None or (value.shape, value.dtype) == (given.shape, given.dtype)


# students that come with the product

SMALL_WIDTHS = {"cnn3": (4, 5, 6), "cnn4": (4, 5, 6, 4), "cnn5": (4, 5, 6, 4, 7)}


@pytest.mark.parametrize("normalization", ["batch", "group", "none"])
@pytest.mark.parametrize("name", ["cnn3", "cnn5", "resnet8", "mobilenet-tiny"])
def test_built_in_students(name: str, normalization: str) -> None:
    options = ExportOptions(
        student=name, widths=SMALL_WIDTHS.get(name, (4, 6, 8)), normalization=normalization,
        latent_size=6, classes=3, batch=4, input=InputSpec((3, 16, 16)), objective=OBJECTIVES[len(name) % 8],
    )  # fmt: skip
    spec, student = prepare(options)
    assert_step_equals_eager(spec, options, student, make_inputs(spec, 1))


SMALL = {"ds-cnn", "gru", "text-attention"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long, pytest.mark.timeout(900)] if name not in SMALL else [])
        for name in ARCHITECTURES
        if name not in (*SMALL_WIDTHS, "resnet8", "mobilenet-tiny")
    ],
)
def test_students_by_their_papers(name: str) -> None:
    # Images as floats: rounding the normalisation's constants to float32 moves millions of activations, and one that
    # crosses the kink of a ReLU changes the first gradients by more than the tolerance.
    given = default_input(name)
    given = InputSpec(given.shape, "float32") if given.dtype == "uint8" else given
    options = ExportOptions(student=name, latent_size=6, classes=3, batch=4, input=given)
    spec, student = prepare(options)
    assert_step_equals_eager(spec, options, student, make_inputs(spec, 1))


@pytest.mark.parametrize("shape", [(1, 28, 28), (4, 9, 15)])
def test_grey_and_multispectral_images_of_any_size(shape: tuple[int, int, int]) -> None:
    mean, std = tuple(0.1 * (i + 1) for i in range(shape[0])), tuple(0.2 + 0.1 * i for i in range(shape[0]))
    options = ExportOptions(
        widths=(4, 5, 6), latent_size=4, classes=2, batch=3, input=InputSpec(shape, "uint8", mean, std)
    )
    spec, student = prepare(options)
    assert_step_equals_eager(spec, options, student, make_inputs(spec, 0))


def test_latents_that_are_the_logits() -> None:
    student = Student(nn.Flatten(), nn.Linear(12, 4), nn.Identity())
    options = ExportOptions(
        latent_size=4, classes=4, batch=3, input=InputSpec((3, 2, 2)), objective=Objective("both", "mse")
    )
    spec, student = prepare(options, student)
    assert_step_equals_eager(spec, options, student, make_inputs(spec, 0))


# graphs


def test_equal_nodes_are_shared_and_unneeded_ones_dropped() -> None:
    graph = Graph()
    x, y = graph.input("x", (2, 3)), graph.input("y", (2, 3))
    assert (x + y) is (x + y) and (x + y) is not (y + x)
    graph.output("out", (x + y) * 2.0)
    dropped = y * 7.0
    graph.prune({"x", "y"})
    assert graph.operators() == {"add": 1, "multiply": 1}
    assert [value.name for value in graph.inputs] == ["x", "y"]
    again = y * 7.0
    assert again is not dropped and again.name != dropped.name and graph.nodes[-1] is again.node
    graph.outputs = {"out": x * 2.0}
    graph.prune({"x", "y"})
    assert [value.name for value in graph.inputs] == ["x"]


def test_an_input_that_nothing_reads_stays_unless_it_is_optional() -> None:
    graph = Graph()
    x = graph.input("x", (2,))
    graph.input("unread", (2,))
    graph.output("out", x + 1.0)
    graph.prune(set())
    assert [value.name for value in graph.inputs] == ["x", "unread"]


def test_numbers_and_constants_keep_the_rank_that_they_are_given() -> None:
    graph = Graph()
    x = graph.input("x", ())
    assert (x + 1.0).shape == () and graph.constant(2.0).shape == ()
    assert (graph.input("y", (2, 3)) + 1.0).shape == (2, 3)


def test_the_peak_of_live_memory_by_hand() -> None:
    graph = Graph()
    x = graph.input("x", (10,))
    a = x + 1.0  # 40 bytes
    b = a.apply("exp")  # a and b: 80 bytes, then a is done with
    c = graph.apply("concat", b, b, axis=0)  # b and c: 120 bytes
    graph.output("out", c * 3.0)  # c and out: 160 bytes
    graph.prune(set())
    assert graph.peak_live_bytes() == 160


def test_an_operator_outside_the_set_is_refused() -> None:
    graph = Graph()
    x = graph.input("x", (2, 3))
    with pytest.raises(ValueError, match="'sort' is not in the set"):
        graph.apply("sort", x)
    assert graph.nodes == []
