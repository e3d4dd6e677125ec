"""BatchNorm, LayerNorm and GroupNorm of any rank."""

from __future__ import annotations

import math
from typing import Any

import torch

from edgestill.export.lowering.aten.context import Context, Refusal, row
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def _as_images(x: Value) -> Value:
    """[N, C, …] → [N, C, H, W]."""
    height = math.prod(x.shape[2:-1]) if x.rank > 3 else 1
    return x.reshape(*x.shape[:2], height, x.shape[-1] if x.rank > 2 else 1)


def _scale_and_offset(c: Context, weight: Any, bias: Any, size: int) -> tuple[Value, Value]:
    weight = c.value(torch.ones(size) if weight is None else weight)
    return weight, c.value(torch.zeros(size) if bias is None else bias)


@row(aten._native_batch_norm_legit_functional.default)
def _batch_norm(c, x, weight, bias, running_mean, running_var, training, momentum, eps):
    x = c.value(x)
    if not training:
        y = _batch_norm_by(c, x, weight, bias, running_mean, running_var, momentum, eps)[0]
        return y, None, None, running_mean, running_var
    images = _as_images(x)
    count = images.size // images.shape[1]
    if count < 2:
        raise Refusal(
            "BatchNorm over one value a channel, which has no variance,",
            hint="export with a larger --batch, or use nn.GroupNorm",
        )
    weight, bias = _scale_and_offset(c, weight, bias, x.shape[1])
    y, mean, variance = c.graph.apply_many("batch_norm", images, weight, bias, eps=float(eps))
    if running_mean is None:
        return y.reshape(*x.shape), mean, variance
    running_mean, running_var = c.value(running_mean), c.value(running_var)
    return (
        y.reshape(*x.shape),
        mean,
        variance,
        running_mean * (1.0 - momentum) + mean * momentum,
        running_var * (1.0 - momentum) + variance * (momentum * count / (count - 1)),
    )


@row(aten._native_batch_norm_legit.no_stats)
def _batch_norm_alone(c, x, weight, bias, training, momentum, eps):
    return _batch_norm(c, x, weight, bias, None, None, True, momentum, eps)


@row(aten._native_batch_norm_legit_no_training.default)
def _batch_norm_by(c, x, weight, bias, mean, variance, momentum, eps):
    x = c.value(x)
    weight, bias = _scale_and_offset(c, weight, bias, x.shape[1])
    y = _as_images(x).apply("normalize", weight, bias, c.value(mean), c.value(variance), eps=float(eps))
    return y.reshape(*x.shape), None, None


@row(aten.native_layer_norm.default)
def _layer_norm(c, x, shape, weight, bias, eps):
    x = c.value(x)
    y = x.reshape(-1, math.prod(shape)).apply("standardize", eps=float(eps)).reshape(*x.shape)
    y = y if weight is None else y * c.value(weight)
    return y if bias is None else y + c.value(bias), None, None


@row(aten.native_group_norm.default)
def _group_norm(c, x, weight, bias, batch, channels, area, groups, eps):
    x = c.value(x)
    y = x.reshape(batch * groups, -1).apply("standardize", eps=float(eps)).reshape(*x.shape)
    shape = (1, channels, *(1,) * (x.rank - 2))
    y = y if weight is None else y * c.value(weight).reshape(*shape)
    return y if bias is None else y + c.value(bias).reshape(*shape), None, None
