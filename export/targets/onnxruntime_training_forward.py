"""What the training build makes a step from: the forward pass with its losses, and the optimizer.

Its gradient builder wants the operators that it has kernels for, not their formulations in simpler ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from edgestill.export.lowering.capture import Layer
from edgestill.export.lowering.channels_first import CHANNELS_FIRST, batch_norm, convolve
from edgestill.export.lowering.formulations import Backward, Context
from edgestill.export.lowering.graph import Graph, Value
from edgestill.export.objectives import loss_and_gradients
from edgestill.export.optimizers import update
from edgestill.export.step import StepSpec, _forward, _output_metrics, _start

GRADIENT = "gradient."


def build_forward(spec: StepSpec) -> Graph:
    """Losses, metrics and next running statistics from state, batch and hyperparameters."""
    graph, state, inputs = _start(spec, spec.step_inputs())
    ctx = Context(graph, state, batch_statistics=True)
    latents, logits, _ = _forward(spec, NATIVE, ctx, inputs["images"])
    result = loss_and_gradients(spec.objective, NATIVE, state | inputs, latents, logits)
    for name, value in ctx.updates.items():
        graph.output(f"next.{name}", value)
    _output_metrics(graph, spec, result, latents, logits)
    graph.prune(set(state))
    return graph


def build_optimizer(spec: StepSpec) -> Graph:
    """Next parameters and slots from `gradient.<parameter>`, parameters, slots and hyperparameters."""
    graph, state, inputs = _start(spec, spec.step_inputs())
    gradients = {name: graph.input(GRADIENT + name, shape) for name, shape in spec.trained().items()}
    for name, value in update(spec.optimizer, graph, state, gradients, inputs).items():
        graph.output(f"next.{name}", value)
    graph.prune(set(state) | set(inputs))
    return graph


def _no_backward(dy: Value) -> NoReturn:
    raise AssertionError("the gradient builder differentiates this graph")


def _conv2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    weight, bias, a = ctx.parameter(layer, "weight"), ctx.parameter(layer, "bias"), layer.attributes
    y = convolve(inputs[0], weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])
    return y, _no_backward


def _max_pool2d(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    return ctx.graph.apply("max_pool2d", inputs[0], **layer.attributes), _no_backward


def _batch_norm(ctx: Context, layer: Layer, inputs: list[Value]) -> tuple[Value, Backward]:
    """With frozen statistics as a product and a sum: of inference normalization the builder makes a wrong
    gradient."""
    if ctx.batch_statistics:
        return batch_norm(ctx, layer, inputs)
    weight, bias, mean, variance = (
        ctx.parameter(layer, name) for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * ctx.graph.apply("rsqrt", variance + layer.attributes["eps"])
    offset = bias - mean * scale
    return inputs[0] * scale.reshape(1, -1, 1, 1) + offset.reshape(1, -1, 1, 1), _no_backward


NATIVE = replace(
    CHANNELS_FIRST,
    name="native",
    formulations={k: f for k, f in CHANNELS_FIRST.formulations.items() if k != "pooled_batch_norm"}
    | {"conv2d": _conv2d, "max_pool2d": _max_pool2d, "batch_norm": _batch_norm},
)
"""Channels first, with pooling and normalization as single operators."""
