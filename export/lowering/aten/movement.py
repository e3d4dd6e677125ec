"""Reshaping, slicing, joining, indexing and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.aten.context import ATEN, Context, Refusal, Row, axes_of, row
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def _shaped(c: Context, x: Any, *_: Any) -> Value:
    return c.value(x).reshape(*c.shape)


for _name in (
    "view.default _unsafe_view.default reshape.default unsqueeze.default squeeze.default squeeze.dim "
    "squeeze.dims flatten.using_ints view_copy.default"
).split():
    _packet, _overload = _name.split(".")
    ATEN[getattr(getattr(aten, _packet), _overload)] = _shaped


def _permute(c: Context, x: Any, dims: Sequence[int]) -> Value:
    return c.value(x).transpose(*(d % x.rank for d in dims))


def _transpose(c: Context, x: Any, a: int, b: int) -> Value:
    order = list(range(x.rank))
    order[a % x.rank], order[b % x.rank] = order[b % x.rank], order[a % x.rank]
    return c.value(x).transpose(*order)


def _slice(c: Context, x: Any, dim: int, start: int | None, stop: int | None, step: int) -> Value:
    axis = dim % x.rank
    start, stop, step = slice(start, stop, step).indices(x.shape[axis])
    return c.value(x).narrow(axis, start, max(stop, start), step)


def _select(c: Context, x: Any, dim: int, index: int) -> Value:
    axis = dim % x.rank
    index %= x.shape[axis]
    return c.value(x).narrow(axis, index, index + 1).reshape(*c.shape)


def _cat(c: Context, parts: Sequence[Any], dim: int = 0) -> Value:
    parts = [c.value(part) for part in parts]
    if any(part.dtype == "float32" for part in parts):
        parts = [c.float(part) for part in parts]
    rank = len(c.shape)
    parts = [part for part in parts if part.shape != (0,) or rank == 1]
    return c.graph.apply("concat", *parts, axis=dim % rank)


def _split(c: Context, x: Any, sizes: int | Sequence[int], dim: int = 0) -> list[Value]:
    axis = dim % x.rank
    if isinstance(sizes, int):
        sizes = [min(sizes, x.shape[axis] - start) for start in range(0, x.shape[axis], sizes)]
    ends = np.cumsum(sizes).tolist()
    return [c.value(x).narrow(axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _slice_scatter(c: Context, x: Any, source: Any, dim: int, start: Any, stop: Any, step: int) -> Value:
    x, source = c.value(x), c.value(source)
    axis = dim % x.rank
    start, stop, step = slice(start, stop, step).indices(x.shape[axis])
    if step != 1:
        raise Refusal("an assignment to a slice with a step")
    parts = [x.narrow(axis, 0, start), source, x.narrow(axis, stop, x.shape[axis])]
    return c.graph.apply("concat", *(part for part in parts if part.size), axis=axis)


def _repeat(c: Context, x: Any, repeats: Sequence[int]) -> Value:
    x = c.value(x)
    shape = (1,) * (len(repeats) - x.rank) + x.shape
    x = x.reshape(*(size for pair in zip((1,) * len(shape), shape, strict=True) for size in pair))
    return x.expand(*(size for pair in zip(repeats, shape, strict=True) for size in pair)).reshape(*c.shape)


def take(x: Value, index: Any, axis: int) -> Value:
    """The entries of an axis by an index [n] of integers."""
    if isinstance(index, Value):
        return x.apply("gather", index, axis=axis)
    return x.apply("gather", x.graph.constant(np.asarray(index, np.int64)), axis=axis)


def _flip(c: Context, x: Any, dims: Sequence[int]) -> Value:
    x = c.value(x)
    for axis in axes_of(dims, x.rank):
        parts = [x.narrow(axis, i, i + 1) for i in reversed(range(x.shape[axis]))]
        x = c.graph.apply("concat", *parts, axis=axis)
    return x


def _index(c: Context, x: Any, indices: Sequence[Any]) -> Value:
    x = c.value(x)
    given = [i for i, index in enumerate(indices) if index is not None]
    if given != list(range(given[0], given[-1] + 1)):
        raise Refusal("an index of axes that are not side by side", hint="index one axis after the other")
    chosen = [indices[i] for i in given]
    before, after = x.shape[: given[0]], x.shape[given[-1] + 1 :]
    if len(chosen) == 1 and isinstance(chosen[0], Value):
        index = chosen[0]
        flat = take(x, index.reshape(-1), given[0])
        return flat.reshape(*before, *index.shape, *after)
    if any(isinstance(index, Value) for index in chosen):
        raise Refusal("several indices that are known only at run time")
    if any(index.dtype == torch.bool for index in chosen):
        places = [i.nonzero(as_tuple=True) if i.dtype == torch.bool else (i,) for i in chosen]
        chosen = [index for group in places for index in group]
        after = x.shape[given[0] + len(chosen) :]
    sizes = x.shape[given[0] : given[0] + len(chosen)]
    arrays = np.broadcast_arrays(*(index.numpy() % size for index, size in zip(chosen, sizes, strict=True)))
    flat = np.ravel_multi_index(arrays, sizes)
    rows = x.reshape(*before, math.prod(sizes), *after)
    return take(rows, flat.reshape(-1), len(before)).reshape(*before, *flat.shape, *after)


def _gather(c: Context, x: Any, dim: int, index: Any, *_: Any) -> Value:
    x = c.value(x)
    axis = dim % x.rank
    if isinstance(index, Value):
        if index.shape[axis] != 1 or any(
            i != axis and index.shape[i] != x.shape[i] for i in range(x.rank)
        ):
            raise Refusal("torch.gather of more than one entry by an index known only at run time")
        places = np.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.rank)])
        return c.graph.apply("where", index.apply("equal", c.graph.constant(places)), x, 0.0).sum(axis)
    grid = list(np.indices(index.shape))
    grid[axis] = index.numpy() % x.shape[axis]
    flat = np.ravel_multi_index(grid, x.shape)
    return take(x.reshape(-1), flat.reshape(-1), 0).reshape(*index.shape)


def _embedding(c: Context, weight: Any, indices: Any, padding_idx: int = -1, *_: Any) -> Value:
    indices = c.value(indices)
    rows = take(c.value(weight), indices.reshape(-1), 0)
    if padding_idx >= 0:  # its row gets no gradient
        padding = indices.reshape(-1, 1).apply("to_float").apply("equal", float(padding_idx))
        rows = c.graph.apply("where", padding, rows.apply("stop_gradient"), rows)
    return rows.reshape(*indices.shape, rows.shape[1])


@row(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def _embedding_bag(c, weight, indices, offsets, _, mode, __, factors, include_last, padding_idx):
    """The sum, mean or largest of the rows of each bag; bags of one size, as nn.EmbeddingBag makes of [B, length]."""
    indices = c.value(indices)
    starts = [] if isinstance(offsets, Value) else offsets.tolist()[: -1 if include_last else None]
    size = indices.size // max(len(starts), 1)
    if starts != list(range(0, indices.size, size)) or factors is not None or padding_idx >= 0:
        raise Refusal(
            "nn.EmbeddingBag with bags of several sizes, factors or padding",
            hint="give it indices [batch, length] alone, or use nn.Embedding and a mean",
        )
    rows = take(c.value(weight), indices, 0).reshape(len(starts), size, -1)
    pooled = (rows.sum, rows.mean, lambda axis: rows.apply("reduce_max", axes=(axis,)))[mode](1)
    return pooled.reshape(len(starts), -1), None, None, None


def _triangle(keep: Callable[[np.ndarray, int], np.ndarray]) -> Row:
    def rule(c: Context, x: Any, diagonal: int = 0) -> Value:
        mask = keep(np.ones(x.shape[-2:], np.float32), diagonal)
        return c.graph.apply("where", c.graph.constant(np.broadcast_to(mask, x.shape)), c.value(x), 0.0)

    return rule


def by_positions(c: Context, x: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """Any movement of elements: the function is shown the positions."""
    x = c.value(x)
    positions = function(torch.arange(x.size).reshape(x.shape))
    return take(x.reshape(-1), positions.reshape(-1).numpy(), 0).reshape(*positions.shape)


def _roll(c: Context, x: Any, shifts: Sequence[int], dims: Sequence[int]) -> Value:
    x = c.value(x)
    if not dims:
        return _roll(c, x.reshape(-1), shifts, [0]).reshape(*x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        axis, size = dim % x.rank, x.shape[dim % x.rank]
        if (start := -shift % size) != 0:
            x = c.graph.apply("concat", x.narrow(axis, start, size), x.narrow(axis, 0, start), axis=axis)
    return x


ATEN |= {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda c, x: c.value(x).transpose(*reversed(range(x.rank))),
    aten.expand.default: lambda c, x, *_: c.value(x).expand(*c.shape),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.stack.default: lambda c, parts, dim=0: _cat(
        c, [unsqueezed(c.value(part), dim % len(c.shape)) for part in parts], dim
    ),
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split,
    aten.unbind.int: lambda c, x, dim=0: [_select(c, x, dim, i) for i in range(x.shape[dim])],
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: lambda c, x, source, dim, index: _slice_scatter(
        c, x, unsqueezed(c.value(source), dim % x.rank), dim, index % x.shape[dim], index % x.shape[dim] + 1, 1
    ),
    aten.copy.default: lambda c, x, source, *_: c.value(source).expand(*c.shape),
    aten.fill.Scalar: lambda c, x, number: torch.full(c.shape, number, dtype=c.dtype),
    aten.repeat.default: _repeat,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    aten.index.Tensor: _index,
    aten.index_select.default: lambda c, x, dim, index: take(
        c.value(x), index if isinstance(index, Value) else index.numpy(), dim % x.rank
    ),
    aten.gather.default: _gather,
    aten.embedding.default: _embedding,
    aten.tril.default: _triangle(np.tril),
    aten.triu.default: _triangle(np.triu),
    aten.diagonal.default: lambda c, x, *a: by_positions(c, x, lambda v: torch.diagonal(v, *a)),
    aten.unfold.default: lambda c, x, *a: by_positions(c, x, lambda v: v.unfold(*a)),
    aten.as_strided.default: lambda c, x, size, stride, offset: by_positions(
        c, x, lambda v: torch.as_strided(v, size, stride, offset or 0)
    ),
}


def unsqueezed(x: Value, axis: int) -> Value:
    return x.reshape(*x.shape[:axis], 1, *x.shape[axis:])


def _sides(pads: Sequence[int], rank: int) -> tuple[list[int], list[int]]:
    """Begins and ends an axis, from F.pad's pairs that start at the last axis."""
    begins, ends = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return begins, ends


