"""Objectives that compare samples with one another, `crd` and `lpd`: rows of losses and gradients in forward operators.

Sources: crd, Tian, Krishnan and Isola 2020, Contrastive Representation Distillation, equations 17-19; lpd, Chen et al.
2021, Learning Student Networks via Feature Embedding. docs/bundle.md has the formulas.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgestill.export.lowering.formulations import Layout
from edgestill.export.lowering.graph import Value

HEADS = "crd."
"""What the names of the projection heads' state tensors begin with."""
_SIDES = ("student_head", "teacher_head")


@dataclass(frozen=True)
class Relational:
    """The loss of each row [B, 1], and the gradients of their sum weighted by `share`: in the latents, and in the
    parameters of the heads by state name."""

    rows: Value
    d_latents: Value
    d_parameters: dict[str, Value]


def initial_heads(
    features: int, latent_size: int, teacher_latent_size: int, seed: int
) -> OrderedDict[str, np.ndarray]:
    """Weights [features, latent size] and biases [features] of both heads, drawn as PyTorch draws a linear layer."""
    heads: OrderedDict[str, np.ndarray] = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for side, size in zip(_SIDES, (latent_size, teacher_latent_size), strict=True):
            for name, tensor in nn.Linear(size, features).state_dict().items():
                heads[f"{HEADS}{side}.{name}"] = tensor.numpy().copy()
    return heads


def contrastive(layout: Layout, given: dict[str, Value], latents: Value, share: Value) -> Relational:
    """`crd`; `given` holds the step's inputs and the heads by name, `share` is [B, 1]."""
    graph, batch = latents.graph, latents.shape[0]
    inverse = 1.0 / given["temperature"].reshape(1, 1)
    student, of_student = _project(layout, given, "student_head", latents)
    teacher, of_teacher = _project(layout, given, "teacher_head", given["teacher_latents"])
    others, of_others = _project(layout, given, "teacher_head", given["teacher_negatives"])
    # log z, where z is what e^(g/τ) is on average between features of random directions
    offset = inverse * inverse * (1 / (2 * student.shape[1]))
    bound, bound_in_batch = offset + math.log(others.shape[0]), offset + math.log(batch - 1)
    apart = graph.constant(1 - np.eye(batch))
    positives = layout.row_sum(student * teacher) * inverse
    negatives = graph.apply("matmul", student, others, transpose_b=True) * inverse
    negatives_in_batch = graph.apply("matmul", teacher, student, transpose_b=True) * inverse
    near, d_near = _softplus(bound - positives)
    near_in_batch, d_near_in_batch = _softplus(bound_in_batch - positives)
    far, d_far = _softplus(negatives - bound)
    far_in_batch, d_far_in_batch = _softplus(negatives_in_batch - bound_in_batch)
    rows = near + layout.row_sum(far) + near_in_batch + layout.row_sum(far_in_batch * apart)

    def turned(a: Value, b: Value) -> Value:
        return graph.apply("matmul", a, b, transpose_a=True)

    share = share * inverse
    pull = -(d_near + d_near_in_batch) * share
    push, push_in_batch = d_far * share, d_far_in_batch * apart * share
    d_latents, of_student_head = of_student(teacher * pull + push @ others + turned(push_in_batch, teacher))
    _, of_teacher_head = of_teacher(student * pull + push_in_batch @ student)
    _, of_negatives = of_others(turned(push, student))
    shared = {name: of_teacher_head[name] + of_negatives[name] for name in of_teacher_head}
    return Relational(rows, d_latents, of_student_head | shared)


def _project(layout: Layout, given: dict[str, Value], side: str, x: Value):
    """Features of length one [n, features], and a function of their gradient to those of `x` and of the head."""
    names = [f"{HEADS}{side}.{part}" for part in ("weight", "bias")]
    weight, bias = (given[name] for name in names)
    graph = x.graph
    projected = graph.apply("matmul", x, weight, transpose_b=True) + bias.reshape(1, -1)
    inverse_norm = graph.apply("rsqrt", layout.row_sum(projected * projected) + 1e-12)
    features = projected * inverse_norm

    def backward(gradient: Value) -> tuple[Value, dict[str, Value]]:
        across = (gradient - features * layout.row_sum(features * gradient)) * inverse_norm
        of_head = (
            graph.apply("matmul", across, x, transpose_a=True),
            layout.column_sum(across).reshape(*bias.shape),
        )
        return across @ weight, dict(zip(names, of_head, strict=True))

    return features, backward


def _softplus(x: Value) -> tuple[Value, Value]:
    """log(1 + eˣ) and its derivative; no exponent is above zero, so that nothing overflows."""
    graph = x.graph
    above = graph.apply("relu", x)
    size = above + graph.apply("relu", -x)
    value = above + graph.apply("log", graph.apply("exp", -size) + 1.0)
    return value, graph.apply("exp", x - value)


def locality(layout: Layout, given: dict[str, Value], latents: Value, share: Value) -> Relational:
    """`lpd`; `given` holds `neighbour_weights`, `share` is [B, 1]."""
    graph, (batch, size) = latents.graph, latents.shape
    # Distances do not change, and squares lose fewer digits.
    centred = latents - layout.column_sum(latents) * (1 / batch)
    weights = given["neighbour_weights"]
    squares = layout.row_sum(centred * centred)
    products = layout.row_sum(centred * (weights @ centred))
    rows = (layout.row_sum(weights) * squares + weights @ squares - products * 2.0) * (1 / (2 * size))
    pairs = weights * (share * (1 / size))
    degrees = layout.row_sum(pairs) + layout.column_sum(pairs).reshape(batch, 1)
    pulled = pairs @ centred + graph.apply("matmul", pairs, centred, transpose_a=True)
    return Relational(rows, centred * degrees - pulled, {})
