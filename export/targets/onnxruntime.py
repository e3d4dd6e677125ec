"""Stock ONNX Runtime: the whole step as plain ONNX operators, channels first.

On ONNX Runtime 1.31, CPU, the input gradient of a convolution is quickest as ConvTranspose, the weight gradient as a
product with the image's columns, and columns and pooling windows are quickest cut out by a depthwise convolution with
one-hot kernels, whose adjoint puts them back for any stride and padding.
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import accumulate
from pathlib import Path

import numpy as np

from edgestill.export.lowering.graph import Graph, Node, Value
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.operators import LOWEST
from edgestill.export.lowering.rewrite import EXPANSIONS, SMALL_DEPTHWISE, meeting, pull_back, rewrite
from edgestill.export.step.graphs import StepSpec, build_encode, build_train_step
from edgestill.export.targets.onnx_emitter import write
from edgestill.export.targets.windows import (
    CHANNELS_FIRST,
    NONE,
    Windows,
    by_axis,
    largest,
    to_largest,
    total,
)

SMALL_AREA = 64
SMALL_CHANNELS = 16
CACHE_BYTES = 2 * 2**20
WINDOW = 9
"""Pooling windows of more pixels are taken apart, first along the rows, then along the columns."""
JOINT_UPDATE_SIZE = 4096


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.onnx` and `encode.onnx` into `folder`; returns what the manifest says of each graph."""
    graphs = {"train_step": build_train_step(spec, JOINT_UPDATE_SIZE), "encode": build_encode(spec)}
    return write({name: lower(graph) for name, graph in graphs.items()}, folder)


def lower(graph: Graph) -> Graph:
    """The graph in operators that ONNX Runtime has and is quick at."""
    graph = rewrite(cancel_turns(rewrite(graph, COMPOSITES)), SMALL_DEPTHWISE)
    columns = {node.inputs[0].name for node in graph.nodes if node.operator == "conv2d_weight_grad"}
    small = {"conv2d": lambda node, *inputs: _conv2d(node, *inputs) if node.inputs[0].name in columns else None}
    return rewrite(rewrite(graph, small | REWRITES), PATTERNS)


def _one_hot_kernels(graph: Graph, channels: int, kernel: tuple[int, int]) -> Value:
    """[channels·kh·kw, 1, kh, kw]: output channel c·kh·kw + k picks the k-th pixel of the window of channel c."""
    size = kernel[0] * kernel[1]
    return graph.constant(np.tile(np.eye(size, dtype=np.float32), (channels, 1)).reshape(-1, 1, *kernel))


def _columns(x: Value, kernel, stride, padding, dilation) -> Value:
    """Windows of each channel: [N, C, kh·kw, oh·ow]."""
    n, channels = x.shape[:2]
    if kernel == (1, 1) and stride == (1, 1) and padding == NONE:
        return x.reshape(n, channels, 1, -1)
    cut = _convolve(x, _one_hot_kernels(x.graph, channels, kernel), stride, padding, dilation, channels)
    return cut.reshape(n, channels, kernel[0] * kernel[1], -1)


