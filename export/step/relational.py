"""Terms that compare samples with one another, `crd` and `lpd`, in plain operators.

Sources: crd, Tian, Krishnan and Isola 2020, Contrastive Representation Distillation, equations 17-19; lpd, Chen et al.
2021, Learning Student Networks via Feature Embedding. docs/bundle.md has the formulas.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from edgestill.export.lowering.graph import Value

HEADS = "crd."
"""What the names of the projection heads' state tensors begin with."""


def initial_heads(
    features: int, latent_size: int, teacher_latent_size: int, seed: int
) -> dict[str, np.ndarray]:
    """Weights [features, latent size] and biases [features] of both heads, drawn as PyTorch draws a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = {
            "student_head": nn.Linear(latent_size, features),
            "teacher_head": nn.Linear(teacher_latent_size, features),
        }
    parameters = nn.ModuleDict(heads).state_dict()
    return {HEADS + name: tensor.numpy().copy() for name, tensor in parameters.items()}


def contrastive(given: dict[str, Value], latents: Value) -> Value:
    """`crd` of each sample [B, 1]; `given` holds the step's inputs and the heads by name."""
    graph, batch = latents.graph, latents.shape[0]
    inverse = 1.0 / given["temperature"].reshape(1, 1)
    student = _project(given, "student_head", latents)
    teacher = _project(given, "teacher_head", given["teacher_latents"])
    others = _project(given, "teacher_head", given["teacher_negatives"])
    # log z, where z is what e^(g/τ) is on average between features of random directions
    offset = inverse * inverse * (1 / (2 * student.shape[1]))
    bound, bound_in_batch = offset + math.log(others.shape[0]), offset + math.log(batch - 1)
    positives = (student * teacher).sum(1) * inverse
    negatives = (student @ others.swap()) * inverse
    negatives_in_batch = (teacher @ student.swap()) * inverse
    near = (bound - positives).apply("softplus") + (bound_in_batch - positives).apply("softplus")
    far = (negatives - bound).apply("softplus").sum(1)
    apart = graph.constant(1 - np.eye(batch))
    far_in_batch = ((negatives_in_batch - bound_in_batch).apply("softplus") * apart).sum(1)
    return near + far + far_in_batch


def _project(given: dict[str, Value], side: str, x: Value) -> Value:
    """Features of length one [n, features]."""
    weight, bias = (given[f"{HEADS}{side}.{part}"] for part in ("weight", "bias"))
    projected = x @ weight.swap() + bias.reshape(1, -1)
    return projected * ((projected * projected).sum(1) + 1e-12).apply("rsqrt")


def locality(given: dict[str, Value], latents: Value) -> Value:
    """`lpd` of each sample [B, 1]; `given` holds `neighbour_weights`."""
    batch, size = latents.shape
    # Distances do not change, and squares lose fewer digits.
    centred = latents - latents.sum(0) * (1 / batch)
    weights = given["neighbour_weights"]
    squares = (centred * centred).sum(1)
    products = (centred * (weights @ centred)).sum(1)
    return (weights.sum(1) * squares + weights @ squares - products * 2.0) * (1 / (2 * size))
