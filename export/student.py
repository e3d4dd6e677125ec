"""Student architectures: perception module, representation layer, output layer."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgestill.runtime.errors import UsageError


class Student(nn.Module):
    """perception (images → features) → representation (→ latents [B, l]) → output (→ logits [B, K])."""

    def __init__(self, perception: nn.Module, representation: nn.Module, output: nn.Module):
        super().__init__()
        self.perception = perception
        self.representation = representation
        self.output = output

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.representation(self.perception(images))
        return latents, self.output(latents)


@dataclass(frozen=True)
class StudentOptions:
    """What every built-in architecture is made from; `widths` None means the architecture's own."""

    input_shape: tuple[int, int, int] = (3, 32, 32)
    latent_size: int = 128
    classes: int = 10
    widths: tuple[int, ...] | None = None
    normalization: str = "batch"  # batch, group, none


def _normalization(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
        return [nn.GroupNorm(groups, channels)]
    return []


def _with_head(perception: nn.Module, options: StudentOptions) -> Student:
    was_training = perception.training
    with torch.no_grad():
        features = perception.eval()(torch.zeros(1, *options.input_shape)).numel()
    perception.train(was_training)
    representation = nn.Sequential(nn.Flatten(), nn.Linear(features, options.latent_size))
    return Student(perception, representation, nn.Linear(options.latent_size, options.classes))


def _cnn(default_widths: tuple[int, ...]) -> Callable[[StudentOptions], Student]:
    """Blocks of convolution → ReLU → BatchNorm, pooling in the first three (where the image is still large enough)."""

    def build(options: StudentOptions) -> Student:
        widths = options.widths or default_widths
        if len(widths) != len(default_widths):
            raise UsageError(
                f"cnn{len(default_widths)} has {len(default_widths)} blocks but --widths gives {widths}",
                hint=f"--widths {','.join(map(str, default_widths))}",
            )
        channels, height, width = options.input_shape
        blocks = []
        for i, wanted in enumerate(widths):
            block = [
                nn.Conv2d(channels, wanted, 3, padding=1),
                nn.ReLU(),
                *_normalization(options.normalization, wanted),
            ]
            if i < 3:
                kernel = (2 if height > 1 else 1, 2 if width > 1 else 1)
                block.append(nn.MaxPool2d(kernel))
                height, width = height // kernel[0], width // kernel[1]
            blocks.append(nn.Sequential(*block))
            channels = wanted
        return _with_head(nn.Sequential(*blocks), options)

    return build


class Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)), He et al. 2016."""

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def _resnet8(options: StudentOptions) -> Student:
    """Three residual stages of one block each (He et al. 2016, CIFAR variant with n = 1), global average pooling."""
    widths = _three_widths("resnet8", options, (16, 32, 64))
    kind, bias = options.normalization, options.normalization == "none"
    channels = options.input_shape[0]
    stages: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=bias),
            *_normalization(kind, widths[0]),
            nn.ReLU(),
        )
    ]
    channels = widths[0]
    for i, width in enumerate(widths):
        stride = 1 if i == 0 else 2
        body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=bias),
            *_normalization(kind, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=bias),
            *_normalization(kind, width),
        )
        shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=bias), *_normalization(kind, width)
            )
        stages.append(Residual(body, shortcut))
        channels = width
    stages.append(nn.AdaptiveAvgPool2d(1))
    return _with_head(nn.Sequential(*stages), options)


def _mobilenet_tiny(options: StudentOptions) -> Student:
    """Depthwise separable convolutions (Howard et al. 2017), stride 2 in three, ReLU6, global average pooling."""
    widths = _three_widths("mobilenet-tiny", options, (32, 64, 128))
    kind, bias = options.normalization, options.normalization == "none"

    def convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        return [layer, *_normalization(kind, outputs), nn.ReLU6()]

    channels = widths[0] // 2
    stages = [nn.Sequential(*convolution(options.input_shape[0], channels, 3, 1))]
    for width in widths:
        stages.append(
            nn.Sequential(
                *convolution(channels, channels, 3, 2, groups=channels), *convolution(channels, width, 1, 1)
            )
        )
        channels = width
    stages.append(nn.AdaptiveAvgPool2d(1))
    return _with_head(nn.Sequential(*stages), options)


def _three_widths(name: str, options: StudentOptions, default: tuple[int, ...]) -> tuple[int, ...]:
    widths = options.widths or default
    if len(widths) != 3:
        raise UsageError(
            f"{name} has 3 stages but --widths gives {widths}", hint=f"--widths {','.join(map(str, default))}"
        )
    return widths


ARCHITECTURES: dict[str, Callable[[StudentOptions], Student]] = {
    "cnn3": _cnn((32, 64, 128)),
    "cnn4": _cnn((32, 64, 128, 128)),
    "cnn5": _cnn((32, 64, 128, 128, 256)),
    "resnet8": _resnet8,
    "mobilenet-tiny": _mobilenet_tiny,
}


def build_student(name: str, options: StudentOptions, seed: int = 0) -> nn.Module:
    """A built-in architecture by name, or the user's own by `package.module:factory` or `file.py:factory`.

    A factory may take any of `latent_size`, `classes`, `input_shape` as keywords; it returns a module with
    `perception`, `representation` and `output`. Initial weights follow `seed`.
    """
    torch.manual_seed(seed)
    if ":" not in name:
        if name not in ARCHITECTURES:
            raise UsageError(
                f"no student is called {name!r}",
                hint=f"use one of {', '.join(ARCHITECTURES)}, or your own as package.module:factory",
            )
        if options.normalization not in ("batch", "group", "none"):
            raise UsageError(f"normalization {options.normalization!r}", hint="use batch, group or none")
        return ARCHITECTURES[name](options)
    if options.widths is not None or options.normalization != "batch":
        raise UsageError(
            f"--widths and --normalization belong to the built-in students, not to {name}",
            hint="leave them out and let your factory choose",
        )
    factory = _find_factory(name)
    given = {
        "latent_size": options.latent_size,
        "classes": options.classes,
        "input_shape": options.input_shape,
    }
    try:
        signature = inspect.signature(factory).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
        student = factory(**{key: value for key, value in given.items() if anything or key in signature})
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"the factory {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(student, nn.Module):
        raise UsageError(f"the factory {name} returned {type(student).__name__}, not a torch.nn.Module")
    return student


def _find_factory(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.rpartition(":")
    hint = "write package.module:factory (importable from here) or path/to/file.py:factory"
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise UsageError(f"no file {module_name}", hint=hint)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path:  # an installed script does not see the user's folder otherwise
                sys.path.insert(0, "")
            module = importlib.import_module(module_name)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"cannot import {module_name}: {type(error).__name__}: {error}", hint=hint
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UsageError(f"{module_name} has no callable {attribute!r}", hint=hint)
    return factory
