"""Random small students for property tests: every layer that can be lowered, in many geometries."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from edgestill.export.exporter import ExportOptions
from edgestill.export.kinks import find_near_kinks
from edgestill.export.objectives import Objective
from edgestill.export.reference import ReferenceStep
from edgestill.export.step import InputOptions, StepSpec
from edgestill.export.student import Residual, Student
from tests.support.export_oracle import NUMBERS

OBJECTIVES = (
    Objective("ce"),
    Objective("kd", "mse"),
    Objective("kd", "kl"),
    Objective("lkd"),
    Objective("both", "mse"),
    Objective("both", "kl"),
    Objective("crd", negatives=7, features=6, teacher_latent_size=3),
    Objective("lpd"),
)
LATENT_SIZE, CLASSES = 5, 4


@dataclass(frozen=True)
class Case:
    """A student, the options that it is lowered with, and the seed of its weights and data."""

    student: nn.Module
    options: ExportOptions
    seed: int

    def __repr__(self) -> str:
        o = self.options
        return (
            f"seed {self.seed}, batch {o.batch} of {o.input.shape}, {o.objective}: {self.student.perception}"
        )


@st.composite
def cases(draw: st.DrawFn, blocks: int = 3) -> Case:
    """One to `blocks` blocks on float32 images, then flatten and two linear layers."""
    batch = draw(st.integers(2, 6))
    channels = draw(st.integers(1, 6))
    size = (draw(st.integers(4, 13)), draw(st.integers(4, 13)))
    shape = (channels, *size)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, blocks))):
        block, channels, size = draw(_blocks(batch, channels, size))
        layers += block
    seed = draw(st.integers(0, 2**20))
    student = Student(
        nn.Sequential(*layers),
        nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], LATENT_SIZE)),
        nn.Linear(LATENT_SIZE, CLASSES),
    )
    randomise(student, seed)
    options = ExportOptions(
        latent_size=LATENT_SIZE,
        classes=CLASSES,
        batch=batch,
        input=InputOptions(shape, "float32"),
        objective=draw(st.sampled_from(OBJECTIVES)),
    )
    return Case(student, options, seed)


Block = tuple[list[nn.Module], int, tuple[int, int]]


@st.composite
def _blocks(draw: st.DrawFn, batch: int, channels: int, size: tuple[int, int]) -> Block:
    kind = draw(st.sampled_from(("convolution", "convolution", "depthwise", "grouped", "pool", "residual")))
    if kind == "pool":
        return draw(_pools(channels, size))
    if kind == "residual":
        outputs = draw(st.sampled_from((channels, channels + 1)))
        main = nn.Sequential(nn.Conv2d(channels, outputs, 3, padding=1), *draw(_follow(batch, outputs, size)))
        shortcut = nn.Identity() if outputs == channels else nn.Conv2d(channels, outputs, 1)
        return [Residual(main, shortcut)], outputs, size
    groups = 1
    if kind == "depthwise":
        groups = channels
    elif kind == "grouped":
        groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 3 if groups > 1 else 7))
    kernel, stride, dilation, padding = [], [], [], []
    for length in size:
        k, d = draw(st.integers(1, 4)), draw(st.sampled_from((1, 1, 2)))
        p = draw(st.integers(0, k))
        if d * (k - 1) + 1 > length + 2 * p:
            k = d = 1
        for chosen, value in zip(
            (kernel, stride, dilation, padding), (k, draw(st.integers(1, 3)), d, p), strict=True
        ):
            chosen.append(value)
    size = tuple(
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    convolution = nn.Conv2d(
        channels,
        outputs,
        tuple(kernel),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        draw(st.booleans()),
    )
    return [convolution, *draw(_follow(batch, outputs, size))], outputs, size


@st.composite
def _follow(draw: st.DrawFn, batch: int, channels: int, size: tuple[int, int]) -> list[nn.Module]:
    """Normalization and activation in either order."""
    pixels = size[0] * size[1]
    norms: list[list[nn.Module]] = [[]]
    # A normalization of a handful of values has gradients that cancel to nothing but rounding.
    if batch * pixels >= 16:
        norms.append([nn.BatchNorm2d(channels, momentum=draw(st.sampled_from((0.1, 0.3))))])
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    if channels // groups * pixels >= 8:
        norms.append([nn.GroupNorm(groups, channels)])
    norm = draw(st.sampled_from(norms))
    activation = draw(st.sampled_from(((nn.ReLU,), (nn.ReLU6,), (nn.Hardswish,), ())))
    return draw(st.permutations([*norm, *(kind() for kind in activation)]))


@st.composite
def _pools(draw: st.DrawFn, channels: int, size: tuple[int, int]) -> Block:
    kind = draw(st.sampled_from(("max", "average", "adaptive")))
    if kind == "adaptive":
        wanted = tuple(draw(st.sampled_from([s for s in range(1, n + 1) if n % s == 0])) for n in size)
        return [nn.AdaptiveAvgPool2d(wanted)], channels, wanted
    dilation = draw(st.sampled_from((1, 1, 2))) if kind == "max" else 1
    kernel, stride, padding = [], [], []
    for length in size:
        k = draw(st.integers(1, 3))
        p = draw(st.integers(0, k // 2))
        if dilation * (k - 1) + 1 > length + 2 * p:
            k, p = 1, 0
        kernel.append(k)
        stride.append(draw(st.integers(1, 3)))
        padding.append(p)
    size = tuple(
        (size[i] + 2 * padding[i] - dilation * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    window = (tuple(kernel), tuple(stride), tuple(padding))
    pool = nn.MaxPool2d(*window, dilation=dilation) if kind == "max" else nn.AvgPool2d(*window)
    return [pool], channels, size


def randomise(student: nn.Module, seed: int) -> None:
    """Random weights, normalization factors of both signs and running statistics: none is 0 or 1 by accident."""
    torch.manual_seed(seed)
    for module in student.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            with torch.no_grad():
                module.weight *= torch.randint(0, 2, module.weight.shape) * 2 - 1
            nn.init.normal_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)


def is_well_posed(student: nn.Module, spec: StepSpec, images: np.ndarray) -> bool:
    """Whether float32 is enough for the gradients: no activation lies so near a ReLU's zero or a tie of a pooling
    window that rounding decides, no normalization blows up a channel that is all but constant, and no pooling window
    holds padding alone, of which PyTorch makes minus infinity."""
    bundle = SimpleNamespace(
        optimizer=spec.optimizer,
        input=spec.input,
        objective=spec.objective,
        state_specs=[SimpleNamespace(**given) for given in spec.state_specs()],
        initial_state=spec.initial_state,
    )
    spreads: list[torch.Tensor] = []

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (x,) = inputs
        of_batch = isinstance(module, nn.BatchNorm2d)
        rows = x.transpose(0, 1).flatten(1) if of_batch else x.reshape(len(x) * module.num_groups, -1)
        spreads.append(rows.std(1))

    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    hooks = [module.register_forward_pre_hook(watch) for module in norms]
    try:
        step = ReferenceStep(bundle, student, NUMBERS)
        kinks = find_near_kinks(step, images)
    finally:
        for hook in hooks:
            hook.remove()
    finite = all(np.isfinite(values).all() for values in step.encode(images))
    return finite and not kinks and not any(((std > 0) & (std < 0.02)).any() for std in spreads)
