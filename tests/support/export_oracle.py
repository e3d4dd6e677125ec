"""Lowered steps in float64 beside the same steps in eager PyTorch, for comparison, and without writing a bundle."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from edgestill.export.exporter import ExportOptions, prepare_step
from edgestill.export.lowering.graph import run_graph
from edgestill.export.parity.reference import ReferenceStep
from edgestill.export.step.graphs import build_encode, build_train_step
from edgestill.export.step.spec import StepSpec

NUMBERS = {
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "clip_norm": 0.3,
    "beta1": 0.9,
    "beta2": 0.99,
    "epsilon": 1e-8,
    "alpha": 0.3,
    "temperature": 3.0,
    "logit_share": 0.4,
}
Arrays = dict[str, np.ndarray]


def prepare(options: ExportOptions, student: nn.Module | None = None) -> tuple[StepSpec, nn.Module]:
    """The step of a student (by default the one that the options name) and the student itself."""
    student = options.build() if student is None else student
    return prepare_step(options, student), student


def as_bundle(spec: StepSpec, options: ExportOptions) -> Any:
    """What the reference reads of a bundle, of a step that is not written to one."""
    own = {"split": options.split} if options.split else {}
    return SimpleNamespace(
        samples=spec.samples,
        manifest=SimpleNamespace(freeze=options.freeze),
        student=SimpleNamespace(name=options.student, options=own),
        state_specs=spec.state_specs(),
        initial_state=spec.initial_state,
        inputs=lambda graph: spec.step_inputs() if graph == "train_step" else spec.encode_inputs(),
        objective=spec.objective,
        optimizer=spec.optimizer,
        batch=spec.batch,
        classes=spec.classes,
        latent_size=spec.latent_size,
    )


def reference(
    spec: StepSpec, options: ExportOptions, student: nn.Module, dtype: torch.dtype = torch.float64
) -> ReferenceStep:
    """Eager PyTorch on a copy of the student."""
    return ReferenceStep(as_bundle(spec, options), copy.deepcopy(student), dtype)


def make_inputs(spec: StepSpec, seed: int, numbers: Mapping[str, float] = NUMBERS) -> Arrays:
    """A random batch with uneven sample weights, some of them zero, and the hyperparameters."""
    random = np.random.default_rng(seed)
    inputs = {}
    for given in spec.step_inputs():
        name, shape = given.name, given.shape
        if given.dtype == "uint8":
            inputs[name] = random.integers(0, 256, shape, dtype=np.uint8)
        elif given.dtype == "int64":
            inputs[name] = random.integers(0, spec.classes if name == "labels" else 2, shape)
        elif name in numbers:
            inputs[name] = np.full(shape, numbers[name], np.float32)
        elif name.endswith("_weights"):
            inputs[name] = (random.uniform(0.2, 2, shape) * (random.random(shape) > 0.3)).astype(np.float32)
            inputs[name][0] = 1
        elif name.startswith("noise."):
            inputs[name] = random.random(shape, np.float32)
        else:
            inputs[name] = random.standard_normal(shape).astype(np.float32)
    return inputs


class Lowered:
    """A student's two graphs, run in PyTorch in float64."""

    def __init__(self, spec: StepSpec):
        self.step, self.encoder = build_train_step(spec), build_encode(spec)

    def train_step(self, state: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
        """(the whole state after one step, metrics)."""
        out = self._run(self.step, state | inputs)
        written = {name.removeprefix("next."): a for name, a in out.items() if name.startswith("next.")}
        return state | written, {name: a for name, a in out.items() if not name.startswith("next.")}

    def encode(self, state: Arrays, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        out = self._run(self.encoder, state | inputs)
        return out["latents"], out["logits"]

    @staticmethod
    def _run(graph: Any, arrays: Arrays) -> Arrays:
        given = {value.name: torch.from_numpy(np.asarray(arrays[value.name])) for value in graph.inputs}
        given = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        with torch.no_grad():
            return {name: tensor.numpy() for name, tensor in run_graph(graph, given).items()}


def contrastive_rows(given: dict[str, torch.Tensor], heads, latents: torch.Tensor) -> torch.Tensor:
    """Equations 17-19 of Tian et al. as they stand, with probabilities and their logarithms, from both sides."""

    def project(side: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ heads[f"crd.{side}.weight"].T + heads[f"crd.{side}.bias"]
        return y / y.norm(dim=1, keepdim=True)

    tau = given["temperature"][0]
    student, teacher = project("student_head", latents), project("teacher_head", given["teacher_latents"])
    others = project("teacher_head", given["teacher_negatives"])
    z = torch.exp(1 / (2 * student.shape[1] * tau**2))

    def rows(anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, keep: torch.Tensor):
        count = keep.sum(1, keepdim=True)
        near = torch.exp((anchors * positives).sum(1, keepdim=True) / tau)
        far = torch.exp(anchors @ negatives.T / tau)
        h_near, h_far = near / (near + count * z), far / (far + count * z)
        return -h_near.log()[:, 0] - ((1 - h_far).log() * keep).sum(1)

    everyone = torch.ones(len(student), len(others), dtype=student.dtype)
    apart = 1 - torch.eye(len(student), dtype=student.dtype)
    return rows(student, teacher, others, everyone) + rows(teacher, student, student, apart)


def locality_rows(weights: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return (weights * torch.cdist(latents, latents, compute_mode="donot_use_mm_for_euclid_dist") ** 2).sum(
        1
    ) / (2 * latents.shape[1])


def weighted_mean(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Zero, with a zero gradient, where all weights are."""
    total = weights.sum()
    return (rows * weights).sum() / (total if total > 0 else 1)


def assert_close(actual: Arrays, expected: Arrays, tolerance: float, floor: float, where: str) -> None:
    """Every array equals the expected one to `tolerance` of its largest entry, or of `floor` if larger.

    Gradients that cancel, as of a bias before BatchNorm, are zero but for rounding.
    """
    for name, wanted in expected.items():
        got = np.asarray(actual[name], np.float64)
        assert got.shape == wanted.shape, f"{where}: {name} has shape {got.shape}, not {wanted.shape}"
        scale = max(float(np.abs(wanted).max(initial=0)), floor)
        difference = float(np.abs(got - wanted).max(initial=0))
        assert difference <= tolerance * scale, f"{where}: {name} differs by {difference:.2e} of {scale:.2e}"


def assert_step_equals_eager(
    spec: StepSpec, options: ExportOptions, student: nn.Module, inputs: Arrays, tolerance: float = 1e-5
) -> None:
    """Two steps and inference with the new state, in float64; constants of the graph are float32."""
    lowered, eager = Lowered(spec), reference(spec, options, student)
    state = spec.initial_state()
    for _ in range(2):
        state, metrics = lowered.train_step(state, inputs)
        assert_close(metrics, eager.train_step(inputs), tolerance, 1e-2, "metrics")
        expected = eager.state()
        slots = {name: array for name, array in expected.items() if name.startswith("optimizer.")}
        largest = max(float(np.abs(array).max()) for array in slots.values())
        assert_close(state, slots, tolerance, 1e-3 * largest, "gradients")
        rest = {name: array for name, array in expected.items() if name not in slots}
        assert_close(state, rest, tolerance, 1e-2, "state")
    samples = {sample.name: inputs[sample.name] for sample in spec.samples}
    wanted = dict(zip(("latents", "logits"), eager.encode(*samples.values()), strict=True))
    encodings = dict(zip(("latents", "logits"), lowered.encode(state, samples), strict=True))
    assert_close(encodings, wanted, tolerance, 1e-2, "inference")
