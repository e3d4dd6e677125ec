"""Random operands and attributes of every operator of a graph, by its name: shapes, broadcasting, windows, axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.gradient import RULES, gradients
from edgestill.export.lowering.graph import Graph

Random = np.random.Generator
Case = tuple[list[np.ndarray], dict]


def normal(random: Random, *shape: int) -> np.ndarray:
    return random.standard_normal(shape)


def sizes(random: Random, rank: int, most: int = 4) -> list[int]:
    return random.integers(1, most + 1, rank).tolist()


def unary(low: float = -np.inf) -> Callable[[Random], Case]:
    """One tensor of any rank; with `low`, of numbers above it."""
    return lambda random: ([_above(low, normal(random, *sizes(random, random.integers(0, 5))))], {})


def _above(low: float, x: np.ndarray) -> np.ndarray:
    return x if low == -np.inf else np.abs(x) + low


def broadcast(count: int, low: float = -np.inf) -> Callable[[Random], Case]:
    """Tensors that broadcast to one another: of lower rank, or of size 1 along some axes."""

    def case(random: Random) -> Case:
        shape = sizes(random, random.integers(1, 5))
        tensors = []
        for _ in range(count):
            own = [size if random.random() < 0.6 else 1 for size in shape][random.integers(0, len(shape)) :]
            tensors.append(_above(low, normal(random, *own)))
        tensors[random.integers(0, count)] = _above(low, normal(random, *shape))
        return tensors, {}

    return case


def where(random: Random) -> Case:
    tensors, _ = broadcast(3)(random)
    return [(tensors[0] > 0).astype(float), *tensors[1:]], {}


def clamp(random: Random) -> Case:
    (x,), _ = unary()(random)
    low, high = random.choice([-0.5, -math.inf]), random.choice([0.3, math.inf])
    return [x], {"low": float(low), "high": float(high), "closed": bool(random.integers(0, 2))}


def power(random: Random) -> Case:
    return unary(0.2)(random)[0], {"exponent": float(random.choice([-1.5, 0.3, 1.7, 2.0, 5.0]))}


def reduction(random: Random) -> Case:
    rank = int(random.integers(1, 6))
    axes = sorted(random.permutation(rank)[: random.integers(1, rank + 1)].tolist())
    return [normal(random, *sizes(random, rank))], {"axes": tuple(axes)}


def matmul(random: Random) -> Case:
    """Two ranks from 2 to 4, which broadcast, with each pair of flags."""
    n, k, m = sizes(random, 3, 5)
    batch = sizes(random, random.integers(0, 3))
    sides = [
        [size if random.random() < 0.7 else 1 for size in batch][random.integers(0, len(batch) + 1) :]
        for _ in "ab"
    ]
    flags = [bool(flag) for flag in random.integers(0, 2, 2)]
    a = normal(random, *sides[0], *((k, n) if flags[0] else (n, k)))
    b = normal(random, *sides[1], *((m, k) if flags[1] else (k, m)))
    return [a, b], {"transpose_a": flags[0], "transpose_b": flags[1]}


def of_rows(**attributes: float) -> Callable[[Random], Case]:
    return lambda random: ([normal(random, *sizes(random, random.integers(1, 4)), 5)], attributes)


def reshape(random: Random) -> Case:
    x = normal(random, *sizes(random, 4))
    order = random.permutation(4)
    return [x], {"shape": tuple(x.shape[i] for i in order if x.shape[i] > 1) or (1,)}


def transpose(random: Random) -> Case:
    rank = int(random.integers(2, 6))
    return [normal(random, *sizes(random, rank))], {"permutation": tuple(random.permutation(rank).tolist())}


def slice_(random: Random) -> Case:
    shape = [size + 2 for size in sizes(random, random.integers(1, 5), 6)]
    axis = int(random.integers(0, len(shape)))
    start = int(random.integers(0, shape[axis] - 1))
    stop = int(random.integers(start + 1, shape[axis] + 1))
    return [normal(random, *shape)], {
        "axis": axis,
        "start": start,
        "stop": stop,
        "step": int(random.integers(1, 4)),
    }


def concat(random: Random) -> Case:
    shape = sizes(random, random.integers(1, 5))
    axis = int(random.integers(0, len(shape)))
    parts = [shape[:axis] + [size] + shape[axis + 1 :] for size in sizes(random, random.integers(1, 8))]
    return [normal(random, *part) for part in parts], {"axis": axis}


def pad(random: Random) -> Case:
    shape = sizes(random, random.integers(1, 5))
    begins, ends = (tuple(random.integers(0, 3, len(shape)).tolist()) for _ in range(2))
    return [normal(random, *shape)], {"begins": begins, "ends": ends, "value": 0.5}


def expand(random: Random) -> Case:
    shape = sizes(random, random.integers(1, 5))
    own = [size if random.random() < 0.5 else 1 for size in shape][random.integers(0, len(shape)) :]
    return [normal(random, *own)], {"shape": tuple(shape)}


def gather(random: Random) -> Case:
    """An index with repetitions, shorter or longer than the axis."""
    shape = sizes(random, random.integers(1, 5))
    axis = int(random.integers(0, len(shape)))
    index = random.integers(0, shape[axis], random.integers(1, 7))
    return [normal(random, *shape), index], {"axis": axis}


def scatter_add(random: Random) -> Case:
    (x, _), attributes = gather(random)
    size = int(random.integers(1, 6))
    index = random.integers(0, size, x.shape[attributes["axis"]])
    return [x, index], attributes | {"size": size}


def windows(random: Random, whole: bool = False) -> tuple[list[int], dict]:
    """Height and width, and attributes of windows over them; `whole`: padding less than the kernel on every side."""
    size, found = [], {"kernel": [], "stride": [], "padding": [], "dilation": []}
    for _ in range(2):
        kernel, dilation = int(random.integers(1, 5)), int(random.integers(1, 3))
        most = (dilation * (kernel - 1) + 2) // 2 if whole else kernel
        sides = tuple(random.integers(0, most, 2).tolist()) if most else (0, 0)
        reach = dilation * (kernel - 1) + 1
        size.append(max(1, reach - sum(sides)) + int(random.integers(0, 5)))
        for key, value in (("kernel", kernel), ("stride", int(random.integers(1, 4))), ("padding", sides),
                           ("dilation", dilation)):  # fmt: skip
            found[key].append(value)
    return size, {key: tuple(values) for key, values in found.items()}


def conv2d(random: Random) -> Case:
    """Dense, grouped and depthwise, with a bias and without; windows with asymmetric padding need not fit exactly."""
    size, a = windows(random)
    kernel, groups = a.pop("kernel"), int(random.integers(1, 4))
    inputs, outputs = (groups * int(random.integers(1, 4)) for _ in range(2))
    tensors = [normal(random, 2, inputs, *size), normal(random, outputs, inputs // groups, *kernel)]
    if random.random() < 0.5:
        tensors.append(normal(random, outputs))
    return tensors, a | {"groups": groups}


def conv2d_transpose(random: Random) -> Case:
    (x, weight, *_), a = conv2d(random)
    out = [_windows_of(x.shape[2 + i], weight.shape[2 + i], a, i) for i in range(2)]
    return [normal(random, 2, weight.shape[0], *out), weight], a | {"size": x.shape[2:]}


def _windows_of(size: int, kernel: int, a: dict, i: int) -> int:
    dilation = a.get("dilation", (1, 1))[i]
    return (size + sum(a["padding"][i]) - dilation * (kernel - 1) - 1) // a["stride"][i] + 1


def max_pool2d(random: Random) -> Case:
    size, a = windows(random, whole=True)
    return [normal(random, 2, 3, *size)], a


def avg_pool2d(random: Random) -> Case:
    (x,), a = max_pool2d(random)
    del a["dilation"]
    a["padding"] = tuple(
        tuple(min(s, k // 2) for s in sides) for sides, k in zip(a["padding"], a["kernel"], strict=True)
    )
    grown = [size + a["kernel"][i] for i, size in enumerate(x.shape[2:])]
    return [normal(random, 2, 3, *grown)], a


def avg_pool2d_grad(random: Random) -> Case:
    (x,), a = avg_pool2d(random)
    out = [_windows_of(x.shape[2 + i], a["kernel"][i], a, i) for i in range(2)]
    return [normal(random, 2, 3, *out)], a | {"size": x.shape[2:]}


def batch_norm(random: Random) -> Case:
    channels = int(random.integers(1, 4))
    x = normal(random, int(random.integers(2, 4)), channels, 4, 3) * 2 + 1
    return [x, normal(random, channels), normal(random, channels)], {"eps": 1e-3}


def normalize(random: Random) -> Case:
    tensors, a = batch_norm(random)
    return [*tensors, normal(random, len(tensors[1])), np.abs(normal(random, len(tensors[1]))) + 0.1], a


def pooled_batch_norm(random: Random) -> Case:
    tensors, a = batch_norm(random)
    return tensors, a | {"kernel": (2, 3), "stride": (1, 2), "padding": ((1, 0), (0, 1)), "dilation": (1, 1)}


BINARY = "add subtract multiply maximum minimum".split()
UNARY = "relu abs exp erf tanh sigmoid softplus sin cos atan".split()
CASES: dict[str, Callable[[Random], Case]] = {
    **dict.fromkeys(BINARY, broadcast(2)),
    **dict.fromkeys(UNARY, unary()),
    **dict.fromkeys(("log", "sqrt", "rsqrt"), unary(0.2)),
    **dict.fromkeys(("reduce_sum", "reduce_mean", "reduce_max"), reduction),
    **dict.fromkeys(("softmax", "log_softmax"), of_rows()),
    "divide": broadcast(2, 0.3),
    "where": where,
    "clamp": clamp,
    "power": power,
    "matmul": matmul,
    "standardize": of_rows(eps=1e-2),
    "reshape": reshape,
    "transpose": transpose,
    "slice": slice_,
    "concat": concat,
    "pad": pad,
    "expand": expand,
    "gather": gather,
    "scatter_add": scatter_add,
    "conv2d": conv2d,
    "conv2d_transpose": conv2d_transpose,
    "max_pool2d": max_pool2d,
    "avg_pool2d": avg_pool2d,
    "avg_pool2d_grad": avg_pool2d_grad,
    "normalize": normalize,
    "batch_norm": batch_norm,
    "pooled_batch_norm": pooled_batch_norm,
}


def comparison(random: Random) -> Case:
    """Of few values, so that some are equal."""
    tensors, attributes = broadcast(2)(random)
    return [np.round(tensor) for tensor in tensors], attributes


def masked(random: Random) -> Case:
    tensors, attributes = broadcast(2)(random)
    return [tensors[0], (tensors[1] > 0).astype(float)], attributes


def argmax(random: Random) -> Case:
    x = np.round(normal(random, *sizes(random, random.integers(1, 5), 6)))
    return [x], {"axis": int(random.integers(0, x.ndim))}


FLAT_CASES: dict[str, Callable[[Random], Case]] = {
    **dict.fromkeys(("greater", "greater_equal", "equal"), comparison),
    **dict.fromkeys(("floor", "stop_gradient"), unary()),
    "masked": masked,
    "argmax": argmax,
    "to_float": lambda random: ([random.integers(-3, 4, sizes(random, 3))], {}),
    "to_integer": lambda random: ([random.integers(-3, 4, sizes(random, 3)).astype(float)], {}),
    "one_hot": lambda random: ([random.integers(0, 5, sizes(random, 1, 6))], {"classes": 5}),
}
"""Of operators without a gradient."""


def with_gradients(
    operator: str, arrays: Sequence[np.ndarray], attributes: Mapping[str, Any], random: Random
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The operator and its gradients as outputs of a graph, and the graph's inputs: the arrays, and a random probe."""
    graph, inputs = Graph(), {f"x{i}": torch.tensor(array) for i, array in enumerate(arrays)}
    for name, tensor in inputs.items():
        graph.input(name, tuple(tensor.shape), "int64" if tensor.dtype == torch.int64 else "float32")
    values = graph.apply_many(operator, *graph.inputs, **attributes)
    for i, value in enumerate(values):
        graph.output(f"y{i}", value)
    if operator in RULES:
        y, probe = values[0], graph.input("probe", values[0].shape)
        inputs["probe"] = torch.from_numpy(random.standard_normal(y.shape).astype(np.float32).astype(float))
        trained = [v for v in graph.inputs if v.dtype == "float32" and v is not probe]
        trained = trained[:3] if operator == "normalize" else trained
        for name, value in gradients(graph, (y * probe).sum(*range(y.rank)), trained).items():
            graph.output(f"gradient.{name}", value)
    return graph, inputs
