"""Students that export must refuse, each with what its message must be about."""

from __future__ import annotations

import math

import torch
from torch import nn

from edgestill.export.students import Student
from tests.support.networks.network import CLASSES, IMAGE, LATENT_SIZE, Refused


def _student(*layers: nn.Module, kind: type[Student] = Student) -> Student:
    """Layers behind a convolution to 4 × 8 × 8, then flatten to whatever size they leave."""
    perception = nn.Sequential(nn.Conv2d(3, 4, 2, 2), *layers, nn.Flatten())
    size = perception.eval()(torch.randn(2, *IMAGE)).shape[1]
    return kind(perception, nn.Linear(size, LATENT_SIZE), nn.Linear(LATENT_SIZE, CLASSES)).train()


class Branch(nn.Module):
    """Another function where the values say so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.mean() > 0 else x


class Mutation(nn.Module):
    """A weight that shrinks a little every time it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.mul_(0.99)
        return x * self.weight


class OwnForward(Student):
    """A student whose forward() is more than its three parts in turn."""

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, logits = super().forward(inputs)
        return latents, 2 * logits


class Counter(nn.Module):
    """A Python number that changes from call to call in training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return x * (1 + 1 / (1 + self.calls))


class Spectrum(nn.Module):
    """The real part of a Fourier transform."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft2(x).real


class Positive(nn.Module):
    """The mean of the positive values, however many there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.flatten()[x.flatten().nonzero()[:, 0]].mean()


class Distinct(nn.Module):
    """How many different values there are after rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.round().unique().numel()


class Unpool(nn.Module):
    """Maxima back at the places that they came from."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        return nn.functional.max_unpool2d(y, places, 2)


class Array(nn.Module):
    """A detour by NumPy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.detach().numpy().std())


class Unused(nn.Module):
    """A parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _nan_weights() -> nn.Module:
    student = _student(nn.ReLU())
    student.output.weight.data[0, 0] = math.nan
    return student


def _one_norm_twice() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return _student(norm, nn.ReLU(), norm)


def _latents_of_rank_3() -> nn.Module:
    perception = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2))
    return Student(perception, nn.Linear(64, LATENT_SIZE), nn.Linear(LATENT_SIZE, CLASSES))


REFUSED: dict[str, Refused] = {
    "data-dependent-branch": Refused(lambda: _student(Branch()), "a Python branch on tensor values"),
    "mutated-weight": Refused(lambda: _student(Mutation()), "a parameter that forward() changes in place"),
    "nan-weights": Refused(_nan_weights, "weights that are not finite"),
    "own-forward": Refused(
        lambda: _student(nn.ReLU(), kind=OwnForward), "forward() differs from the three parts"
    ),
    "python-counter": Refused(lambda: _student(Counter()), "training mode differs from what was captured"),
    "complex-numbers": Refused(lambda: _student(Spectrum()), "complex numbers"),
    "nonzero": Refused(lambda: _student(Positive()), "a shape that depends on the values"),
    "unique": Refused(lambda: _student(Distinct()), "a shape that depends on the values"),
    "max-unpool": Refused(lambda: _student(Unpool()), "an operator that is not supported"),
    "numpy": Refused(lambda: _student(Array()), "values that leave the graph"),
    "float64-weights": Refused(lambda: _student(nn.ReLU()).double(), "parameters that are not float32"),
    "unused-parameter": Refused(lambda: _student(Unused()), "a parameter that does not enter the outputs"),
    "one-norm-twice": Refused(_one_norm_twice, "a BatchNorm that normalises two activations"),
    "latents-of-rank-3": Refused(_latents_of_rank_3, "latents that are not [batch, size]"),
    "nothing-to-train": Refused(
        lambda: _student(nn.ReLU()).requires_grad_(False), "no parameter is left to be trained"
    ),
}
