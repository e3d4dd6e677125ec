"""What people write in forward(): captured with the gradients of eager PyTorch, or refused with place and way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

from edgestill.export.exporter import ExportOptions, export_bundle, prepare_step
from edgestill.export.lowering.graph import LoweringError
from edgestill.export.parity.verify import verify_bundle
from edgestill.export.step.graphs import build_train_step
from edgestill.export.students import Student
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from tests.support.export_oracle import assert_step_equals_eager, make_inputs, prepare

OPTIONS = ExportOptions(latent_size=6, classes=4, batch=4, input=InputSpec((5,), "float32"))
ROWS = torch.arange(4)


class Code(nn.Module):
    """A linear layer, then a function of the module and its result."""

    def __init__(self, code: Callable[[Code, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.code = nn.Linear(5, 5), code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, self.layer(x))


def student(code: Callable[[Code, torch.Tensor], torch.Tensor]) -> Student:
    torch.manual_seed(0)
    return Student(Code(code), nn.Linear(5, 6), nn.Linear(6, 4))


def in_place(m: Code, y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[y < 0] = 0.1
    y[:, 1:4:2] = y[:, :2] * 2
    y[ROWS, torch.tensor([3, 0, 0, 2])] = y[:, 4]
    y[y[:, 0] > 0] = torch.tensor([1.0, 2, 3, 4, 5])
    return y


def stopped(m: Code, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        factor = torch.sigmoid(y)
    print("its shape is", y.shape, "and its mean", y.mean().item())
    return y * factor + y.detach().tanh() * np.sqrt(2)


RIGHT: dict[str, Callable[[Code, torch.Tensor], torch.Tensor]] = {
    "assignments": in_place,
    "no-gradient-print-numpy-number": stopped,
    "gumbel": lambda m, y: F.gumbel_softmax(y, 0.7, hard=True) if m.training else y.softmax(1),
    "gumbel-first-axis": lambda m, y: F.gumbel_softmax(y, hard=True, dim=0) if m.training else y.softmax(1),
    "scatter": lambda m, y: y.scatter(1, torch.tensor([[0, 3]] * 4), y[:, 3:] * 2),
    "scatter-by-values": lambda m, y: y.scatter(1, y.argmax(1, keepdim=True), y[:, :1] * 3),
    "scatter-add": lambda m, y: y.scatter_add(1, y.argmax(1, keepdim=True), y[:, :1].exp()),
    "checkpoint": lambda m, y: checkpoint(lambda x: F.dropout(m.layer(x), 0.5, m.training), y, use_reentrant=False),
    "reentrant": lambda m, y: checkpoint(lambda x: F.dropout(m.layer(x), 0.5, m.training), y, use_reentrant=True),
    "compiled": lambda m, y: torch.compile(torch.tanh)(y),
    "vmap": lambda m, y: torch.func.vmap(lambda row: row * row.sum())(y),
    "branch-on-shapes": lambda m, y: torch.where(y > 0, y, y * 0.1) if y.shape[0] > 2 else y,
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right(name: str) -> None:
    spec, model = prepare(OPTIONS, student(RIGHT[name]))
    assert_step_equals_eager(spec, OPTIONS, model, make_inputs(spec, 1))


def packed(m: Code, y: torch.Tensor) -> torch.Tensor:
    sequences = rnn.pack_padded_sequence(y[:, :, None], torch.tensor([5, 4, 3, 2]), batch_first=True)
    return rnn.pad_packed_sequence(sequences, batch_first=True)[0][..., 0]


def by_autograd(m: Code, y: torch.Tensor) -> torch.Tensor:
    z = y.detach().requires_grad_(True)
    return y + torch.autograd.grad((z**3).sum(), z, create_graph=True)[0]


TRACED = r"cannot trace the student .* in perception \(Code\) \(test_forward_code.py, line \d+: .*\): "
WRONG: dict[str, tuple[Callable[[Code, torch.Tensor], torch.Tensor], str, str]] = {
    "cond": (
        lambda m, y: torch.cond(y.sum() > 0, lambda a: a * 2, lambda a: a - 1, (y,)),
        r"perception \(Code\): the control flow of torch's cond", "torch.where",
    ),
    "packed": (packed, TRACED + "Could not extract", "instead of packed ones"),
    "branch": (lambda m, y: y * 2 if y.sum() > 0 else y, TRACED + "Could not guard", "torch.where"),
    "assert": (lambda m, y: y if bool(y.isfinite().all()) else y * 0, TRACED + "Could not guard", "torch.where"),
    "number": (lambda m, y: y * float(y.mean()), TRACED + "Could not guard", "depends on values"),
    "item": (lambda m, y: y * y.max().item(), r"perception \(Code\): .*_local_scalar_dense", "depends on values"),
    "shape": (lambda m, y: y + y[y > 0].sum(), r"perception \(Code\): aten.index.Tensor", "fixed shapes"),
    "numpy": (lambda m, y: y + torch.from_numpy(np.tanh(y.detach().numpy())), TRACED, "no NumPy"),
    "data": (lambda m, y: y * y.data.tanh(), r"in perception \(Code\): ", "detach"),
    "format": (lambda m, y: y * len(f"{y.mean():.3f}"), TRACED, "no formatting of values"),
    "tensor-of-tensors": (lambda m, y: y * torch.tensor([y.mean()]), TRACED, "torch.stack"),
    "fourier": (lambda m, y: torch.fft.fft(y).real, r"perception \(Code\): .*_fft_r2c", "each line names"),
    "complex": (lambda m, y: torch.view_as_complex(torch.stack([y, y], -1)).abs(), "as_complex", "complex numbers"),
    "sparse": (lambda m, y: torch.sparse.mm(torch.eye(4).to_sparse(), y), "_sparse_addmm", "dense tensors"),
    "nested": (lambda m, y: torch.nested.as_nested_tensor([y[0], y[1]]).to_padded_tensor(0.0), TRACED, "with a mask"),
    "sort": (lambda m, y: y.sort(-1).values, r"perception \(Code\): the operator aten.sort", "max"),
    "scatter": (lambda m, y: y.scatter(1, (y[:, :2] > 0).long(), 0.0), "more than one assignment a line", "one_hot"),
    "half": (lambda m, y: y.half().float(), r"perception \(Code\): a conversion to torch.float16", "float32"),
    "grad-mode": (lambda m, y: y * (1 + torch.is_grad_enabled()), "captured graph gives other", "is_grad_enabled"),
    "autograd": (by_autograd, r"fails in training mode below torch.no_grad\(\), on random", "yourself"),
    "backward": (
        lambda m, y: y.scatter(1, y.argmax(1, keepdim=True), y[:, :2]), "gradient fails in PyTorch itself", "yourself",
    ),
    "function": (lambda m, y: nn.functional.hardtanh(y) + Straight.apply(y), "calls Straight, a torch", "detach"),
}  # fmt: skip


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(0)

    @staticmethod
    def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
        return dy


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    code, message, hint = WRONG[name]
    with pytest.raises(LoweringError, match=message) as error:
        prepare_step(OPTIONS, student(code))
    assert hint in error.value.hint


def test_a_scripted_module_is_refused() -> None:
    model = Student(torch.jit.script(nn.Sequential(nn.Linear(5, 5))), nn.Linear(5, 6), nn.Linear(6, 4))
    with pytest.raises(LoweringError, match="perception: a module of torch.jit"):
        prepare_step(OPTIONS, model)


def test_a_reentrant_checkpoint_of_what_has_no_gradient_has_none() -> None:
    spec, _ = prepare(
        OPTIONS, student(lambda m, y: y.detach() + checkpoint(m.layer, y.detach(), use_reentrant=True))
    )
    with pytest.raises(LoweringError, match="the loss does not depend on perception.layer.weight"):
        build_train_step(spec)


class OwnInput(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, 0] = 1
        return super().forward(x.mul_(2))


def test_an_input_that_is_changed_in_place() -> None:
    spec, model = prepare(OPTIONS, Student(OwnInput(5, 5), nn.Linear(5, 6), nn.Linear(6, 4)))
    assert_step_equals_eager(spec, OPTIONS, model, make_inputs(spec, 1))


# functions that close over the module that they belong to

CLOSURE = """
import torch
from torch import nn

