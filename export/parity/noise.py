"""Eager PyTorch with given random numbers in place of its own: the same masks as a step that was given them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What PyTorch makes without being told a dtype is of this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class GivenNoise(TorchDispatchMode):
    """Random operators take the tensors of `noise`, uniform in [0, 1), in the order in which the student draws.

    With None it draws them itself and remembers them in `drawn`. Errors: ValueError where they do not fit. Where the
    default dtype is float64, what the student makes as float32 is float64, too.
    """

    def __init__(self, noise: Iterable[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.given = None if noise is None else iter(noise)
        self.drawn: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rule, kwargs = _RULES.get(func), kwargs or {}
        if torch.get_default_dtype() is torch.float64 and not func._schema.is_mutable:
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs) if rule is None else rule(self, *args, **kwargs)

    def uniform(self, shape) -> torch.Tensor:
        tensor = torch.rand(tuple(shape)) if self.given is None else next(self.given, None)
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"the student draws {list(shape)} where the step was given something else")
        self.drawn.append(tensor)
        return tensor

    def below(self, shape, p) -> torch.Tensor:
        """A mask, compared in float32 whatever the precision of `p`."""
        return self.uniform(shape).float() < (p.float() if isinstance(p, torch.Tensor) else p)

    def normal(self, shape) -> torch.Tensor:
        radius = ((1 - self.uniform(shape)).log() * -2).sqrt()
        return radius * (self.uniform(shape) * (2 * math.pi)).cos()

    def dropout(self, x, p, train=True):
        if not train or p in (0, 1):
            return x * (0 if train and p else 1), torch.full_like(x, not (train and p), dtype=torch.bool)
        keep = self.below(x.shape, 1 - p)
        return x * (keep.to(x.dtype) / (1 - p)), keep


def _widened(x):
    if x is torch.float32:
        return torch.float64
    return x.double() if isinstance(x, torch.Tensor) and x.dtype is torch.float32 else x


_RULES: dict[object, Callable] = {
    aten.native_dropout.default: GivenNoise.dropout,
    aten.bernoulli_.float: lambda n, x, p=0.5, **_: x.copy_(n.below(x.shape, p)),
    aten.bernoulli.p: lambda n, x, p=0.5, **_: n.below(x.shape, p).to(x.dtype),
    aten.bernoulli.default: lambda n, p, **_: n.below(p.shape, p).to(p.dtype),
    aten.uniform_.default: lambda n, x, low=0.0, high=1.0, **_: x.copy_(n.uniform(x.shape) * (high - low) + low),
    aten.rand_like.default: lambda n, x, **_: n.uniform(x.shape).to(x.dtype),
    aten.rand.default: lambda n, size, **_: n.uniform(size).to(torch.get_default_dtype()),
    aten.randn_like.default: lambda n, x, **_: n.normal(x.shape).to(x.dtype),
    aten.randn.default: lambda n, size, **_: n.normal(size).to(torch.get_default_dtype()),
    aten.normal_.default: lambda n, x, mean=0.0, std=1.0, **_: x.copy_(n.normal(x.shape) * std + mean),
    aten.exponential_.default: lambda n, x, rate=1.0, **_: x.copy_((1 - n.uniform(x.shape)).log() * (-1 / rate)),
}
