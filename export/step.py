"""Builds the two graphs of a student, `train_step` and `encode`, as pure functions of state and inputs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgestill.export.lowering.capture import CapturedStudent, Layer
from edgestill.export.lowering.formulations import Context, Layout, run_backward, run_forward
from edgestill.export.lowering.graph import Graph, Value
from edgestill.export.objectives import LossAndGradients, Objective, batch_inputs, loss_and_gradients
from edgestill.export.optimizers import Optimizer, hyperparameters, slots, update
from edgestill.runtime.errors import UsageError


@dataclass(frozen=True)
class InputOptions:
    """Images [C, H, W] as a device has them: uint8, normalised in the graph, or float32 as they are."""

    shape: tuple[int, int, int] = (3, 32, 32)
    dtype: str = "uint8"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class StepSpec:
    """Everything that decides a student's graphs, whatever the engine."""

    student: CapturedStudent
    initial: OrderedDict[
        str, np.ndarray
    ]  # parameters (the student's, then the objective's) and statistics, float32
    statistics: frozenset[str]
    frozen_parameters: frozenset[str]
    frozen_layers: frozenset[
        str
    ]  # outputs of the layers that normalise with running statistics while training
    batch: int
    input: InputOptions
    objective: Objective
    optimizer: Optimizer

    def trained(self) -> dict[str, tuple[int, ...]]:
        return {
            name: data.shape
            for name, data in self.initial.items()
            if name not in self.statistics and name not in self.frozen_parameters
        }

    def state_specs(self) -> list[dict]:
        """Every state tensor in the bundle's order: name, shape, dtype, role, written."""
        running = {
            name
            for layer in self.student.layers
            if layer.output not in self.frozen_layers
            for key, name in layer.parameters.items()
            if key.startswith("running")
        }
        specs = []
        for name, data in self.initial.items():
            statistic = name in self.statistics
            written = name in running if statistic else name not in self.frozen_parameters
            specs.append(_spec(name, data.shape, "statistic" if statistic else "parameter", written))
        return specs + [
            _spec(name, shape, "slot", True) for name, shape in slots(self.optimizer, self.trained()).items()
        ]

    def step_inputs(self) -> list[dict]:
        return batch_inputs(
            self.objective,
            self.batch,
            self.input.shape,
            self.input.dtype,
            self.student.latent_size,
            self.student.classes,
        ) + hyperparameters(self.optimizer)

    def metrics(self) -> list[dict]:
        losses = ["loss", "ce_loss"] + (["distillation_loss"] if self.objective.needs_teacher else [])
        return [_metric(name, (1,), "nat") for name in losses] + self.encodings()

    def encodings(self) -> list[dict]:
        return [
            _metric("latents", (self.batch, self.student.latent_size), "latent units"),
            _metric("logits", (self.batch, self.student.classes), "nat"),
        ]

    def initial_state(self) -> dict[str, np.ndarray]:
        zeros = {spec["name"]: np.zeros(spec["shape"], np.float32) for spec in self.state_specs()}
        return zeros | dict(self.initial)

    def flops(self) -> int:
        """Floating-point operations of a step: two a multiplication and addition in the convolutions and linear layers,
        forward, for weight gradients, and for input gradients where something before the layer is trained."""
        trained = self.trained()
        reached: dict[str, bool] = {}  # does a value depend on a trained parameter?
        total = 0
        for layer in self.student.layers:
            before = any(reached.get(name, False) for name in layer.inputs)
            own = any(name in trained for name in layer.parameters.values())
            reached[layer.output] = before or own
            if layer.kind in ("conv2d", "linear"):
                weight = self.initial[layer.parameters["weight"]]
                positions = np.prod(layer.output_shape) // weight.shape[0]
                total += int(2 * positions * weight.size) * (
                    1 + (layer.parameters["weight"] in trained) + before
                )
        if (given := self.objective).name == "crd":
            of_student = self.batch * self.student.latent_size * (2 + reached[self.student.latents])
            of_teacher = (self.batch + given.negatives) * given.teacher_latent_size * 2
            total += 2 * given.features * (of_student + of_teacher)
        return total


def _spec(name: str, shape: tuple[int, ...], role: str, written: bool) -> dict:
    return {"name": name, "shape": list(shape), "dtype": "float32", "role": role, "written": written}


def _metric(name: str, shape: tuple[int, ...], unit: str) -> dict:
    return {"name": name, "shape": list(shape), "dtype": "float32", "unit": unit}


