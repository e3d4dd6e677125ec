"""Upsampling: repetition, or one constant matrix an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgestill.export.lowering.aten.context import Context, rows
from edgestill.export.lowering.aten.products import mapped
from edgestill.export.lowering.graph import Value


def _resampled(c: Context, x: Value, size: Sequence[int] | None, *options: Any) -> Value:
    """Axis by axis: the operator itself is shown the unit vectors of each, and gives the columns of its matrix."""
    *options, scales = options
    for i, (old, new) in enumerate(zip(x.shape[2:], c.shape[2:], strict=True)):
        alone = [1] * (x.rank - 2)
        shape, size = ([*alone[:i], n, *alone[i + 1 :]] for n in (old, new))
        scale = scales and [float(one) if k == i else 1.0 for k, one in enumerate(scales)]
        unit = torch.eye(old, dtype=torch.float64).reshape(old, 1, *shape)
        columns = c.node.target(unit, None if scale else size, *options, scale)
        x = mapped(x, 2 + i, columns.reshape(old, new).T.numpy())
    return x


def _nearest(c: Context, x: Value, size: Sequence[int] | None, scales: Sequence[float] | None) -> Value:
    factors = [new // old for old, new in zip(x.shape[2:], c.shape[2:], strict=True)]
    grown = [old * factor for old, factor in zip(x.shape[2:], factors, strict=True)]
    if grown != list(c.shape[2:]) or (scales and list(scales) != factors):
        return _resampled(c, x, size, scales)
    pairs = [n for pair in zip(x.shape[2:], factors, strict=True) for n in pair]
    apart = x.reshape(*x.shape[:2], *(n for old in x.shape[2:] for n in (old, 1)))
    return apart.expand(*x.shape[:2], *pairs)


rows({f"upsample_nearest{n}d.vec _upsample_nearest_exact{n}d.vec": _nearest for n in (1, 2, 3)})
rows(
    {
        "upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec": _resampled,
        "upsample_bicubic2d.vec": _resampled,
    }
)
