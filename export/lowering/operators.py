"""The closed set of operators that a lowered graph may contain, each with its meaning as a PyTorch function.

Nothing else ever reaches an artifact: `Graph.apply` refuses a name that is not in this table. Every operator is a
forward operator that inference engines have; none needs a training runtime. `onnx_emitter.py` spells each in ONNX,
`torch_emitter.py` runs these functions themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "int64": torch.int64}


def _matmul(a, b, transpose_a=False, transpose_b=False):
    a = a.transpose(-1, -2) if transpose_a else a
    b = b.transpose(-1, -2) if transpose_b else b
    if a.ndim == 2 and b.ndim == 2:  # XNNPACK takes products of two runtime tensors only as batch products
        return torch.bmm(a.reshape(1, *a.shape), b.reshape(1, *b.shape)).reshape(a.shape[0], b.shape[1])
    if a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0]:
        return torch.bmm(a, b)  # matmul would put copies (expand) between the delegated pieces
    return torch.matmul(a, b)


def _concat(*parts, axis):
    while len(parts) > 1:  # XNNPACK concatenates at most five tensors at once
        groups = [parts[i : i + 4] for i in range(0, len(parts), 4)]
        parts = [torch.cat(group, axis) if len(group) > 1 else group[0] for group in groups]
    return parts[0]


def _slice(x, axis, start, stop):
    return torch.slice_copy(x, axis, start, stop)  # a view would be cloned by every reshape of it


def _pad(x, begins, ends, value=0.0):
    pairs = [
        size for begin, end in zip(reversed(begins), reversed(ends), strict=True) for size in (begin, end)
    ]
    while pairs[-2:] == [0, 0]:
        pairs = pairs[:-2]
    return F.pad(x, pairs, value=value)


def _max_pool2d(x, kernel, stride, padding, dilation):
    return F.max_pool2d(x, kernel, stride, padding, dilation)


def _normalize(x, weight, bias, mean, variance, eps):
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)


def _normalize_by_batch(x, weight, bias, running_mean, running_var, eps):
    """The running statistics do not enter: they give ONNX's operator buffers of their own (onnx_emitter.py)."""
    mean = torch.mean(x, (0, 2, 3))
    variance = torch.var(x, (0, 2, 3), correction=0)
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance


def _conv2d(x, weight, *bias, stride, padding, dilation, groups):
    return F.conv2d(x, weight, bias[0] if bias else None, stride, padding, dilation, groups)


def _conv2d_transpose(x, weight, stride, padding, output_padding, dilation, groups):
    return F.conv_transpose2d(x, weight, None, stride, padding, output_padding, groups, dilation)


def _reduce_sum(x, axes):
    return torch.sum(x, axes, keepdim=True)


def _reduce_mean(x, axes):
    return torch.mean(x, axes, keepdim=True)


def _one_hot(labels, classes):
    return torch.eq(labels.reshape(-1, 1), torch.arange(classes, dtype=torch.int64)).to(torch.float32)


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    # elementwise, with broadcasting
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "maximum": torch.maximum,
    "relu": torch.relu,
    "clamp": lambda x, low, high: torch.clamp(x, low, high),
    "greater_equal": lambda a, b: torch.ge(a, b).to(torch.float32),  # 1 where a ≥ b, else 0
    "positive": lambda x: torch.clamp(x * 1e38, 0.0, 1.0),  # 1 where x > 0, else 0, without comparisons
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "to_float": lambda x: x.to(torch.float32),
    "one_hot": _one_hot,
    # reductions and products
    "matmul": _matmul,
    "reduce_sum": _reduce_sum,
    "reduce_mean": _reduce_mean,
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    # movement
    "reshape": lambda x, shape: torch.reshape(x, shape),
    "transpose": lambda x, permutation: torch.permute_copy(x, permutation),
    "slice": _slice,
    "concat": _concat,
    "pad": _pad,
    # images, N C H W
    "conv2d": _conv2d,
    "conv2d_transpose": _conv2d_transpose,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": lambda x, kernel, stride, padding: F.avg_pool2d(x, kernel, stride, padding),
    "normalize": _normalize,  # (x − mean) / sqrt(variance + eps) · weight + bias, per channel
    "normalize_by_batch": _normalize_by_batch,  # by the batch's own mean and biased variance, which it returns too
}
