"""What cannot be lowered, or makes no sense, is refused with the place, the reason and what to do instead."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgestill.export.exporter import ExportOptions, export_bundle, prepare_step
from edgestill.export.lowering.graph import LoweringError
from edgestill.export.students import Student
from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.errors import UsageError
from tests.support.export_oracle import prepare

OPTIONS = ExportOptions(latent_size=6, classes=4, batch=4, input=InputSpec((3, 8, 8)))


def student_with(*layers: nn.Module, features: int = 4 * 8 * 8) -> Student:
    """A convolution to 4 channels of 8×8, then the layers, then linear layers from `features`."""
    return Student(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers),
        nn.Sequential(nn.Flatten(), nn.Linear(features, 6)),
        nn.Linear(6, 4),
    )


def test_a_student_that_images_do_not_fit() -> None:
    with pytest.raises(LoweringError, match=r"cannot trace the student on images \[4, 3, 10, 10\]") as error:
        prepare(replace(OPTIONS, input=InputSpec((3, 10, 10))), student_with())
    assert "--input-shape" in error.value.hint


def test_latents_that_are_not_rows() -> None:
    student = Student(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(144, 4)))
    with pytest.raises(
        LoweringError, match=r"latents of `representation` have shape \[4, 4, 6, 6\]"
    ) as error:
        prepare(OPTIONS, student)
    assert "nn.Flatten()" in error.value.hint


def test_nothing_is_written_of_a_student_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one_value.py").write_text(
        "from torch import nn\nfrom edgestill.export.students import Student\n"
        "def build():\n"
        "    head = nn.Sequential(nn.Flatten(), nn.Linear(4, 6))\n"
        "    return Student(nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)), head, nn.Linear(6, 4))\n"
    )
    name = f"{tmp_path / 'one_value.py'}:build"
    options = replace(OPTIONS, student=name, batch=1, engines=("onnxruntime",))
    with pytest.raises(LoweringError) as error:
        export_bundle(options, tmp_path / "bundle")
    assert error.value.hint and error.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py" and path.name[0] != "_"] == []


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"latent_size": 7}, "latents have size 6, not 7", "--latent-size 6"),
        ({"classes": 9}, "logits have size 4, not 9", "--classes 4"),
        ({"classes": 1}, "--classes must be at least 2", None),
        ({"batch": 0}, "--batch must be at least 1", None),
        ({"latent_size": -1}, "--latent-size must be at least 1", None),
        ({"engines": ()}, "names no engine", "--engines"),
        ({"input": InputSpec((3, 8, 8), "uint8", (0.5,), (0.5,))}, "need 3 numbers", "--mean"),
        ({"input": InputSpec((3, 8, 8), "uint8", (0.5,) * 3, (0.5, 0.0, 0.5))}, "above zero", "--std"),
        ({"input": InputSpec((3, 8, 8), "float32", (0.5,) * 3)}, "for uint8 inputs", "BatchNorm"),
        ({"input": InputSpec((3, 8, 8), "uint8", (5.0,) * 3, (0.5,) * 3)}, "from 0 to 1", "--mean"),
        ({"input": InputSpec((3, 0, 8))}, "sizes of at least 1", None),
        ({"seed": 2**63}, "out of range", "0 or more"),
        (
            {"freeze": ("perception", "representation", "output")},
            "nothing of the student is left",
            "--freeze perception",
        ),
    ],
)
def test_options_that_make_no_sense(changed: dict, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=message) as error:
        prepare_step(replace(OPTIONS, **changed), student_with())
    assert hint is None or hint in error.value.hint
    assert error.value.exit_code == 2


# --student


FACTORY = """
from torch import nn

class Own(nn.Module):
    def __init__(self, latent_size):
        super().__init__()
        self.perception = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.representation = nn.Sequential(nn.Flatten(), nn.Linear(4, latent_size))
        self.output = nn.Linear(latent_size, 4)

def build(latent_size):
    return Own(latent_size)

def fail():
    raise ValueError("no weights here")

def text():
    return "a student"

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user's students, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    path = tmp_path / "own_student.py"
    path.write_text(FACTORY)
    return path


def test_a_students_factory_by_module_and_by_file(own: Path) -> None:
    for name in ("own_student:build", f"{own}:build", "own_student.py:build"):
        spec, student = prepare(replace(OPTIONS, student=name))
        assert type(student).__name__ == "Own"
        assert "perception.0.weight" in spec.initial and spec.latent_size == 6


def test_the_seed_decides_the_initial_weights(own: Path) -> None:
    def weight(seed: int) -> torch.Tensor:
        return replace(OPTIONS, student="own_student:build", seed=seed).build().output.weight

    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(1), weight(2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cnn7", "no student is called 'cnn7'"),
        ("own_student:missing", "no callable 'missing'"),
        ("own_student:number", "no callable 'number'"),
        ("own_student:fail", "ValueError: no weights here"),
        ("own_student:text", r"returned str, not a torch\.nn\.Module"),
        ("nowhere_at_all:build", "cannot import nowhere_at_all"),
        ("nowhere.py:build", r"no file nowhere\.py"),
    ],
)
def test_a_student_that_cannot_be_found_or_made(own: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(OPTIONS, student=name).build()


def test_widths_and_normalization_are_for_built_in_students(own: Path) -> None:
    with pytest.raises(UsageError, match="belong to the built-in students"):
        replace(OPTIONS, student="own_student:build", widths=(1, 2, 3)).build()
    for name in ("cnn3", "resnet8", "mobilenet-tiny"):
        with pytest.raises(UsageError, match=f"{name} has 3") as error:
            replace(OPTIONS, student=name, widths=(4, 4)).build()
        assert "--widths" in error.value.hint
    with pytest.raises(UsageError, match="normalization 'layer'"):
        replace(OPTIONS, student="cnn3", normalization="layer").build()


class Drawing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, True)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4, scale_grad_by_freq=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).flatten(1)


