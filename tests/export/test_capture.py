"""From a student to a graph: modes, gradients that stop, buffers, sharing, splits, several inputs, refusals."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.exporter import ExportOptions, prepare_step
from edgestill.export.lowering.capture import SampleSpec, capture
from edgestill.export.lowering.graph import LoweringError, run_graph
from edgestill.export.parts import student_parts
from edgestill.export.step.graphs import build_encode, build_train_step
from edgestill.export.students import Student
from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.errors import EdgestillError, UsageError
from tests.support.lowering import Studied, study
from tests.support.networks import BEYOND_EXPORT, NETWORKS, REFUSED
from tests.support.networks.network import CLASSES, IMAGE, LATENT_SIZE, Apply

OPTIONS = ExportOptions(latent_size=5, classes=3, batch=4, input=InputSpec((6,), "float32"))


def student(*layers: nn.Module, size: int = 8) -> Student:
    """Linear 6 → 8, the layers on rows [B, 8], a latent of 5, 3 classes."""
    torch.manual_seed(0)
    return Student(nn.Sequential(nn.Linear(6, 8), *layers), nn.Linear(size, 5), nn.Linear(5, 3))


def checked(model: nn.Module, training: bool = True, **form: object) -> Studied:
    """The student studied on rows [B, 6]; its graph computes what eager PyTorch does."""
    case = study(
        model, {"images": torch.randn(4, 6, generator=torch.Generator().manual_seed(1))}, training, **form
    )
    case.check(run_graph(case.graph, case.inputs))
    return case


def gradients_of(case: Studied) -> set[str]:
    return {name.removeprefix("gradient.") for name in case.graph.outputs if name.startswith("gradient.")}


# where gradients stop


class Stopped(nn.Module):
    """A branch whose gradient the student does not want, beside one that it does."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.side, self.main = how, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "detach":
            side = self.side(x).detach()
        elif self.how == "no_grad":
            with torch.no_grad():
                side = torch.sigmoid(self.side(x))
                side = side / side.sum(1, keepdim=True)
        else:
            side = self.side(x)
        return self.main(x) * side


@pytest.mark.parametrize(("how", "stops"), [("detach", True), ("no_grad", True), ("not", False)])
def test_gradients_stop_where_the_student_stops_them(how: str, stops: bool) -> None:
    case = checked(student(Stopped(how)))
    assert ("perception.1.side.weight" in gradients_of(case)) is not stops
    assert "perception.1.main.weight" in gradients_of(case) and "perception.0.weight" in gradients_of(case)


def test_parameters_that_take_no_gradient_are_not_trained() -> None:
    model = student(nn.Linear(8, 8))
    model.perception[0].requires_grad_(False)
    model.output.bias.requires_grad_(False)
    spec = prepare_step(OPTIONS, model)
    assert spec.frozen == {"perception.0.weight", "perception.0.bias", "output.bias"}
    outputs = build_train_step(spec).outputs
    written = {
        name.removeprefix("next.") for name in outputs if name.startswith("next.") and "optimizer" not in name
    }
    assert written == {name for name, _ in model.named_parameters()} - spec.frozen


# state


class Averages(nn.Module):
    """An exponential average in a buffer, a counter that is no number of a graph, and a buffer that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(8))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("scale", torch.linspace(1, 2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.calls += 1
        return (x - self.average) * self.scale


def test_buffers_that_training_changes_come_out() -> None:
    case = checked(student(Averages()))
    assert [name for name in case.graph.outputs if name.startswith("next.")] == ["next.perception.1.average"]
    assert "perception.1.scale" in {value.name for value in case.graph.inputs}
    resting = checked(student(Averages()), training=False)
    assert not [name for name in resting.graph.outputs if name.startswith("next.")]


def test_capturing_changes_nothing_of_the_student() -> None:
    model = student(Averages(), nn.BatchNorm1d(8), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for training in (True, False):
        capture(student_parts(model), [SampleSpec("images", (4, 6), "float32")], training)
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Tied(nn.Module):
    """Two layers of one weight, by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_tied_weights_are_one_parameter_with_one_gradient() -> None:
    case = checked(student(Tied()))
    assert "perception.1.first.weight" in gradients_of(case)
    assert "perception.1.second.weight" not in {value.name for value in case.graph.inputs}
    spec = prepare_step(OPTIONS, student(Tied()))
    assert "perception.1.first.weight" in spec.initial and "perception.1.second.weight" not in spec.initial


