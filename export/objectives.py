"""Objectives as functions of tensors: loss terms and their gradients in latents and logits, in forward operators.

loss = (1 − α)·CE + α·D (CE alone for `ce`), each term a weighted mean over the batch; docs/bundle.md has the formulas.
Sources: kd, Hinton et al. 2015 (KL at temperature T) and its form with the mean squared error of logits (Ba and Caruana
2014); lkd, the mean squared error of latents; both, their mixture; crd and lpd: relational.py.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

import numpy as np

from edgestill.export.lowering.formulations import Layout
from edgestill.export.lowering.graph import Value
from edgestill.export.relational import contrastive, initial_heads, locality
from edgestill.runtime.bundle.manifest import Objective

NEGATIVES, FEATURES = 512, 128


def complete(objective: Objective, latent_size: int) -> Objective:
    """The objective with the defaults of the sizes of `crd` that are not given."""
    if objective.name != "crd":
        return objective
    return replace(
        objective,
        negatives=objective.negatives or NEGATIVES,
        features=objective.features or FEATURES,
        teacher_latent_size=objective.teacher_latent_size or latent_size,
    )


def batch_inputs(
    objective: Objective,
    batch: int,
    input_shape: tuple[int, ...],
    input_dtype: str,
    latent_size: int,
    classes: int,
) -> list[dict]:
    """The specs of what a step takes besides state and the optimizer's hyperparameters, in order (docs/bundle.md)."""
    unit = "grey levels 0-255" if input_dtype == "uint8" else "as the student takes them"
    specs = [
        _spec("images", (batch, *input_shape), unit, input_dtype),
        _spec("labels", (batch,), "class index", "int64"),
        _spec("label_weights", (batch,), "weight of a sample in the cross-entropy"),
    ]
    if objective.takes_latents:
        specs.append(_spec("teacher_latents", (batch, latent_size), "latent units"))
    if objective.takes_logits:
        specs.append(_spec("teacher_logits", (batch, classes), "nat"))
    if objective.name == "crd":
        for name, samples in (("teacher_latents", batch), ("teacher_negatives", objective.negatives)):
            specs.append(_spec(name, (samples, objective.teacher_latent_size), "latent units"))
    if objective.name == "lpd":
        specs.append(_spec("neighbour_weights", (batch, batch), "weight of a pair, 0-1"))
    if objective.needs_teacher:
        specs.append(_spec("teacher_weights", (batch,), "weight of a sample in the distillation term"))
        specs.append(_spec("alpha", (1,), "share of the distillation term, 0-1"))
    if objective.name == "both":
        specs.append(_spec("logit_share", (1,), "share of the logits in the distillation term, 0-1"))
    if objective.kd_loss == "kl" or objective.name == "crd":
        specs.append(_spec("temperature", (1,), "softmax temperature"))
    return specs


def objective_parameters(objective: Objective, latent_size: int, seed: int) -> OrderedDict[str, np.ndarray]:
    """What the objective trains besides the student, by state name, at its start: the heads of `crd`."""
    if objective.name != "crd":
        return OrderedDict()
    return initial_heads(objective.features, latent_size, objective.teacher_latent_size, seed)


def _spec(name: str, shape: tuple[int, ...], unit: str, dtype: str = "float32") -> dict:
    return {"name": name, "shape": list(shape), "dtype": dtype, "unit": unit}


@dataclass(frozen=True)
class LossAndGradients:
    loss: Value
    ce_loss: Value
    distillation_loss: Value | None
    d_latents: Value | None  # None: the loss reaches the latents through the logits alone
    d_logits: Value
    d_parameters: dict[str, Value] = field(
        default_factory=dict
    )  # of what the objective trains, by state name


def loss_and_gradients(
    objective: Objective, layout: Layout, inputs: dict[str, Value], latents: Value, logits: Value
) -> LossAndGradients:
    """Losses of shape [1] and their gradients; `inputs` by the names of `batch_inputs` and `objective_parameters`."""
    graph, classes = logits.graph, logits.shape[1]

    def total(column: Value) -> Value:
        return layout.column_sum(column).reshape(1)

    weights = _normalised(inputs["label_weights"], layout)
    one_hot = graph.apply("one_hot", inputs["labels"], classes=classes)
    ce_rows = -layout.row_sum(layout.log_softmax(logits) * one_hot)
    ce_loss = total(ce_rows * weights)
    d_ce = (graph.apply("softmax", logits) - one_hot) * weights
    if not objective.needs_teacher:
        return LossAndGradients(ce_loss, ce_loss, None, None, d_ce)

    alpha = inputs["alpha"]
    weights = _normalised(inputs["teacher_weights"], layout)
    alpha_column = alpha.reshape(1, 1)
    d_ce = d_ce * (1.0 - alpha_column)
    share = weights * alpha_column
    d_parameters: dict[str, Value] = {}
    if objective.relates_samples:
        compare = contrastive if objective.name == "crd" else locality
        found = compare(layout, inputs, latents, share)
        rows, d_latents, d_logits, d_parameters = found.rows, found.d_latents, d_ce, found.d_parameters
    elif objective.name == "lkd":
        rows, d_latents = _squared_error(layout, latents, inputs["teacher_latents"], share)
        d_logits = d_ce
    elif objective.name == "kd":
        rows, gradient = _of_logits(objective, layout, inputs, logits, share)
        d_logits, d_latents = d_ce + gradient, None
    else:
        beta = inputs["logit_share"].reshape(1, 1)
        rest = 1.0 - beta
        latent_rows, d_latents = _squared_error(layout, latents, inputs["teacher_latents"], share * rest)
        logit_rows, gradient = _of_logits(objective, layout, inputs, logits, share * beta)
        rows, d_logits = latent_rows * rest + logit_rows * beta, d_ce + gradient
    distillation_loss = total(rows * weights)
    loss = ce_loss * (1.0 - alpha) + distillation_loss * alpha
    return LossAndGradients(loss, ce_loss, distillation_loss, d_latents, d_logits, d_parameters)


def _of_logits(
    objective: Objective, layout: Layout, inputs: dict[str, Value], logits: Value, share: Value
) -> tuple[Value, Value]:
    """The loss of each row [B, 1] by `kd_loss`, and the gradient in the logits of their sum weighted by `share`."""
    if objective.kd_loss == "mse":
        return _squared_error(layout, logits, inputs["teacher_logits"], share)
    graph, temperature = logits.graph, inputs["temperature"].reshape(1, 1)
    log_teacher = layout.log_softmax(inputs["teacher_logits"] / temperature)
    teacher = graph.apply("softmax", inputs["teacher_logits"] / temperature)
    student = graph.apply("softmax", logits / temperature)
    log_student = layout.log_softmax(logits / temperature)
    rows = layout.row_sum(teacher * (log_teacher - log_student)) * (temperature * temperature)
    return rows, (student - teacher) * (share * temperature)


def _squared_error(layout: Layout, ours: Value, target: Value, share: Value) -> tuple[Value, Value]:
    """The mean squared error of each row [B, 1], and the gradient in `ours` of their sum weighted by `share`."""
    difference = ours - target
    rows = layout.row_sum(difference * difference) * (1 / difference.shape[1])
    return rows, difference * (share * (2 / difference.shape[1]))


def _normalised(weights: Value, layout: Layout) -> Value:
    """Weights [B] divided by their sum, as a column [B, 1]; all zero where the sum is zero."""
    column = weights.reshape(-1, 1)
    return column / weights.graph.apply("maximum", layout.column_sum(column), 1e-12)
