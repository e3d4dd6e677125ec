"""Random small students over all kinds of layers and shapes: a table of layer makers, and networks drawn from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from edgestill.export.students import Student
from tests.support.networks.layers import Attention, Film, Maxout, Recurrent, StochasticDepth
from tests.support.networks.network import Add, Apply, Cat

Random = np.random.Generator
Shape = tuple[int, ...]  # without the batch
Maker = Callable[[Random, Shape], nn.Module]
MOST = 1500
"""Elements of one sample of any activation."""


@dataclass(frozen=True)
class Drawn:
    """A student, the shape of its float32 samples, and the names of the makers that it is made by."""

    student: Student
    shape: Shape
    names: tuple[str, ...]


def _int(random: Random, low: int, high: int) -> int:
    return int(random.integers(low, high + 1))


def _one_of(random: Random, *values):
    return values[int(random.integers(0, len(values)))]


def _divisor(random: Random, n: int) -> int:
    return _one_of(random, *(d for d in range(1, n + 1) if n % d == 0))


def _windows(random: Random, shape: Shape, most: int = 3) -> dict[str, tuple[int, ...]]:
    kernel = tuple(_int(random, 1, min(most, size)) for size in shape[1:])
    return {
        "kernel_size": kernel,
        "stride": tuple(_int(random, 1, 2) for _ in kernel),
        "padding": tuple(_int(random, 0, size // 2) for size in kernel),
    }


def _convolution(random: Random, shape: Shape) -> nn.Module:
    groups, kind = _divisor(random, shape[0]), (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
    form = _windows(random, shape) | {"dilation": _int(random, 1, 2)}
    return kind(shape[0], groups * _int(random, 1, 3), groups=groups, bias=bool(_int(random, 0, 1)), **form)


def _depthwise(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
    return kind(shape[0], shape[0] * _int(random, 1, 2), 3, padding=1, groups=shape[0])


def _padded_convolution(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
    mode = _one_of(random, "reflect", "replicate", "circular")
    return kind(shape[0], _int(random, 1, 4), 3, padding=1, padding_mode=mode)


def _transposed(random: Random, shape: Shape) -> nn.Module:
    groups = _divisor(random, shape[0])
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(shape) - 2]
    stride, padding = _int(random, 1, 2), _int(random, 0, 1)
    return kind(shape[0], groups * _int(random, 1, 2), 3, stride, padding, stride - 1, groups)


def _max_pool(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[len(shape) - 2]
    return kind(**_windows(random, shape), dilation=_int(random, 1, 2), ceil_mode=bool(_int(random, 0, 1)))


def _average_pool(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[len(shape) - 2]
    flags = {"ceil_mode": bool(_int(random, 0, 1)), "count_include_pad": bool(_int(random, 0, 1))}
    return kind(**_windows(random, shape), **flags)


def _adaptive(average: bool) -> Maker:
    def make(random: Random, shape: Shape) -> nn.Module:
        kinds = (
            (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
            if average
            else (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
        )
        return kinds[len(shape) - 2](tuple(_int(random, 1, size) for size in shape[1:]))

    return make


def _power_pool(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.LPPool1d, nn.LPPool2d)[len(shape) - 2]
    return nn.Sequential(nn.Softplus(), kind(_int(random, 2, 3), 2, _int(random, 1, 2)))


def _batch_norm(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 1]
    return kind(
        shape[0], momentum=0.3, affine=bool(_int(random, 0, 3)), track_running_stats=bool(_int(random, 0, 3))
    )


def _instance_norm(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(shape) - 2]
    return kind(shape[0], affine=bool(_int(random, 0, 1)), track_running_stats=bool(_int(random, 0, 1)))


def _upsampled(random: Random, shape: Shape) -> nn.Module:
    mode = _one_of(random, "nearest", ("linear", "bilinear", "trilinear")[len(shape) - 2])
    return nn.Upsample(tuple(size + _int(random, -1, 3) for size in shape[1:]), mode=mode)


def _padding(random: Random, shape: Shape) -> nn.Module:
    sides = [_int(random, 0, 2) for _ in range(2 * (len(shape) - 1))]
    mode = _one_of(random, "constant", "reflect", "replicate", "circular")
    return Apply(lambda x: F.pad(x, sides, mode))


def _residual(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
    body = kind(shape[0], shape[0], 3, padding=1)
    return (
        Add(body, nn.Tanh())
        if _int(random, 0, 1)
        else StochasticDepth(body)
        if len(shape) == 3
        else Add(body)
    )


def _branches(random: Random, shape: Shape) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
    return Cat(nn.Identity(), kind(shape[0], 2, 3, padding=1), Apply(torch.sin))


def _linear(random: Random, shape: Shape) -> nn.Module:
    layer = nn.Linear(shape[-1], _int(random, 2, 8), bias=bool(_int(random, 0, 1)))
    return parametrizations.weight_norm(layer) if _int(random, 0, 3) == 0 else layer


def _recurrent(random: Random, shape: Shape) -> nn.Module:
    kind, form = _one_of(random, nn.LSTM, nn.GRU, nn.RNN), {"bidirectional": bool(_int(random, 0, 1))}
    return Recurrent(
        kind(shape[0], 4, num_layers=_int(random, 1, 2), batch_first=True, **form), bool(_int(random, 0, 1))
    )


def _encoder(random: Random, shape: Shape) -> nn.Module:
    heads = _divisor(random, shape[-1])
    form = {"norm_first": bool(_int(random, 0, 1)), "activation": _one_of(random, "relu", "gelu")}
    return nn.TransformerEncoderLayer(
        shape[-1], heads, 6, _one_of(random, 0.0, 0.2), batch_first=True, **form
    )


def _of(*kinds: Callable[[], nn.Module]) -> Maker:
    return lambda random, shape: _one_of(random, *kinds)()


def _along(function: Callable[[torch.Tensor, int], torch.Tensor]) -> Maker:
    """A function of the whole tensor and one of its axes."""

    def make(random: Random, shape: Shape) -> nn.Module:
        axis = _int(random, 1, len(shape))
        return Apply(lambda x: function(x, axis))

    return make


def _sliced(random: Random, shape: Shape) -> nn.Module:
    axis, step = _int(random, 1, len(shape)), _int(random, 1, 3)
    start = _int(random, 0, shape[axis - 1] - 1)
    cut = tuple(slice(None) if i != axis else slice(start, None, step) for i in range(len(shape) + 1))
    return Apply(lambda x: x[cut])


def _indexed(random: Random, shape: Shape) -> nn.Module:
    axis = _int(random, 1, len(shape))
    index = torch.from_numpy(random.integers(0, shape[axis - 1], _int(random, 1, 5)))
    return Apply(lambda x: x.index_select(axis, index))


def _permuted(random: Random, shape: Shape) -> nn.Module:
    order = [0, *(random.permutation(len(shape)) + 1).tolist()]
    return Apply(lambda x: x.permute(order).contiguous())


class Learned(nn.Module):
    """A learnable factor and offset that broadcast."""

    def __init__(self, scale: Shape, offset: Shape):
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.randn(scale)), nn.Parameter(torch.randn(offset))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.offset


def _scaled(random: Random, shape: Shape) -> nn.Module:
    return Learned(tuple(size if _int(random, 0, 1) else 1 for size in shape), shape[-1:])


IMAGES, SPATIAL, ROWS, ANY = (3,), (2, 3, 4), (2,), (1, 2, 3, 4)
MAKERS: dict[str, tuple[tuple[int, ...], Maker]] = {
    # name: ranks of a sample that it takes, maker
    "convolution": (SPATIAL, _convolution),
    "depthwise": (SPATIAL, _depthwise),
    "padded-convolution": ((2, 3), _padded_convolution),
    "transposed-convolution": (SPATIAL, _transposed),
    "max-pool": (SPATIAL, _max_pool),
    "average-pool": (SPATIAL, _average_pool),
    "adaptive-average-pool": (SPATIAL, _adaptive(True)),
    "adaptive-max-pool": (SPATIAL, _adaptive(False)),
    "power-pool": ((2, 3), _power_pool),
    "batch-norm": (ANY, _batch_norm),
    "instance-norm": (SPATIAL, _instance_norm),
    "group-norm": (SPATIAL, lambda r, s: nn.GroupNorm(_divisor(r, s[0]), s[0], affine=bool(_int(r, 0, 1)))),
    "layer-norm": (
        ANY,
        lambda r, s: nn.LayerNorm(s[-_int(r, 1, len(s)) :], elementwise_affine=bool(_int(r, 0, 1))),
    ),
    "rms-norm": (ANY, lambda r, s: nn.RMSNorm(s[-1:], eps=1e-3)),
    "local-response-norm": (IMAGES, lambda r, s: nn.LocalResponseNorm(3, alpha=0.1)),
    "upsample": (SPATIAL, _upsampled),
    "padding": ((2, 3), _padding),
    "pixel-unshuffle": (IMAGES, lambda r, s: nn.PixelUnshuffle(2)),
    "pixel-shuffle": (IMAGES, lambda r, s: nn.Sequential(nn.Conv2d(s[0], 4, 1), nn.PixelShuffle(2))),
    "channel-shuffle": (IMAGES, lambda r, s: nn.ChannelShuffle(_divisor(r, s[0]))),
    "unfold": (IMAGES, lambda r, s: nn.Unfold(2, stride=2)),
    "residual": (SPATIAL, _residual),
    "branches": (SPATIAL, _branches),
    "squeeze-and-excitation": (IMAGES, lambda r, s: Film(s[0])),
    "linear": (ANY, _linear),
    "maxout": ((1,), lambda r, s: Maxout(s[0], _int(r, 2, 6))),
    "recurrent": (ROWS, _recurrent),
    "attention": (ROWS, lambda r, s: Attention(s[-1], _divisor(r, s[-1]), uses_weights=bool(_int(r, 0, 1)))),
    "encoder-layer": (ROWS, _encoder),
    "causal-attention": (
        ROWS,
        lambda r, s: Apply(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    ),
    "relu": (ANY, _of(nn.ReLU, nn.ReLU6, lambda: nn.LeakyReLU(0.2), nn.PReLU)),
    "sigmoid": (ANY, _of(nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink)),
    "silu": (ANY, _of(nn.SiLU, nn.Mish, nn.GELU, lambda: nn.GELU(approximate="tanh"))),
    "elu": (ANY, _of(nn.ELU, nn.SELU, lambda: nn.CELU(0.7), nn.Softplus)),
    "hard": (ANY, _of(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softshrink, nn.Hardshrink)),
    "threshold": (ANY, lambda r, s: nn.Threshold(0.1, 0.2)),
    "glu": (ANY, lambda r, s: nn.GLU(_int(r, 1, len(s)))),
    "softmax": (ANY, _along(lambda x, axis: x.softmax(axis))),
    "log-softmax": (ANY, _along(lambda x, axis: x.log_softmax(axis))),
    "dropout": (ANY, lambda r, s: nn.Dropout(0.3)),
    "channel-dropout": ((2, 3, 4), lambda r, s: (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(s) - 2](0.3)),
    "alpha-dropout": (ANY, lambda r, s: nn.AlphaDropout(0.2)),
    "noise": (ANY, lambda r, s: Apply(lambda x: x + 0.1 * torch.randn_like(x))),
    "sum": (ANY, _along(lambda x, axis: x.sum(axis, keepdim=True) * 0.3 + x)),
    "mean": ((2, 3, 4), _along(lambda x, axis: x.mean(axis))),
    "maximum": ((2, 3, 4), _along(lambda x, axis: x.amax(axis))),
    "largest": ((2, 3, 4), _along(lambda x, axis: x.max(axis).values - x.min(axis).values)),
    "log-sum-exp": ((2, 3, 4), _along(lambda x, axis: x.logsumexp(axis))),
    "deviation": ((2, 3, 4), _along(lambda x, axis: (x.var(axis, correction=0) + 0.01).sqrt())),
    "normalize": (ANY, _along(lambda x, axis: F.normalize(x + 0.1, dim=axis))),
    "cumulative-sum": (ANY, _along(lambda x, axis: x.cumsum(axis) * 0.5)),
    "flip": (ANY, _along(lambda x, axis: x.flip(axis) * x)),
    "roll": (ANY, _along(lambda x, axis: torch.cat((x.roll(1, axis), x), 1))),
    "chunk": (
        ANY,
        _along(lambda x, axis: (lambda parts: parts[0].sin().sum(axis, keepdim=True) + x)(x.chunk(2, axis))),
    ),
    "stack": ((1, 2), _along(lambda x, axis: torch.stack((x, x.cos()), axis))),
    "slice": (ANY, _sliced),
    "index": (ANY, _indexed),
    "permute": ((2, 3, 4), _permuted),
    "expand": (ANY, lambda r, s: Apply(lambda x: x.mean(1, keepdim=True).expand_as(x) * x)),
    "repeat": (ANY, lambda r, s: Apply(lambda x: x.repeat(1, 2, *(1,) * (x.ndim - 2)))),
    "flatten": ((3, 4), lambda r, s: nn.Flatten(2)),
    "unflatten": ((1,), lambda r, s: nn.Unflatten(1, (1, s[0]))),
    "gram": ((2, 3, 4), lambda r, s: Apply(lambda x: x @ x.transpose(-1, -2) / x.shape[-1])),
    "learned": (ANY, _scaled),
    "powers": (ANY, lambda r, s: Apply(lambda x: x.square() * 0.3 + (x.abs() + 0.5) ** 0.7)),
    "exponential": (ANY, lambda r, s: Apply(lambda x: x.clamp(-1, 1).exp() + (x.abs() + 0.3).log())),
    "waves": (ANY, lambda r, s: Apply(lambda x: x.sin() + x.atan() + torch.erf(x))),
    "division": (ANY, lambda r, s: Apply(lambda x: x / (1 + x.square()) + 1 / (2 + x.sigmoid()))),
    "where": (ANY, lambda r, s: Apply(lambda x: torch.where(x > 0.1, x * x, x.minimum(x.tanh())))),
    "detached": (ANY, lambda r, s: Apply(lambda x: x * x.sigmoid().detach() + torch.floor(x))),
}


def draw(random: Random, most_layers: int = 4) -> Drawn:
    """One to `most_layers` layers that fit one another, then flatten and two linear layers."""
    rank = _one_of(random, 1, 2, 3, 3, 3, 4)
    sizes = {1: (6, 12), 2: (3, 9), 3: (4, 9), 4: (3, 5)}[rank]
    shape = first = (_int(random, 2, 6), *(_int(random, *sizes) for _ in range(rank - 1)))
    torch.manual_seed(_int(random, 0, 2**31))
    layers: list[nn.Module] = []
    names: list[str] = []
    wanted = _int(random, 1, most_layers)
    while len(layers) < wanted:
        fitting = [name for name, (ranks, _) in MAKERS.items() if len(shape) in ranks]
        name = _one_of(random, *fitting)
        found = _fitting(MAKERS[name][1], random, shape)
        if found is not None:
            (layer, shape), _ = found, names.append(name)
            layers.append(layer)
    head = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 5))
    stem = nn.Linear(first[-1], first[-1])  # so that every layer's own gradient is asked for
    return Drawn(Student(nn.Sequential(stem, *layers), head, nn.Linear(5, 4)), first, tuple(names))


def _fitting(maker: Maker, random: Random, shape: Shape) -> tuple[nn.Module, Shape] | None:
    """A layer for this shape, and the shape behind it; None where the layer does not take it."""
    try:
        layer = maker(random, shape)
        with torch.no_grad():
            y = layer.train()(torch.randn(2, *shape))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return None
    fits = y.ndim in (2, 3, 4, 5) and len(y) == 2 and 0 < y[0].numel() <= MOST and bool(y.isfinite().all())
    return (layer, tuple(y.shape[1:])) if fits else None
