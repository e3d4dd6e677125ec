"""The parts of a student, and the built-in architectures by their papers; those made for images of 224 × 224 leave out
their first two strides where there are fewer than 96 rows or columns, as is usual for CIFAR."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY = 4096
"""How many tokens a text network tells apart."""


class Student(nn.Module):
    """perception (inputs → features) → representation (→ latents [B, l]) → output (→ logits [B, K])."""

    def __init__(self, perception: nn.Module, representation: nn.Module, output: nn.Module):
        super().__init__()
        self.perception, self.representation, self.output = perception, representation, output

    def forward(self, *samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.representation(self.perception(*samples))
        return latents, self.output(latents)


@dataclass(frozen=True)
class StudentOptions:
    """What every built-in architecture is made from; `input_shape` (of one sample) and `widths` None mean its own."""

    input_shape: tuple[int, ...] | None = None
    latent_size: int = 128
    classes: int = 10
    widths: tuple[int, ...] | None = None
    normalization: str = "batch"  # batch, group, none


def with_head(perception: nn.Module, options: StudentOptions, dropout: float = 0.0) -> Student:
    """Representation and output layer behind any perception module, whose features are counted by a trial in eval."""
    latent, dtype = options.latent_size, torch.int64 if len(options.input_shape) == 1 else torch.float32
    features = perception.eval()(torch.zeros(1, *options.input_shape, dtype=dtype)).numel()
    layers = [nn.Flatten(), *[nn.Dropout(dropout)] * (dropout > 0), nn.Linear(features, latent)]
    return Student(perception.train(), nn.Sequential(*layers), nn.Linear(latent, options.classes))


def normalize(kind: str, channels: int, dimensions: int = 2) -> list[nn.Module]:
    """Batch normalization, group normalization in 8 groups where the channels allow it, or nothing."""
    if kind == "batch":
        return [(nn.BatchNorm1d if dimensions == 1 else nn.BatchNorm2d)(channels)]
    return [nn.GroupNorm(math.gcd(channels, 8), channels)] * (kind == "group")


def convolve(
    kind: str, inputs: int, width: int, size=1, stride=1, groups=1, then=nn.ReLU, padding=None, dimensions=2
) -> list[nn.Module]:
    """Convolution, with a bias only where no normalization follows → normalization → activation, if any."""
    layer, padding = nn.Conv1d if dimensions == 1 else nn.Conv2d, size // 2 if padding is None else padding
    convolution = layer(inputs, width, size, stride, padding, groups=groups, bias=kind == "none")
    return [convolution, *normalize(kind, width, dimensions), *([then()] if then else [])]


class Residual(nn.Module):
    """activation(body(x) + shortcut(x)), He et al. 2016."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module | None = None):
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def cnn(options: StudentOptions) -> Student:
    """Blocks of 3×3 convolution → ReLU → normalization, 2×2 max pooling in the first three."""
    blocks, (channels, *sides) = [], options.input_shape
    for i, width in enumerate(options.widths):
        block = [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            *normalize(options.normalization, width),
        ]
        if i < 3:  # along a side of one pixel nothing is pooled
            block.append(nn.MaxPool2d(tuple(min(2, side) for side in sides)))
            sides = [max(1, side // 2) for side in sides]
        blocks.append(nn.Sequential(*block))
        channels = width
    return with_head(nn.Sequential(*blocks), options)


def resnet(options: StudentOptions) -> Student:
    """Three stages of one residual block (for CIFAR, n = 1) or four of two blocks, global average pooling."""
    kind, channels, blocks = options.normalization, options.widths[0], 1 if len(options.widths) == 3 else 2
    large = blocks > 1 and min(options.input_shape[1:]) >= 96
    stem = convolve(kind, options.input_shape[0], channels, *((7, 2) if large else (3,)))
    stages: list[nn.Module] = [nn.Sequential(*stem, *[nn.MaxPool2d(3, 2, 1)] * large)]
    for i, width in enumerate(options.widths):
        for j in range(blocks):
            stride = 2 if i and not j else 1
            first = convolve(kind, channels, width, 3, stride)
            body = nn.Sequential(*first, *convolve(kind, width, width, 3, then=None))
            keeps = stride == 1 and channels == width
            shortcut = [] if keeps else convolve(kind, channels, width, 1, stride, then=None)
            stages.append(Residual(body, nn.Sequential(*shortcut)))
            channels = width
    return with_head(nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1)), options)


def _separable(options: StudentOptions, stem: list, widths: tuple, stride: int, then: type) -> Student:
    layers = [nn.Sequential(*stem)]
    for inputs, width in zip(widths, widths[1:], strict=False):
        depthwise = convolve(options.normalization, inputs, inputs, 3, stride, inputs, then)
        layers.append(nn.Sequential(*depthwise, *convolve(options.normalization, inputs, width, then=then)))
    return with_head(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), options)


