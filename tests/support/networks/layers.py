"""A small student around every layer and operator that a student may be made of, by the kind of its input."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from edgestill.export.students import Student
from tests.support.networks.network import (
    CLASSES,
    IMAGE,
    LARGE,
    LATENT_SIZE,
    TOKENS,
    VECTOR,
    VOCABULARY,
    VOLUME,
    WINDOW,
    Add,
    Apply,
    Network,
    network,
)

Layers = Callable[[], list[nn.Module]]


class Scale(nn.Module):
    """A learnable number times the input, and another one added."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.offset = nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor.exp() + self.offset


class WithBuffer(nn.Module):
    """A function of the input and one constant buffer."""

    def __init__(self, function: Callable, buffer: torch.Tensor, persistent: bool = True):
        super().__init__()
        self.function = function
        self.register_buffer("constant", buffer, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.constant)


class WithParameter(nn.Module):
    """A function of the input and one parameter."""

    def __init__(self, function: Callable, *shape: int):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


class BlurPool(nn.Module):
    """Binomial smoothing before striding, by constant weights (Zhang 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", (row[:, None] * row).expand(channels, 1, 3, 3).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, stride=2, groups=x.shape[1])


class CoordConv(nn.Module):
    """Convolution that sees the coordinates of each pixel (Liu et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__()
        axis = torch.linspace(-1, 1, side)
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None])
        self.convolution = nn.Conv2d(inputs + 2, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(torch.cat((x, self.coordinates.expand(len(x), -1, -1, -1)), 1))


class StochasticDepth(nn.Module):
    """A residual block that whole samples skip in training (Huang et al. 2016)."""

    def __init__(self, body: nn.Module, p: float = 0.2):
        super().__init__()
        self.body, self.p = body, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x + self.body(x)
        keeps = (torch.rand(len(x), 1, 1, 1) >= self.p).to(x.dtype)
        return x + self.body(x) * keeps / (1 - self.p)


class GaussianNoise(nn.Module):
    """Normal noise on the features in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class FunctionalDropout(nn.Module):
    """Dropout as a function, of activations and of channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout2d(F.dropout(x, 0.3, self.training), 0.2, self.training)


class Shared(nn.Module):
    """One convolution applied twice."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(F.relu(self.convolution(x)))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder transposed."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.encoder = nn.Linear(size, hidden)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


class Film(nn.Module):
    """Features scaled and shifted by what the input itself says (Perez et al. 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.condition = nn.Linear(channels, 2 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, shift = self.condition(x.mean((2, 3))).chunk(2, 1)
        return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class Maxout(nn.Module):
    """The largest of several linear layers (Goodfellow et al. 2013)."""

    def __init__(self, inputs: int, outputs: int, pieces: int = 3):
        super().__init__()
        self.linear, self.pieces = nn.Linear(inputs, outputs * pieces), pieces

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).unflatten(1, (-1, self.pieces)).max(2).values


class Highway(nn.Module):
    """A gate between a layer and its input (Srivastava et al. 2015)."""

    def __init__(self, size: int):
        super().__init__()
        self.layer, self.gate = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.layer(x)) + (1 - gate) * x


class Cosine(nn.Module):
    """Class logits as cosines times a learnable temperature (Gidaris and Komodakis 2018)."""

    def __init__(self, size: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, size))
        self.temperature = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.temperature * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Recurrent(nn.Module):
    """A recurrent layer over windows [B, C, T]: all its hidden states, or the last."""

    def __init__(self, layer: nn.Module, last: bool = True):
        super().__init__()
        self.layer, self.last = layer, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.layer(x.transpose(1, 2))[0]
        return states[:, -1] if self.last else states


