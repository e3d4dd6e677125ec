"""The two graphs of a student, `train_step` and `encode`, as pure functions of state and inputs."""

from __future__ import annotations

import math

import numpy as np

from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph, LoweringError, Value
from edgestill.export.lowering.rewrite import fuse_pooled_norms, inline
from edgestill.export.step.objectives import losses
from edgestill.export.step.optimizers import update
from edgestill.export.step.spec import StepSpec
from edgestill.runtime.bundle.manifest import InputSpec, TensorSpec


def build_train_step(spec: StepSpec, joint_update_size: int = 0, fused: bool = True) -> Graph:
    """The whole training step: forward, loss, gradients, optimizer, running statistics.

    Parameters of at most `joint_update_size` elements are updated as one vector: fewer operators to start.
    `fused`: with operators that have a cheaper gradient together than one after the other.
    """
    graph, state, inputs = build_loss(spec, fused)
    of_parameters = gradients(graph, graph.outputs["loss"], [state[name] for name in spec.trained()])
    missing = [name for name in spec.trained() if name not in of_parameters]
    if missing:
        raise LoweringError(
            f"the loss does not depend on {', '.join(missing)}",
            hint="freeze it (requires_grad_(False), --freeze), or leave it out of the student",
        )
    graph.path = ""
    new = update(spec.optimizer, graph, state, of_parameters, inputs, joint_update_size)
    outputs, graph.outputs = graph.outputs, {}
    for tensor in spec.state_specs():
        if tensor.written:
            name = "next." + tensor.name
            graph.output(name, new[tensor.name] if tensor.name in new else outputs[name])
    for metric in spec.metrics():
        graph.output(metric.name, outputs[metric.name])
    graph.prune(set(state))
    return graph


def build_loss(spec: StepSpec, fused: bool) -> tuple[Graph, dict[str, Value], dict[str, Value]]:
    """Forward pass and losses: the graph with metrics and next statistics as outputs, its state and its inputs."""
    zero = {name for name, data in spec.initial.items() if not data.all()}
    forward = spec.training.graph
    forward = fuse_pooled_norms(forward, never=zero.__contains__) if fused else forward
    graph, state, inputs, found = _start(spec, spec.step_inputs(), forward)
    graph.path = "loss"
    for name, value in (
        found | losses(spec.objective, state | inputs, found["latents"], found["logits"])
    ).items():
        graph.output(name, value)
    return graph, state, inputs


def build_encode(spec: StepSpec) -> Graph:
    """Samples → latents and logits, as the student infers."""
    graph, state, _, found = _start(spec, spec.encode_inputs(), spec.inference.graph)
    graph.output("latents", found["latents"])
    graph.output("logits", found["logits"])
    graph.prune(set(state))
    return graph


def count_flops(graph: Graph) -> int:
    """Floating-point operations of the products and convolutions: two a multiplication and addition."""
    total = 0
    for node in graph.nodes:
        if node.operator == "matmul":
            a = node.inputs[0]
            inner = a.shape[-2] if node.attributes["transpose_a"] else a.shape[-1]
            total += 2 * node.outputs[0].size * inner
        elif node.operator in ("conv2d", "conv2d_transpose"):
            image, weight = node.outputs[0] if node.operator == "conv2d" else node.inputs[0], node.inputs[1]
            total += 2 * image.size * math.prod(weight.shape[1:])
        elif node.operator == "conv2d_weight_grad":
            total += 2 * node.inputs[1].size * math.prod(node.outputs[0].shape[1:])
    return total


def _start(
    spec: StepSpec, inputs: list[TensorSpec], forward: Graph
) -> tuple[Graph, dict[str, Value], dict[str, Value], dict[str, Value]]:
    """A graph with its state and these inputs, and what a forward pass gives in it, by name."""
    graph = Graph()
    state, given = (
        {t.name: graph.input(t.name, t.shape, t.dtype) for t in ts} for ts in (spec.state_specs(), inputs)
    )
    return graph, state, given, inline(graph, forward, state | given | _normalised(spec.samples, given))


def _normalised(samples: tuple[InputSpec, ...], inputs: dict[str, Value]) -> dict[str, Value]:
    """uint8 samples as the student takes them."""
    values = {}
    for sample in (sample for sample in samples if sample.dtype == "uint8"):
        shape = (1, -1, *(1,) * (len(sample.shape) - 1))
        mean, std = (np.asarray(v, np.float32).reshape(shape) for v in (sample.mean, sample.std))
        x = inputs[sample.name].apply("to_float")
        graph = x.graph
        values[sample.name] = x * graph.constant(1 / (255 * std)) - graph.constant(mean / std)
    return values