def mobilenet_tiny(options: StudentOptions) -> Student:
    """Depthwise separable convolutions, stride 2 in three of them, ReLU6, global average pooling."""
    stem = convolve(options.normalization, options.input_shape[0], options.widths[0] // 2, 3, then=nn.ReLU6)
    return _separable(options, stem, (options.widths[0] // 2, *options.widths), 2, nn.ReLU6)


def ds_cnn(options: StudentOptions) -> Student:
    """A 10×4 convolution of stride 2 over time and frequency, then four depthwise separable ones."""
    widths = options.widths
    stem = convolve(options.normalization, options.input_shape[0], widths[0], (10, 4), 2, padding=(5, 1))
    return _separable(options, stem, widths, 1, nn.ReLU)


class Squeeze(nn.Sequential):
    """Squeeze-and-excitation (Hu et al. 2018): the input times what the layers make of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * super().forward(x)


def _inverted(options: StudentOptions, stages: tuple, last: int, then: type = nn.ReLU6) -> nn.Sequential:
    """Inverted residuals with linear bottlenecks, in stages of (kernel, stride, expansion of each block)."""
    kind, small, v3 = options.normalization, min(options.input_shape[1:]) < 96, then is nn.Hardswish
    channels = 16 if v3 else 32
    blocks = convolve(kind, options.input_shape[0], channels, 3, 1 if small else 2, then=then)
    for i, (width, (kernel, stride, *expansions)) in enumerate(zip(options.widths, stages, strict=True)):
        active = nn.ReLU if v3 and i < 2 else then
        stride, small = (1, False) if small and stride == 2 else (stride, small)
        for expansion in expansions:
            hidden = round(channels * expansion)
            block = convolve(kind, channels, hidden, then=active) if expansion != 1 else []
            block += convolve(kind, hidden, hidden, kernel, stride, hidden, active)
            if v3 and i != 1:
                fewer = 8 * math.ceil(hidden / 32)
                gate = (nn.Conv2d(hidden, fewer, 1), nn.ReLU(), nn.Conv2d(fewer, hidden, 1), nn.Hardsigmoid())
                block.append(Squeeze(nn.AdaptiveAvgPool2d(1), *gate))
            block = nn.Sequential(*block, *convolve(kind, hidden, width, then=None))
            keeps = stride == 1 and channels == width
            blocks.append(Residual(block, nn.Identity(), nn.Identity()) if keeps else block)
            channels, stride = width, 1
    return nn.Sequential(*blocks, *convolve(kind, channels, last, then=then), nn.AdaptiveAvgPool2d(1))


def mobilenet_v2(options: StudentOptions) -> Student:
    """Inverted residuals with linear bottlenecks, ReLU6."""
    more = ((3, 2, 6, 6), (3, 2, 6, 6, 6), (3, 2, 6, 6, 6, 6), (3, 1, 6, 6, 6), (3, 2, 6, 6, 6), (3, 1, 6))
    return with_head(_inverted(options, ((3, 1, 1), *more), 1280), options)


def mobilenet_v3_small(options: StudentOptions) -> Student:
    """Inverted residuals with squeeze-and-excitation in four of five stages, Hardswish in the last three, dropout."""
    stages = ((3, 2, 1), (3, 2, 4.5, 11 / 3), (5, 2, 4, 6, 6), (5, 1, 3, 3), (5, 2, 6, 6, 6))
    body = _inverted(options, stages, 6 * options.widths[-1], nn.Hardswish)
    hidden = nn.Conv2d(6 * options.widths[-1], 1024, 1)
    return with_head(nn.Sequential(*body, hidden, nn.Hardswish()), options, dropout=0.2)


def efficientnet_lite0(options: StudentOptions) -> Student:
    """Inverted residuals of 3×3 and 5×5 without squeeze-and-excitation, ReLU6, dropout."""
    more = ((3, 2, 6, 6), (5, 2, 6, 6), (3, 2, 6, 6, 6), (5, 1, 6, 6, 6), (5, 2, 6, 6, 6, 6), (3, 1, 6))
    return with_head(_inverted(options, ((3, 1, 1), *more), 1280), options, dropout=0.2)


class ShuffleUnit(nn.Module):
    """Split (at stride 2: copy), transform one or both halves, concatenate, shuffle the channels."""

    def __init__(self, kind: str, inputs: int, outputs: int, stride: int):
        super().__init__()
        half, self.parts = outputs // 2, 2 // stride
        left = convolve(kind, inputs, inputs, 3, 2, inputs, None) + convolve(kind, inputs, half)
        self.left = nn.Sequential(*left * (stride == 2))
        middle = convolve(kind, half, half, 3, stride, half, None)
        right = convolve(kind, inputs // self.parts, half) + middle + convolve(kind, half, half)
        self.right = nn.Sequential(*right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = x.chunk(self.parts, 1)
        joined = torch.cat((self.left(halves[0]), self.right(halves[-1])), 1)
        return joined.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def shufflenet_v2(options: StudentOptions) -> Student:
    """Stages of 4, 8 and 4 units that split, transform and shuffle the channels, global average pooling."""
    kind, channels, large = options.normalization, 24, min(options.input_shape[1:]) >= 96
    units = convolve(kind, options.input_shape[0], channels, 3, 1 + large) + [nn.MaxPool2d(3, 2, 1)] * large
    for width, repeats in zip(options.widths, (4, 8, 4), strict=True):
        units += [ShuffleUnit(kind, width if i else channels, width, 1 if i else 2) for i in range(repeats)]
        channels = width
    return with_head(nn.Sequential(*units, *convolve(kind, channels, 1024), nn.AdaptiveAvgPool2d(1)), options)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 × 7 → LayerNorm → 4 × wider GELU layer → layer scale, added to its input."""

    def __init__(self, width: int):
        super().__init__()
        mix = (nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))
        depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.body = nn.Sequential(depthwise, ChannelNorm(width, eps=1e-6), *mix)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.body(x)


def convnext_atto(options: StudentOptions) -> Student:
    """Patches of 4×4 (small images: 2×2), stages of 2, 2, 6 and 2 blocks of depthwise 7×7, LayerNorm, GELU."""
    channels, patch, layers = options.input_shape[0], 2 if min(options.input_shape[1:]) < 96 else 4, []
    for width, repeats in zip(options.widths, (2, 2, 6, 2), strict=True):
        pair = [
            nn.Conv2d(channels, width, patch, patch),
            ChannelNorm(channels if layers else width, eps=1e-6),
        ]
        layers += reversed(pair) if layers else pair
        layers += [ConvNeXtBlock(width) for _ in range(repeats)]
        channels, patch = width, 2
    layers += [nn.AdaptiveAvgPool2d(1), ChannelNorm(channels, eps=1e-6)]
    return with_head(nn.Sequential(*layers), options)


class Transformer(nn.Module):
    """Encoder layers (pre-norm, GELU) over embedded tokens behind a class token, whose output [B, width] it returns."""

    def __init__(self, embed: nn.Module, tokens: int, width: int, depth: int, head: int, dropout: float):
        super().__init__()
        form = (width, width // head, 4 * width, dropout, "gelu", 1e-6, True, True)
        self.embed, self.dropout = embed, nn.Dropout(dropout)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + tokens, width), std=0.02))
        layers = [nn.TransformerEncoderLayer(*form) for _ in range(depth)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width, eps=1e-6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(inputs)
        if tokens.dim() == 4:  # patches [B, width, H, W]
            tokens = tokens.flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(len(tokens), -1, -1), tokens), 1) + self.positions
        return self.layers(self.dropout(tokens))[:, 0]


