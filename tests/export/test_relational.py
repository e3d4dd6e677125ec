"""Objectives `crd` and `lpd`: losses in plain NumPy, gradients by finite differences, all in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.export.exporter import ExportOptions
from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph, run_graph
from edgestill.export.step.graphs import build_train_step, count_flops
from edgestill.export.step.objectives import FEATURES, NEGATIVES
from edgestill.export.step.relational import contrastive, initial_heads, locality
from edgestill.export.targets import onnxruntime
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from edgestill.runtime.errors import UsageError
from tests.support.export_oracle import NUMBERS, Arrays, assert_step_equals_eager, make_inputs, prepare
from tests.support.lowering import run_onnx

FEATURE_COUNT, LATENT, TEACHER_LATENT = 6, 5, 4


def contrastive_loss(arrays: Arrays) -> float:
    """Equations 17-19 of Tian et al., one pair of samples after the other."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}

    def project(side: str, x: np.ndarray) -> np.ndarray:
        y = a[f"crd.{side}.weight"] @ x + a[f"crd.{side}.bias"]
        return y / np.sqrt(y @ y)

    tau = a["temperature"][0]
    student = [project("student_head", x) for x in a["latents"]]
    teacher = [project("teacher_head", x) for x in a["teacher_latents"]]
    others = [project("teacher_head", x) for x in a["teacher_negatives"]]

    def critic(g: float, negatives: int) -> float:
        noise = negatives * np.exp(1 / (2 * FEATURE_COUNT * tau**2))
        return 1 / (1 + noise * np.exp(-g / tau))

    total = 0.0
    for i, share in enumerate(a["share"][:, 0]):
        rest = [s for j, s in enumerate(student) if j != i]
        g = student[i] @ teacher[i]
        of_student = np.log(critic(g, len(others)))
        of_student += sum(np.log1p(-critic(student[i] @ t, len(others))) for t in others)
        of_teacher = np.log(critic(g, len(rest))) + sum(
            np.log1p(-critic(s @ teacher[i], len(rest))) for s in rest
        )
        total -= share * (of_student + of_teacher)
    return total


def locality_loss(arrays: Arrays) -> float:
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    latents, weights = a["latents"], a["neighbour_weights"]
    total = 0.0
    for i, share in enumerate(a["share"][:, 0]):
        for j in range(len(latents)):
            total += share * weights[i, j] / 2 * np.mean((latents[i] - latents[j]) ** 2)
    return total


def central_differences(loss: Callable[[Arrays], float], arrays: Arrays, name: str) -> np.ndarray:
    gradient = np.zeros(arrays[name].shape)
    for index in np.ndindex(gradient.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved = arrays[name].astype(np.float64)
            moved[index] += step
            values.append(loss(arrays | {name: moved}))
        gradient[index] = (values[0] - values[1]) / 2e-5
    return gradient


def arrays_of(name: str, seed: int, batch: int, negatives: int, temperature: float) -> Arrays:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    arrays = {"latents": normal(batch, LATENT), "share": random.random((batch, 1)).astype(np.float32)}
    if name == "lpd":
        return arrays | {"neighbour_weights": random.random((batch, batch)).astype(np.float32)}
    heads = initial_heads(FEATURE_COUNT, LATENT, TEACHER_LATENT, seed)
    return arrays | heads | {
        "teacher_latents": normal(batch, TEACHER_LATENT),
        "teacher_negatives": normal(negatives, TEACHER_LATENT),
        "temperature": np.array([temperature], np.float32),
    }  # fmt: skip


def run(name: str, arrays: Arrays, engine: bool = False) -> Arrays:
    """Rows, and gradients of their sum by `share`, by the name of what they are of: in float64, or by ONNX Runtime."""
    graph = Graph()
    given = {key: graph.input(key, array.shape) for key, array in arrays.items()}
    rows = contrastive(given, given["latents"]) if name == "crd" else locality(given, given["latents"])
    wanted = [value for key, value in given.items() if key == "latents" or key.startswith("crd.")]
    found = gradients(graph, (rows * given["share"]).sum(0, 1), wanted)
    graph.output("rows", rows)
    for key, value in found.items():
        graph.output(f"d.{key}", value)
    inputs = {key: torch.from_numpy(array).double() for key, array in arrays.items()}
    results = run_onnx(onnxruntime.lower(graph), inputs) if engine else run_graph(graph, inputs)
    return {key: tensor.numpy() for key, tensor in results.items()}


@pytest.mark.parametrize("name", ["crd", "lpd"])
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(2, 5),
    negatives=st.integers(1, 9),
    temperature=st.sampled_from((0.07, 0.2, 1.0, 4.0)),
)
def test_losses_and_gradients_are_those_of_finite_differences(
    name: str, seed: int, batch: int, negatives: int, temperature: float
) -> None:
    arrays = arrays_of(name, seed, batch, negatives, temperature)
    loss = contrastive_loss if name == "crd" else locality_loss
    found = run(name, arrays)
    total = float((found.pop("rows").astype(np.float64) * arrays["share"]).sum())
    assert total == pytest.approx(loss(arrays), rel=1e-4, abs=1e-5)
    heads = {f"d.{key}" for key in arrays if key.startswith("crd.")}
    assert found.keys() == {"d.latents"} | heads
    for key, gradient in found.items():
        expected = central_differences(loss, arrays, key.removeprefix("d."))
        scale = max(np.abs(expected).max(), 1e-2)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-4 * scale, err_msg=key)


