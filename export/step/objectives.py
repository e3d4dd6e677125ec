"""Objectives: what a step is given besides samples, what it trains besides the student, and its loss.

loss = (1 − α)·CE + α·D (CE alone for `ce`), each term a weighted mean over the batch; docs/bundle.md has the formulas.
Sources: kd, Hinton et al. 2015 (KL at temperature T) and its form with the mean squared error of logits (Ba and Caruana
2014); lkd, the mean squared error of latents; both, their mixture; crd and lpd: relational.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgestill.export.lowering.graph import Value
from edgestill.export.step.relational import contrastive, initial_heads, locality
from edgestill.runtime.bundle.manifest import Objective, TensorSpec

NEGATIVES, FEATURES = 512, 128


def complete(objective: Objective, latent_size: int) -> Objective:
    """The objective with the defaults of what is not given: of `kd_loss`, and of the sizes of `crd`."""
    usual = {"kd_loss": "mse"} if objective.takes_logits else {}
    if objective.name == "crd":
        usual = {"negatives": NEGATIVES, "features": FEATURES, "teacher_latent_size": latent_size}
    return replace(objective, **{name: getattr(objective, name) or value for name, value in usual.items()})


def objective_inputs(objective: Objective, batch: int, latent_size: int, classes: int) -> list[TensorSpec]:
    """What a step takes besides state, samples and the optimizer's hyperparameters, in order (docs/bundle.md)."""
    crd, of_teacher = objective.name == "crd", objective.teacher_latent_size
    rows = (
        (True, "label_weights", (batch,), "weight of a sample in the cross-entropy"),
        (objective.takes_latents, "teacher_latents", (batch, latent_size), "latent units"),
        (objective.takes_logits, "teacher_logits", (batch, classes), "nat"),
        (crd, "teacher_latents", (batch, of_teacher), "latent units"),
        (crd, "teacher_negatives", (objective.negatives, of_teacher), "latent units"),
        (objective.name == "lpd", "neighbour_weights", (batch, batch), "weight of a pair, 0-1"),
        (objective.needs_teacher, "teacher_weights", (batch,), "weight of a sample in the distillation term"),
        (objective.needs_teacher, "alpha", (1,), "share of the distillation term, 0-1"),
        (objective.name == "both", "logit_share", (1,), "share of the logits in the distillation term, 0-1"),
        (crd or objective.kd_loss == "kl", "temperature", (1,), "softmax temperature"),
    )
    labels = TensorSpec("labels", (batch,), "int64", "class index")
    return [labels, *(TensorSpec(name, shape, "float32", unit) for taken, name, shape, unit in rows if taken)]


def objective_parameters(objective: Objective, latent_size: int, seed: int) -> dict[str, np.ndarray]:
    """What the objective trains besides the student, by state name, at its start: the heads of `crd`."""
    if objective.name != "crd":
        return {}
    return initial_heads(objective.features, latent_size, objective.teacher_latent_size, seed)


def losses(objective: Objective, given: dict[str, Value], latents: Value, logits: Value) -> dict[str, Value]:
    """The losses of a batch, each of shape [1]; `given` by `objective_inputs`' names and `objective_parameters`'."""
    one_hot = given["labels"].apply("one_hot", classes=logits.shape[1])
    ce_rows = -(logits.apply("log_softmax") * one_hot).sum(1)
    ce_loss = _weighted_mean(ce_rows, given["label_weights"])
    if not objective.needs_teacher:
        return {"loss": ce_loss, "ce_loss": ce_loss}
    rows, alpha = TERMS[objective.name](objective, given, latents, logits), given["alpha"]
    distillation_loss = _weighted_mean(rows, given["teacher_weights"])
    loss = ce_loss * (1.0 - alpha) + distillation_loss * alpha
    return {"loss": loss, "ce_loss": ce_loss, "distillation_loss": distillation_loss}


def _latents(objective: Objective, given: dict[str, Value], latents: Value, logits: Value) -> Value:
    return _squared_error(latents, given["teacher_latents"])


def _logits(objective: Objective, given: dict[str, Value], latents: Value, logits: Value) -> Value:
    if objective.kd_loss == "mse":
        return _squared_error(logits, given["teacher_logits"])
    temperature = given["temperature"].reshape(1, 1)
    of_teacher = given["teacher_logits"] / temperature
    apart = of_teacher.apply("log_softmax") - (logits / temperature).apply("log_softmax")
    return (of_teacher.apply("softmax") * apart).sum(1) * (temperature * temperature)


def _both(objective: Objective, given: dict[str, Value], *outputs: Value) -> Value:
    share = given["logit_share"].reshape(1, 1)
    of_latents, of_logits = (term(objective, given, *outputs) for term in (_latents, _logits))
    return of_latents * (1.0 - share) + of_logits * share


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
