"""Published architectures for images and volumes, at widths that train in milliseconds; each names its paper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.networks.layers import BlurPool, StochasticDepth
from tests.support.networks.network import LARGE, Add, Apply, Cat, Network, conv_bn, network

Layers = list[nn.Module]


def _global() -> Layers:
    return [nn.AdaptiveAvgPool2d(1)]


class ReLUAfter(nn.Module):
    """ReLU(body(x) + shortcut(x)) (He et al. 2016)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.sum = Add(body, shortcut=shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.sum(x))


class Gate(nn.Module):
    """The input times what a module makes of it."""

    def __init__(self, *gate: nn.Module):
        super().__init__()
        self.gate = nn.Sequential(*gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(x)


def squeeze_excitation(
    channels: int, ratio: int = 4, act: type = nn.ReLU, last: type = nn.Sigmoid
) -> nn.Module:
    """Channels weighted by their means (Hu et al. 2018)."""
    few = max(channels // ratio, 4)
    return Gate(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, few, 1), act(), nn.Conv2d(few, channels, 1), last()
    )


class EfficientChannels(nn.Module):
    """A convolution over the channels' means (Wang et al. 2020, ECA-Net)."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.convolution(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)
        return x * weights[:, :, :, None].expand_as(x)


class Cbam(nn.Module):
    """Attention to channels, then to places (Woo et al. 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, channels)
        )
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))[:, :, None, None]
        both = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True).values), 1)
        return x * self.place(both).sigmoid()


def basic(inputs: int, outputs: int, stride: int = 1, *extra: nn.Module, groups: int = 1) -> nn.Module:
    """The residual block of two 3 × 3 convolutions."""
    body = nn.Sequential(
        conv_bn(inputs, outputs, 3, stride, groups), conv_bn(outputs, outputs, 3, act=None), *extra
    )
    shortcut = None if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride, act=None)
    return ReLUAfter(body, shortcut)


def bottleneck(
    inputs: int, outputs: int, stride: int = 1, groups: int = 1, extra: Callable = nn.Identity
) -> nn.Module:
    """The residual block 1 × 1 → 3 × 3 (grouped) → 1 × 1."""
    hidden = outputs // 2
    body = nn.Sequential(
        conv_bn(inputs, hidden),
        conv_bn(hidden, hidden, 3, stride, groups),
        extra(),
        conv_bn(hidden, outputs, act=None),
    )
    shortcut = None if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride, act=None)
    return ReLUAfter(body, shortcut)


def stages(
    block: Callable[..., nn.Module], widths: tuple[int, ...], repeats: int = 1, **form: object
) -> Layers:
    """A stem and stages of a residual block, each but the first of stride 2, and the global mean."""
    layers, channels = [conv_bn(3, widths[0], 3)], widths[0]
    for i, width in enumerate(widths):
        for j in range(repeats):
            layers.append(block(channels, width, 2 if i and not j else 1, **form))
            channels = width
    return [*layers, *_global()]


def attentive(module: Callable[[int], nn.Module], inputs: int, outputs: int, stride: int) -> nn.Module:
    """A basic block with an attention at its end."""
    return basic(inputs, outputs, stride, module(outputs))


class PreActivation(nn.Module):
    """BatchNorm → ReLU → convolution, twice, the shortcut behind the first activation (He et al. 2016b)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        keeps = stride == 1 and inputs == outputs
        self.shortcut = None if keeps else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.first(x)
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


class Dense(nn.Module):
    """A layer that adds its channels to those it read (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.layer = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, self.layer(x)), 1)


def lenet() -> Layers:
    """LeCun et al. 1998."""
    pool = partial(nn.AvgPool2d, 2)
    return [
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        pool(),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        pool(),
        nn.Conv2d(16, 120, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.Tanh(),
    ]


def alexnet() -> Layers:
    """Krizhevsky et al. 2012, with local response normalization and dropout."""
    return [
        nn.Conv2d(3, 24, 5, padding=2),
        nn.ReLU(),
        nn.LocalResponseNorm(5, k=2),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 32, 5, padding=2, groups=2),
        nn.ReLU(),
        nn.LocalResponseNorm(5, k=2),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(432, 64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 64),
        nn.ReLU(),
    ]


