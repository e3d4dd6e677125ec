"""Reshaping, slicing, joining, indexing and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgestill.export.lowering.aten.context import Context, Refusal, axes_of, row, rows
from edgestill.export.lowering.aten.elementwise import where
from edgestill.export.lowering.graph import Value

SLICES = 2
"""An index by constants that is at most so many slices end to end is said by these."""


def _select(c: Context, x: Value, dim: int, index: int) -> Value:
    index %= x.shape[dim]
    return x.narrow(dim % x.rank, index, index + 1)


def _slice(c: Context, x: Value, dim: int, start: int | None, stop: int | None, step: int) -> Value:
    start, stop, step = slice(start, stop, step).indices(x.shape[dim])
    return x.narrow(dim % x.rank, start, max(stop, start), step)


@row("slice_scatter")
def _slice_scatter(c: Context, x: Value, source: Value, dim: int, start: Any, stop: Any, step: int) -> Value:
    axis = dim % x.rank
    start, stop, step = slice(start, stop, step).indices(x.shape[axis])
    if step != 1:
        return _assigned(x, source, lambda ours, theirs: ours.slice_scatter(theirs, axis, start, stop, step))
    return _cat(c, [x.narrow(axis, 0, start), source, x.narrow(axis, stop, x.shape[axis])], axis)


def _cat(c: Context, parts: Sequence[Value], dim: int) -> Value:
    return c.graph.apply("concat", *(part for part in parts if part.size), axis=dim % len(c.shape))


def _split(c: Context, x: Value, sizes: Sequence[int], dim: int) -> list[Value]:
    ends = np.cumsum(sizes).tolist()
    return [x.narrow(dim % x.rank, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _repeat(c: Context, x: Value, repeats: Sequence[int]) -> Value:
    shape = (1,) * (len(repeats) - x.rank) + x.shape
    pairs = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    return x.reshape(*(n for size in shape for n in (1, size))).expand(*pairs)


# entries of an axis


def pieces(x: Value, axis: int, places: Sequence[int]) -> Value:
    """The entries of an axis by constant places, as few slices end to end."""
    slices = [x.narrow(axis, run[0], run[-1] + 1) for run in _runs(places)]
    return x.graph.apply("concat", *slices, axis=axis)


def _runs(places: Sequence[int]) -> list[np.ndarray]:
    return np.split(np.asarray(places), np.flatnonzero(np.diff(places) != 1) + 1)


def take(x: Value, index: Value | np.ndarray, axis: int) -> Value:
    """The entries of an axis by an index [n] of integers."""
    index = index if isinstance(index, Value) else x.graph.constant(np.asarray(index, np.int64))
    if index.constant is not None and len(_runs(index.constant)) <= SLICES:
        return pieces(x, axis, index.constant.tolist())
    return x.apply("gather", index, axis=axis)


def chosen(x: Value, index: Value, axis: int) -> Value:
    """One entry of each line along an axis, by an index that is known only at run time."""
    return where(_there(x, index, axis), x, 0.0).sum(axis)


def _there(x: Value, index: Value, axis: int) -> Value:
    """1 for the entry of each line along an axis that the index names."""
    places = np.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.rank)])
    return index.apply("equal", x.graph.constant(places))


def _flip(c: Context, x: Value, dims: Sequence[int]) -> Value:
    for axis in axes_of(dims, x.rank):
        x = pieces(x, axis, range(x.shape[axis])[::-1])
    return x


@row("index.Tensor")
def _index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [i for i, index in enumerate(indices) if index is not None]
    if given != list(range(given[0], given[-1] + 1)):
        raise Refusal("an index of axes that are not side by side", hint="index one axis after the other")
    first, found = given[0], [indices[i] for i in given]
    if any(index.constant is None for index in found):
        if len(found) > 1:
            raise Refusal("several indices that are known only at run time")
        return take(x, found[0].reshape(-1), first)
    # A mask takes as many axes as it has; PyTorch itself says where in their product each entry is.
    arrays = [_array(index) for index in found]
    sizes = x.shape[first : first + sum(array.ndim if array.dtype == bool else 1 for array in arrays)]
    places = torch.arange(math.prod(sizes)).reshape(sizes)[tuple(map(torch.from_numpy, arrays))]
    lines = x.reshape(*x.shape[:first], -1, *x.shape[first + len(sizes) :])
    return take(lines, places.reshape(-1).numpy(), first)


def _array(index: Value) -> np.ndarray:
    return index.constant if index.dtype == "int64" else index.constant != 0


@row("index_put")
def _index_put(
    c: Context, x: Value, indices: Sequence[Value | None], source: Value, accumulate: bool
) -> Value:
    given = [index for index in indices if index is not None]
    if not accumulate and all(index.constant is not None for index in given):
        arrays = [None if index is None else torch.from_numpy(_array(index)) for index in indices]
        return _assigned(x, source, lambda ours, theirs: torch.ops.aten.index_put(ours, arrays, theirs))
    first, mask = next((i, index) for i, index in enumerate(indices) if index is not None)
    after = x.rank - first - mask.rank
    if len(given) > 1 or mask.dtype == "int64" or not (source.size == 1 or source.rank <= after):
        raise Refusal("an assignment by an index known only at run time")
    mask = mask.reshape(*(1,) * first, *mask.shape, *(1,) * after)
    source = source.reshape(*source.shape[max(source.rank - after, 0) :])
    return where(mask, x + source if accumulate else source, x)


@row("scatter.value scatter.src scatter_add")
def _scatter(c: Context, x: Value, dim: int, index: Value, source: Value | float) -> Value:
    axis, add = dim % x.rank, "add" in c.node.target.name()
    if isinstance(source, Value):
        for i, size in enumerate(index.shape):  # what the index does not name
            source = source.narrow(i, 0, size)
    if index.constant is not None and not add:
        places = torch.from_numpy(index.constant)
        source = c.value(source).expand(*index.shape)
        return _assigned(x, source, lambda ours, theirs: ours.scatter(axis, places, theirs))
    if index.shape != (*x.shape[:axis], 1, *x.shape[axis + 1 :]):
        raise Refusal("more than one assignment a line by an index known only at run time")
    return where(_there(x, index, axis), x + source if add else source, x)


def _assigned(x: Value, source: Value, assign: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Value:
    """Any assignment at constant places: PyTorch itself is shown the positions of x's entries and of the source's."""
    both = x.graph.apply("concat", x.reshape(-1), source.reshape(-1), axis=0)
    ours, theirs = torch.arange(both.size).split([x.size, source.size])
    return take(both, assign(ours.reshape(x.shape), theirs.reshape(source.shape)).reshape(-1).numpy(), 0)


def _moved(c: Context, x: Value, *how: Any) -> Value:
    """Any movement of elements: the operator itself is shown their positions."""
    positions = c.node.target(torch.arange(x.size).reshape(x.shape), *how)
    return take(x.reshape(-1), positions.reshape(-1).numpy(), 0)


@row("gather")
def _gather(c: Context, x: Value, dim: int, index: Value, *_: Any) -> Value:
    axis = dim % x.rank
    if index.constant is not None:
        return _moved(c, x, dim, torch.from_numpy(index.constant))
    if index.shape != (*x.shape[:axis], 1, *x.shape[axis + 1 :]):
        raise Refusal("torch.gather of more than one entry by an index known only at run time")
    return chosen(x, index, axis)


def _check_plain(by_frequency: bool) -> None:
    if by_frequency:
        raise Refusal("an embedding with scale_grad_by_freq", hint="leave scale_grad_by_freq out")


@row("embedding")
def _embedding(c: Context, weight: Value, indices: Value, padding_idx: int, by_frequency: bool, *_: Any) -> Value:
    _check_plain(by_frequency)
    rows = take(weight, indices.reshape(-1), 0)
    if padding_idx < 0:
        return rows
    padding = indices.reshape(-1, 1).apply("to_float").apply("equal", float(padding_idx))
    return where(padding, rows.apply("stop_gradient"), rows)  # its row gets no gradient


@row("_embedding_bag _embedding_bag_forward_only")
def _embedding_bag(c, weight, indices, offsets, by_frequency, mode, _, factors, include_last, padding_idx):
    """The sum, mean or largest of the rows of each bag; bags of one size, as nn.EmbeddingBag makes of [B, length]."""
    _check_plain(by_frequency)
    starts = [] if offsets.constant is None else offsets.constant.tolist()[: -1 if include_last else None]
    size = indices.size // max(len(starts), 1)
    if starts != list(range(0, indices.size, size)) or factors is not None or padding_idx >= 0:
        raise Refusal(
            "nn.EmbeddingBag with bags of several sizes, factors or padding",
            hint="give it indices [batch, length] alone, or use nn.Embedding and a mean",
        )
    bags = take(weight, indices, 0).reshape(len(starts), size, -1)
    return bags.apply(("reduce_sum", "reduce_mean", "reduce_max")[mode], axes=(1,)), None, None, None


@row("pad")
def _pad(c: Context, x: Value, pads: Sequence[int], mode: str, number: float | None) -> Value:
    """`pads` are pairs that start at the last axis."""
    rest = [0] * (x.rank - len(pads) // 2)
    begins, ends = (rest + list(pads[side::2])[::-1] for side in (0, 1))
    if mode == "constant":
        return x.pad(begins, ends, value=float(number or 0.0))
    for axis, sides in enumerate(zip(begins, ends, strict=True)):
        if any(sides):
            places = F.pad(torch.arange(x.shape[axis], dtype=torch.float64)[None], sides, mode)[0]
            x = pieces(x, axis, places.long().tolist())
    return x


rows(
    {
        "view _unsafe_view view_copy unsqueeze squeeze.dims clone alias lift_fresh_copy": lambda c, x, *_: x,
        "permute": lambda c, x, dims: x.transpose(*(d % x.rank for d in dims)),
        "expand": lambda c, x, *_: x.expand(*c.shape),
        "copy": lambda c, x, source, *_: source.expand(*c.shape),
        "repeat": _repeat,
        "slice.Tensor": _slice,
        "select.int": _select,
        "cat": _cat,
        "split_with_sizes": _split,
        "flip": _flip,
        "index_select": lambda c, x, dim, index: take(x, index, dim % x.rank),
        "diagonal unfold as_strided": _moved,
        "constant_pad_nd": lambda c, x, pads, number: _pad(c, x, pads, "constant", number),
    }
)