def _convolve(x: Value, weight: Value, stride, padding, dilation, groups, *bias: Value) -> Value:
    return x.apply(
        "conv2d", weight, *bias, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def _some_images(x: Value, numbers: int) -> list[tuple[int, int]]:
    """Which images to take at a time if columns have so many numbers a channel of an image: few enough that they are
    still in the cache when a product reads them."""
    n, image_bytes = x.shape[0], 4 * numbers * x.shape[1]
    whole = [count for count in range(1, n + 1) if n % count == 0]
    images = max(count for count in whole if count == 1 or count * image_bytes <= CACHE_BYTES)
    return [(start, start + images) for start in range(0, n, images)]


def _conv2d(node: Node, x: Value, weight: Value, *bias: Value) -> Value | None:
    """The engine's own convolution makes of a small image products too small to share among threads, so there a product
    with the columns, which the weight gradient needs anyway, takes its place."""
    a, size, kernel = node.attributes, node.outputs[0].shape[2:], weight.shape[2:]
    if a["groups"] != 1 or math.prod(size) > SMALL_AREA or x.shape[1] < SMALL_CHANNELS:
        return None
    flat, parts = weight.reshape(weight.shape[0], -1, 1, 1), []
    for start, stop in _some_images(x, math.prod(size) * math.prod(kernel)):
        columns = _columns(x.narrow(0, start, stop), kernel, a["stride"], a["padding"], a["dilation"])
        columns = columns.reshape(stop - start, -1, *size)
        parts.append(_convolve(columns, flat, (1, 1), NONE, (1, 1), 1, *bias))
    return x.graph.apply("concat", *parts, axis=0)


def _by_columns(x: Value, weight: Value, a: dict) -> Value:
    """A convolution as a product of weight and columns for each image: [N, groups, channels, area]."""
    columns = _columns(x, weight.shape[2:], a["stride"], a["padding"], a["dilation"])
    groups, area = a["groups"], columns.shape[3]
    return weight.reshape(1, groups, weight.shape[0] // groups, -1) @ columns.reshape(x.shape[0], groups, -1, area)


def _by_rows(x: Value, weight: Value, a: dict) -> Value:
    """A depthwise convolution: columns along the rows alone, and for each of them a matrix that takes the rows of x to
    the rows that they meet under the kernel: for 13×13, a thirteenth of the columns."""
    (n, channels, height, _), (kh, kw) = x.shape, weight.shape[2:]
    meet = meeting(a, 0, height, kh)
    sides, step, gap = (NONE[0], a["padding"][1]), (1, a["stride"][1]), (1, a["dilation"][1])
    columns = _columns(x, (1, kw), step, sides, gap).reshape(n, channels, kw * height, -1)
    by_place = weight.reshape(channels, kh, kw).transpose(0, 2, 1).reshape(channels * kw, kh)
    matrices = (by_place @ x.graph.constant(meet.reshape(kh, -1))).reshape(1, channels, kw * height, -1)
    return matrices.swap() @ columns


def _conv2d_weight_grad(node: Node, x: Value, dy: Value, weight: Value) -> tuple[Value, Value]:
    """That of the products of a few images at a time, summed."""
    a, (kh, kw), parts = node.attributes, weight.shape[2:], []
    large = a["groups"] == x.shape[1] == dy.shape[1] and kh * kw > WINDOW
    say, places = (_by_rows, kw * math.prod(x.shape[2:])) if large else (_by_columns, kh * kw * math.prod(dy.shape[2:]))
    for start, stop in _some_images(x, places):
        of_dy = dy.narrow(0, start, stop)
        parts += pull_back(
            lambda w, x, shape=of_dy.shape: say(x, w, a).reshape(*shape), [of_dy], [weight], x.narrow(0, start, stop)
        )
    return total(parts), dy.sum(0, 2, 3).reshape(-1)


def _stages(x: Value, a: dict) -> list[dict]:
    """Poolings one after the other that a max pooling is the same as. Halves: rows first, because they are contiguous
    and the first pass is the larger one."""
    row, column = by_axis(a)
    if _is_halves(x, a):
        return [one for one in (column, row) if math.prod(one["kernel"]) > 1]
    return [row, column] if min(a["kernel"]) > 1 and math.prod(a["kernel"]) > WINDOW else [a]


def _is_halves(x: Value, a: dict) -> bool:
    """Windows of one or two pixels a side that tile the image: the larger of each two rows, then of each two columns,
    whose masks are of half and quarter size."""
    tiles = a["kernel"] == a["stride"] and a["padding"] == NONE and a["dilation"] == (1, 1)
    whole = all(size % k == 0 for size, k in zip(x.shape[2:], a["kernel"], strict=True))
    return tiles and whole and max(a["kernel"]) == 2


def _pooled(x: Value, stage: dict) -> Value:
    halves = _is_halves(x, stage)
    return largest(x, CHANNELS_FIRST, stage) if halves else x.apply("max_pool2d", **stage)


def _max_pool2d(node: Node, x: Value) -> Value | None:
    return reduce(_pooled, _stages(x, node.attributes), x) if _is_halves(x, node.attributes) else None


def _max_pool2d_grad(node: Node, dy: Value, x: Value, y: Value) -> Value:
    """To one largest pixel of a window alone, as in PyTorch: after ReLU, ties are common.

    It is the first in PyTorch's order but for a tie of only the upper right and the lower left of a 2×2 window.
    """
    stages = _stages(x, node.attributes)
    values = [*accumulate(stages[:-1], _pooled, initial=x), y]
    for stage, x, y in reversed([*zip(stages, values, values[1:], strict=False)]):
        tiles, places = stage["kernel"] == stage["stride"] and stage["dilation"] == (1, 1), math.prod(stage["kernel"])
        if tiles and places > WINDOW:
            dy = _to_largest_of_tiles(dy, x, y, stage)
        elif places > WINDOW or _is_halves(x, stage) or not (x.finite and dy.finite):
            dy = to_largest(dy, x, y, CHANNELS_FIRST, stage)
        else:
            dy = _to_largest_of_columns(dy, x, y, **stage)
    return dy


def _to_largest_of_columns(dy: Value, x: Value, y: Value, kernel, stride, padding, dilation) -> Value:
    """Small windows, overlapping ones too, of finite numbers: the kernels that cut them out are mostly zeros."""
    begins, ends = zip(NONE[0], NONE[0], *padding, strict=True)
    rows = (*y.shape[:2], 1, -1)

    def cut(x: Value) -> Value:
        return _columns(x.pad(begins, ends, LOWEST), kernel, stride, NONE, dilation)

    hits = cut(x).apply("greater_equal", y.reshape(*rows))
    # A hit minus the hits before it is above zero for the first one only.
    first = np.eye(hits.shape[2], dtype=np.float32) - np.tri(hits.shape[2], k=-1, dtype=np.float32)
    winners = (x.graph.constant(first) @ hits).apply("relu")
    return pull_back(cut, [winners * dy.reshape(*rows)], [x])[0]


def _to_largest_of_tiles(dy: Value, x: Value, y: Value, a: dict) -> Value:
    """Windows along one axis, of any length, that do not overlap."""
    axis = 2 if a["kernel"][1] == 1 else 3
    before, size, after = y.shape[: axis + 1], math.prod(a["kernel"]), y.shape[axis + 1 :]

    def cut(x: Value) -> Value:
        whole = Windows(x, CHANNELS_FIRST, **a, fill=LOWEST).padded.narrow(axis, 0, y.shape[axis] * size)
        return whole.reshape(*before, size, *after)

    places = np.arange(size).reshape(-1, *(1,) * len(after))
    hits = cut(x).apply("argmax", axis=axis + 1).apply("equal", x.graph.constant(places[(None,) * len(before)]))
    return pull_back(cut, [dy.reshape(*before, 1, *after).apply("masked", hits)], [x])[0]


def _sum(node: Node, x: Value) -> Value | None:
    """Over the first axis as a product with ones, which uses every thread."""
    if node.attributes["axes"] != (0,) or x.rank < 2:
        return None
    ones = x.graph.constant(np.ones((1, x.shape[0])))
    return (ones @ x.reshape(x.shape[0], -1)).reshape(*node.outputs[0].shape)


def _affine(node: Node, a: Value, b: Value) -> Value | None:
    """x·scale + offset a channel, in one pass over memory: a depthwise convolution of one pixel."""
    for product, offset in ((a, b), (b, a)):
        if product.operator != "multiply" or product.rank != 4:
            continue
        for x, scale in (product.node.inputs, product.node.inputs[::-1]):
            if x.shape != node.outputs[0].shape or x.size == x.shape[1]:
                continue
            channels = (1, x.shape[1], 1, 1)
            if scale.shape == offset.shape == channels:
                weight = scale.reshape(-1, 1, 1, 1)
                return _convolve(x, weight, (1, 1), NONE, (1, 1), x.shape[1], offset.reshape(-1))
    return None


COMPOSITES = {name: rule for name, rule in EXPANSIONS.items() if name not in ("batch_norm", "standardize")}
REWRITES = COMPOSITES | {
    "conv2d_weight_grad": _conv2d_weight_grad,
    "max_pool2d": _max_pool2d,
    "max_pool2d_grad": _max_pool2d_grad,
}
PATTERNS = {"reduce_sum": _sum, "add": _affine}
