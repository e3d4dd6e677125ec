"""Upsampling: repetition, or one constant matrix an axis."""

from __future__ import annotations

from typing import Any

import torch

from edgestill.export.lowering.aten.context import ATEN, Context, Row
from edgestill.export.lowering.aten.products import along
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def _resampled(mode: str, function: Any) -> Row:
    def rule(c: Context, x: Any, size: Any, *rest: Any) -> Value:
        x = c.value(x)
        wanted, scales = c.shape[2:], rest[-1]
        factors = [w // have for w, have in zip(wanted, x.shape[2:], strict=True)]
        whole = all(have * f == w for have, w, f in zip(x.shape[2:], wanted, factors, strict=True))
        if mode == "nearest" and whole and (scales is None or list(scales) == factors):
            shape = [n for have in x.shape[2:] for n in (have, 1)]
            grown = [n for have, f in zip(x.shape[2:], factors, strict=True) for n in (have, f)]
            return x.reshape(*x.shape[:2], *shape).expand(*x.shape[:2], *grown).reshape(*c.shape)
        for i, new in enumerate(wanted):
            old = x.shape[2 + i]
            scale = None if scales is None else [scales[i]]
            eye = torch.eye(old).reshape(old, 1, old)
            if mode == "bicubic":
                eye, scale = eye.unsqueeze(-1), None if scales is None else [scales[i], 1.0]
                matrix = function(eye, None if scale else [new, 1], rest[0], scale)
            else:
                matrix = function(eye, None if scale else [new], *rest[:-1], scale)
            x = along(x, 2 + i, matrix.reshape(old, new).T.numpy())
        return x

    return rule


for _n in (1, 2, 3):
    ATEN[getattr(aten, f"upsample_nearest{_n}d").vec] = _resampled("nearest", aten.upsample_nearest1d.vec)
    ATEN[getattr(aten, f"_upsample_nearest_exact{_n}d").vec] = _resampled(
        "nearest", aten._upsample_nearest_exact1d.vec
    )
ATEN |= {
    aten.upsample_linear1d.vec: _resampled("linear", aten.upsample_linear1d.vec),
    aten.upsample_bilinear2d.vec: _resampled("linear", aten.upsample_linear1d.vec),
    aten.upsample_trilinear3d.vec: _resampled("linear", aten.upsample_linear1d.vec),
    aten.upsample_bicubic2d.vec: _resampled("bicubic", aten.upsample_bicubic2d.vec),
}
