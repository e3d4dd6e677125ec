"""What docs/students.md says is refused is refused, in its words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from edgestill.export.exporter import ExportOptions, prepare_step
from edgestill.export.step.graphs import build_train_step
from edgestill.export.students import Student
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from edgestill.runtime.errors import EdgestillError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "students.md").read_text(encoding="utf-8")
TABLE = PAGE[PAGE.index("## What is refused") :]


class Does(nn.Module):
    """A linear layer, and what a function makes of it."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x))


class Detached(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


class Counted(Does):
    def __init__(self):
        super().__init__(lambda x: x)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return super().forward(x) * self.steps


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class WithForward(Student):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.representation(self.perception(x)).relu())


def _student(perception: nn.Module | None = None, kind: type[Student] = Student) -> Student:
    torch.manual_seed(0)
    return kind(perception or nn.Linear(6, 6), nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), nn.Linear(5, 4))


def _changed(change: Callable[[Student], object], perception: nn.Module | None = None) -> Student:
    student = _student(perception)
    change(student)
    return student


def _nan(student: Student) -> None:
    nn.init.constant_(student.output.weight, float("nan"))


def _called_twice() -> nn.Module:
    head = nn.Linear(5, 5)
    return nn.Sequential(nn.Linear(6, 5), head, head)


FLOAT = InputSpec((6,), "float32")
CASES: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "aten.sort": (lambda: _student(Does(lambda x: torch.sort(x)[0])), {}),
    "cannot trace": (lambda: _student(Does(lambda x: x if x.sum() > 0 else -x)), {}),
    "momentum=None": (lambda: _student(nn.BatchNorm1d(6, momentum=None)), {}),
    "more than 1 value": (lambda: _student(nn.BatchNorm1d(6)), {"batch": 1}),
    "autograd.Function": (lambda: _student(Does(Twice.apply)), {}),
    "backward hook": (lambda: _changed(lambda s: s.perception.weight.register_hook(lambda g: g)), {}),
    "buffer": (lambda: _student(Counted()), {}),
    "other logits": (lambda: _student(kind=WithForward), {}),
    "float64": (lambda: _changed(lambda s: s.output.double()), {}),
    "NaN": (lambda: _changed(_nan), {}),
    "does not enter": (lambda: _changed(lambda s: s.perception.add_module("extra", nn.Linear(2, 2))), {}),
    "loss does not depend": (lambda: _student(Detached(6, 6)), {}),
    "have shape": (
        lambda: Student(nn.Conv2d(1, 2, 1), nn.Linear(4, 5), nn.Linear(5, 4)),
        {"input": InputSpec((1, 4, 4), "float32")},
    ),
    "of torch.jit": (lambda: _student(torch.jit.script(nn.Linear(6, 6))), {}),
    "no module": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), {}),
    "has not": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), {"split": ("features", "head")}),
    "model calls": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), {"split": ("1", "0")}),
    "is called": (_called_twice, {"split": ("0", "1")}),
    "left to train": (_student, {"freeze": ("perception", "representation", "output")}),
    "are for uint8": (_student, {"input": InputSpec((6,), "float32", (0.5,) * 6, (0.2,) * 6)}),
    "numbers each": (_student, {"input": InputSpec((6,), "uint8", (127.0,) * 6, (60.0,) * 6)}),
}  # fmt: skip
"""By a few words of the message: a student and its options."""


def _messages() -> list[str]:
    return re.findall(r"\*([^*]+)\*", "\n".join(re.findall(r"^\|.*\| (.*) \|$", TABLE, re.MULTILINE)))


def _refusal(student: nn.Module, changes: dict) -> EdgestillError:
    given = {"latent_size": 5, "classes": 4, "batch": 3, "input": FLOAT, "objective": Objective("ce")} | changes
    with pytest.raises(EdgestillError) as caught:
        build_train_step(prepare_step(ExportOptions(student="plant.py:plant", **given), student))
    return caught.value


@pytest.mark.parametrize("words", CASES)
def test_a_refusal_of_the_page(words: str) -> None:
    (said,) = [message for message in _messages() if words in message]
    make, changes = CASES[words]
    error = _refusal(make(), changes)
    shown = re.sub(r"^(perception) \(\w+\)", r"\1", error.message)
    wanted = re.sub(r"^perception\.0: ", "perception: ", said).rstrip("…")
    assert wanted in shown and error.hint, f"{error.message}\n{error.hint}"


def test_the_page_says_no_other_message() -> None:
    assert [words for message in _messages() for words in CASES if words in message] == list(CASES)


def test_all_places_are_named_at_once() -> None:
    blocks = nn.Sequential(Does(lambda x: torch.sort(x)[0]), nn.RReLU(), Does(lambda x: torch.atan2(x, x)))
    error = _refusal(_student(blocks), {})
    assert "3 things in the student" in error.message
    assert re.findall(r"^  (\S+) ", error.message, re.MULTILINE) == ["perception.0", "perception.1", "perception.2"]
    shown = re.search(r"^edgestill: error: (.*)\nhint: (.*)$", PAGE, re.MULTILINE)
    assert shown[1] in error.message and shown[2] in error.message


def test_a_count_that_nothing_reads_is_no_matter() -> None:
    perception = Counted()
    perception.forward = lambda x, own=perception: (own.steps.add_(1), own.linear(x))[1]
    options = ExportOptions("", 5, 4, 3, input=FLOAT, objective=Objective("ce"))
    spec = prepare_step(options, _student(perception))
    assert "perception.steps" not in {one.name for one in spec.state_specs()}