class FinalState(nn.Module):
    """The final hidden and cell state of an LSTM of several layers."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.layer = nn.LSTM(channels, hidden, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (hidden, cell) = self.layer(x.transpose(1, 2))
        return torch.cat((hidden[-1], cell[-1], hidden[0]), 1)


class Cells(nn.Module):
    """A cell called step by step."""

    def __init__(self, cell: nn.Module, hidden: int):
        super().__init__()
        self.cell, self.hidden = cell, hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = x.new_zeros(len(x), self.hidden)
        state = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        for step in x.unbind(2)[:6]:
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    """nn.MultiheadAttention of tokens to themselves, its averaged weights thrown away or used."""

    def __init__(self, size: int, heads: int, uses_weights: bool = False, **form: object):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True, **form)
        self.uses_weights = uses_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, weights = self.attention(x, x, x, need_weights=self.uses_weights)
        return torch.cat((y, weights), 2) if self.uses_weights else y


class ScaledDotProduct(nn.Module):
    """F.scaled_dot_product_attention with a mask, causal or neither."""

    def __init__(self, size: int, heads: int, masked: bool = False, causal: bool = False):
        super().__init__()
        self.projection, self.heads, self.causal = nn.Linear(size, 3 * size), heads, causal
        mask = torch.zeros(TOKENS[0], TOKENS[0]).masked_fill(
            torch.ones(TOKENS[0], TOKENS[0]).tril() == 0, -1e4
        )
        self.register_buffer("mask", mask if masked else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.projection(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        return y.transpose(1, 2).flatten(2)


class TiedTokens(nn.Module):
    """Token vectors that are compared with the whole vocabulary again."""

    def __init__(self, size: int):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size)
        self.mix = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(self.tokens(x))).mean(1) @ self.tokens.weight.t()


def _function(*functions: Callable[[torch.Tensor], torch.Tensor]) -> Layers:
    return lambda: [Apply(function) for function in functions]


def _one(layer: Callable[..., nn.Module], *args: object, **form: object) -> Layers:
    return lambda: [layer(*args, **form)]


_MASK = (torch.arange(256).reshape(16, 16) % 7 == 0)[None, None]
_PICK = torch.tensor([5, 0, 0, 3])

# After a 3 × 3 convolution to 8 channels, on images of 16 × 16.
ON_IMAGES: dict[str, Layers] = {
    # convolutions
    "conv2d": _one(nn.Conv2d, 8, 8, 3),
    "conv2d-1x1-no-bias": _one(nn.Conv2d, 8, 6, 1, bias=False),
    "conv2d-strided": _one(nn.Conv2d, 8, 8, 3, stride=2, padding=1),
    "conv2d-dilated": _one(nn.Conv2d, 8, 8, 3, dilation=2, padding=2),
    "conv2d-grouped": _one(nn.Conv2d, 8, 12, 3, groups=4),
    "conv2d-depthwise": _one(nn.Conv2d, 8, 8, 3, groups=8, padding=1),
    "conv2d-depthwise-multiplied": _one(nn.Conv2d, 8, 16, 3, groups=8, stride=2),
    "conv2d-depthwise-13": _one(nn.Conv2d, 8, 8, 13, groups=8, padding=6),
    "conv2d-rectangular": _one(nn.Conv2d, 8, 8, (1, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "conv2d-even-same": _one(nn.Conv2d, 8, 8, 4, padding="same"),
    "conv2d-even": _one(nn.Conv2d, 8, 8, 2, padding=1),
    "conv2d-valid": _one(nn.Conv2d, 8, 8, 5, padding="valid"),
    "conv2d-reflect": _one(nn.Conv2d, 8, 8, 3, padding=1, padding_mode="reflect"),
    "conv2d-replicate": _one(nn.Conv2d, 8, 8, 3, padding=1, padding_mode="replicate"),
    "conv2d-circular": _one(nn.Conv2d, 8, 8, 3, padding=1, padding_mode="circular"),
    "conv-transpose2d": _one(nn.ConvTranspose2d, 8, 6, 4, stride=2, padding=1),
    "conv-transpose2d-output-padding": _one(
        nn.ConvTranspose2d, 8, 6, 3, stride=2, padding=1, output_padding=1
    ),
    "conv-transpose2d-grouped": _one(nn.ConvTranspose2d, 8, 8, 3, groups=4, dilation=2),
    "weight-norm": lambda: [parametrizations.weight_norm(nn.Conv2d(8, 8, 3))],
    "spectral-norm": lambda: [parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))],
    # paddings
    "zero-pad": _one(nn.ZeroPad2d, (1, 2, 0, 3)),
    "constant-pad": _one(nn.ConstantPad2d, 2, 0.5),
    "reflection-pad": _one(nn.ReflectionPad2d, (1, 2, 3, 0)),
    "replication-pad": _one(nn.ReplicationPad2d, 2),
    "circular-pad": _one(nn.CircularPad2d, (2, 1, 0, 1)),
    "negative-pad": _function(lambda x: F.pad(x, (-1, -2, 0, -1))),
    # pooling
    "max-pool2d": _one(nn.MaxPool2d, 2),
    "max-pool2d-overlapping": _one(nn.MaxPool2d, 3, 2, 1),
    "max-pool2d-ceil": _one(nn.MaxPool2d, 3, 2, ceil_mode=True),
    "max-pool2d-dilated": _one(nn.MaxPool2d, 3, 1, dilation=2),
    "max-pool2d-partial": _one(nn.MaxPool2d, 3),
    "avg-pool2d": _one(nn.AvgPool2d, (2, 4)),
    "avg-pool2d-ceil": _one(nn.AvgPool2d, 3, 2, ceil_mode=True),
    "avg-pool2d-padded": _one(nn.AvgPool2d, 3, 2, 1),
    "avg-pool2d-without-padding": _one(nn.AvgPool2d, 3, 2, 1, count_include_pad=False),
    "avg-pool2d-ceil-without-padding": _one(nn.AvgPool2d, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg-pool2d-divisor": _one(nn.AvgPool2d, 2, divisor_override=3),
    "lp-pool2d": lambda: [nn.Softplus(), nn.LPPool2d(2, 2)],
    "lp-pool2d-3": lambda: [nn.Softplus(), nn.LPPool2d(3, 3, 2)],
    "adaptive-avg-pool2d": _one(nn.AdaptiveAvgPool2d, (5, 7)),
    "adaptive-avg-pool2d-larger": _one(nn.AdaptiveAvgPool2d, (20, 16)),
    "adaptive-avg-pool2d-global": _one(nn.AdaptiveAvgPool2d, 1),
    "adaptive-max-pool2d": _one(nn.AdaptiveMaxPool2d, (5, 7)),
    "adaptive-max-pool2d-global": _one(nn.AdaptiveMaxPool2d, 1),
    "global-max": _function(lambda x: x.amax((2, 3))),
    # normalization
    "batch-norm2d": lambda: [nn.BatchNorm2d(8), nn.ReLU()],
    "batch-norm2d-without-affine": _one(nn.BatchNorm2d, 8, affine=False),
    "batch-norm2d-without-statistics": _one(nn.BatchNorm2d, 8, track_running_stats=False),
    "batch-norm2d-cumulative": _one(nn.BatchNorm2d, 8, momentum=None),
    "instance-norm2d": _one(nn.InstanceNorm2d, 8),
    "instance-norm2d-affine": _one(nn.InstanceNorm2d, 8, affine=True),
    "instance-norm2d-tracking": _one(nn.InstanceNorm2d, 8, affine=True, track_running_stats=True),
    "group-norm": _one(nn.GroupNorm, 4, 8),
    "group-norm-without-affine": _one(nn.GroupNorm, 2, 8, affine=False),
    "layer-norm-image": _one(nn.LayerNorm, (8, 16, 16)),
    "layer-norm-without-affine": _one(nn.LayerNorm, 16, elementwise_affine=False),
    "layer-norm-without-bias": _one(nn.LayerNorm, 16, bias=False),
    "rms-norm": _one(nn.RMSNorm, 16),
    "rms-norm-without-affine": _one(nn.RMSNorm, (16, 16), eps=1e-5, elementwise_affine=False),
    "local-response-norm": _one(nn.LocalResponseNorm, 3, alpha=0.1, k=2.0),
    # activations
    "relu": _one(nn.ReLU),
    "relu-inplace": _one(nn.ReLU, inplace=True),
    "relu6": _one(nn.ReLU6),
    "leaky-relu": _one(nn.LeakyReLU, 0.1),
    "prelu-per-channel": _one(nn.PReLU, 8),
    "prelu-shared": _one(nn.PReLU),
    "elu": _one(nn.ELU, 0.7),
    "selu": _one(nn.SELU),
    "celu": _one(nn.CELU, 1.3),
    "gelu": _one(nn.GELU),
    "gelu-tanh": _one(nn.GELU, approximate="tanh"),
    "silu": _one(nn.SiLU),
    "mish": _one(nn.Mish),
    "sigmoid": _one(nn.Sigmoid),
    "log-sigmoid": _one(nn.LogSigmoid),
    "tanh": _one(nn.Tanh),
    "tanhshrink": _one(nn.Tanhshrink),
    "hardsigmoid": _one(nn.Hardsigmoid),
    "hardswish": _one(nn.Hardswish),
    "hardtanh": _one(nn.Hardtanh, -0.5, 0.8),
    "softplus": _one(nn.Softplus, beta=2, threshold=10),
    "softsign": _one(nn.Softsign),
    "softshrink": _one(nn.Softshrink, 0.2),
    "hardshrink": _one(nn.Hardshrink, 0.2),
    "threshold": _one(nn.Threshold, 0.1, -0.2),
    "glu": _one(nn.GLU, dim=1),
    "softmax-channels": _one(nn.Softmax2d),
    "softmin": _one(nn.Softmin, dim=3),
    "log-softmax": _one(nn.LogSoftmax, dim=1),
    # noise
    "dropout": _one(nn.Dropout, 0.3),
    "dropout2d": _one(nn.Dropout2d, 0.3),
    "alpha-dropout": _one(nn.AlphaDropout, 0.2),
    "feature-alpha-dropout": _one(nn.FeatureAlphaDropout, 0.2),
    "dropout-function": _one(FunctionalDropout),
    "stochastic-depth": lambda: [StochasticDepth(nn.Conv2d(8, 8, 3, padding=1))],
    "gaussian-noise": _one(GaussianNoise),
    # shapes
    "pixel-shuffle": _one(nn.PixelShuffle, 2),
    "pixel-unshuffle": _one(nn.PixelUnshuffle, 2),
    "channel-shuffle": _one(nn.ChannelShuffle, 4),
    "upsample-nearest": _one(nn.Upsample, scale_factor=2),
    "upsample-nearest-size": _one(nn.Upsample, size=(24, 20)),
    "upsample-bilinear": _one(nn.Upsample, scale_factor=2, mode="bilinear"),
    "upsample-bilinear-aligned": _one(nn.Upsample, size=(25, 20), mode="bilinear", align_corners=True),
    "downsample-bilinear": _one(nn.Upsample, size=(11, 7), mode="bilinear"),
    "unfold": _one(nn.Unfold, 3, stride=2),
    "unfold-fold": lambda: [nn.Unfold(3, padding=1), nn.Fold((16, 16), 3, padding=1)],
    "cat": _function(lambda x: torch.cat((x, x.sin(), x[:, :2]), 1)),
    "stack": _function(lambda x: torch.stack((x, x.cos()), 2)),
    "split": _function(lambda x: (lambda a, b, c: a.relu() * b + c)(*x.split((1, 1, 6), 1))),
    "chunk": _function(lambda x: (lambda a, b: a.sigmoid() * b)(*x.chunk(2, 3))),
    "unbind": _function(lambda x: (lambda a, *rest: a * rest[0] - rest[-1])(*x.unbind(1))),
    "slice": _function(lambda x: x[:, 1:7:2, 2:, :-3]),
    "select": _function(lambda x: x[:, -1] * x[:, 2]),
    "index-constant": _function(lambda x: x[:, _PICK]),
    "index-two-constants": _function(lambda x: x[:, :, _PICK, _PICK]),
    "index-select": _function(lambda x: x.index_select(3, _PICK)),
    "gather-constant": _function(lambda x: x.gather(1, _PICK.reshape(1, 4, 1, 1).expand(len(x), 4, 16, 16))),
    "roll": _function(lambda x: x.roll((3, -2), (2, 3))),
    "flip": _function(lambda x: x.flip((1, 3))),
    "expand": _function(lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1) * x[:, :4]),
    "repeat": _function(lambda x: x[:, :3].repeat(1, 2, 1, 2)),
    "repeat-interleave": _function(lambda x: x[:, :3].repeat_interleave(2, 1)),
    "permute": _function(lambda x: x.permute(0, 3, 1, 2).reshape(len(x), 32, 64).transpose(1, 2)),
    "squeeze": _function(lambda x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(1)),
    "diagonal": _function(lambda x: x.diagonal(dim1=2, dim2=3)),
    "moved-axes": _function(lambda x: torch.movedim(x, 1, -1).contiguous().view(len(x), -1, 8)),
    # arithmetic
    "power-and-root": _function(lambda x: x.abs().add(0.1).sqrt() + x**2 - 0.1 * x.pow(3)),
    "power-fraction": _function(lambda x: F.softplus(x) ** 0.7 + F.softplus(x).pow(-0.5)),
    "exponential": _function(lambda x: x.clamp(-2, 2).exp() + x.abs().log1p() + torch.expm1(-x.abs())),
    "logarithm": _function(lambda x: (x.square() + 1).log() + F.softplus(x).log2()),
    "sine-and-cosine": _function(lambda x: (2 * x).sin() + x.cos()),
    "arctangent": _function(lambda x: x.atan() + torch.erf(x)),
    "division": _function(lambda x: x / (1 + x.square()) + 1 / (2 + x.sigmoid())),
    "reciprocal-root": _function(lambda x: x * (x.square().mean(1, keepdim=True) + 1e-3).rsqrt()),
    "numbers": _function(lambda x: 3 - 2 * x + x / 4 - torch.rsub(x, 1, alpha=2)),
    "clamp": _function(lambda x: x.clamp(min=-0.3) + x.clamp(max=0.4) + x.clamp(-0.5, 0.6)),
    "minimum-and-maximum": _function(lambda x: torch.maximum(x, -0.3 * x) + torch.minimum(x, x.flip(1))),
    "where": _function(lambda x: torch.where(x > 0.1, x, 0.2 * x)),
    "comparison-mask": _function(lambda x: x * (x.abs() < 1).float()),
    "masked-fill": lambda: [WithBuffer(lambda x, mask: x.masked_fill(mask, -0.5), _MASK)],
    "lerp": _function(lambda x: torch.lerp(x, x.tanh(), 0.3)),
    "addcmul": _function(lambda x: torch.addcmul(x, x.sigmoid(), x.tanh(), value=0.5)),
    # reductions
    "sum": _function(lambda x: x.sum((1, 3))),
    "mean": _function(lambda x: x.mean(-1)),
    "maximum-along": _function(lambda x: x.max(2).values + x.min(3).values),
    "amin": _function(lambda x: x.amin(1)),
    "std-and-variance": _function(lambda x: torch.cat((x.std((2, 3)), x.var((2, 3), correction=0)), 1)),
    "log-sum-exp": _function(lambda x: x.logsumexp((2, 3))),
    "cumulative-sum": _function(lambda x: x.cumsum(2)),
    "norm": _function(lambda x: torch.cat((x.norm(dim=(2, 3)), x.norm(p=1, dim=(2, 3)) / 9), 1)),
    "norm-3": _function(lambda x: torch.linalg.vector_norm(x, 3, dim=1)),
    "normalize": _function(lambda x: F.normalize(x.flatten(2), dim=2)),
    "product": _function(lambda x: x[:, :, ::4, ::4].tanh().prod(1)),
    "cosine-similarity": _function(lambda x: F.cosine_similarity(x[:, :4], x[:, 4:], dim=1)),
    # products
    "matmul": _function(lambda x: x @ x.transpose(2, 3) / 16),
    "matmul-broadcast": lambda: [WithParameter(torch.matmul, 16, 5)],
    "matmul-vector": lambda: [WithParameter(torch.matmul, 16)],
    "bmm": _function(lambda x: torch.bmm(x[:, 0], x[:, 1]) / 4),
    "baddbmm": _function(lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=0.5, alpha=0.2)),
    "einsum": lambda: [WithParameter(lambda x, w: torch.einsum("bchw,ck->bkhw", x, w), 8, 6)],
    "einsum-gram": _function(lambda x: torch.einsum("bchw,bdhw->bcd", x, x) / 256),
    "outer": _function(lambda x: x.mean((2, 3))[:, :, None] * x.amax((2, 3))[:, None, :]),
    "distances": lambda: [
        WithParameter(lambda x, w: (x.flatten(2)[:, :, None] - w).square().mean(3).add(1e-3).sqrt(), 4, 256)
    ],
    # parameters and buffers
    "learnable-number": _one(Scale),
    "learnable-image": lambda: [WithParameter(lambda x, w: x + w, 1, 8, 16, 16)],
    "constant-buffer": lambda: [WithBuffer(lambda x, c: x * c, torch.linspace(-1, 1, 16))],
    "constant-buffer-not-persistent": lambda: [
        WithBuffer(lambda x, c: x + c, torch.linspace(0, 1, 8).reshape(8, 1, 1), persistent=False)
    ],
    "constant-in-forward": _function(lambda x: x * torch.arange(16) + torch.ones(8, 1, 1) + torch.eye(16)),
    "blur-pool": _one(BlurPool, 8),
    "coord-conv": _one(CoordConv, 8, 8, 16),
    "film": _one(Film, 8),
    "shared-module": _one(Shared, 8),
    "residual": lambda: [Add(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())],
    "tied-weights": lambda: [nn.Flatten(), Tied(2048, 12)],
}

# After a convolution to 8 channels, on windows of 24 steps.
ON_WINDOWS: dict[str, Layers] = {
    "conv1d": _one(nn.Conv1d, 8, 8, 5, stride=2),
    "conv1d-dilated": _one(nn.Conv1d, 8, 8, 3, dilation=4, padding=4),
    "conv1d-depthwise": _one(nn.Conv1d, 8, 8, 5, groups=8, padding="same"),
    "conv1d-even-same": _one(nn.Conv1d, 8, 8, 8, padding="same"),
    "conv1d-causal": lambda: [nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(8, 8, 3, dilation=2)],
    "conv1d-reflect": _one(nn.Conv1d, 8, 8, 5, padding=2, padding_mode="reflect"),
    "conv-transpose1d": _one(nn.ConvTranspose1d, 8, 6, 4, stride=2, padding=1),
    "max-pool1d": _one(nn.MaxPool1d, 3, 2, 1),
    "avg-pool1d": _one(nn.AvgPool1d, 3, 2, 1, count_include_pad=False),
    "lp-pool1d": lambda: [nn.Softplus(), nn.LPPool1d(2, 3, 2)],
    "adaptive-avg-pool1d": _one(nn.AdaptiveAvgPool1d, 7),
    "adaptive-max-pool1d": _one(nn.AdaptiveMaxPool1d, 5),
    "batch-norm1d": lambda: [nn.BatchNorm1d(8), nn.ReLU()],
    "batch-norm1d-without-affine": _one(nn.BatchNorm1d, 8, affine=False),
    "instance-norm1d": _one(nn.InstanceNorm1d, 8),
    "instance-norm1d-tracking": _one(nn.InstanceNorm1d, 8, affine=True, track_running_stats=True),
    "dropout1d": _one(nn.Dropout1d, 0.3),
    "upsample-linear": _one(nn.Upsample, scale_factor=2, mode="linear"),
    "upsample-nearest1d": _one(nn.Upsample, size=36),
    "replication-pad1d": _one(nn.ReplicationPad1d, (2, 1)),
    "sliding-windows": _function(lambda x: x.unfold(2, 6, 3).mean(3)),
    "differences": _function(lambda x: torch.diff(x, dim=2)),
    "lstm": lambda: [Recurrent(nn.LSTM(8, 12, batch_first=True))],
    "lstm-all-states": lambda: [Recurrent(nn.LSTM(8, 6, batch_first=True), last=False)],
    "lstm-projected": lambda: [Recurrent(nn.LSTM(8, 12, proj_size=5, batch_first=True))],
    "lstm-bidirectional": lambda: [
        Recurrent(nn.LSTM(8, 6, batch_first=True, bidirectional=True), last=False)
    ],
    "lstm-final-states": _one(FinalState, 8, 8),
    "gru": lambda: [Recurrent(nn.GRU(8, 12, batch_first=True))],
    "gru-two-layers": lambda: [Recurrent(nn.GRU(8, 8, num_layers=2, batch_first=True))],
    "gru-dropout": lambda: [Recurrent(nn.GRU(8, 8, num_layers=2, dropout=0.2, batch_first=True))],
    "gru-without-bias": lambda: [Recurrent(nn.GRU(8, 8, bias=False, batch_first=True))],
    "rnn-tanh": lambda: [Recurrent(nn.RNN(8, 12, batch_first=True))],
    "rnn-relu": lambda: [Recurrent(nn.RNN(8, 12, nonlinearity="relu", batch_first=True))],
    "lstm-cell": lambda: [Cells(nn.LSTMCell(8, 10), 10)],
    "gru-cell": lambda: [Cells(nn.GRUCell(8, 10), 10)],
}

# After a convolution to 4 channels, on volumes of 6 × 8 × 8.
ON_VOLUMES: dict[str, Layers] = {
    "conv3d": _one(nn.Conv3d, 4, 4, 3, stride=(1, 2, 2), padding=1),
    "conv3d-depthwise": _one(nn.Conv3d, 4, 4, 3, groups=4),
    "conv-transpose3d": _one(nn.ConvTranspose3d, 4, 3, 2, stride=2),
    "max-pool3d": _one(nn.MaxPool3d, (1, 2, 2)),
    "max-pool3d-overlapping": _one(nn.MaxPool3d, 3, 2, 1),
    "avg-pool3d": _one(nn.AvgPool3d, 2),
    "adaptive-avg-pool3d": _one(nn.AdaptiveAvgPool3d, (4, 3, 5)),
    "adaptive-max-pool3d": _one(nn.AdaptiveMaxPool3d, (1, 3, 1)),
    "batch-norm3d": lambda: [nn.BatchNorm3d(4), nn.ReLU()],
    "batch-norm3d-without-affine": _one(nn.BatchNorm3d, 4, affine=False),
    "instance-norm3d": _one(nn.InstanceNorm3d, 4, affine=True),
    "instance-norm3d-without-affine": _one(nn.InstanceNorm3d, 4),
    "dropout3d": _one(nn.Dropout3d, 0.3),
    "upsample-nearest3d": _one(nn.Upsample, scale_factor=2),
    "replication-pad3d": _one(nn.ReplicationPad3d, 1),
}

# On 12 token ids of a vocabulary of 50; those of TOKEN_VECTORS after an embedding of 16.
ON_TOKENS: dict[str, Layers] = {
    "embedding": _one(nn.Embedding, VOCABULARY, 6),
    "embedding-padding": lambda: [nn.Embedding(VOCABULARY, 8, padding_idx=0), Apply(lambda x: x.mean(1))],
    "embedding-tied": _one(TiedTokens, 12),
    "embedding-bag": _one(nn.EmbeddingBag, VOCABULARY, 12, mode="mean"),
    "one-hot": _function(lambda x: F.one_hot(x, VOCABULARY).float().mean(1)),
}
ON_TOKEN_VECTORS: dict[str, Layers] = {
    "position-buffer": lambda: [WithBuffer(lambda x, c: x + c, torch.linspace(0, 3, 12)[:, None].sin())],
    "layer-norm": _one(nn.LayerNorm, 16),
    "linear-tokens": lambda: [nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4, bias=False)],
    "multihead-attention": _one(Attention, 16, 4),
    "multihead-attention-dropout": _one(Attention, 16, 4, dropout=0.2),
    "multihead-attention-weights": _one(Attention, 16, 2, uses_weights=True, bias=False),
    "multihead-attention-other-sizes": _one(Attention, 16, 2, kdim=16, vdim=16, add_bias_kv=True),
    "scaled-dot-product": _one(ScaledDotProduct, 16, 4),
    "scaled-dot-product-causal": _one(ScaledDotProduct, 16, 2, causal=True),
    "scaled-dot-product-masked": _one(ScaledDotProduct, 16, 2, masked=True),
    "transformer-encoder-layer": _one(nn.TransformerEncoderLayer, 16, 4, 32, 0.0, batch_first=True),
    "transformer-encoder-layer-pre-norm": _one(
        nn.TransformerEncoderLayer, 16, 4, 32, 0.1, "gelu", norm_first=True, batch_first=True
    ),
    "softmax": _one(nn.Softmax, dim=-1),
    "bilinear": lambda: [Apply(lambda x: x.mean(1)), Add(nn.Linear(16, 16), nn.Tanh())],
}

ON_VECTORS: dict[str, Layers] = {
    "linear": lambda: [nn.Linear(10, 12), nn.ReLU()],
    "batch-norm1d-vectors": lambda: [nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU()],
    "layer-norm-vectors": lambda: [nn.Linear(10, 12), nn.LayerNorm(12), nn.SiLU()],
    "maxout": lambda: [Maxout(10, 12)],
    "highway": lambda: [nn.Linear(10, 12), Highway(12)],
    "weight-norm-linear": lambda: [parametrizations.weight_norm(nn.Linear(10, 12)), nn.Tanh()],
    "spectral-norm-linear": lambda: [parametrizations.spectral_norm(nn.Linear(10, 12)), nn.ReLU()],
    "self-normalizing": lambda: [nn.Linear(10, 12), nn.SELU(), nn.AlphaDropout(0.1), nn.Linear(12, 12)],
}


def _cosine_head() -> nn.Module:
    """A student whose output layer compares directions."""
    perception = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Student(perception, nn.Linear(32, LATENT_SIZE), Cosine(LATENT_SIZE, CLASSES))


def _frozen() -> nn.Module:
    """A student whose first layer is not trained, by requires_grad."""
    perception = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    perception[0].requires_grad_(False)
    return Student(perception, nn.Linear(392, LATENT_SIZE), nn.Linear(LATENT_SIZE, CLASSES))


def _after(stem: Callable[[], nn.Module], layers: Layers, shape: tuple[int, ...], dtype: str) -> Network:
    return network(lambda: [stem(), *layers()], shape, dtype)


_STEMS: tuple[tuple[dict[str, Layers], Callable[[], nn.Module], tuple[int, ...], str], ...] = (
    (ON_IMAGES, lambda: nn.Conv2d(3, 8, 3, padding=1), IMAGE, "float32"),
    (ON_WINDOWS, lambda: nn.Conv1d(4, 8, 3, padding=1), WINDOW, "float32"),
    (ON_VOLUMES, lambda: nn.Conv3d(2, 4, 3, padding=1), VOLUME, "float32"),
    (ON_TOKENS, nn.Identity, TOKENS, "int64"),
    (ON_TOKEN_VECTORS, lambda: nn.Embedding(VOCABULARY, 16), TOKENS, "int64"),
    (ON_VECTORS, nn.Identity, VECTOR, "float32"),
)
LAYERS: dict[str, Network] = {
    name: _after(stem, layers, shape, dtype)
    for table, stem, shape, dtype in _STEMS
    for name, layers in table.items()
} | {
    "cosine-head": Network(_cosine_head, IMAGE),
    "frozen-by-requires-grad": Network(_frozen, IMAGE),
    "max-pool2d-32": network(lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(32)], LARGE, "uint8"),
}