def test_a_cold_critic_neither_overflows_nor_loses_its_gradient() -> None:
    """At temperature 0.003 scores reach ±333, whose exponents float32 does not hold."""
    arrays = arrays_of("crd", 3, 4, 8, 0.003)
    found = run("crd", arrays, engine=True)
    assert all(np.isfinite(array).all() for array in found.values())
    assert found["rows"].max() > 100 and np.abs(found["d.latents"]).max() > 1


def test_the_loss_of_indifferent_features_is_that_of_guessing() -> None:
    """Where all scores are log z · τ, h is 1/(N+1): log(N+1) + N·log(1+1/N), of both sides."""
    temperature = 2.0
    arrays = arrays_of("crd", 0, 4, 9, temperature)
    for side in ("student", "teacher"):
        arrays[f"crd.{side}_head.weight"][:] = 0
    level = 1 / (2 * FEATURE_COUNT * temperature)
    first, second = np.eye(FEATURE_COUNT, dtype=np.float32)[:2]
    arrays["crd.student_head.bias"] = first
    arrays["crd.teacher_head.bias"] = level * first + np.sqrt(1 - level**2, dtype=np.float32) * second
    expected = sum(np.log(n + 1) + n * np.log(1 + 1 / n) for n in (9, 3))
    np.testing.assert_allclose(run("crd", arrays)["rows"], expected, rtol=1e-6)


def test_latents_far_from_zero_keep_their_distances() -> None:
    arrays = arrays_of("lpd", 1, 5, 1, 1.0)
    arrays["latents"] += 100  # spread 1
    rows = run("lpd", arrays, engine=True)["rows"]
    assert float((rows * arrays["share"]).sum()) == pytest.approx(locality_loss(arrays), rel=1e-4)


# the whole step

OPTIONS = ExportOptions(
    student="cnn3", widths=(3, 4, 5), latent_size=6, classes=3, batch=4, input=InputSpec((3, 16, 16)), seed=3
)  # fmt: skip


def test_a_step_at_the_usual_temperature_equals_eager_pytorch() -> None:
    objective = Objective("crd", negatives=20, features=8, teacher_latent_size=5)
    options = replace(OPTIONS, objective=objective, freeze=("perception",))
    spec, student = prepare(options)
    inputs = make_inputs(spec, 1, NUMBERS | {"temperature": 0.07, "alpha": 0.44})
    assert_step_equals_eager(spec, options, student, inputs)


def test_sizes_not_given_have_defaults_and_heads_are_state() -> None:
    spec, student = prepare(replace(OPTIONS, objective=Objective("crd")))
    assert spec.objective == Objective("crd", None, NEGATIVES, FEATURES, 6)
    specs = {given.name: given for given in spec.state_specs()}
    own = {name for name in student.state_dict() if not name.endswith("num_batches_tracked")}
    heads = {name for name in specs if not name.startswith("optimizer.")} - own
    assert heads == {
        f"crd.{side}_head.{part}" for side in ("student", "teacher") for part in ("weight", "bias")
    }
    for name in heads:
        assert specs[name].role == "parameter" and specs[name].written
        assert specs[f"optimizer.momentum.{name}"].shape == specs[name].shape
    heads_of = spec.initial_state()
    assert heads_of["crd.student_head.weight"].shape == (FEATURES, 6)
    assert np.abs(heads_of["crd.teacher_head.weight"]).max() <= 6**-0.5  # as PyTorch draws them
    other = prepare(replace(OPTIONS, objective=Objective("crd"), seed=4))[0].initial_state()
    assert (heads_of["crd.student_head.weight"] != other["crd.student_head.weight"]).any()


def test_the_heads_and_scores_count_as_products() -> None:
    def flops(**changed: object) -> int:
        return count_flops(build_train_step(prepare(replace(OPTIONS, **changed))[0]))

    crd = Objective("crd", negatives=20, features=8, teacher_latent_size=5)
    # forward and weight gradients of both, input gradients of the student's; products of features with both gradients
    heads, scores = 3 * 4 * 6 + 2 * (4 + 20) * 5, 3 * (4 * 20 + 4 * 4)
    assert flops(objective=crd) - flops() == 2 * 8 * (heads + scores)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"objective": Objective("lkd", teacher_latent_size=4)},
            "--teacher-latent-size is for --objective crd",
        ),
        ({"objective": Objective("lpd", negatives=4)}, "--negatives is for --objective crd, not lpd"),
        ({"objective": Objective("crd", negatives=0)}, "--negatives must be at least 1, not 0"),
        ({"objective": Objective("crd", features=-1)}, "--features must be at least 1"),
        ({"objective": Objective("lpd"), "batch": 1}, "compares samples, a batch has 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(replace(OPTIONS, **changed))
