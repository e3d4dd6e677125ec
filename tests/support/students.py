"""A factory of a student that a name finds."""

from __future__ import annotations

from edgestill.export.students import ARCHITECTURES, Student, StudentOptions


def small(latent_size: int, classes: int, input_shape: tuple[int, ...]) -> Student:
    """A narrow `cnn3`, with weights of torch's generator as it stands."""
    return ARCHITECTURES["cnn3"](StudentOptions(input_shape, latent_size, classes, (4, 4, 4)))