def student_state(student: nn.Module) -> tuple[OrderedDict[str, np.ndarray], frozenset[str]]:
    """Parameters and running statistics by their PyTorch names, and which of them are statistics."""
    parameters = {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if name not in parameters:
            first = next(other for other, tensor in student.named_parameters() if tensor is parameter)
            raise UsageError(
                f"the student's {name} and {first} are one parameter",
                hint="call the one module twice instead, or give each module a parameter of its own",
            )
    tensors: OrderedDict[str, np.ndarray] = OrderedDict()
    for name, tensor in student.state_dict().items():
        if name.endswith("num_batches_tracked"):  # PyTorch reads it for momentum=None only, which is refused
            continue
        if name not in parameters and not name.endswith(("running_mean", "running_var")):
            raise UsageError(
                f"the student has a buffer {name}", hint="parameters and BatchNorm statistics are supported"
            )
        if tensor.dtype != torch.float32:
            raise UsageError(f"the student's {name} is {tensor.dtype}", hint="make the student float32")
        tensors[name] = tensor.detach().cpu().numpy().copy()
    return tensors, frozenset(tensors) - parameters


def frozen_names(student: nn.Module, freeze: list[str]) -> frozenset[str]:
    """Parameters named by `--freeze`: a module's path ("perception"), or its first n children ("perception:2")."""
    frozen: set[str] = set()
    for item in freeze:
        path, _, count = item.partition(":")
        try:
            module = student.get_submodule(path)
        except AttributeError as error:
            raise UsageError(
                f"--freeze {item}: the student has no module {path!r}",
                hint="name one of " + ", ".join(n for n, _ in student.named_children()),
            ) from error
        prefixes = [path]
        if count:
            children = [f"{path}.{name}" for name, _ in module.named_children()]
            if not count.isdigit() or not 0 < int(count) <= len(children):
                raise UsageError(
                    f"--freeze {item}: {path} has {len(children)} blocks", hint=f"--freeze {path}:1"
                )
            prefixes = children[: int(count)]
        names = {
            name
            for name, _ in student.named_parameters()
            if any(name.startswith(prefix + ".") for prefix in prefixes)
        }
        if not names:
            raise UsageError(
                f"--freeze {item} names no parameters", hint="--freeze perception, or perception:2"
            )
        frozen |= names
    if len(frozen) == len(dict(student.named_parameters())):
        raise UsageError(
            "--freeze leaves nothing to train", hint="freeze only a part, e.g. --freeze perception"
        )
    return frozenset(frozen)


def frozen_layers(layers: tuple[Layer, ...], frozen: frozenset[str]) -> frozenset[str]:
    """Normalization layers all of whose parameters are frozen keep their running statistics."""
    return frozenset(
        layer.output
        for layer in layers
        if layer.kind == "batch_norm" and layer.parameters["weight"] in frozen
    )


def build_train_step(spec: StepSpec, layout: Layout) -> Graph:
    """The whole training step: forward, loss, backward, optimizer, running statistics."""
    graph, state, inputs = _start(spec, spec.step_inputs())
    ctx = Context(graph, state, batch_statistics=True)
    latents, logits, tape = _forward(spec, layout, ctx, inputs["images"])
    result = loss_and_gradients(spec.objective, layout, state | inputs, latents, logits)
    gradients = {spec.student.logits: result.d_logits}
    if result.d_latents is not None:
        alone = (
            spec.student.latents != spec.student.logits
        )  # an output layer that is nn.Identity adds no node
        gradients[spec.student.latents] = result.d_latents if alone else result.d_logits + result.d_latents
    of_parameters = run_backward(tape, gradients) | result.d_parameters
    trained = {name: of_parameters[name] for name in spec.trained()}
    new = update(spec.optimizer, graph, state, trained, inputs, layout.joint_update_size) | ctx.updates
    for tensor in spec.state_specs():
        if tensor["written"]:
            graph.output("next." + tensor["name"], new[tensor["name"]])
    _output_metrics(graph, spec, result, latents, logits)
    graph.prune(set(state))
    return graph


def build_encode(spec: StepSpec, layout: Layout) -> Graph:
    """Images → latents and logits, with running statistics."""
    graph, state, inputs = _start(spec, spec.step_inputs()[:1])
    latents, logits, _ = _forward(
        spec, layout, Context(graph, state, batch_statistics=False), inputs["images"]
    )
    graph.output("latents", latents)
    graph.output("logits", logits)
    graph.prune(set(state))
    return graph


def _output_metrics(
    graph: Graph, spec: StepSpec, result: LossAndGradients, latents: Value, logits: Value
) -> None:
    values = {
        "loss": result.loss,
        "ce_loss": result.ce_loss,
        "distillation_loss": result.distillation_loss,
        "latents": latents,
        "logits": logits,
    }
    for metric in spec.metrics():
        graph.output(metric["name"], values[metric["name"]])


def _start(spec: StepSpec, inputs: list[dict]) -> tuple[Graph, dict[str, Value], dict[str, Value]]:
    graph = Graph()
    state = {t["name"]: graph.input(t["name"], tuple(t["shape"])) for t in spec.state_specs()}
    return graph, state, {t["name"]: graph.input(t["name"], tuple(t["shape"]), t["dtype"]) for t in inputs}


def _forward(spec: StepSpec, layout: Layout, ctx: Context, images: Value):
    x = images
    if spec.input.dtype == "uint8":
        x = ctx.graph.apply("to_float", x)
        mean, std = (
            np.asarray(values, np.float32).reshape(1, -1, 1, 1)
            for values in (spec.input.mean, spec.input.std)
        )
        x = x * ctx.graph.constant(1 / (255 * std)) - ctx.graph.constant(mean / std)
    values = {spec.student.images: layout.from_images(x)}
    tape = run_forward(ctx, layout, spec.student.layers, values, spec.frozen_layers)
    return values[spec.student.latents], values[spec.student.logits], tape
