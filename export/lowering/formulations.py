"""How a layer computes and differentiates itself, in forward operators.

A formulation is a function of a layer: it returns the output and a closure that turns the output's gradient into the
gradients of its inputs and of its parameters. A layout is a table of formulations; this module holds those that no
layout changes, `channels_first.py` and `channels_last.py` the others. Gradients nobody asks for are pruned from the
graph afterwards, so formulations never decide what to leave out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from edgestill.export.lowering.capture import Layer, LoweringError
from edgestill.export.lowering.graph import Graph, Value

Gradients = tuple[tuple[Value, ...], dict[str, Value]]
"""Gradients of the inputs, in order, and of the parameters by their local name ("weight")."""
Backward = Callable[[Value], Gradients]


@dataclass
class Context:
    """What a formulation may see besides its inputs.

    `state` holds parameters and statistics by name; `batch_statistics` says whether this layer normalises with the
    batch's statistics (training) or the running ones (inference, frozen); new running statistics go to `updates`.
    """

    graph: Graph
    state: dict[str, Value]
    batch_statistics: bool
    updates: dict[str, Value] = field(default_factory=dict)

    def parameter(self, layer: Layer, name: str) -> Value | None:
        return self.state[layer.parameters[name]] if name in layer.parameters else None

    def update_statistics(self, layer: Layer, mean: Value, variance: Value, count: int) -> None:
        """PyTorch's running statistics: momentum of the new value, unbiased variance."""
        if count < 2:
            raise LoweringError(
                f"{layer.path}: BatchNorm over one value a channel has no variance",
                hint="export with a larger --batch, or use nn.GroupNorm",
            )
        momentum = layer.attributes["momentum"]
        for name, value in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
            state_name = layer.parameters[name]
            old = self.state[state_name]
            self.updates[state_name] = old * (1.0 - momentum) + value.reshape(*old.shape) * momentum


Formulation = Callable[[Context, Layer, list[Value]], tuple[Value, Backward]]


@dataclass(frozen=True)
class Layout:
    """The formulations of one family of engines and how images enter and leave it."""

    name: str
    formulations: dict[str, Formulation]
    from_images: Callable[[Value], Value]
    positive: Callable[[Value], Value]  # 1 where a value is above zero, else 0
    column_sum: Callable[[Value], Value]  # [n, c] → [1, c]
    row_sum: Callable[[Value], Value]  # [n, c] → [n, 1]
    log_softmax: Callable[[Value], Value]  # [n, c], over c
    joint_update_size: int = (
        0  # parameters up to this size are updated as one vector: fewer operators to start
    )


def linear(ctx: Context, layer: Layer, inputs: list[Value], layout: Layout) -> tuple[Value, Backward]:
    (x,) = inputs
    weight, bias = ctx.parameter(layer, "weight"), ctx.parameter(layer, "bias")
    y = ctx.graph.apply("matmul", x, weight, transpose_b=True)
    if bias is not None:
        y = y + bias.reshape(1, -1)

    def backward(dy: Value) -> Gradients:
        gradients = {"weight": ctx.graph.apply("matmul", dy, x, transpose_a=True)}
        if bias is not None:
            gradients["bias"] = layout.column_sum(dy).reshape(*bias.shape)
        return (dy @ weight,), gradients

    return y, backward


def relu(ctx: Context, layer: Layer, inputs: list[Value], layout: Layout) -> tuple[Value, Backward]:
    y = ctx.graph.apply("relu", inputs[0])
    return y, lambda dy: ((dy * layout.positive(y),), {})


def clipped_relu(ctx: Context, layer: Layer, inputs: list[Value], layout: Layout) -> tuple[Value, Backward]:
    low, high = layer.attributes["low"], layer.attributes["high"]
    y = ctx.graph.apply("clamp", inputs[0], low=low, high=high)
    return y, lambda dy: ((dy * (layout.positive(y - low) * layout.positive(high - y)),), {})


def hardswish(ctx: Context, layer: Layer, inputs: list[Value], layout: Layout) -> tuple[Value, Backward]:
    (x,) = inputs

    def gate(value: Value) -> Value:
        return ctx.graph.apply("clamp", value + 3.0, low=0.0, high=6.0)

    def backward(dy: Value) -> Gradients:
        # 0 below −3, x/3 + 1/2 between, 1 above 3, as PyTorch has it.
        above = layout.positive(x - 3.0)
        inside = (1.0 - layout.positive(-3.0 - x)) - above
        return (dy * (inside * (x * (1 / 3) + 0.5) + above),), {}

    return x * gate(x) * (1 / 6), backward


def add(ctx: Context, layer: Layer, inputs: list[Value], layout: Layout) -> tuple[Value, Backward]:
    return inputs[0] + inputs[1], lambda dy: ((dy, dy), {})


SHARED = {"linear": linear, "relu": relu, "clipped_relu": clipped_relu, "hardswish": hardswish, "add": add}


def _pooled_norms(layers: tuple[Layer, ...], frozen: frozenset[str]) -> tuple[Layer, ...]:
    """The layers, each BatchNorm that only a maximum pooling reads joined with it into one `pooled_batch_norm`."""
    readers = Counter(name for layer in layers for name in layer.inputs)
    norms = {
        layer.output: layer
        for layer in layers
        if layer.kind == "batch_norm" and layer.output not in frozen and readers[layer.output] == 1
    }
    joined = []
    for layer in layers:
        if layer.kind == "max_pool2d" and (norm := norms.get(layer.inputs[0])):
            joined.remove(norm)
            layer = replace(
                norm,
                kind="pooled_batch_norm",
                output=layer.output,
                output_shape=layer.output_shape,
                attributes=norm.attributes | {"pool": layer},
            )
        joined.append(layer)
    return tuple(joined)


def run_forward(
    ctx: Context, layout: Layout, layers: tuple[Layer, ...], values: dict[str, Value], frozen: frozenset[str]
) -> list[tuple[Layer, Backward]]:
    """Adds the layers' outputs to `values`; returns each layer with its backward closure, in order.

    `frozen` names the layers (by output) that normalise with their running statistics although the step trains.
    """
    tape = []
    training = ctx.batch_statistics
    if training and "pooled_batch_norm" in layout.formulations:
        layers = _pooled_norms(layers, frozen)
    for layer in layers:
        ctx.batch_statistics = training and layer.output not in frozen
        inputs = [values[name] for name in layer.inputs]
        if layer.kind in SHARED:
            y, backward = SHARED[layer.kind](ctx, layer, inputs, layout)
        else:
            y, backward = layout.formulations[layer.kind](ctx, layer, inputs)
        values[layer.output] = y
        tape.append((layer, backward))
    ctx.batch_statistics = training
    return tape


def run_backward(tape: list[tuple[Layer, Backward]], gradients: dict[str, Value]) -> dict[str, Value]:
    """Gradients of the parameters by state name, from the gradients of the last values (`gradients`, by trace name)."""
    of_parameters: dict[str, Value] = {}
    for layer, backward in reversed(tape):
        if layer.output not in gradients:
            continue
        of_inputs, of_own = backward(gradients.pop(layer.output))
        for name, gradient in zip(layer.inputs, of_inputs, strict=True):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        for local, gradient in of_own.items():
            name = layer.parameters[local]
            of_parameters[name] = of_parameters[name] + gradient if name in of_parameters else gradient
    return of_parameters
