"""What cannot be lowered, or makes no sense, is refused with the place, the reason and what to do instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.exporter import ExportOptions, export_bundle, prepare_step
from edgestill.export.lowering.capture import LoweringError
from edgestill.export.step import InputOptions
from edgestill.export.student import Student
from edgestill.runtime.errors import UsageError
from tests.support.export_oracle import make_inputs, prepare

OPTIONS = ExportOptions(latent_size=6, classes=4, batch=4, input=InputOptions((3, 8, 8)))


class Function(nn.Module):
    """A user's own module whose forward pass is `function`."""

    def __init__(self, function, *modules: nn.Module):
        super().__init__()
        self.function = function
        self.inner = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.inner)


def student_with(*layers: nn.Module, features: int = 4 * 8 * 8) -> Student:
    """A convolution to 4 channels of 8×8, then the layers, then linear layers from `features`."""
    return Student(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers),
        nn.Sequential(nn.Flatten(), nn.Linear(features, 6)),
        nn.Linear(6, 4),
    )


SHARED = nn.BatchNorm2d(4)
UNSUPPORTED: dict[str, tuple[list[nn.Module], str, str, int]] = {
    # name: layers after the first convolution, where, what the message says, features for the linear layer
    "dropout": ([nn.Dropout(0.2)], r"perception\.1", r"Dropout\(p=0.2\)", 256),
    "dropout2d": ([nn.Dropout2d(0.5)], r"perception\.1", r"Dropout2d", 256),
    "gelu": ([nn.GELU()], r"perception\.1", r"gelu", 256),
    "silu": ([nn.SiLU()], r"perception\.1", r"silu", 256),
    "leaky": ([nn.LeakyReLU()], r"perception\.1", r"leaky_relu", 256),
    "sigmoid": ([nn.Sigmoid()], r"perception\.1", r"sigmoid", 256),
    "softmax": ([nn.Softmax(1)], r"perception\.1", r"softmax", 256),
    "layer norm": ([nn.LayerNorm([4, 8, 8])], r"perception\.1", r"layer_norm", 256),
    "instance norm": ([nn.InstanceNorm2d(4)], r"perception\.1", r"instance_norm", 256),
    "upsampling": ([nn.Upsample(scale_factor=2)], r"perception\.1", r"upsample", 1024),
    "pixel shuffle": ([nn.PixelShuffle(2)], r"perception\.1", r"pixel_shuffle", 256),
    "transposed convolution": ([nn.ConvTranspose2d(4, 4, 1)], r"perception\.1", r"conv_transpose2d", 256),
    "average of all": ([nn.BatchNorm2d(4, momentum=None)], r"perception\.1", "momentum", 256),
    "no running statistics": (
        [nn.BatchNorm2d(4, track_running_stats=False)],
        r"perception\.1",
        "track_running_stats",
        256,
    ),
    "batch norm without factors": ([nn.BatchNorm2d(4, affine=False)], r"perception\.1", "affine", 256),
    "group norm without factors": (
        [nn.GroupNorm(2, 4, affine=False)],
        r"perception\.1",
        "without weight",
        256,
    ),
    "batch norm of rows": ([nn.Flatten(), nn.BatchNorm1d(256)], r"perception\.2", "batch", 256),
    "reflected padding": (
        [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")],
        r"perception\.1",
        "padding_mode='reflect'",
        256,
    ),
    "even kernel, same size": ([nn.Conv2d(4, 4, 2, padding="same")], r"perception\.1", "even kernel", 256),
    "one batch norm twice": ([SHARED, nn.ReLU(), SHARED], r"perception\.3", "two activations", 256),
    "pooling to 3 of 8": ([nn.AdaptiveAvgPool2d(3)], r"perception\.1", "does not divide", 36),
    "partial windows": ([nn.MaxPool2d(3, ceil_mode=True)], r"perception\.1", "partial window", 36),
    "partial windows of averages": (
        [nn.AvgPool2d(3, ceil_mode=True)],
        r"perception\.1",
        "partial window",
        36,
    ),
    "divisor": ([nn.AvgPool2d(2, divisor_override=3)], r"perception\.1", "divisor", 64),
    "padding not counted": (
        [nn.AvgPool2d(2, padding=1, count_include_pad=False)],
        r"perception\.1",
        "count_include_pad",
        100,
    ),
    "maximum with positions": (
        [Function(lambda x: F.max_pool2d(x, 2, return_indices=True)[1].float())],
        r"perception\.1",
        "max_pool2d",
        64,
    ),
    "reshape": ([Function(lambda x: x.reshape(-1, 8, 8, 4))], r"perception\.1", "reshape", 256),
    "transposition": ([Function(lambda x: x.transpose(1, 2))], r"perception\.1", "transpose", 256),
    "multiplication": ([Function(lambda x: x * x)], r"perception\.1", "mul", 256),
    "a number added": ([Function(lambda x: x + 1.0)], r"perception\.1", "number", 256),
    "a factor added": ([Function(lambda x: torch.add(x, x, alpha=2))], r"perception\.1", "factor", 256),
    "broadcasting": ([Function(lambda x: x + x[:, :1])], r"perception\.1", "cannot be lowered", 256),
    "mean over channels": ([Function(lambda x: x.mean(1))], r"perception\.1", "mean over", 64),
    "concatenation": ([Function(lambda x: torch.cat([x, x], 1))], r"perception\.1", "cat", 512),
    "a weight that is computed": (
        [Function(lambda x, c: F.conv2d(x, c.weight * 2), nn.Conv2d(4, 4, 1))],
        r"perception\.1",
        "cannot be lowered",
        256,
    ),
    "a tensor of its own": (
        [Function(lambda x: x + torch.tensor([1.0]))],
        r"forward|perception\.1",
        "tensors of its own",
        256,
    ),
    "dropout as a function": (
        [Function(lambda x: F.dropout(x, 0.5))],
        r"perception\.1",
        "dropout|bernoulli|rand",
        256,
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_lowered_is_refused(case: str) -> None:
    layers, where, what, features = UNSUPPORTED[case]
    with pytest.raises(LoweringError, match=what) as error:
        prepare(OPTIONS, student_with(*layers, features=features))
    assert error.match(where)
    assert error.value.hint and error.value.exit_code == 1


@pytest.mark.parametrize("kind", ["GELU", "LayerNorm", "SiLU", "InstanceNorm2d"])
def test_the_hint_says_what_to_use_instead(kind: str) -> None:
    layer = {"LayerNorm": lambda: nn.LayerNorm([4, 8, 8]), "InstanceNorm2d": lambda: nn.InstanceNorm2d(4)}
    with pytest.raises(LoweringError, match=kind) as error:
        prepare(OPTIONS, student_with(layer.get(kind, getattr(nn, kind))()))
    assert {"GELU": "Hardswish", "SiLU": "Hardswish", "LayerNorm": "GroupNorm"}.get(
        kind, "nn.GroupNorm(channels, channels)"
    ) in error.value.hint


@pytest.mark.parametrize(
    "layer",
    [nn.Identity(), nn.Dropout(0.0), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(4, 4, 3, padding="same")],
    ids=lambda layer: type(layer).__name__,
)
def test_what_only_looks_unsupported_is_lowered(layer: nn.Module) -> None:
    features = 64 if isinstance(layer, nn.MaxPool2d) else 256
    spec, _ = prepare(OPTIONS, student_with(layer, features=features))
    assert make_inputs(spec, 0)


@pytest.mark.parametrize("part", ["perception", "representation", "output"])
def test_a_student_lacking_a_part(part: str) -> None:
    student = student_with()
    delattr(student, part)
    with pytest.raises(LoweringError, match=f"no module `{part}`") as error:
        prepare(OPTIONS, student)
    assert "`representation`" in error.value.hint


def test_a_student_that_images_do_not_fit() -> None:
    with pytest.raises(LoweringError, match=r"images of shape \(4, 3, 10, 10\)") as error:
        prepare(replace(OPTIONS, input=InputOptions((3, 10, 10))), student_with())
    assert "--input-shape" in error.value.hint


def test_latents_that_are_not_rows() -> None:
    student = Student(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(144, 4)))
    with pytest.raises(
        LoweringError, match=r"latents of `representation` have shape \(4, 4, 6, 6\)"
    ) as error:
        prepare(OPTIONS, student)
    assert "nn.Flatten()" in error.value.hint


def test_a_branch_on_the_images() -> None:
    with pytest.raises(LoweringError, match="cannot trace") as error:
        prepare(OPTIONS, student_with(Function(lambda x: x if x.sum() > 0 else -x)))
    assert "branches" in error.value.hint


def test_a_parameter_that_nothing_uses() -> None:
    student = student_with()
    student.perception.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    with pytest.raises(LoweringError, match=r"perception\.spare") as error:
        prepare(OPTIONS, student)
    assert error.value.hint


def test_a_parameter_with_two_names() -> None:
    student = student_with(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    student.perception[3].weight = student.perception[2].weight
    with pytest.raises(UsageError, match=r"perception\.3\.weight and perception\.2\.weight are one") as error:
        prepare(OPTIONS, student)
    assert error.value.hint


def test_batch_normalization_of_one_value_a_channel(tmp_path: Path) -> None:
    student_file = tmp_path / "one_value.py"
    student_file.write_text(
        "from torch import nn\nfrom edgestill.export.student import Student\n"
        "def build():\n"
        "    head = nn.Sequential(nn.Flatten(), nn.Linear(4, 6))\n"
        "    return Student(nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)), head, nn.Linear(6, 4))\n"
    )
    options = replace(OPTIONS, student=f"{student_file}:build", batch=1, engines=("onnxruntime",))
    with pytest.raises(LoweringError, match=r"perception\.1: BatchNorm over one value") as error:
        export_bundle(options, tmp_path / "bundle")
    assert "nn.GroupNorm" in error.value.hint
    assert not (tmp_path / "bundle").exists()


def test_a_student_that_is_not_float32() -> None:
    with pytest.raises((UsageError, LoweringError), match=r"float64|Double|double") as error:
        prepare(OPTIONS, student_with().double())
    assert error.value.hint


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"latent_size": 7}, "latents have size 6, not 7", "--latent-size 6"),
        ({"classes": 9}, "logits have size 4, not 9", "--classes 4"),
        ({"classes": 1}, "--classes must be at least 2", None),
        ({"batch": 0}, "--batch must be at least 1", None),
        ({"latent_size": -1}, "--latent-size must be at least 1", None),
        ({"engines": ()}, "names no engine", "--engines"),
        ({"input": InputOptions((3, 8, 8), "uint8", (0.5,), (0.5,))}, "need 3 numbers", "--mean"),
        ({"input": InputOptions((3, 8, 8), "uint8", (0.5,) * 3, (0.5, 0.0, 0.5))}, "above zero", "--std"),
        ({"input": InputOptions((3, 8, 8), "float32", (0.5,) * 3)}, "for uint8 inputs", "BatchNorm2d"),
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
        assert "perception.0.weight" in spec.initial and spec.student.latent_size == 6


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
