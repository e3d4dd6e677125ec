"""Stock ONNX Runtime: the whole step as plain ONNX operators, channels first.

On ONNX Runtime 1.31, CPU, the input gradient of a convolution is quickest as ConvTranspose, the weight gradient as a
product with the image's columns, and columns and pooling windows are quickest cut out by a depthwise convolution with
one-hot kernels, whose adjoint puts them back for any stride and padding.
"""

from __future__ import annotations

import operator
from collections import Counter
from functools import reduce
from pathlib import Path

import numpy as np

from edgestill.export.lowering.graph import Graph, Node, Value
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.rewrite import EXPANSIONS, SMALL_DEPTHWISE, rewrite
from edgestill.export.step.graphs import StepSpec, build_encode, build_train_step
from edgestill.export.targets.onnx_emitter import to_onnx

SMALL_AREA = 64
SMALL_CHANNELS = 16
CACHE_BYTES = 2 * 2**20
WINDOW = 9
"""Pooling windows of more pixels are taken apart, first along the rows, then along the columns."""
JOINT_UPDATE_SIZE = 4096
NONE = ((0, 0), (0, 0))


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.onnx` and `encode.onnx` into `folder`; returns what the manifest says of each graph."""
    records = {}
    for name, graph in (
        ("train_step", build_train_step(spec, JOINT_UPDATE_SIZE)),
        ("encode", build_encode(spec)),
    ):
        graph = lower(graph)
        model = to_onnx(graph)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        records[name] = {
            "file": f"{name}.onnx",
            "inputs": [value.name for value in graph.inputs],
            "outputs": list(graph.outputs),
            "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
            "planned_memory_bytes": graph.peak_live_bytes(),
        }
    return records


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


def _column_parts(x: Value, a: dict, kernel: tuple[int, int], area: int) -> list[Value]:
    """The columns [images, C, kh·kw, oh·ow] of a few images at a time: few enough that they are still in the cache when
    a product reads them."""
    n = x.shape[0]
    column_bytes = 4 * area * x.shape[1] * kernel[0] * kernel[1]
    images = max(
        count
        for count in range(1, n + 1)
        if n % count == 0 and (count == 1 or count * column_bytes <= CACHE_BYTES)
    )
    return [
        _columns(x.narrow(0, start, start + images), kernel, a["stride"], a["padding"], a["dilation"])
        for start in range(0, n, images)
    ]


def _conv2d(node: Node, x: Value, weight: Value, *bias: Value) -> Value | None:
    """The engine's own convolution makes of a small image products too small to share among threads, so there a product
    with the columns, which the weight gradient needs anyway, takes its place."""
    a, size = node.attributes, node.outputs[0].shape[2:]
    if a["groups"] != 1 or np.prod(size) > SMALL_AREA or x.shape[1] < SMALL_CHANNELS:
        return None
    flat = weight.reshape(weight.shape[0], -1, 1, 1)
    parts = [
        _convolve(columns.reshape(columns.shape[0], -1, *size), flat, (1, 1), NONE, (1, 1), 1, *bias)
        for columns in _column_parts(x, a, weight.shape[2:], int(np.prod(size)))
    ]
    return x.graph.apply("concat", *parts, axis=0)


def _conv2d_weight_grad(node: Node, x: Value, dy: Value, weight: Value) -> tuple[Value, Value]:
    """A product of gradient and columns for each image, summed."""
    a, start, parts = node.attributes, 0, []
    groups = a["groups"]
    if groups == x.shape[1] == dy.shape[1] and np.prod(weight.shape[2:]) > WINDOW:
        return _large_depthwise_grad(x, dy, weight, a), dy.sum(0, 2, 3).reshape(-1)
    for columns in _column_parts(x, a, weight.shape[2:], int(np.prod(dy.shape[2:]))):
        images, area = columns.shape[0], columns.shape[3]
        of_dy = dy.narrow(0, start, start + images)
        shape = (images, -1, area) if groups == 1 else (images, groups, -1, area)
        by_image = of_dy.reshape(*shape).apply("matmul", columns.reshape(*shape), transpose_b=True)
        # A product with ones: unlike the engine's sum over the first axis it uses every thread.
        parts.append(by_image.reshape(images, -1).sum(0))
        start += images
    return reduce(operator.add, parts).reshape(*node.outputs[0].shape), dy.sum(0, 2, 3).reshape(-1)


def _large_depthwise_grad(x: Value, dy: Value, weight: Value, a: dict) -> Value:
    """Columns along the rows alone, and a product of every row of x with every row of dy, of which those are summed
    that meet under one row of the kernel: for 13×13, a thirteenth of the columns."""
    (_, channels, height, _), (rows, width), (kh, kw) = x.shape, dy.shape[2:], weight.shape[2:]
    top, sides = a["padding"][0][0], ((0, 0), a["padding"][1])
    meet = np.zeros((height, rows, kh), np.float32)
    for i in range(kh):
        for row in range(rows):
            if 0 <= (at := row * a["stride"][0] + i * a["dilation"][0] - top) < height:
                meet[at, row, i] = 1
    along_rows = {"stride": (1, a["stride"][1]), "padding": sides, "dilation": (1, a["dilation"][1])}
    start, parts = 0, []
    for columns in _column_parts(x, along_rows, (1, kw), height * width):
        images = columns.shape[0]
        lines = columns.reshape(images * channels, kw * height, width)
        of_dy = dy.narrow(0, start, start + images).reshape(images * channels, rows, width)
        parts.append((lines @ of_dy.swap()).reshape(images, -1).sum(0))
        start += images
    total = reduce(operator.add, parts).reshape(channels * kw, height * rows)
    sums = total @ x.graph.constant(meet.reshape(-1, kh))
    return sums.reshape(channels, kw, kh).transpose(0, 2, 1).reshape(*weight.shape)


def _is_halves(x: Value, a: dict) -> bool:
    halves = a["kernel"] == a["stride"] == (2, 2) and a["padding"] == NONE and a["dilation"] == (1, 1)
    return halves and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0


def _halves(x: Value) -> tuple[Value, ...]:
    """Windows of 2×2: the larger of each two rows, then of each two columns, whose masks are of half and quarter size.
    Rows first, because they are contiguous and the first pass is the larger one."""
    width = x.shape[3]
    rows = x.reshape(-1, 2, width)
    upper, lower = rows.narrow(1, 0, 1), rows.narrow(1, 1, 2)
    higher = upper.apply("maximum", lower)
    pairs = higher.reshape(-1, 2).transpose(1, 0)
    return upper, lower, higher, pairs.narrow(0, 0, 1), pairs.narrow(0, 1, 2)


def _max_pool2d(node: Node, x: Value) -> Value | None:
    if not _is_halves(x, node.attributes):
        return None
    *_, left, right = _halves(x)
    return left.apply("maximum", right).reshape(*node.outputs[0].shape)


def _max_pool2d_grad(node: Node, dy: Value, x: Value, y: Value) -> Value:
    """To one largest pixel of a window alone, as in PyTorch: after ReLU, ties are common.

    It is the first in PyTorch's order but for a tie of only the upper right and the lower left of a 2×2 window.
    """
    a = node.attributes
    if _is_halves(x, a):
        upper, lower, higher, left, right = _halves(x)
        of_columns = _shared(dy.reshape(1, -1), left, right, 0)
        of_rows = _shared(of_columns.transpose(1, 0).reshape(*higher.shape), upper, lower, 1)
        return of_rows.reshape(*x.shape)
    (height, width), (top, left) = a["kernel"], a["padding"]
    if height * width > WINDOW:
        if height > 1 and width > 1:  # the first largest of a row, then the row of the first of them
            row = {"kernel": (1, width), "stride": (1, a["stride"][1]), "padding": ((0, 0), left)}
            row["dilation"] = (1, a["dilation"][1])
            column = {"kernel": (height, 1), "stride": (a["stride"][0], 1), "padding": (top, (0, 0))}
            column["dilation"] = (a["dilation"][0], 1)
            rows = x.apply("max_pool2d", **row)
            return _grad_along(_grad_along(dy, rows, y, column), x, rows, row)
        return _grad_along(dy, x, y, a)
    return _grad_by_windows(dy, x, y, **a)


def _shared(dy: Value, first: Value, second: Value, axis: int) -> Value:
    to_first = dy.apply("masked", first.apply("greater_equal", second))
    return dy.graph.apply("concat", to_first, dy - to_first, axis=axis)


def _grad_by_windows(dy: Value, x: Value, y: Value, kernel, stride, padding, dilation) -> Value:
    """Small windows, overlapping ones too."""
    graph, (n, channels, height, width) = x.graph, y.shape
    (top, bottom), (left, right) = padding
    size = kernel[0] * kernel[1]
    source = x.pad((0, 0, top, left), (0, 0, bottom, right), -3e38)  # a padded pixel never wins
    windows = _columns(source, kernel, stride, NONE, dilation)
    hits = windows.apply("greater_equal", y.reshape(n, channels, 1, -1))
    # A hit minus the hits before it is above zero for the first one only.
    first = np.eye(size, dtype=np.float32) - np.tri(size, k=-1, dtype=np.float32)
    winners = (graph.constant(first) @ hits).apply("relu")
    parts = (winners * dy.reshape(n, channels, 1, -1)).reshape(n, channels * size, height, width)
    kernels = _one_hot_kernels(graph, channels, kernel)
    dx = parts.apply(
        "conv2d_transpose", kernels, size=source.shape[2:], stride=stride, padding=NONE, dilation=dilation,
        groups=channels,
    )  # fmt: skip
    return dx.pad((0, 0, -top, -left), (0, 0, -bottom, -right))


def _grad_along(dy: Value, x: Value, y: Value, a: dict) -> Value:
    """Windows along one axis, of any length."""
    axis = 2 if a["kernel"][1] == 1 else 3
    size, step, dilation = (a[key][axis - 2] for key in ("kernel", "stride", "dilation"))
    before, after = a["padding"][axis - 2]
    padded = x.pad([0] * axis + [before] + [0] * (3 - axis), [0] * axis + [after] + [0] * (3 - axis), -3e38)
    shape = (*x.shape[:axis], y.shape[axis], size, *x.shape[axis + 1 :])
    if step == size and dilation == 1:  # every pixel is in one window
        whole = padded.narrow(axis, 0, y.shape[axis] * size)
        first = whole.reshape(*shape).apply("argmax", axis=axis + 1)
        places = x.graph.constant(np.arange(size).reshape([-1 if i == axis + 1 else 1 for i in range(5)]))
        hits = first.apply("equal", places)
        dx = dy.reshape(*first.shape).expand(*shape).apply("masked", hits).reshape(*whole.shape)
    else:  # each place in turn passes on what it does not keep
        reach, parts, left = (y.shape[axis] - 1) * step + 1, [], dy
        for k in range(size):
            place = padded.narrow(axis, k * dilation, k * dilation + reach, step)
            kept = left.apply("masked", place.apply("greater_equal", y))
            left = left - kept
            parts.append((k * dilation, kept))
        dx = _laid_out(parts, axis, step, padded.shape[axis])
    missing = padded.shape[axis] - dx.shape[axis]
    ends = [missing - after if i == axis else 0 for i in range(4)]
    return dx.pad([-before if i == axis else 0 for i in range(4)], ends)


def _laid_out(parts: list[tuple[int, Value]], axis: int, step: int, size: int) -> Value:
    """Parts with `step` between their entries, each moved to its start, summed."""
    spread = []
    for start, part in parts:
        shape, n = part.shape, part.shape[axis]
        if step > 1:
            part = part.reshape(*shape[: axis + 1], 1, *shape[axis + 1 :])
            part = part.pad([0] * 5, [step - 1 if i == axis + 1 else 0 for i in range(5)])
            part = part.reshape(*shape[:axis], n * step, *shape[axis + 1 :])
        after = size - start - part.shape[axis]
        spread.append(part.pad(*([size if i == axis else 0 for i in range(4)] for size in (start, after))))
    return reduce(operator.add, spread)


def _sum(node: Node, x: Value) -> Value | None:
    """Over the first axis as a product with ones, which uses every thread."""
    if node.attributes["axes"] != (0,) or x.rank != 2:
        return None
    return x.graph.constant(np.ones((1, x.shape[0]))) @ x


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
    "avg_pool2d_grad": EXPANSIONS["avg_pool2d_grad"],
}
PATTERNS = {"reduce_sum": _sum, "add": _affine}