def test_a_module_called_twice_gets_the_sum_of_its_gradients() -> None:
    layer = nn.Linear(8, 8)
    case = checked(student(layer, nn.Tanh(), layer))
    assert len(gradients_of(case)) == 8


# modes


class Resting(nn.Module):
    """A BatchNorm that keeps its running statistics whatever it is told (as in fine-tuning)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def train(self, mode: bool = True) -> Resting:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_a_norm_that_stays_in_inference_mode_stays() -> None:
    model = student(Resting())
    nn.init.uniform_(model.perception[1].norm.running_var, 0.5, 2)
    case = checked(model)
    assert "batch_norm" not in case.graph.operators() and case.graph.operators()["normalize"] == 1
    assert not [name for name in case.graph.outputs if name.startswith("next.")]
    assert "perception.1.norm.weight" in gradients_of(case)


def test_freezing_a_norm_keeps_its_statistics() -> None:
    model = student(nn.BatchNorm1d(8))
    spec = prepare_step(replace(OPTIONS, freeze=("perception.1",)), model)
    assert "normalize" in spec.training.graph.operators() and spec.training.written == ()
    assert prepare_step(OPTIONS, model).training.written == (
        "perception.1.running_mean",
        "perception.1.running_var",
    )


class ByMode(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * 2 if self.training else x + 1


def test_each_mode_has_its_own_branch() -> None:
    assert "tanh" in checked(student(ByMode())).graph.operators()
    assert "tanh" not in checked(student(ByMode()), training=False).graph.operators()


# what a student is


class Existing(nn.Module):
    """A model as people have it: no three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 9), nn.ReLU())
        self.neck = nn.Linear(9, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latent = F.silu(self.neck(self.features(x)))
        return self.head(latent) * 2


@pytest.mark.parametrize("split", [("head",), ("neck", "head"), ("features", "neck", "head")])
def test_an_existing_model_is_split_where_its_output_layer_is_called(split: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    case = checked(Existing(), split=split)
    assert gradients_of(case) == {
        f"{part}.{kind}" for part in ("features.0", "neck", "head") for kind in ("weight", "bias")
    }
    assert case.graph.outputs["latents"].shape == (4, 5)
    spec = prepare_step(replace(OPTIONS, split=split), Existing())
    assert "features.0.weight" in spec.initial


def test_a_split_that_names_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="--split names 'tail', which Existing has not") as error:
        student_parts(Existing(), ("tail",))
    assert "features, neck, head" in error.value.hint


@pytest.mark.parametrize(
    ("split", "message", "hint"),
    [
        (("head", "features"), "names head, features, but the model calls features, head", "features,head"),
        (("neck", "features", "head"), "but the model calls features, neck, head", "features,neck,head"),
        (("spare", "head"), "names spare, head, but the model calls head", "leave spare out"),
        (("spare",), "names spare, but the model calls none of these", "leave spare out"),
        (("features.0", "features", "neck", "head"), "names 4 modules", "at most three"),
    ],
)
def test_a_split_that_is_not_what_the_model_runs_is_refused(split: tuple[str, ...], message: str, hint: str) -> None:
    model = Existing()
    model.spare = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(UsageError, match=message) as error:
        prepare_step(replace(OPTIONS, split=split), model)
    assert hint in error.value.hint


def test_a_module_that_is_called_by_its_parts_is_one_that_is_called() -> None:
    class Blocks(Existing):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([self.features])

    checked(Blocks(), split=("blocks", "head"))


def test_a_split_at_a_module_that_is_called_twice_is_refused() -> None:
    class Twice(Existing):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(super().forward(x) @ torch.ones(3, 5))

    with pytest.raises(EdgestillError, match="head is called 2 times, not once"):
        checked(Twice(), split=("head",))


@pytest.mark.parametrize("part", ["perception", "representation", "output"])
def test_a_student_lacking_a_part(part: str) -> None:
    model = student()
    delattr(model, part)
    with pytest.raises(UsageError, match=f"no module {part}") as error:
        prepare_step(OPTIONS, model)
    assert "--split" in error.value.hint


class TwoInputs(nn.Module):
    """A window of numbers and token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.tokens = nn.Linear(6, 4), nn.Embedding(11, 4)

    def forward(self, window: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.window(window), self.tokens(tokens).mean(1)), 1)


def test_several_input_tensors_and_token_ids() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.perception, model.representation, model.output = TwoInputs(), nn.Linear(8, 5), nn.Linear(5, 3)
    samples = {
        "window": torch.randn(4, 6),
        "tokens": torch.tensor([[0, 10, 3], [3, 3, 3], [1, 2, 4], [9, 0, 10]]),
    }
    for training in (True, False):
        case = study(model, samples, training)
        case.check(run_graph(case.graph, case.inputs))
    assert {v.name: v.dtype for v in case.graph.inputs if v.name in samples} == {
        "window": "float32",
        "tokens": "int64",
    }
    options = replace(
        OPTIONS,
        input=InputSpec((6,), "float32", name="window"),
        more_inputs=(InputSpec((3,), "int64", name="tokens"),),
    )
    given = [(spec.name, spec.shape, spec.dtype) for spec in prepare_step(options, model).encode_inputs()]
    assert given == [("window", (4, 6), "float32"), ("tokens", (4, 3), "int64")]


def test_grey_levels_are_normalised_in_the_graph() -> None:
    """train_step and encode, on uint8 images with a mean and deviation a channel."""
    torch.manual_seed(0)
    model = Student(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3))
    given = InputSpec((3, 2, 2), "uint8", (0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    spec = prepare_step(replace(OPTIONS, input=given), model)
    images = torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2) * 5
    inputs = {"images": images, **{n: torch.from_numpy(a) for n, a in spec.initial.items()}}
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (given.mean, given.std))
    latents = model.representation(model.perception((images / 255 - mean) / std))
    found = run_graph(build_encode(spec), inputs)
    torch.testing.assert_close(found["latents"], latents.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["logits"], model.output(latents).detach(), rtol=1e-5, atol=1e-5)


# what is refused


def test_all_blockers_are_named_at_once_each_with_its_way_out() -> None:
    model = student(
        Apply(lambda x: x.sort(1).values + x.round()),
        nn.Linear(8, 8),
        Apply(lambda x: x + torch.poisson(torch.ones(8))),
    )
    with pytest.raises(LoweringError) as error:
        prepare_step(OPTIONS, model)
    lines = error.value.message.splitlines()
    assert lines[0] == "3 things in the student cannot be lowered:"
    for line, place, hint in zip(
        lines[1:],
        ("perception.1 (Apply): the operator aten.sort", "perception.1 (Apply): the operator aten.round",
         "perception.3 (Apply): the random operator aten.poisson"),
        ("use max, argmax, or comparisons", "write it with other operators", "draw with torch.rand"),
        strict=True,
    ):  # fmt: skip
        assert place in line and f"hint: {hint}" in line
    assert error.value.exit_code == 1


REASONS = {
    "data-dependent-branch": "cannot trace the student.*data-dependent",
    "mutated-weight": "in training mode",
    "nan-weights": "output.weight holds NaN or infinity",
    "own-forward": r"student\(x\) gives other logits",
    "python-counter": "in training mode",
    "complex-numbers": r"perception\.1 \(Spectrum\).*complex",
    "nonzero": r"perception\.1 \(Positive\).*nonzero",
    "unique": r"perception\.1 \(Distinct\)",
    "max-unpool": r"perception\.1 \(Unpool\).*max_pool2d_with_indices",
    "numpy": r"cannot trace the student.*numpy\(\)",
    "float64-weights": "is torch.float64",
    "unused-parameter": r"perception\.1\.spare does not enter its outputs",
    "one-norm-twice": "cannot trace the student",
    "latents-of-rank-3": r"`representation` have shape \[4, 4, 16\], not \[4, size\]",
    "nothing-to-train": "nothing of the student is left to train",
}


def corpus_options(network: object) -> ExportOptions:
    given = InputSpec(network.input_shape, network.input_dtype)
    return ExportOptions(latent_size=LATENT_SIZE, classes=CLASSES, batch=4, input=given)


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_refused_is_refused_for_its_reason(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises((LoweringError, UsageError)) as error:
        build_train_step(prepare_step(corpus_options(REFUSED[name]), REFUSED[name].build()))
    assert re.search(REASONS[name], error.value.message, re.DOTALL), error.value.message
    assert error.value.hint


@pytest.mark.parametrize("name", BEYOND_EXPORT)
def test_what_torch_export_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(LoweringError) as error:
        prepare_step(corpus_options(NETWORKS[name]), NETWORKS[name].build())
    assert error.value.hint


def test_batch_normalization_of_one_value_a_channel() -> None:
    model = Student(
        nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten()), nn.Linear(4, 5), nn.Linear(5, 3)
    )
    with pytest.raises(
        LoweringError, match=r"perception\.1 \(BatchNorm2d\): BatchNorm over one value|trace"
    ) as error:
        prepare_step(replace(OPTIONS, batch=1, input=InputSpec(IMAGE)), model)
    assert error.value.hint