def vgg11(norm: bool) -> Layers:
    """Simonyan and Zisserman 2015, configuration A."""
    layers, channels = [], 3
    for width in (8, 0, 16, 0, 32, 32, 0, 48, 48, 0, 48, 48, 0):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return [*layers, nn.Flatten(), nn.Linear(48, 48), nn.ReLU(), nn.Dropout(0.5)]


def nin() -> Layers:
    """Network in network (Lin et al. 2014)."""
    layers: Layers = []
    for inputs, width, size in ((3, 24, 5), (24, 24, 5), (24, 24, 3)):
        layers += [nn.Conv2d(inputs, width, size, padding=size // 2), nn.ReLU(), nn.Conv2d(width, width, 1)]
        layers += [nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(0.5)]
    return [*layers, *_global()]


def squeezenet() -> Layers:
    """Iandola et al. 2016."""

    def fire(inputs: int, squeeze: int, expand: int) -> nn.Module:
        left = nn.Sequential(nn.Conv2d(squeeze, expand, 1), nn.ReLU())
        right = nn.Sequential(nn.Conv2d(squeeze, expand, 3, padding=1), nn.ReLU())
        return nn.Sequential(nn.Conv2d(inputs, squeeze, 1), nn.ReLU(), Cat(left, right))

    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    stem = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), pool()]
    return [*stem, fire(16, 4, 16), fire(32, 4, 16), pool(), fire(32, 8, 24), nn.Dropout(0.5), *_global()]


def preactivation(widths: tuple[int, ...], repeats: int, dropout: float = 0.0) -> Layers:
    """Pre-activation ResNet (He et al. 2016b), Wide ResNet (Zagoruyko and Komodakis 2016)."""
    *layers, mean = stages(PreActivation, widths, repeats, dropout=dropout)
    layers[0] = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    return [*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(), mean]


def densenet() -> Layers:
    """Huang et al. 2017."""
    layers, channels = [nn.Conv2d(3, 12, 3, padding=1, bias=False)], 12
    for i in range(3):
        for _ in range(3):
            layers.append(Dense(channels, 6))
            channels += 6
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if i < 2:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return [*layers, *_global()]


def inception() -> Layers:
    """Szegedy et al. 2015."""

    def module(inputs: int) -> nn.Module:
        pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inputs, 4))
        five = nn.Sequential(conv_bn(inputs, 4), conv_bn(4, 4, 5))
        return Cat(conv_bn(inputs, 8), nn.Sequential(conv_bn(inputs, 8), conv_bn(8, 12, 3)), five, pool)

    return [
        conv_bn(3, 16, 3),
        nn.MaxPool2d(3, 2, 1),
        module(16),
        module(28),
        nn.MaxPool2d(3, 2, 1),
        module(28),
        *_global(),
    ]


