"""How a student is called, from samples to latents and logits: part by part, or as an existing model is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import nn

from edgestill.export.students import Student
from edgestill.runtime.bundle.common_head import common_head
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

    def __call__(self, *samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Without checkpoints: they would run forward again while the gradient is computed, and draw noise again."""
        changed = {"CheckpointFunction": _Through, "_checkpoint_without_reentrant_generator": _once}
        with mock.patch.multiple(torch.utils.checkpoint, **changed):
            return super().__call__(*samples)

    def train(self, mode: bool = True) -> Parts:
        super().train(mode)
        for module in self.resting:
            module.eval()
        return self


class _Through:
    """In place of PyTorch's reentrant checkpoint, which has no gradient unless one of its inputs has one."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *inputs: Any) -> Any:
        with (
            nullcontext() if any(getattr(one, "requires_grad", False) for one in inputs) else torch.no_grad()
        ):
            return function(*inputs)


def _once(*_: Any, **__: Any) -> Iterator[None]:
    """In place of what PyTorch's other checkpoint does before and after the function: nothing."""
    yield


class SplitModel(Parts):
    """An existing model: its forward() gives the logits, the latents are what the last of `places` is called with.

    Modules are called in the order of `places`, one or more in each; else UsageError.
    """

    prefix = "student."

    def __init__(self, model: nn.Module, places: Sequence[str], resting: Iterable[nn.Module] = ()):
        nn.Module.__init__(self)
        self.student, self.places, self.resting = model, tuple(places), tuple(resting)

    def forward(self, *samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []
        ran: dict[str, None] = {}
        inside = [(name, m) for name in self.places for m in self.student.get_submodule(name).modules()]
        hooks = [m.register_forward_pre_hook(lambda *_, name=name: ran.setdefault(name)) for name, m in inside]
        last = self.student.get_submodule(self.places[-1])
        hooks.append(last.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:1])))
        try:
            logits = self.student(*samples)
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, torch.Tensor):
            raise UsageError(
                f"--split: {type(self.student).__name__} returns {type(logits).__name__}, not a tensor of logits",
                hint="wrap it in a module that returns the logits alone",
            )
        if tuple(ran) != self.places:
            missing, called = [name for name in self.places if name not in ran], ", ".join(ran) or "none of these"
            raise UsageError(
                f"--split names {', '.join(self.places)}, but the model calls {called}",
                hint=f"leave {' and '.join(missing)} out" if missing else f"--split {','.join(ran)}",
            )
        if len(seen) != 1:
            raise UsageError(
                f"--split: {self.places[-1]} is called {len(seen)} times, not once",
                hint="name the module that is called once, with the latent",
            )
        return seen[0], logits


def student_parts(student: nn.Module, split: Sequence[str] = (), freeze: Sequence[str] = ()) -> Parts:
    """The module to call. Errors: UsageError where a part is missing.

    `split` names the modules of perception, representation and output in an existing model, in the order in which it
    calls them; the last with the latent. Fewer than three: what lies before the last is perception and representation.
    """
    resting = resting_norms(student, frozen_names(student, freeze)) if freeze else ()
    if split:
        if len(split) > len(PARTS):
            message = f"--split names {len(split)} modules: {', '.join(split)}"
            raise UsageError(message, hint="name at most three: where perception, representation and output lie")
        names = [name for name, _ in student.named_modules() if name]
        for name in split:
            if name not in names:
                raise UsageError(
                    f"--split names {name!r}, which {type(student).__name__} has not",
                    hint="it has " + ", ".join([n for n in names if "." not in n] or names[:8]),
                )
        return SplitModel(student, split, resting)
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


def set_common_head(student: nn.Module, path: str) -> None:
    """Gives the output layer at `path` the weights of the common head, and a bias of zero where it has one.

    Errors: UsageError for an output that is not one linear layer, or of sizes that the common head cannot have.
    """
    layer = student.get_submodule(path)
    if type(layer) is not nn.Linear:
        raise UsageError(
            f"--common-head takes the place of one linear layer, and {path} is {type(layer).__name__}",
            hint="make the student's output layer nn.Linear(latent_size, classes), or leave --common-head out",
        )
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(common_head(layer.out_features, layer.in_features)))
        if layer.bias is not None:
            layer.bias.zero_()
