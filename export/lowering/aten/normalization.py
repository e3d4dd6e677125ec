"""BatchNorm, LayerNorm and GroupNorm of any rank."""

from __future__ import annotations

import math

import numpy as np

from edgestill.export.lowering.aten.context import Context, Refusal, row, rows
from edgestill.export.lowering.graph import Value


def _images_and_affine(c: Context, x: Value, weight: Value | None, bias: Value | None) -> list[Value]:
    """[N, C, …] as [N, C, H, W], and factors and offsets a channel, if any."""
    height = math.prod(x.shape[2:-1]) if x.rank > 3 else 1
    images = x.reshape(*x.shape[:2], height, x.shape[-1] if x.rank > 2 else 1)
    neutral = [c.graph.constant(np.full(x.shape[1], number)) for number in (1.0, 0.0)]
    return [images, *(n if given is None else given for given, n in zip((weight, bias), neutral, strict=True))]


@row("_native_batch_norm_legit_functional")
def _batch_norm(c, x, weight, bias, running_mean, running_var, training, momentum, eps):
    if not training:
        y, *_ = _batch_norm_by(c, x, weight, bias, running_mean, running_var, momentum, eps)
        return y, None, None, running_mean, running_var
    count = x.size // x.shape[1]
    if count < 2:
        raise Refusal(
            "BatchNorm over one value a channel, which has no variance,",
            hint="export with a larger --batch, or use nn.GroupNorm",
        )
    made = c.graph.apply_many("batch_norm", *_images_and_affine(c, x, weight, bias), eps=float(eps))
    if running_mean is None:
        return made
    _, mean, variance = made
    return (
        *made,
        running_mean * (1.0 - momentum) + mean * momentum,
        running_var * (1.0 - momentum) + variance * (momentum * count / (count - 1)),
    )


@row("_native_batch_norm_legit_no_training")
def _batch_norm_by(c, x, weight, bias, mean, variance, momentum, eps):
    images, *affine = _images_and_affine(c, x, weight, bias)
    return images.apply("normalize", *affine, mean, variance, eps=float(eps)), None, None


def _standardized(x: Value, rows: int, affine: list[Value | None], eps: float) -> tuple[Value, None, None]:
    """Each of so many rows by its own mean and variance, then by factors and offsets, if any."""
    y = x.reshape(rows, -1).apply("standardize", eps=float(eps)).reshape(*x.shape)
    weight, bias = affine
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, None, None


def _layer_norm(c, x, shape, weight, bias, eps):
    return _standardized(x, x.size // math.prod(shape), [weight, bias], eps)


def _group_norm(c, x, weight, bias, batch, channels, area, groups, eps):
    shape = (1, channels, *(1,) * (x.rank - 2))
    return _standardized(x, batch * groups, [v and v.reshape(*shape) for v in (weight, bias)], eps)


rows(
    {
        "_native_batch_norm_legit.no_stats": lambda c, x, weight, bias, training, momentum, eps: _batch_norm(
            c, x, weight, bias, None, None, True, momentum, eps
        ),
        "native_layer_norm": _layer_norm,
        "native_group_norm": _group_norm,
    }
)