@row(aten.constant_pad_nd.default)
def _constant_pad(c: Context, x: Any, pads: Sequence[int], number: float = 0) -> Value:
    x = c.value(x)
    return x.pad(*_sides(pads, x.rank), value=float(number))


@row(aten.pad.default)
def _pad(c: Context, x: Any, pads: Sequence[int], mode: str = "constant", number: float | None = None) -> Value:
    if mode == "constant":
        return _constant_pad(c, x, pads, number or 0.0)
    x = c.value(x)
    for axis, (begin, end) in enumerate(zip(*_sides(pads, x.rank), strict=True)):
        if not begin and not end:
            continue
        size = x.shape[axis]
        places = np.arange(-begin, size + end)
        if mode == "circular":
            places %= size
        elif mode == "replicate":
            places = places.clip(0, size - 1)
        else:  # reflect
            places = np.abs(places)
            places = np.where(places >= size, 2 * (size - 1) - places, places)
        x = pieces(c, x, axis, places.tolist())
    return x


def pieces(c: Context, x: Value, axis: int, places: list[int]) -> Value:
    """An axis by constant places, as few slices end to end."""
    starts = [i for i in range(len(places)) if i == 0 or places[i] != places[i - 1] + 1]
    runs = [places[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return c.graph.apply("concat", *(x.narrow(axis, run[0], run[-1] + 1) for run in runs), axis=axis)


for _name in ("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"):
    ATEN[getattr(aten, _name).default] = lambda c, x, pads: _pad(c, x, pads, "reflect")
for _name in ("replication_pad1d", "replication_pad2d", "replication_pad3d"):
    ATEN[getattr(aten, _name).default] = lambda c, x, pads: _pad(c, x, pads, "replicate")
