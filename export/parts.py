"""How a student is called, from samples to latents and logits: part by part, or as an existing model is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from edgestill.runtime.errors import UsageError

PARTS = ("perception", "representation", "output")


class Parts(nn.Module):
    """Calls perception, representation and output one after the other: samples → (latents, logits).

    `resting` modules infer also while the others train.
    """

    def __init__(self, student: nn.Module, resting: Iterable[nn.Module] = ()):
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(student, name))
        self.resting = tuple(resting)

    def train(self, mode: bool = True) -> Parts:
        super().train(mode)
        for module in self.resting:
            module.eval()
        return self

    def forward(self, *samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.representation(self.perception(*samples))
        return latents, self.output(latents)


class SplitModel(Parts):
    """An existing model: its forward() gives the logits, the latents are what the module `output` is called with."""

    def __init__(self, model: nn.Module, output: str, resting: Iterable[nn.Module] = ()):
        nn.Module.__init__(self)
        self.student = model
        self.resting = tuple(resting)
        self.place = output

    def forward(self, *samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []
        module = self.student.get_submodule(self.place)
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.student(*samples)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise UsageError(
                f"--split: {self.place} is called {len(seen)} times, not once",
                hint="name the module that is called once, with the latent",
            )
        return seen[0], logits


def student_parts(
    student: nn.Module, split: Sequence[str] = (), resting: Iterable[nn.Module] = ()
) -> tuple[Parts, str]:
    """The module to call, and what begins the names of its state. Errors: UsageError where a part is missing.

    `split` names the modules of perception, representation and output in an existing model, in that order; the last one
    is called with the latent. Fewer than three: what lies before the last is perception and representation.
    """
    if split:
        names = [name for name, _ in student.named_modules() if name]
        for name in split:
            if name not in names:
                raise UsageError(
                    f"--split names {name!r}, which {type(student).__name__} has not",
                    hint="it has " + ", ".join([n for n in names if "." not in n] or names[:8]),
                )
        return SplitModel(student, split[-1], resting), "student."
    missing = [name for name in PARTS if not isinstance(getattr(student, name, None), nn.Module)]
    if missing:
        raise UsageError(
            f"the student {type(student).__name__} has no module {' and no '.join(missing)}",
            hint="give it `perception`, `representation` (ending in the latent) and `output` (latent to logits), or "
            "name them in it: --split features,head",
        )
    return Parts(student, resting), ""


def resting_norms(student: nn.Module, frozen: frozenset[str]) -> list[nn.Module]:
    """BatchNorms whose weight `--freeze` names: they keep and use their running statistics."""
    return [
        module
        for name, module in student.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen
    ]


def frozen_names(student: nn.Module, freeze: Sequence[str]) -> frozenset[str]:
    """Parameters named by `--freeze`: a module's path ("perception"), or its first n children ("perception:2")."""
    frozen: set[str] = set()
    for item in freeze:
        path, _, count = item.partition(":")
        try:
            module = student.get_submodule(path)
        except AttributeError as error:
            raise UsageError(
                f"--freeze {item}: the student has no module {path!r}",
                hint="name one of " + ", ".join(n for n, _ in student.named_children()),
            ) from error
        prefixes = [path]
        if count:
            children = [f"{path}.{name}" for name, _ in module.named_children()]
            if not count.isdigit() or not 0 < int(count) <= len(children):
                raise UsageError(
                    f"--freeze {item}: {path} has {len(children)} blocks", hint=f"--freeze {path}:1"
                )
            prefixes = children[: int(count)]
        names = {
            name
            for name, _ in student.named_parameters()
            if any(name.startswith(prefix + ".") for prefix in prefixes)
        }
        if not names:
            raise UsageError(
                f"--freeze {item} names no parameters", hint="--freeze perception, or perception:2"
            )
        frozen |= names
    frozen |= {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    if len(frozen) == len(dict(student.named_parameters())):
        raise UsageError(
            "nothing of the student is left to train", hint="freeze only a part, e.g. --freeze perception"
        )
    return frozenset(frozen)
