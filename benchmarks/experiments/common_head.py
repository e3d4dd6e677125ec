"""The built-in students with one output layer for all, to be frozen by `edgestill export --freeze output`.

Where every student classifies with the same fixed directions, latents of different students mean the same: they carry
the logits, and a global student that learns latents alone can classify. Sources: Hoffer et al. 2018, "Fix your
classifier"; Oh et al. 2022, "FedBABU".
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.experiments.simulated import WIDTH_DIVISOR
from benchmarks.simulation.students import WIDTHS
from export.student import ARCHITECTURES, Student, StudentOptions

_HEAD_SEED = 20_220_125


def _with_common_head(name: str) -> Callable[..., Student]:
    def build(latent_size: int, classes: int, input_shape: tuple[int, int, int]) -> Student:
        widths = tuple(width // WIDTH_DIVISOR for width in WIDTHS[name])
        student = ARCHITECTURES[name](StudentOptions(input_shape, latent_size, classes, widths))
        generator = torch.Generator().manual_seed(_HEAD_SEED)
        with torch.no_grad():
            # orthogonal rows of norm 1: no class lies nearer to another than any other does
            torch.nn.init.orthogonal_(student.output.weight, generator=generator)
            student.output.bias.zero_()
        return student

    return build


cnn3 = _with_common_head("cnn3")
cnn4 = _with_common_head("cnn4")
cnn5 = _with_common_head("cnn5")
