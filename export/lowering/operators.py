"""The closed set of operators that a graph may contain, each with its meaning as a PyTorch function.

`Graph.apply` refuses a name that is not in this table, and an emitter one that its engine cannot spell. Gradients
of convolution, pooling and normalization are operators like any other: an engine keeps those that it has kernels for
and rewrites the others. Masks are float32, 1 or 0. Images are N C H W; `padding` is ((top, bottom), (left, right)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "int64": torch.int64}
LOWEST = -3e38


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


def _slice(x, axis, start, stop, step=1):
    return torch.slice_copy(x, axis, start, stop, step)  # a view would be cloned by every reshape of it


def _pad(x, begins, ends, value=0.0):
    pairs = [
        size for begin, end in zip(reversed(begins), reversed(ends), strict=True) for size in (begin, end)
    ]
    while pairs[-2:] == [0, 0]:
        pairs = pairs[:-2]
    return F.pad(x, pairs, value=value)


def _padded(x, padding, value=0.0):
    """For functions that pad both sides alike: the image padded before, and what is left for them to pad."""
    (top, bottom), (left, right) = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


def _conv2d(x, weight, *bias, stride, padding, dilation, groups):
    x, rest = _padded(x, padding)
    return F.conv2d(x, weight, bias[0] if bias else None, stride, rest, dilation, groups)


def _conv2d_transpose(dy, weight, size, stride, padding, dilation, groups):
    """The adjoint of conv2d in its image, which has height and width `size`: its input gradient."""
    shape = (dy.shape[0], weight.shape[1] * groups, *(size[i] + sum(padding[i]) for i in range(2)))
    dx = torch.ops.aten.convolution_backward(
        dy, dy.new_empty(shape), weight, None, stride, (0, 0), dilation, False, (0, 0), groups,
        (True, False, False),
    )[0]  # fmt: skip
    (top, _), (left, _) = padding
    return dx[:, :, top : top + size[0], left : left + size[1]]


def _conv2d_weight_grad(x, dy, weight, stride, padding, dilation, groups, bias):
    """The gradients of a convolution in its weight, which is asked for its shape alone, and in its bias."""
    (top, bottom), (left, right) = padding
    x = F.pad(x, (left, right, top, bottom))
    dw = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, (0, 0), dilation, False, (0, 0), groups, (False, True, False)
    )[1]
    return dw, dy.sum((0, 2, 3))


def _max_pool2d(x, kernel, stride, padding, dilation):
    (top, bottom), (left, right) = padding
    x = F.pad(x, (left, right, top, bottom), value=LOWEST) if top + bottom + left + right else x
    return F.max_pool2d(x, kernel, stride, 0, dilation)


def _max_pool2d_grad(dy, x, y, kernel, stride, padding, dilation):
    """To the first largest pixel of each window."""
    (top, bottom), (left, right) = padding
    padded = F.pad(x, (left, right, top, bottom), value=LOWEST)
    _, indices = torch.ops.aten.max_pool2d_with_indices(padded, kernel, stride, 0, dilation)
    dx = torch.ops.aten.max_pool2d_with_indices_backward(
        dy, padded, kernel, stride, (0, 0), dilation, False, indices
    )
    return dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def _avg_pool2d(x, kernel, stride, padding):
    """Padding counts."""
    x, rest = _padded(x, padding)
    return F.avg_pool2d(x, kernel, stride, rest)


def _avg_pool2d_grad(dy, size, kernel, stride, padding):
    channels = dy.shape[1]
    share = torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=dy.dtype, device=dy.device)
    return _conv2d_transpose(dy, share, size, stride, padding, (1, 1), channels)


def _channelwise(x):
    return x.reshape(1, -1, 1, 1)


def _normalize(x, weight, bias, mean, variance, eps):
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)


def _batch_norm(x, weight, bias, eps):
    mean = torch.mean(x, (0, 2, 3))
    variance = torch.var(x, (0, 2, 3), correction=0)
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance


def _batch_norm_grad(dy, x, weight, mean, variance, eps):
    inverse = torch.rsqrt(_channelwise(variance) + eps)
    centred = (x - _channelwise(mean)) * inverse
    db, dw = dy.sum((0, 2, 3)), (dy * centred).sum((0, 2, 3))
    count = x.numel() // x.shape[1]
    dx = dy - (_channelwise(db) + centred * _channelwise(dw)) / count
    return dx * _channelwise(weight) * inverse, dw, db


def _pooled_batch_norm(x, weight, bias, eps, **pool):
    y, mean, variance = _batch_norm(x, weight, bias, eps)
    return _max_pool2d(y, **pool), mean, variance


def _pooled_batch_norm_grad(dy, x, weight, mean, variance, eps, **pool):
    y, _, _ = _batch_norm(x, weight, torch.zeros_like(weight), eps)
    return _batch_norm_grad(
        _max_pool2d_grad(dy, y, _max_pool2d(y, **pool), **pool), x, weight, mean, variance, eps
    )


def _standardize(x, eps):
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    return (x - mean) * inverse, inverse


def _on_images(meaning, images=(0,), result=True):
    """With `last`, the images that it takes and gives are [N, H, W, C]."""

    def function(*tensors, last=False, **attributes):
        if not last:
            return meaning(*tensors, **attributes)
        turned = [t.permute(0, 3, 1, 2) if i in images else t for i, t in enumerate(tensors)]
        found = meaning(*turned, **attributes)
        return found.permute(0, 2, 3, 1).contiguous() if result else found

    return function


def _one_hot(labels, classes):
    return torch.eq(labels.unsqueeze(-1), torch.arange(classes, device=labels.device)).to(torch.float32)


def _mask(compare):
    return lambda a, b: compare(a, b).to(torch.float32)


Meaning = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
ELEMENTWISE: dict[str, Meaning] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "relu": torch.relu,
    "clamp": lambda x, low, high, closed: torch.clamp(x, low, high),  # closed: with a gradient at its ends
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "power": lambda x, exponent: torch.pow(x, exponent),
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "floor": torch.floor,
    "greater": _mask(torch.gt),
    "greater_equal": _mask(torch.ge),
    "equal": _mask(torch.eq),
    "where": lambda mask, a, b: torch.where(mask != 0, a, b),
    "masked": lambda x, mask: torch.where(mask != 0, x, 0.0),  # a product of what is finite (bounds.py)
    "to_float": lambda x: x.to(torch.float32),
    "to_integer": lambda x: x.to(torch.int64),
    "stop_gradient": lambda x: x.clone(),
}
"""With broadcasting: turns of what they take may be moved past them (layout.py)."""
OPERATORS: dict[str, Meaning] = {
    **ELEMENTWISE,
    # reductions, whose axes stay with size 1, and products
    "reduce_sum": lambda x, axes: torch.sum(x, axes, keepdim=True),
    "reduce_mean": lambda x, axes: torch.mean(x, axes, keepdim=True),
    "reduce_max": lambda x, axes: torch.amax(x, axes, keepdim=True),
    "argmax": lambda x, axis: torch.argmax(x, axis, keepdim=True),  # the first one
    "matmul": _matmul,
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "standardize": _standardize,  # (x − mean) / sqrt(variance + eps) over the last axis; the factor comes with it
    # movement
    "reshape": lambda x, shape: torch.reshape(x, shape),
    "transpose": lambda x, permutation: torch.permute_copy(x, permutation),
    "slice": _slice,
    "concat": _concat,
    "pad": _pad,
    "expand": lambda x, shape: torch.expand_copy(x, shape),
    "gather": lambda x, index, axis: torch.index_select(x, axis, index),  # index [n] of integers
    "scatter_add": lambda x, index, axis, size: torch.index_add(
        x.new_zeros((*x.shape[:axis], size, *x.shape[axis + 1 :])), axis, index, x
    ),  # the adjoint of gather
    "one_hot": _one_hot,
    # images
    "conv2d": _on_images(_conv2d),
    "conv2d_transpose": _on_images(_conv2d_transpose),
    "conv2d_weight_grad": _on_images(_conv2d_weight_grad, (0, 1), False),
    "max_pool2d": _on_images(_max_pool2d),
    "max_pool2d_grad": _on_images(_max_pool2d_grad, (0, 1, 2)),
    "avg_pool2d": _on_images(_avg_pool2d),
    "avg_pool2d_grad": _on_images(_avg_pool2d_grad),
    "normalize": _normalize,  # (x − mean) / sqrt(variance + eps) · weight + bias, a channel
    "batch_norm": _batch_norm,  # by the batch's own mean and biased variance, which it returns too
    "batch_norm_grad": _batch_norm_grad,
    "pooled_batch_norm": _pooled_batch_norm,  # batch_norm, then max_pool2d
    "pooled_batch_norm_grad": _pooled_batch_norm_grad,
}