def xception() -> Layers:
    """Chollet 2017."""

    def separable(inputs: int, outputs: int) -> nn.Module:
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        return nn.Sequential(depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def block(inputs: int, outputs: int) -> nn.Module:
        body = (
            nn.ReLU(),
            separable(inputs, outputs),
            nn.ReLU(),
            separable(outputs, outputs),
            nn.MaxPool2d(3, 2, 1),
        )
        return Add(*body, shortcut=conv_bn(inputs, outputs, 1, 2, act=None))

    return [conv_bn(3, 16, 3), block(16, 24), block(24, 32), nn.ReLU(), *_global()]


def mobilenet_v1() -> Layers:
    """Howard et al. 2017."""
    layers, channels = [conv_bn(3, 16, 3, 2)], 16
    for width, stride in ((24, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        layers += [conv_bn(channels, channels, 3, stride, channels), conv_bn(channels, width)]
        channels = width
    return [*layers, *_global()]


def mobile(
    rows: tuple[tuple[int, int, int, int], ...],
    act: type = nn.ReLU6,
    attention: Callable[[int], nn.Module] | None = None,
    skips: float = 0.0,
) -> Layers:
    """Inverted residuals (kernel, expansion, width, stride) of MobileNetV2/V3, MNASNet, EfficientNet, MCUNet."""
    layers, channels = [conv_bn(3, 12, 3, 2, act=act)], 12
    for size, expansion, width, stride in rows:
        hidden = channels * expansion
        body: Layers = [conv_bn(channels, hidden, act=act)] if expansion > 1 else []
        body += [
            conv_bn(hidden, hidden, size, stride, hidden, act),
            *([attention(hidden)] if attention else []),
        ]
        block = nn.Sequential(*body, conv_bn(hidden, width, act=None))
        if stride == 1 and width == channels:
            block = StochasticDepth(block, skips) if skips else Add(block)
        layers.append(block)
        channels = width
    return [*layers, conv_bn(channels, 64, act=act), *_global(), nn.Flatten(), nn.Dropout(0.2)]


_V2 = ((3, 1, 12, 1), (3, 4, 16, 2), (3, 4, 16, 1), (3, 4, 24, 2), (3, 4, 24, 1))
_MIXED = ((3, 1, 12, 1), (5, 3, 16, 2), (5, 3, 16, 1), (7, 4, 24, 2), (3, 4, 24, 1))


class Shuffle(nn.Module):
    """A unit of ShuffleNetV1: grouped 1 × 1 convolutions with a shuffle between (Zhang et al. 2018)."""

    def __init__(self, channels: int, stride: int, groups: int = 4):
        super().__init__()
        depthwise = conv_bn(channels, channels, 3, stride, channels, None)
        ends = (
            conv_bn(channels, channels, groups=groups),
            conv_bn(channels, channels, groups=groups, act=None),
        )
        self.body = nn.Sequential(ends[0], nn.ChannelShuffle(groups), depthwise, ends[1])
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1:
            return F.relu(x + self.body(x))
        return F.relu(torch.cat((F.avg_pool2d(x, 3, 2, 1), self.body(x)), 1))


class ShuffleV2(nn.Module):
    """A unit of ShuffleNetV2 of stride 1 (Ma et al. 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(
            conv_bn(half, half), conv_bn(half, half, 3, 1, half, None), conv_bn(half, half)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 1)
        joined = torch.cat((left, self.body(right)), 1)
        batch, channels, height, width = joined.shape
        return joined.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(joined.shape)


class Ghost(nn.Module):
    """Half the channels by a convolution, the others cheaply from them (Han et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, act: type | None = nn.ReLU):
        super().__init__()
        self.primary = conv_bn(inputs, outputs // 2, act=act)
        self.cheap = conv_bn(outputs // 2, outputs // 2, 3, 1, outputs // 2, act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        primary = self.primary(x)
        return torch.cat((primary, self.cheap(primary)), 1)


def ghostnet() -> Layers:
    """Han et al. 2020."""
    blocks = [
        Add(Ghost(24, 48), squeeze_excitation(48, last=nn.Hardsigmoid), Ghost(48, 24, None)) for _ in range(2)
    ]
    return [conv_bn(3, 16, 3, 2), Ghost(16, 24), blocks[0], nn.AvgPool2d(2), blocks[1], *_global()]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Liu et al. 2022: depthwise 7 × 7, LayerNorm, GELU, layer scale."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalization, channels last (Woo et al. 2023)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width) * 0.1), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        response = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return x + self.gamma * (x * response / (response.mean(-1, keepdim=True) + 1e-6)) + self.beta


class Mixer(nn.Module):
    """A block of MLP-Mixer (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class GatedMlp(nn.Module):
    """A block of gMLP: a gate that mixes tokens (Liu et al. 2021)."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.before, self.after = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.space = nn.Conv1d(tokens, tokens, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, v = F.gelu(self.before(self.norm(x))).chunk(2, -1)
        return x + self.after(u * self.space(self.inner(v)))


class Affine(nn.Module):
    """A scale and a shift a channel instead of a normalization (Touvron et al. 2021, ResMLP)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1, 1, width)), nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, self.scale, x)


class Patches(nn.Module):
    """Patches as tokens, with a class token or without, with learnt positions or without."""

    def __init__(self, width: int, patch: int, tokens: int, classes: int = 0, positions: bool = True):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.classes = nn.Parameter(torch.randn(1, classes, width) * 0.02) if classes else None
        self.positions = nn.Parameter(torch.randn(1, tokens + classes, width) * 0.02) if positions else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        if self.classes is not None:
            tokens = torch.cat((self.classes.expand(len(x), -1, -1), tokens), 1)
        return tokens if self.positions is None else tokens + self.positions


class WindowAttention(nn.Module):
    """Attention within windows, shifted by half of one or not, with relative positions (Liu et al. 2021, Swin)."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int):
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        place = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        apart = (place[:, :, None] - place[:, None, :]) + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        regions = torch.zeros(1, side, side, 1)
        if shift:
            regions[:, -shift:] += 1
            regions[:, :, -shift:] += 2
        region = self.cut(regions).squeeze(-1)
        apart = region[:, None, :] != region[:, :, None]
        self.register_buffer("mask", torch.zeros(apart.shape).masked_fill(apart, -100.0)[:, None])

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        count, w = self.side // self.window, self.window
        return x.reshape(-1, count, w, count, w, x.shape[-1]).transpose(2, 3).reshape(-1, w * w, x.shape[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        y = self.cut(torch.roll(self.norms[0](x), (-self.shift, -self.shift), (1, 2)))
        q, k, v = self.qkv(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        scores = scores + self.table[self.index.flatten()].unflatten(0, self.index.shape).permute(2, 0, 1)
        scores = scores.unflatten(0, (batch, -1)) + self.mask
        y = (scores.flatten(0, 1).softmax(-1) @ v).transpose(1, 2).flatten(2)
        count, w = self.side // self.window, self.window
        y = self.projection(y).reshape(batch, count, count, w, w, channels).transpose(2, 3)
        x = x + torch.roll(y.reshape(batch, height, width, channels), (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norms[1](x))


def swin() -> Layers:
    """Liu et al. 2021: two blocks of window attention, patches merged, two more."""
    first = [
        Apply(lambda x: x.permute(0, 2, 3, 1)),
        *(WindowAttention(24, 3, 8, 4, shift) for shift in (0, 2)),
    ]
    merge = Apply(
        lambda x: torch.cat((x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]), -1)
    )
    second = [nn.LayerNorm(96), nn.Linear(96, 32, bias=False), WindowAttention(32, 4, 4, 4, 0)]
    return [nn.Conv2d(3, 24, 4, 4), *first, merge, *second, nn.LayerNorm(32), Apply(lambda x: x.mean((1, 2)))]


def encoder(width: int, heads: int, depth: int, dropout: float = 0.0) -> Layers:
    """Pre-norm encoder layers with GELU."""
    form = {"activation": "gelu", "norm_first": True, "batch_first": True, "dropout": dropout}
    return [nn.TransformerEncoderLayer(width, heads, 2 * width, **form) for _ in range(depth)]


class ConvAttention(nn.Module):
    """Attention whose projections are depthwise convolutions (Wu et al. 2021, CvT)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(
            conv_bn(width, width, 3, stride, width, None) for stride in (1, 2, 2)
        )
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for p in self.projections)
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        return x + self.out(y.unflatten(2, x.shape[2:]))


class SequencePool(nn.Module):
    """Tokens weighted by a learnt attention (Hassani et al. 2021, CCT)."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.score(x).softmax(1).transpose(1, 2), x).squeeze(1)


class PoolFormer(nn.Module):
    """Average pooling in the place of attention (Yu et al. 2022)."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))
        self.scales = nn.Parameter(torch.full((2, width, 1, 1), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        x = x + self.scales[0] * (self.pool(y) - y)
        return x + self.scales[1] * self.mlp(self.norms[1](x))


class UNet(nn.Module):
    """Down and up again with skips, by bilinear upsampling (Ronneberger et al. 2015)."""

    def __init__(self, mode: str = "bilinear"):
        super().__init__()
        self.down = nn.ModuleList((conv_bn(3, 8, 3), conv_bn(8, 16, 3), conv_bn(16, 24, 3)))
        self.up = nn.ModuleList((conv_bn(24 + 16, 16, 3), conv_bn(16 + 8, 8, 3)))
        self.mode = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        y = self.down[2](F.max_pool2d(second, 2))
        for layer, skip in zip(self.up, (second, first), strict=True):
            larger = F.interpolate(y, scale_factor=2, mode=self.mode)
            y = layer(torch.cat((larger, skip), 1))
        return F.adaptive_avg_pool2d(y, 4)


def autoencoder() -> Layers:
    """A convolutional bottleneck and its transposed convolutions (Masci et al. 2011)."""
    down = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3, 2, 1, output_padding=1)]
    return [*down, *up, nn.Sigmoid(), nn.AvgPool2d(4)]


class Pyramid(nn.Module):
    """Maxima over grids of several sizes, side by side (He et al. 2014, SPP)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.adaptive_max_pool2d(x, size).flatten(1) for size in (4, 3, 2, 1)], 1)


class SelectiveKernel(nn.Module):
    """A softmax between branches of different kernels (Li et al. 2019, SKNet)."""

    def __init__(self, width: int):
        super().__init__()
        self.branches = nn.ModuleList((conv_bn(width, width, 3), conv_bn(width, width, 5)))
        self.squeeze, self.choose = nn.Linear(width, 8), nn.Linear(8, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([branch(x) for branch in self.branches], 1)
        scores = self.choose(F.relu(self.squeeze(both.sum(1).mean((2, 3))))).unflatten(1, (2, -1))
        return (both * scores.softmax(1)[..., None, None]).sum(1)


class NonLocal(nn.Module):
    """Every place attends to every other (Wang et al. 2018)."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(width, width // 2, 1) for _ in range(3))
        self.out = nn.Conv2d(width // 2, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        return x + self.out(torch.bmm(v, weights.transpose(1, 2)).view(len(x), -1, *x.shape[2:]))


class RepVgg(nn.Module):
    """3 × 3, 1 × 1 and identity, each with BatchNorm (Ding et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.three = conv_bn(inputs, outputs, 3, stride, act=None)
        self.one = conv_bn(inputs, outputs, 1, stride, act=None)
        self.same = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.three(x) + self.one(x)
        return F.relu(y if self.same is None else y + self.same(x))


class Res2(nn.Module):
    """Groups of channels that pass through one another in turn (Gao et al. 2019, Res2Net)."""

    def __init__(self, width: int, parts: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(conv_bn(width // parts, width // parts, 3) for _ in range(parts - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = x.chunk(len(self.layers) + 1, 1)
        done = [first]
        for layer, part in zip(self.layers, rest, strict=True):
            done.append(layer(part + done[-1]))
        return x + torch.cat(done, 1)


def c3d() -> Layers:
    """C3D (Tran et al. 2015)."""
    first = [nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2))]
    second = [nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)]
    return [*first, *second, nn.Flatten(), nn.Linear(16 * 2 * 4 * 4, 32), nn.ReLU(), nn.Dropout(0.5)]


def r2plus1d() -> Layers:
    """Space, then time (Tran et al. 2018)."""

    def pair(inputs: int, outputs: int, stride: int) -> nn.Module:
        space = nn.Conv3d(inputs, outputs, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        time = nn.Conv3d(outputs, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        norms = nn.BatchNorm3d(outputs), nn.BatchNorm3d(outputs)
        return nn.Sequential(space, norms[0], nn.ReLU(), time, norms[1], nn.ReLU())

    return [pair(3, 8, 1), Add(pair(8, 8, 1)), pair(8, 16, 2), nn.AdaptiveAvgPool3d(1)]


def first_token() -> nn.Module:
    return Apply(lambda x: x[:, 0])


def mean_token() -> nn.Module:
    return Apply(lambda x: x.mean(1))


ON_IMAGES: dict[str, Callable[[], Layers]] = {
    "alexnet": alexnet,
    "vgg11": lambda: vgg11(norm=False),
    "vgg11-batch-norm": lambda: vgg11(norm=True),
    "network-in-network": nin,
    "squeezenet": squeezenet,
    "resnet18": lambda: stages(basic, (8, 16, 24, 32), 2),
    "resnet20": lambda: stages(basic, (8, 16, 32), 3),
    "resnet-bottleneck": lambda: stages(bottleneck, (16, 32, 48)),
    "resnet-preactivation": lambda: preactivation((12, 24, 32), 1),
    "wide-resnet": lambda: preactivation((16, 32, 48), 1, dropout=0.3),
    "resnext": lambda: stages(bottleneck, (16, 32, 48), groups=4),
    "regnet-x": lambda: stages(bottleneck, (16, 32), 2, groups=2),
    "regnet-y": lambda: stages(
        lambda i, o, s: bottleneck(i, o, s, 2, lambda: squeeze_excitation(o // 2)), (16, 32), 2
    ),
    "se-resnet": lambda: stages(partial(attentive, squeeze_excitation), (8, 16, 24)),
    "cbam-resnet": lambda: stages(partial(attentive, Cbam), (8, 16, 24)),
    "eca-resnet": lambda: stages(partial(attentive, lambda width: EfficientChannels()), (8, 16, 24)),
    "stochastic-depth-resnet": lambda: [
        conv_bn(3, 12, 3, 2),
        StochasticDepth(conv_bn(12, 12, 3), 0.3),
        StochasticDepth(conv_bn(12, 12, 3), 0.5),
        *_global(),
    ],
    "densenet": densenet,
    "inception": inception,
    "xception": xception,
    "repvgg": lambda: [RepVgg(3, 12, 2), RepVgg(12, 12, 1), RepVgg(12, 24, 2), *_global()],
    "res2net": lambda: [conv_bn(3, 16, 3, 2), Res2(16), Res2(16), *_global()],
    "sknet": lambda: [conv_bn(3, 12, 3, 2), SelectiveKernel(12), *_global()],
    "non-local": lambda: [conv_bn(3, 12, 3, 2), nn.MaxPool2d(2), NonLocal(12), *_global()],
    "mobilenet-v1": mobilenet_v1,
    "mobilenet-v2": lambda: mobile(_V2),
    "mobilenet-v3": lambda: mobile(_V2, nn.Hardswish, partial(squeeze_excitation, last=nn.Hardsigmoid)),
    "mnasnet": lambda: mobile(_MIXED, nn.ReLU, squeeze_excitation),
    "mcunet": lambda: mobile(_MIXED),
    "efficientnet-b0": lambda: mobile(_MIXED, nn.SiLU, partial(squeeze_excitation, act=nn.SiLU), 0.2),
    "shufflenet-v1": lambda: [conv_bn(3, 16, 3, 2), Shuffle(16, 2), Shuffle(32, 1), *_global()],
    "shufflenet-v2": lambda: [conv_bn(3, 16, 3, 2), ShuffleV2(16), ShuffleV2(16), *_global()],
    "ghostnet": ghostnet,
    "convmixer": lambda: [
        nn.Conv2d(3, 24, 4, 4),
        nn.GELU(),
        nn.BatchNorm2d(24),
        Add(nn.Conv2d(24, 24, 5, groups=24, padding="same"), nn.GELU(), nn.BatchNorm2d(24)),
        nn.Conv2d(24, 24, 1),
        nn.GELU(),
        nn.BatchNorm2d(24),
        *_global(),
    ],
    "convnext": lambda: [
        nn.Conv2d(3, 16, 2, 2),
        ChannelNorm(16),
        ConvNeXt(16),
        ChannelNorm(16),
        nn.Conv2d(16, 24, 2, 2),
        ConvNeXt(24),
        *_global(),
        nn.Flatten(),
        nn.LayerNorm(24),
    ],
    "convnext-v2": lambda: [
        nn.Conv2d(3, 16, 4, 4),
        Apply(lambda x: x.permute(0, 2, 3, 1)),
        Add(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), ResponseNorm(64), nn.Linear(64, 16)),
        Apply(lambda x: x.mean((1, 2))),
    ],
    "replknet": lambda: [
        conv_bn(3, 12, 3, 2),
        Add(conv_bn(12, 12, 13, 1, 12, None), nn.GELU(), conv_bn(12, 12, act=None)),
        *_global(),
    ],
    "mlp-mixer": lambda: [
        Patches(24, 4, 64, positions=False),
        Mixer(64, 24),
        Mixer(64, 24),
        nn.LayerNorm(24),
        mean_token(),
    ],
    "gmlp": lambda: [Patches(24, 4, 64, positions=False), GatedMlp(64, 24), GatedMlp(64, 24), mean_token()],
    "resmlp": lambda: [
        Patches(24, 4, 64, positions=False),
        Affine(24),
        Mixer(64, 24),
        Affine(24),
        mean_token(),
    ],
    "vit": lambda: [Patches(24, 4, 64, 1), *encoder(24, 3, 2), nn.LayerNorm(24), first_token()],
    "deit": lambda: [
        Patches(24, 4, 64, 2),
        *encoder(24, 3, 2, 0.1),
        Apply(lambda x: (x[:, 0] + x[:, 1]) / 2),
    ],
    "swin": swin,
    "poolformer": lambda: [nn.Conv2d(3, 16, 7, 4, 2), PoolFormer(16), PoolFormer(16), *_global()],
    "cct": lambda: [
        nn.Conv2d(3, 24, 3, 1, 1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2),
        Apply(lambda x: x.flatten(2).transpose(1, 2)),
        *encoder(24, 2, 1),
        SequencePool(24),
    ],
    "cvt": lambda: [nn.Conv2d(3, 16, 7, 4, 2), ChannelNorm(16), ConvAttention(16, 2), *_global()],
    "coatnet": lambda: [
        conv_bn(3, 16, 3, 2, act=nn.GELU),
        Add(conv_bn(16, 32, act=nn.GELU), squeeze_excitation(32), conv_bn(32, 16, act=None)),
        nn.MaxPool2d(2),
        Apply(lambda x: x.flatten(2).transpose(1, 2)),
        *encoder(16, 2, 1),
        mean_token(),
    ],
    "unet": lambda: [UNet()],
    "unet-nearest": lambda: [UNet("nearest")],
    "autoencoder": autoencoder,
    "spatial-pyramid": lambda: [conv_bn(3, 8, 3), nn.MaxPool2d(2), conv_bn(8, 12, 3), Pyramid()],
    "anti-aliased": lambda: [conv_bn(3, 12, 3), BlurPool(12), conv_bn(12, 16, 3), BlurPool(16), *_global()],
    "espcn": lambda: [
        nn.Conv2d(3, 12, 5, 2, 2),
        nn.Tanh(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.PixelShuffle(2),
        nn.AvgPool2d(4),
    ],
    "all-convolutional": lambda: [
        nn.Dropout(0.2),
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, 2, 1),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Conv2d(12, 16, 3, 2, 1),
        nn.ReLU(),
        *_global(),
    ],
    "group-norm-resnet": lambda: [
        nn.Conv2d(3, 16, 3, 2, 1),
        Add(nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False)),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        *_global(),
    ],
}


PUBLISHED: dict[str, Network] = {
    name: network(layers, LARGE, "uint8", "published") for name, layers in ON_IMAGES.items()
} | {
    "lenet": network(lenet, (1, 28, 28), "uint8", "published"),
    "c3d": network(c3d, (3, 4, 16, 16), "float32", "published"),
    "r2plus1d": network(r2plus1d, (3, 4, 16, 16), "float32", "published"),
}
