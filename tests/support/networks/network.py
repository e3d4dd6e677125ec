"""What a network of the corpus is, and how a perception module becomes a small student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from edgestill.export.students import Student

LATENT_SIZE, CLASSES, VOCABULARY = 16, 5, 50
IMAGE, LARGE, WINDOW, VOLUME, TOKENS, VECTOR = (3, 16, 16), (3, 32, 32), (4, 24), (2, 6, 8, 8), (12,), (10,)


@dataclass(frozen=True)
class Network:
    """A student of the corpus; `build` follows torch's seed as it stands."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"  # uint8, float32, int64
    kind: str = "layer"  # layer, published

    def example(self, batch: int = 8, seed: int = 0) -> torch.Tensor:
        """Inputs as the student sees them: token ids below VOCABULARY, or numbers of mean 0 and deviation 1."""
        random = torch.Generator().manual_seed(seed)
        if self.input_dtype == "int64":
            return torch.randint(0, VOCABULARY, (batch, *self.input_shape), generator=random)
        return torch.randn(batch, *self.input_shape, generator=random)


@dataclass(frozen=True)
class Refused:
    """A student that export must refuse, and what its message must be about."""

    build: Callable[[], nn.Module]
    reason: str
    input_shape: tuple[int, ...] = IMAGE
    input_dtype: str = "float32"


class Apply(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


class Add(nn.Module):
    """body(x) + shortcut(x)."""

    def __init__(self, *body: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


class Cat(nn.Module):
    """What each branch makes of the input, side by side in the channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def conv_bn(
    inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU
) -> nn.Sequential:
    """Convolution → BatchNorm → activation, if any."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), *([act()] if act else []))


def student(*perception: nn.Module, network: Network, representation: tuple[nn.Module, ...] = ()) -> Student:
    """Perception, flatten, what else comes before the latent, a latent of 16, 5 classes."""
    trunk = perception[0] if len(perception) == 1 else nn.Sequential(*perception)
    features = nn.Sequential(trunk, nn.Flatten(), *representation).eval()(network.example(2)).shape[1]
    head = nn.Sequential(nn.Flatten(), *representation, nn.Linear(features, LATENT_SIZE))
    return Student(trunk, head, nn.Linear(LATENT_SIZE, CLASSES)).train()


def network(
    layers: Callable[[], list[nn.Module]], shape: tuple[int, ...], dtype: str = "float32", kind: str = "layer"
) -> Network:
    """The student whose perception module is these layers in turn."""
    data = Network(lambda: None, shape, dtype, kind)
    return Network(lambda: student(*layers(), network=data), shape, dtype, kind)