class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.scale = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Parameter(torch.ones(6))
        self.head, self.calls, self.lock = nn.Linear(6, 4), [], __import__("threading").Lock()
        self.body = lambda x: self.norm(self.layer(x)) * self.scale
        self.head.register_forward_hook(lambda module, inputs, y: y * self.scale.sum())

    def forward(self, x):
        self.last = self.body(x)
        self.calls.append(self.last)
        return self.head(self.last)
"""


@pytest.fixture
def closure(tmp_path: Path) -> Path:
    path = tmp_path / "closure.py"
    path.write_text(CLOSURE)
    return path


def test_a_lambda_that_closes_over_its_module(closure: Path, tmp_path: Path) -> None:
    names: dict = {}
    exec(compile(CLOSURE, "closure.py", "exec"), names)
    model = names["Closure"]().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = ExportOptions(
        student=model, latent_size=6, classes=4, batch=4, input=InputSpec((5,), "float32"), split=("head",),
        engines=("onnxruntime",), objective=Objective("ce"),
    )  # fmt: skip
    with Bundle.open(export_bundle(options, tmp_path / "of-instance")) as bundle:
        assert {spec.name for spec in bundle.state_specs if spec.written} > set(
            dict(model.named_parameters())
        )
    assert not model.training and model.calls == [] and not hasattr(model, "last")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_factory_of_a_lambda_that_closes_over_its_module_is_verified(closure: Path, tmp_path: Path) -> None:
    options = ExportOptions(
        student=f"{closure}:Closure", latent_size=6, classes=4, batch=4, input=InputSpec((5,), "float32"),
        split=("head",), engines=("onnxruntime",),
    )  # fmt: skip
    path = export_bundle(options, tmp_path / "of-factory")
    assert verify_bundle(path, steps=4)["onnxruntime"]["ok"]
