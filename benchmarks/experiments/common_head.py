"""The built-in students with one output layer for all, to be frozen by `edgestill export --freeze output`.

Where every student classifies with the same fixed directions, latents of different students mean the same: they carry
the logits, and a global student that learns latents alone can classify. Sources: Hoffer et al. 2018, "Fix your
classifier"; Oh et al. 2022, "FedBABU".
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgestill.export.students import ARCHITECTURES, Student, StudentOptions

WIDTHS = {"cnn3": (8, 16, 32), "cnn4": (8, 16, 32, 32), "cnn5": (8, 16, 32, 32, 64)}
"""A quarter of the built-in ones. In this file, for a cached bundle is found by what its student's file says."""
_HEAD_SEED = 20_220_125


def _with_common_head(name: str) -> Callable[..., Student]:
    def build(latent_size: int, classes: int, input_shape: tuple[int, int, int]) -> Student:
        student = ARCHITECTURES[name](StudentOptions(input_shape, latent_size, classes, WIDTHS[name]))
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