def test_random_numbers_in_inference_mode() -> None:
    with pytest.raises(LoweringError, match="random numbers in inference mode"):
        prepare(OPTIONS, student_with(Drawing()))


def test_gradients_by_frequency() -> None:
    student = Student(Tokens(), nn.Linear(12, 6), nn.Linear(6, 4))
    with pytest.raises(LoweringError, match="scale_grad_by_freq"):
        prepare(replace(OPTIONS, input=InputSpec((3,), "int64")), student)


class Named(nn.Module):
    """A model with tensors of names that a step or a graph has, too."""

    def __init__(self, name: str, module: bool = False) -> None:
        super().__init__()
        self.name, self.body, self.head = name, nn.Linear(5, 6), nn.Linear(6, 4)
        if module:
            self.add_module(name, nn.Linear(6, 6))
        else:
            self.register_parameter(name, nn.Parameter(torch.ones(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = getattr(self, self.name)
        x = self.body(x).tanh() * 2
        return self.head(own(x) if isinstance(own, nn.Module) else x * own)


@pytest.mark.parametrize(("name", "module"), [("labels", False), ("alpha", False), ("noise", True), ("images", False)])
def test_a_tensor_of_a_name_that_the_step_has(name: str, module: bool) -> None:
    options = replace(OPTIONS, input=InputSpec((5,), "float32"), split=("body", "head"))
    with pytest.raises(UsageError, match="as a step has") as error:
        prepare_step(options, Named(name, module))
    assert error.value.hint and "rename" in error.value.hint


@pytest.mark.parametrize("name", ["tanh_0", "multiply_0", "constant_1"])
def test_a_tensor_of_a_name_that_the_graph_would_give(name: str) -> None:
    options = replace(OPTIONS, input=InputSpec((5,), "float32"), split=("body", "head"))
    assert name in prepare_step(options, Named(name)).initial


@pytest.mark.parametrize("name", ["images", "labels", "loss", "noise.0"])
def test_a_second_sample_of_a_name_that_the_step_has(name: str) -> None:
    class Both(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    given = InputSpec((5,), "float32")
    options = replace(OPTIONS, input=given, more_inputs=(replace(given, name=name),))
    with pytest.raises(UsageError, match=f"{name}"):
        prepare(options, Student(Both(), nn.Linear(5, 6), nn.Linear(6, 4)))


# what a trace of the forward pass would lose


class Changed(nn.Module):
    """A linear layer on rows of 5, and something that a graph would not repeat."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(5, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("wide", torch.zeros(6, dtype=torch.float64 if how == "float64" else torch.float32))
        if how == "parameter-hook":
            self.layer.weight.register_hook(lambda gradient: -gradient)
        if how == "accumulate-hook":
            self.layer.weight.register_post_accumulate_grad_hook(lambda parameter: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.how == "tensor-hook" and y.requires_grad:
            y.register_hook(lambda gradient: -gradient)
        if self.how == "in-place":
            y = y * 1
            with torch.no_grad():
                y.mul_(0.5)
        if self.how == "inference-mode":
            with torch.inference_mode():
                factor = y.detach().sigmoid()
            y = y * factor.clone()
        if self.how == "new-buffer" and self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        if self.how == "buffer-at-inference":
            self.mean.add_(y.detach().mean(0))
        if self.how == "python-random":
            y = y * (random.random() > 0)
        return y + self.mean * 0 + self.wide.float()


LOST = {
    "parameter-hook": "has a backward hook",
    "accumulate-hook": "has a backward hook",
    "tensor-hook": r"gradient of the student's perception.layer.\w+ is not autograd's",
    "in-place": r"gradient of the student's perception.layer.\w+ is not autograd's",
    "new-buffer": "buffer perception.mean another tensor",
    "buffer-at-inference": "buffer perception.mean in inference mode",
    "python-random": "Python's or NumPy's generator",
    "float64": "buffer perception.wide is torch.float64",
}


@pytest.mark.parametrize("how", LOST)
def test_what_a_trace_would_lose(how: str) -> None:
    student = Student(Changed(how), nn.Identity(), nn.Linear(6, 4))
    options = replace(OPTIONS, input=InputSpec((5,), "float32"))
    with pytest.raises(LoweringError, match=LOST[how]) as error:
        prepare(options, student)
    assert error.value.hint


def test_a_layer_that_has_no_shape_yet() -> None:
    student = Student(nn.Linear(5, 6), nn.LazyLinear(6), nn.Linear(6, 4))
    with pytest.raises(LoweringError, match="has no shape yet") as error:
        prepare(replace(OPTIONS, input=InputSpec((5,), "float32")), student)
    assert "call the student" in error.value.hint


class Result(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.body(x))}


def test_a_model_that_returns_no_tensor() -> None:
    options = replace(OPTIONS, input=InputSpec((5,), "float32"), split=("body", "head"))
    with pytest.raises(UsageError, match="returns dict"):
        prepare_step(options, Result())


def test_a_branch_on_values_is_named_by_its_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    student = Student(Branch(), nn.Linear(5, 6), nn.Linear(6, 4))
    with pytest.raises(LoweringError, match=r"test_refusals.py, line \d+"):
        prepare(replace(OPTIONS, input=InputSpec((5,), "float32")), student)