def vit_tiny(options: StudentOptions) -> Student:
    """Patches, the largest up to 16×16 that cut the image in 7×7 or more, and twelve layers of attention."""
    (width,), (channels, *sides) = options.widths, options.input_shape
    patch = next((p for p in (16, 8, 4, 2) if all(n % p == 0 and n // p >= 7 for n in sides)), 1)
    tokens = (sides[0] // patch) * (sides[1] // patch)
    embed = nn.Conv2d(channels, width, patch, patch)
    return with_head(Transformer(embed, tokens, width, 12, 64, 0.0), options)


def text_attention(options: StudentOptions) -> Student:
    """Vectors of token ids and two layers of attention, dropout."""
    (width,), (length,) = options.widths, options.input_shape
    return with_head(Transformer(nn.Embedding(VOCABULARY, width), length, width, 2, 32, 0.1), options)


def cnn1d(options: StudentOptions) -> Student:
    """Three blocks of convolution over time → normalization → ReLU, global average pooling."""
    kind, channels, layers = options.normalization, options.input_shape[0], []
    for width, kernel in zip(options.widths, (8, 5, 3), strict=True):
        layers += convolve(kind, channels, width, kernel, dimensions=1)
        channels = width
    return with_head(nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1)), options)


class LastState(nn.GRU):
    """The last hidden state [B, width] of a GRU over windows [B, C, T]."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return super().forward(windows.permute(2, 0, 1))[0][-1]


def gru(options: StudentOptions) -> Student:
    """A convolution over time that shortens the window to a quarter (steps are unrolled), GRU, dropout."""
    kind, (first, second) = options.normalization, options.widths
    shorten = convolve(kind, options.input_shape[0], first, 8, 4, padding=2, dimensions=1)
    return with_head(nn.Sequential(*shorten, LastState(first, second)), options, dropout=0.5)
