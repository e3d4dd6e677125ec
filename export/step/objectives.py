"""Objectives: what a step is given besides samples, what it trains besides the student, and its loss.

loss = (1 − α)·CE + α·D (CE alone for `ce`), each term a weighted mean over the batch; docs/bundle.md has the formulas.
Sources: kd, Hinton et al. 2015 (KL at temperature T) and its form with the mean squared error of logits (Ba and Caruana
2014); lkd, the mean squared error of latents; both, their mixture; crd and lpd: relational.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edgestill.export.lowering.graph import Value
from edgestill.export.step.relational import contrastive, initial_heads, locality
from edgestill.runtime.bundle.manifest import Objective, TensorSpec

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


def objective_inputs(objective: Objective, batch: int, latent_size: int, classes: int) -> list[TensorSpec]:
    """What a step takes besides state, samples and the optimizer's hyperparameters, in order (docs/bundle.md)."""
    specs = [
        TensorSpec("labels", (batch,), "int64", "class index"),
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


def _spec(name: str, shape: tuple[int, ...], unit: str) -> TensorSpec:
    return TensorSpec(name, shape, "float32", unit)


@dataclass(frozen=True)
class Losses:
    """Each of shape [1]."""

    loss: Value
    ce_loss: Value
    distillation_loss: Value | None = None


def losses(objective: Objective, given: dict[str, Value], latents: Value, logits: Value) -> Losses:
    """The losses of a batch; `given` by the names of `objective_inputs` and `objective_parameters`."""
    one_hot = given["labels"].apply("one_hot", classes=logits.shape[1])
    ce_rows = -(logits.apply("log_softmax") * one_hot).sum(1)
    ce_loss = _weighted_mean(ce_rows, given["label_weights"])
    if not objective.needs_teacher:
        return Losses(ce_loss, ce_loss)
    rows = TERMS[objective.name](objective, given, latents, logits)
    distillation_loss = _weighted_mean(rows, given["teacher_weights"])
    alpha = given["alpha"]
    return Losses(ce_loss * (1.0 - alpha) + distillation_loss * alpha, ce_loss, distillation_loss)


def _latents(objective: Objective, given: dict[str, Value], latents: Value, logits: Value) -> Value:
    return _squared_error(latents, given["teacher_latents"])


def _logits(objective: Objective, given: dict[str, Value], latents: Value, logits: Value) -> Value:
    if objective.kd_loss == "mse":
        return _squared_error(logits, given["teacher_logits"])
    temperature = given["temperature"].reshape(1, 1)
    of_teacher = given["teacher_logits"] / temperature
    apart = of_teacher.apply("log_softmax") - (logits / temperature).apply("log_softmax")
    return (of_teacher.apply("softmax") * apart).sum(1) * (temperature * temperature)


def _both(objective: Objective, given: dict[str, Value], latents: Value, logits: Value) -> Value:
    share = given["logit_share"].reshape(1, 1)
    terms = _latents(objective, given, latents, logits), _logits(objective, given, latents, logits)
    return terms[0] * (1.0 - share) + terms[1] * share


Term = Callable[[Objective, dict[str, Value], Value, Value], Value]
TERMS: dict[str, Term] = {
    "lkd": _latents,
    "kd": _logits,
    "both": _both,
    "crd": lambda objective, given, latents, logits: contrastive(given, latents),
    "lpd": lambda objective, given, latents, logits: locality(given, latents),
}
"""The distillation term D of each sample [B, 1], by the objective's name."""


def _squared_error(ours: Value, target: Value) -> Value:
    """The mean squared error of each row [B, 1]."""
    difference = ours - target
    return (difference * difference).sum(1) * (1 / difference.shape[1])


def _weighted_mean(rows: Value, weights: Value) -> Value:
    """Of rows [B, 1] by weights [B]: shape [1], zero where all weights are zero."""
    column = weights.reshape(-1, 1)
    share = column / column.sum(0).apply("maximum", 1e-12)
    return (rows * share).sum(0).reshape(1)
