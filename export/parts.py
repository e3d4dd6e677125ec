"""How a student is called, from samples to latents and logits: part by part, or as an existing model is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from edgestill.export.students import Student
from edgestill.runtime.errors import UsageError

PARTS = ("perception", "representation", "output")
T = TypeVar("T")


class Parts(Student):
    """Calls perception, representation and output one after the other: samples → (latents, logits).

    `resting` modules infer also while the others train. `prefix` is what it puts before the student's own names.
    """

    prefix = ""

    def __init__(self, student: nn.Module, resting: Iterable[nn.Module] = ()):
        super().__init__(*(getattr(student, name) for name in PARTS))
        self.resting = tuple(resting)

    def own(self, named: Iterable[tuple[str, T]]) -> dict[str, T]:
        """What `named_parameters()` and the like give, by the student's own names."""
        return {name.removeprefix(self.prefix): one for name, one in named}

    def train(self, mode: bool = True) -> Parts:
        super().train(mode)
        for module in self.resting:
            module.eval()
        return self


class SplitModel(Parts):
    """An existing model: its forward() gives the logits, the latents are what the module `output` is called with."""

    prefix = "student."

    def __init__(self, model: nn.Module, output: str, resting: Iterable[nn.Module] = ()):
        nn.Module.__init__(self)
        self.student, self.place, self.resting = model, output, tuple(resting)

    def forward(self, *samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []
        module = self.student.get_submodule(self.place)
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:1]))
        try:
            logits = self.student(*samples)
        finally:
            handle.remove()
        if not isinstance(logits, torch.Tensor):
            raise UsageError(
                f"--split: {type(self.student).__name__} returns {type(logits).__name__}, not a tensor of logits",
                hint="wrap it in a module that returns the logits alone",
            )
        if len(seen) != 1:
            raise UsageError(
                f"--split: {self.place} is called {len(seen)} times, not once",
                hint="name the module that is called once, with the latent",
            )
        return seen[0], logits


def student_parts(student: nn.Module, split: Sequence[str] = (), freeze: Sequence[str] = ()) -> Parts:
    """The module to call. Errors: UsageError where a part is missing.

    `split` names the modules of perception, representation and output in an existing model, in that order; the last one
    is called with the latent. Fewer than three: what lies before the last is perception and representation.
    """
    resting = resting_norms(student, frozen_names(student, freeze)) if freeze else ()
    if split:
        names = [name for name, _ in student.named_modules() if name]
        for name in split:
            if name not in names:
                raise UsageError(
                    f"--split names {name!r}, which {type(student).__name__} has not",
                    hint="it has " + ", ".join([n for n in names if "." not in n] or names[:8]),
                )
        return SplitModel(student, split[-1], resting)
    missing = [name for name in PARTS if not isinstance(getattr(student, name, None), nn.Module)]
    if missing:
        raise UsageError(
            f"the student {type(student).__name__} has no module {' and no '.join(missing)}",
            hint="give it `perception`, `representation` (ending in the latent) and `output` (latent to logits), or "
            "name them in it: --split features,head",
        )
    return Parts(student, resting)


def resting_norms(student: nn.Module, frozen: frozenset[str]) -> list[nn.Module]:
    """BatchNorms whose weight `--freeze` names: they keep and use their running statistics."""
    norm = nn.modules.batchnorm._BatchNorm
    named = student.named_modules()
    return [module for name, module in named if isinstance(module, norm) and f"{name}.weight" in frozen]


def frozen_names(student: nn.Module, freeze: Sequence[str]) -> frozenset[str]:
    """Parameters named by `--freeze`: a module's path ("perception"), or its first n children ("perception:2")."""
    parameters = dict(student.named_parameters())
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    for item in freeze:
        path, _, count = item.partition(":")
        try:
            children = [f"{path}.{name}." for name, _ in student.get_submodule(path).named_children()]
        except AttributeError as error:
            known = ", ".join(name for name, _ in student.named_children())
            raise UsageError(
                f"--freeze {item}: the student has no module {path!r}", f"name one of {known}"
            ) from error
        if count and (not count.isdigit() or not 0 < int(count) <= len(children)):
            raise UsageError(f"--freeze {item}: {path} has {len(children)} blocks", hint=f"--freeze {path}:1")
        prefixes = tuple(children[: int(count)]) if count else f"{path}."
        names = {name for name in parameters if name.startswith(prefixes)}
        if not names:
            raise UsageError(
                f"--freeze {item} names no parameters", hint="--freeze perception, or perception:2"
            )
        frozen |= names
    if len(frozen) == len(parameters):
        hint = "freeze only a part, e.g. --freeze perception"
        raise UsageError("nothing of the student is left to train", hint)
    return frozenset(frozen)
