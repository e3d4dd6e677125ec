"""Which kernel calls an operator is that is not elementwise: a rule each, which appends them to the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from edgestill.export.lowering.graph import Node, Value
from edgestill.export.lowering.operators import ELEMENTWISE
from edgestill.export.targets.native_fusion import side_by_side
from edgestill.export.targets.native_plan import (
    ALIGNMENT,
    Plan,
    Unpooled,
    View,
    bits_of,
    broadcast,
    dense_strides,
    joint_axes,
    reshaped,
    same_place,
)

LANES, TASK_ROWS, RUN = 16, 96, 256
SPOTS, TILE_BYTES, GRAD_TILE_BYTES = 36, 2**19, 2**21
PARTIAL_BYTES = 4 * 2**20
"""At most so much memory takes what weight gradients sum up before they are added."""


def _reshape(plan: Plan, node: Node, x: Value) -> None:
    view = plan.view(x)
    strides = reshaped(view.shape, view.strides, node.outputs[0].shape)
    if strides is None:
        view = plan.dense(x)
        strides = dense_strides(node.outputs[0].shape)
    value = node.outputs[0]
    plan.views[value.name] = View(view.base, view.dtype, value.shape, strides, view.offset)


def _seen(plan: Plan, node: Node, strides: Sequence[int], view: View, offset: int = 0) -> None:
    value = node.outputs[0]
    plan.views[value.name] = View(view.base, view.dtype, value.shape, tuple(strides), view.offset + offset)


def _transpose(plan: Plan, node: Node, x: Value) -> None:
    view = plan.view(x)
    _seen(plan, node, [view.strides[axis] for axis in node.attributes["permutation"]], view)


def _slice(plan: Plan, node: Node, x: Value) -> None:
    view, a = plan.view(x), node.attributes
    strides = list(view.strides)
    strides[a["axis"]] *= a["step"]
    _seen(plan, node, strides, view, a["start"] * view.strides[a["axis"]])


def _expand(plan: Plan, node: Node, x: Value) -> None:
    _seen(plan, node, broadcast(plan, x, node.outputs[0].shape).strides, plan.view(x))


def _same(plan: Plan, node: Node, x: Value) -> None:
    plan.views[node.outputs[0].name] = plan.view(x)


def _concat(plan: Plan, node: Node, *parts: Value) -> None:
    """Parts that lie in the whole already stay there; those that lie side by side elsewhere are the whole."""
    value, axis, start = node.outputs[0], node.attributes["axis"], 0
    if (to := plan.side_by_side(value, axis, parts)) is None:
        to = plan.whole(value)
        for part in parts:
            place = View(to.base, to.dtype, part.shape, to.strides, to.offset + start * to.strides[axis])
            if not same_place(plan.view(part), place):
                plan.copy(plan.view(part), place, "concat")
            start += part.shape[axis]
    plan.views[value.name] = to


def _pad(plan: Plan, node: Node, x: Value) -> None:
    to, a = plan.result(node.outputs[0]), node.attributes
    offset = sum(begin * stride for begin, stride in zip(a["begins"], to.strides, strict=True))
    place = View(to.base, to.dtype, x.shape, to.strides, offset)
    plan.copy(plan.view(x), place, "pad", a["value"], to)


def _reduce(plan: Plan, node: Node, x: Value) -> None:
    """A run of neighbouring axes at a time, the last one first."""
    shape, view = list(x.shape), plan.dense(x)
    axes = [axis for axis in node.attributes["axes"] if shape[axis] > 1]
    while axes:
        stop = axes[-1] + 1
        start = stop - 1
        while start > 0 and (start - 1 in axes or shape[start - 1] == 1):
            start -= 1
        outer, size, inner = (math.prod(part) for part in (shape[:start], shape[start:stop], shape[stop:]))
        shape[start:stop] = [1] * (stop - start)
        axes = [axis for axis in axes if axis < start]
        to = plan.new(shape)
        part = plan.new((outer * max(-(-size // (4096 if inner == 1 else 128)), 1), inner))
        maximum = int(node.operator == "reduce_max")
        plan.call("reduce", node.operator, [view], [to, part], [view, to, part, maximum, outer, size, inner])
        view = to
    plan.views[node.outputs[0].name] = View(view.base, view.dtype, tuple(shape), dense_strides(shape), view.offset)


def _matmul(plan: Plan, node: Node, a: Value, b: Value) -> None:
    value = node.outputs[0]
    batch = value.shape[:-2]
    left, right = (_matrix(plan, v, batch, node.attributes[f"transpose_{side}"]) for v, side in ((a, "a"), (b, "b")))
    m, k, n = value.shape[-2], left[0].shape[-1], value.shape[-1]
    batches = math.prod(batch)
    if right[1] == 0 and left[1] in (0, m * left[0].strides[-2]) and batches > 1 and left[1]:
        batches, m, left, right = 1, batches * m, (left[0], 0), right  # rows of all batches meet one matrix
    to = plan.result(value)
    panels = -(-n // LANES)
    ready = plan.packed.get(right) if right[0].base in plan.outside else None
    packed = ready or plan.new((batches if right[1] else 1, panels * LANES, k))
    plan.packed[right] = packed
    tiles = batches * -(-m // TASK_ROWS)
    each = max(1, min(panels, panels * tiles // 16))
    (lv, ls), (rv, rs) = left, right
    if lv.strides[-1] != 1:
        plan.scratch = max(plan.scratch, RUN * TASK_ROWS * 4)
    plan.call(
        "product", "matmul", [lv, packed] if ready else [lv, rv], [to] if ready else [to, packed],
        [lv, rv, to, packed, batches, m, n, k, ls, *lv.strides[-2:], rs, *rv.strides[-2:], each, int(bool(ready))],
    )  # fmt: skip


def _matrix(plan: Plan, value: Value, batch: tuple[int, ...], turned: bool) -> tuple[View, int]:
    """The view of a matrix of each batch, turned where asked, and how far apart the batches are."""
    view = plan.view(value)
    stride = _batch_stride(view, batch)
    if stride is None:
        view = broadcast(plan, value, (*batch, *value.shape[-2:]))
        view = plan.copied(view, "expand")
        stride = math.prod(view.shape[-2:])
    if turned:
        order = [*range(len(view.shape) - 2), len(view.shape) - 1, len(view.shape) - 2]
        shape, strides = (tuple(of[i] for i in order) for of in (view.shape, view.strides))
        view = View(view.base, view.dtype, shape, strides, view.offset)
    return view, stride


def _batch_stride(view: View, batch: tuple[int, ...]) -> int | None:
    own = view.shape[:-2]
    if math.prod(own) == 1:
        return 0
    if (1,) * (len(batch) - len(own)) + own != batch:
        return None
    axes = joint_axes(own, view.strides[:-2])
    return axes[0][1] if len(axes) == 1 else None


def _windows(plan: Plan, x: Value, to: Value, weight: Value | None, a: dict, kernel, groups: int, adjoint: bool):
    """The words that convolutions and pooling share; x and to are the images that the kernel calls so."""
    pads, dilation = a["padding"], a.get("dilation", (1, 1))
    strides = plan.view(weight).strides if weight is not None else (0, 0, 0, 0)
    words = [*x.shape, *to.shape[1:], *kernel, *a["stride"], pads[0][0], pads[1][0], *dilation, groups, *strides]
    return [*words, int(adjoint)]


def _block_scratch(plan: Plan, a: dict, kernel, pixels: Sequence[int], channels: int, adjoint: bool, more: int = 0):
    """A task's scratch: what is under a block of the result's pixels (layout.h)."""
    sizes = [-(-size // stride) if adjoint else size for size, stride in zip(pixels[1:3], a["stride"], strict=True)]
    width = min(sizes[1], TASK_ROWS)
    block = (min(sizes[0], TASK_ROWS // width), width)
    elements = channels
    for size, k, stride, dilation in zip(block, kernel, a["stride"], a["dilation"], strict=True):
        reach = (k - 1) * dilation
        elements *= size + reach // stride if adjoint else (size - 1) * stride + reach + 1
    plan.scratch = max(plan.scratch, -(-(4 * elements + more) // ALIGNMENT) * ALIGNMENT)


def _conv2d(plan: Plan, node: Node, x: Value, weight: Value, *bias: Value) -> None:
    adjoint, a, value = node.operator == "conv2d_transpose", node.attributes, node.outputs[0]
    groups, kernel = a["groups"], weight.shape[2:]
    image, offset = plan.dense(x), plan.dense(bias[0]) if bias else None
    to, filters = plan.result(value), plan.view(weight)
    if is_pointwise(a, kernel, x.shape, value.shape):
        x, value = _as_one_row(x), _as_one_row(value)
    words = _windows(plan, x, value, weight, a, kernel, groups, adjoint)
    depthwise = groups == x.shape[3] == value.shape[3]
    into, out, taps = x.shape[3] // groups, value.shape[3] // groups, math.prod(kernel)
    reads = [image, filters, *([offset] if bias else [])]
    if depthwise and groups > 1:
        packed = plan.new((taps, groups))
        _block_scratch(plan, a, kernel, value.shape, x.shape[3], adjoint, 16 * sum(kernel))
        plan.call(
            "depthwise", node.operator, reads, [to, packed],
            [image, filters, to, offset, packed, *words, int(adjoint), 1],
        )  # fmt: skip
        return
    if has_winograd(a, kernel, x.shape[3], value.shape):
        wide = -(-out // LANES) * LANES
        packed = plan.new((SPOTS, into, wide))
        tiles = max(12, min(48, TILE_BYTES // (SPOTS * 4 * (into + wide)) // 12 * 12))
        plan.scratch = max(plan.scratch, SPOTS * (tiles * (into + wide) + 2 * LANES) * 4)
        arguments = [image, filters, to, offset, packed, *words, tiles]
        plan.call("winograd", node.operator, reads, [to, packed], arguments)
        return
    packed = plan.new((groups, -(-out // LANES) * LANES, taps * into))
    _block_scratch(plan, a, kernel, value.shape, x.shape[3], adjoint, 16 * sum(kernel))
    plan.call("conv", node.operator, reads, [to, packed], [image, filters, to, offset, packed, *words])


def _conv2d_weight_grad(plan: Plan, node: Node, x: Value, dy: Value, weight: Value) -> None:
    a, value = node.attributes, node.outputs[0]
    groups, kernel = a["groups"], weight.shape[2:]
    image, slope, to = plan.dense(x), plan.dense(dy), plan.result(value)
    words = _windows(plan, x, dy, None, a, kernel, groups, False)
    words[-5:-1] = to.strides
    depthwise = groups == x.shape[3] == dy.shape[3] and groups > 1
    if is_pointwise(a, kernel, x.shape, dy.shape):
        x, dy = _as_one_row(x), _as_one_row(dy)
        words[:6] = [*x.shape, *dy.shape[1:3]]
    if has_winograd(a, kernel, x.shape[3], dy.shape):
        _winograd_weight_grad(plan, node, image, slope, to, words)
        return
    each = 4 * value.size
    parts = max(1, min(x.shape[0], PARTIAL_BYTES // each))
    images = -(-x.shape[0] // parts)
    partial = plan.new((-(-x.shape[0] // images), each // 4))
    if not depthwise:
        _block_scratch(plan, a, kernel, dy.shape, x.shape[3], False)
    tail = [2, images] if depthwise else [images]
    plan.call(
        "depthwise" if depthwise else "conv_grad", node.operator, [image, slope], [to, partial],
        [image, slope, to, None, partial, *words, *tail],
    )  # fmt: skip


def _winograd_weight_grad(plan: Plan, node: Node, image: View, slope: View, to: View, words: list[int]) -> None:
    """In parts of so many images that a chain of sums is full, or a cache of their transformed tiles; but of no fewer
    than make these more than what goes from part to part."""
    (images, *_, channels), (_, height, width, out) = image.shape, slope.shape
    each, wide = -(-height // 4) * -(-width // 4), -(-out // LANES) * LANES
    bytes_each, kept_bytes = SPOTS * 4 * each * (channels + wide), SPOTS * 4 * channels * wide
    part = min(images, -(-RUN // each), max(1, max(GRAD_TILE_BYTES, kept_bytes) // bytes_each))
    work = plan.new((SPOTS, part * each * (channels + wide) + channels * wide + 2 * LANES))
    for first in range(0, images, part):
        count = min(part, images - first)
        goes_on, goes_further = first > 0, first + count < images
        views = [replace(v, offset=v.offset + first * v.strides[0]) for v in (image, slope)]
        arguments = [*views, to, None, work, count, *words[1:], goes_on + 2 * goes_further]
        plan.call("winograd_grad", node.operator, [image, slope], [to, work], arguments)


def is_pointwise(a: dict, kernel: tuple[int, int], x: Sequence[int], to: Sequence[int]) -> bool:
    """Whether each pixel is multiplied by itself, so that of images there is no need: pixels lie in a row."""
    return kernel == (1, 1) and a["groups"] == 1 and a["stride"] == (1, 1) and tuple(x[:3]) == tuple(to[:3])


def _as_one_row(images: Value) -> Value:
    """[N, H, W, C] as [parts, 1, pixels, C]: as many parts as there are tasks for, none of few pixels."""
    pixels = math.prod(images.shape[:3])
    parts = max(p for p in range(1, 17) if pixels % p == 0 and (p == 1 or pixels // p >= TASK_ROWS))
    return replace(images, shape=(parts, 1, pixels // parts, images.shape[3]))


def has_winograd(a: dict, kernel: tuple[int, int], channels: int, result: tuple[int, ...]) -> bool:
    """Whether F(4×4, 3×3) pays: with few channels or pixels its transforms cost more than they save."""
    plain = a["groups"] == 1 and kernel == (3, 3) and a["stride"] == (1, 1) and a["dilation"] == (1, 1)
    return plain and min(channels, result[3]) >= 16 and min(result[1:3]) >= 4


def _max_pool(plan: Plan, node: Node, x: Value, *factor: Value) -> None:
    value, a = node.outputs[0], node.attributes
    image, scale = plan.dense(x), plan.dense(factor[0]) if factor else None
    wide = 1 if math.prod(a["kernel"]) <= 256 else 4
    winners = None
    if any(y.name == value.name for y in plan.fusion.pooled.values()):
        winners = plan.winners[value.name] = plan.new(value.shape, "uint8" if wide == 1 else "float32")
    to = plan.result(value)
    _pool_call(plan, node, [image, scale, to, winners], x, value, 0, wide)


def _max_pool_grad(plan: Plan, node: Node, dy: Value, y: Value, *image: Value) -> None:
    """From the winners, which the pooling has kept; where only programs read it, they find it out themselves."""
    value, a = node.outputs[0], node.attributes
    wide = 1 if math.prod(a["kernel"]) <= 256 else 4
    if image:  # of another graph's pooling
        x, y = y, image[0]
        winners = plan.new(y.shape, "uint8" if wide == 1 else "float32")
        _pool_call(plan, node, [plan.dense(x), None, plan.new(y.shape), winners], x, y, 0, wide)
    else:
        winners = plan.winners[y.name]
    if side_by_side(node) and value.name not in plan.loose:
        channels, width = value.shape[3], value.shape[2]
        plan.unpooled[value.name] = Unpooled(value, plan.dense(dy), winners, (channels, width, *a["kernel"]))
        return
    arguments = [plan.dense(dy), None, plan.result(value), winners]
    _pool_call(plan, node, arguments, value, dy, 1, wide)


def _avg_pool(plan: Plan, node: Node, x: Value) -> None:
    value, backward = node.outputs[0], node.operator == "avg_pool2d_grad"
    arguments = [plan.dense(x), None, plan.result(value), None]
    _pool_call(plan, node, arguments, *((value, x) if backward else (x, value)), 2 + backward, 4)


def _pool_call(plan: Plan, node: Node, arguments: list, large: Value, small: Value, what: int, wide: int) -> None:
    a = node.attributes
    words = _windows(plan, large, small, None, a, a["kernel"], 1, False)
    to, winners = arguments[2], arguments[3]
    seen = [view for view in arguments if view is not None]
    written = [to] if what != 0 or winners is None else [to, winners]
    plan.scratch = max(plan.scratch, math.prod(a["kernel"]) * 16)
    plan.call("pool", node.operator, seen, written, [*arguments, None, *words, what, wide])


def _rows(plan: Plan, node: Node, x: Value) -> None:
    what = ("softmax", "log_softmax", "standardize").index(node.operator)
    view, results = plan.dense(x), [plan.result(value) for value in node.outputs]
    number = bits_of(node.attributes.get("eps", 0.0))
    size = x.shape[-1]
    arguments = [view, results[0], results[-1], what, x.size // size, size, number]
    plan.call("rows", node.operator, [view], results, arguments)


def _indexed(plan: Plan, node: Node, *inputs: Value) -> None:
    what = ("gather", "scatter_add", "argmax", "one_hot", "to_integer").index(node.operator)
    value, x, views = node.outputs[0], inputs[0], [plan.dense(v) for v in inputs]
    to = plan.result(value)
    outer = size = inner = 1
    count = x.size
    if what < 3:
        axis = node.attributes["axis"]
        size = value.shape[axis] if what == 1 else x.shape[axis]
        outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
        count = inputs[1].size if what < 2 else 1
    elif what == 3:
        size = node.attributes["classes"]
    index = views[1] if what < 2 else views[0]
    plan.call("index", node.operator, views, [to], [views[0], index, to, what, outer, size, count, inner])


RULES = {
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "expand": _expand,
    "stop_gradient": _same,
    "concat": _concat,
    "pad": _pad,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "matmul": _matmul,
    "conv2d": _conv2d,
    "conv2d_transpose": _conv2d,
    "conv2d_weight_grad": _conv2d_weight_grad,
    "max_pool2d": _max_pool,
    "max_pool2d_grad": _max_pool_grad,
    "avg_pool2d": _avg_pool,
    "avg_pool2d_grad": _avg_pool,
    "softmax": _rows,
    "log_softmax": _rows,
    "standardize": _rows,
    "gather": _indexed,
    "scatter_add": _indexed,
    "argmax": _indexed,
    "one_hot": _indexed,
    "to_integer": _indexed,
}

TAKEN = frozenset(RULES) | (ELEMENTWISE.keys() - {"stop_gradient"})
"""Operators that a plan can be made of."""
