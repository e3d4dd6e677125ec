"""Runs lowered graphs, and the same steps in eager PyTorch in float64, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.exporter import ExportOptions, prepare_step
from edgestill.export.lowering.channels_first import CHANNELS_FIRST
from edgestill.export.lowering.channels_last import CHANNELS_LAST
from edgestill.export.lowering.graph import Graph
from edgestill.export.lowering.onnx_emitter import to_onnx
from edgestill.export.lowering.torch_emitter import GraphModule
from edgestill.export.step import StepSpec, build_encode, build_train_step

LAYOUTS = {"channels_first": CHANNELS_FIRST, "channels_last": CHANNELS_LAST}
NUMBERS = {
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.99,
    "epsilon": 1e-3,  # with 1e-8 a weight's first step is ± the rate, even where its gradient is noise
    "alpha": 0.3,
    "temperature": 3.0,
    "logit_share": 0.4,
}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Lowered:
    """A student's two graphs in one layout, run as the layout's engine would run them."""

    layout: str
    spec: StepSpec
    step: Graph
    encoder: Graph

    @classmethod
    def of(cls, layout: str, spec: StepSpec) -> Lowered:
        table = LAYOUTS[layout]
        return cls(layout, spec, build_train_step(spec, table), build_encode(spec, table))

    def train_step(self, state: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
        """(the whole state after one step, metrics)."""
        out = run_graph(self.step, self.layout, state | inputs)
        written = {name.removeprefix("next."): a for name, a in out.items() if name.startswith("next.")}
        return state | written, {name: a for name, a in out.items() if not name.startswith("next.")}

    def encode(self, state: Arrays, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = run_graph(self.encoder, self.layout, state | {"images": images})
        return out["latents"], out["logits"]


def run_graph(graph: Graph, layout: str, arrays: Arrays) -> Arrays:
    """Channels first as ONNX in ONNX Runtime; channels last as the PyTorch module that ExecuTorch exports."""
    feeds = {value.name: arrays[value.name] for value in graph.inputs}
    if layout == "channels_first":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        model = to_onnx(graph).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results = session.run(list(graph.outputs), feeds)
    else:
        with torch.no_grad():
            results = GraphModule(graph)(*(torch.from_numpy(array) for array in feeds.values()))
        results = [result.numpy() for result in results]
    return dict(zip(graph.outputs, results, strict=True))


def prepare(options: ExportOptions, student: nn.Module | None = None) -> tuple[StepSpec, nn.Module]:
    """The step of a student (by default the one that the options name) and the student itself."""
    student = options.build() if student is None else student
    return prepare_step(options, student), student


def make_inputs(spec: StepSpec, seed: int, numbers: Mapping[str, float] = NUMBERS) -> Arrays:
    """A random batch with uneven sample weights, some of them zero, and the hyperparameters."""
    random = np.random.default_rng(seed)
    inputs = {}
    for given in spec.step_inputs():
        name, shape = given["name"], tuple(given["shape"])
        if given["dtype"] == "uint8":
            inputs[name] = random.integers(0, 256, shape, dtype=np.uint8)
        elif name == "labels":
            inputs[name] = random.integers(0, spec.student.classes, shape)
        elif name in numbers:
            inputs[name] = np.full(shape, numbers[name], np.float32)
        elif name.endswith("_weights"):
            inputs[name] = (random.uniform(0.2, 2, shape) * (random.random(shape) > 0.3)).astype(np.float32)
            inputs[name][0] = 1
        else:
            inputs[name] = random.standard_normal(shape).astype(np.float32)
    return inputs


class Eager:
    """The oracle. Of the step's specification it reads only the options and the frozen names."""

    def __init__(self, student: nn.Module, spec: StepSpec):
        self.spec = spec
        self.student = copy.deepcopy(student).double()
        parameters = dict(self.student.named_parameters())
        for name in spec.frozen_parameters:
            parameters[name].requires_grad_(False)
        self.heads = {
            name: nn.Parameter(torch.from_numpy(array).double())
            for name, array in spec.initial.items()
            if name not in self.student.state_dict()
        }
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad} | self.heads
        if spec.optimizer.name == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.trained.values(), 1.0, 0.5, nesterov=spec.optimizer.nesterov
            )
            self.slots = {"momentum": "momentum_buffer"}
        else:
            self.optimizer = torch.optim.AdamW(self.trained.values())
            self.slots = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

    def train_step(self, inputs: Arrays) -> Arrays:
        """One step; the metrics by name."""
        given = {
            name: torch.from_numpy(a) if a.dtype == np.int64 else torch.from_numpy(a).double()
            for name, a in inputs.items()
        }
        self._set_hyperparameters({name: float(a[0]) for name, a in inputs.items() if a.shape == (1,)})
        self.student.train()
        for name, module in self.student.named_modules():
            if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" in self.spec.frozen_parameters:
                module.eval()
        latents, logits = self._outputs(given["images"])
        ce = weighted_mean(F.cross_entropy(logits, given["labels"], reduction="none"), given["label_weights"])
        metrics = {"loss": ce, "ce_loss": ce, "latents": latents, "logits": logits}
        if self.spec.objective.needs_teacher:
            rows = self._distances(given, latents, logits)
            metrics["distillation_loss"] = weighted_mean(rows, given["teacher_weights"])
            alpha = given["alpha"][0]
            metrics["loss"] = (1 - alpha) * ce + alpha * metrics["distillation_loss"]
        self.optimizer.zero_grad()
        metrics["loss"].backward()
        self.optimizer.step()
        return {n: m.detach().numpy().reshape(m.shape or (1,)) for n, m in metrics.items()}

    def state(self) -> Arrays:
        """Parameters, running statistics and slots by the bundle's names; no bias corrections."""
        tensors = self.student.state_dict() | self.heads
        state = {n: t.detach().numpy().copy() for n, t in tensors.items() if t.ndim}
        for name, parameter in self.trained.items():
            for ours, theirs in self.slots.items():
                slot = self.optimizer.state[parameter].get(theirs)
                if slot is not None:  # torch.optim.SGD keeps none for momentum 0
                    state[f"optimizer.{ours}.{name}"] = slot.numpy().copy()
        return state

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.student.eval()
        with torch.no_grad():
            latents, logits = self._outputs(torch.from_numpy(images).double())
        return latents.numpy(), logits.numpy()

    def _set_hyperparameters(self, numbers: dict[str, float]) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = numbers["learning_rate"], numbers["weight_decay"]
        if self.spec.optimizer.name == "sgd":
            group["momentum"] = numbers["momentum"]
        else:
            group["betas"], group["eps"] = (numbers["beta1"], numbers["beta2"]), numbers["epsilon"]

    def _outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.spec.input
        if given.dtype == "uint8":
            columns = [np.array(values).reshape(1, -1, 1, 1) for values in (given.mean, given.std)]
            mean, std = map(torch.from_numpy, columns)
            images = (images / 255 - mean) / std
        latents = self.student.representation(self.student.perception(images))
        return latents, self.student.output(latents)

    def _distances(self, given: dict[str, torch.Tensor], latents, logits) -> torch.Tensor:
        if self.spec.objective.name == "crd":
            return contrastive_rows(given, self.heads, latents)
        if self.spec.objective.name == "lpd":
            return locality_rows(given["neighbour_weights"], latents)
        if self.spec.objective.name == "both":
            share = given["logit_share"][0]
            of_latents = (latents - given["teacher_latents"]).square().mean(1)
            return (1 - share) * of_latents + share * self._logit_distances(given, logits)
        if self.spec.objective.name == "lkd":
            return (latents - given["teacher_latents"]).square().mean(1)
        return self._logit_distances(given, logits)

    def _logit_distances(self, given: dict[str, torch.Tensor], logits) -> torch.Tensor:
        if self.spec.objective.kd_loss == "mse":
            return (logits - given["teacher_logits"]).square().mean(1)
        t = given["temperature"][0]
        teacher = F.softmax(given["teacher_logits"] / t, 1)
        return t * t * F.kl_div(F.log_softmax(logits / t, 1), teacher, reduction="none").sum(1)


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
    spec: StepSpec, student: nn.Module, layout: str, inputs: Arrays, tolerance: float = 1e-4
) -> None:
    """One step from zero slots, then inference with the new state."""
    lowered, eager = Lowered.of(layout, spec), Eager(student, spec)
    metrics = eager.train_step(inputs)
    state, ours = lowered.train_step(spec.initial_state(), inputs)
    assert_close(ours, metrics, tolerance, 1e-2, f"{layout}: metrics")
    expected = eager.state()
    slots = [name for name in expected if name.startswith("optimizer.")]
    largest = max(float(np.abs(expected[name]).max()) for name in slots)
    assert_close(state, {n: expected[n] for n in slots}, tolerance, 0.1 * largest, f"{layout}: gradients")
    rest = {name: array for name, array in expected.items() if name not in slots}
    assert_close(state, rest, tolerance, 1e-2, f"{layout}: state")
    encodings = dict(zip(("latents", "logits"), lowered.encode(state, inputs["images"]), strict=True))
    wanted = dict(zip(("latents", "logits"), eager.encode(inputs["images"]), strict=True))
    assert_close(encodings, wanted, 5 * tolerance, 1e-2, f"{layout}: inference")
