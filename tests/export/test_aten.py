"""What students are made of, operator by operator: each row of aten.py against eager PyTorch, forward and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.lowering.aten.context import ATEN, RANDOM, Context
from edgestill.export.lowering.capture import SampleSpec, capture
from edgestill.export.lowering.graph import LoweringError, run_graph
from edgestill.export.lowering.operators import OPERATORS
from edgestill.export.parts import student_parts
from edgestill.export.students import Student
from tests.support.lowering import Studied, of_the_corpus, studied, study
from tests.support.networks.layers import Recurrent
from tests.support.networks.network import IMAGE, VOLUME, WINDOW, Apply, network

aten = torch.ops.aten
Function = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("name", of_the_corpus(90, "aten"))
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_network_computes_what_eager_pytorch_does(name: str, training: bool) -> None:
    case = studied(name, training)
    assert case.graph.operators().keys() <= OPERATORS.keys()
    assert training or not any(value.name.startswith("noise.") for value in case.graph.inputs)
    case.check(run_graph(case.graph, case.inputs))


def study_layers(*layers: nn.Module, shape: tuple[int, ...] = IMAGE) -> Studied:
    """Layers behind a learnable convolution, in a small student."""
    stem = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    torch.manual_seed(0)
    made = network(lambda: [stem(shape[0], 6, 3, padding=1), *layers], shape)
    return study(made.build(), {"images": made.example(4)})


def assigned(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 0] = 0
    x[:, :, 1:3] *= 2
    x[:, 1, 2] = x[:, 2, 3]
    return x


# What no network of the corpus says; the corpus holds the rest.
FUNCTIONS: dict[str, Function] = {
    "tan": lambda x: (x / 3).tan(),
    "arcsine": lambda x: (x / 9).asin() + (x / 9).acos(),
    "hyperbolic": lambda x: (x / 3).sinh() + (x / 3).cosh(),
    "sign": lambda x: x.sign() * x + x.sgn(),
    "ceil": lambda x: x * x.ceil(),
    "logarithms": lambda x: x.abs().add(1).log10() + x.square().log1p(),
    "true-divide": lambda x: 2 / (x.abs() + 1) + x / 3 + x / 4,
    "floor-divide": lambda x: (
        x * torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.7, rounding_mode="trunc")
    ),
    "powers": lambda x: x**1 + x**4 + (x.abs() + 1) ** -1 + (x.abs() + 1) ** -0.5,
    "power-of-number": lambda x: 2 ** x.tanh(),
    "power-of-tensor": lambda x: (x.abs() + 0.1) ** x.tanh(),
    "comparisons": lambda x: x * ((x >= 0.1) | (x < -0.5)).float() + x * ((x <= 1) & (x != 0)).float(),
    "comparisons-of-tensors": lambda x: x * (x > x.flip(1)) + x * (x <= x.roll(1, 2)),
    "logical": lambda x: x * torch.logical_not(x > 0) + x * torch.logical_and(x > -1, x < 1) * (~(x > 0.5)),
    "logical-or": lambda x: x * torch.logical_or(x > 1, x < -1),
    "any": lambda x: x * (x > 1).any(1, keepdim=True),
    "masked-fill-where-negative": lambda x: x.masked_fill(x < 0, 0.1),
    "assignment": assigned,
    "whole-numbers": lambda x: x * (torch.arange(16) // 2 + 1),
    "to-integers": lambda x: x * x.to(torch.int64).to(torch.float32),
    "filled": lambda x: (
        x + torch.zeros_like(x) + torch.full_like(x, 0.5) + x.new_ones(16) + torch.ones_like(x)
    ),
    "detached": lambda x: x * x.detach() + x.sigmoid().detach(),
    "largest-of-all": lambda x: x / x.abs().max() - x / (x.min() - 9),
    "arguments": lambda x: x * x.argmax(1, keepdim=True),
    "infinite-norm": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
    "zero-norm": lambda x: torch.relu(x - 50).norm(dim=1) + x.mean(1),
    "mean-of-all": lambda x: x - x.mean() + x.sum() / 1000,
    "variance-and-mean": lambda x: torch.cat(torch.var_mean(x, (2, 3)), 1),
    "cumulative-last": lambda x: x.cumsum(3),
    "vector-product": lambda x: torch.mv(x[:, 0, 0], x[0, 1, 1])[:, None] + torch.dot(x[0, 0, 0], x[0, 1, 1]),
    "addmm": lambda x: torch.addmm(x[:, 0, 0], x[:, 1, 1], x[0, 2], beta=0.5, alpha=2.0),
    "gather-largest": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "chosen-by-largest": lambda x: x[0, :, :, 0].T[x[:, 0, :, 1].argmax(1)],
    "negative-index": lambda x: x[:, [-1, -2, 0]],
    "slice-scatter": lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 3, 5),
    "slice-scatter-with-a-step": lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 6, 3),
    "put-by-index": lambda x: x.index_put((torch.tensor([0, 1]), torch.tensor([2, 0])), x[:2, 1] * 2),
    "put-by-mask": lambda x: x.index_put((x > 0,), torch.tensor(0.5)),
    "put-by-mask-of-an-inner-axis": lambda x: torch.ops.aten.index_put(
        x, [None, x[0, :, 0, 0] > 0], torch.ones(16, 16)
    ),
    "added-by-mask": lambda x: x.index_put((x[:, :, 0, 0] > 0,), torch.linspace(0, 1, 16), accumulate=True),
    "scatter": lambda x: x.scatter(1, x.argmax(1, keepdim=True), x[:, :1] * 2),
    "scatter-by-constants": lambda x: x.scatter(2, torch.tensor([[[[1], [5]]]]).expand(len(x), 6, 2, 16), 0.5),
    "scatter-add": lambda x: x.scatter_add(1, x.argmax(1, keepdim=True), x[:, 1:2]),
    "triangles": lambda x: x.tril() + x.triu(2) * 2 + x.tril(-1),
    "strided": lambda x: x.as_strided((len(x), 5, 7), (1536, 3, 2), 1),
    "roll-all": lambda x: x.roll(3) * x,
    "unflatten": lambda x: x.flatten(2).unflatten(2, (4, 64)).squeeze().unsqueeze(1),
    "split-equally": lambda x: torch.cat(x.split(2, 1)[::-1], 1) * x,
    "hand-written-attention": lambda x: (x.flatten(2) @ x.flatten(2).mT / 40).softmax(1) @ x.flatten(2),
    "nothing-to-attend": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.ones(16, 16, dtype=torch.bool).tril(-1)
    ),
    "clamp-by-a-tensor-that-ties": lambda x: torch.clamp(x, max=x.detach()) + torch.clamp(x, min=x.detach() * 1),
    "softplus-with-a-low-threshold": lambda x: F.softplus(x, 1, 0.5) + F.softplus(x, 2, 1),
    "logic-of-numbers": lambda x: x * torch.logical_and(x.floor(), x - 1) + x * torch.logical_or(x.floor(), x > 1),
    "sum-of-masks": lambda x: x * ((x > 0) + (x > 1)),
    "whole-choice": lambda x: x * torch.where(x.argmax(1, keepdim=True) == 1, 0, x.argmax(1, keepdim=True)),
    "whole-product-with-a-mask": lambda x: x * (x.argmax(1, keepdim=True) * (x.argmax(1, keepdim=True) != 1)),
    "whole-cumulative": lambda x: x * x.argmax(1, keepdim=True).cumsum(2),
    "power-by-a-constant-tensor": lambda x: x ** torch.tensor(2.0) + x ** torch.full((16,), 3.0),
    "deviation-of-what-is-constant": lambda x: x * (x * 0 + 3).std((2, 3), keepdim=True) + x.std(1, keepdim=True),
    "norm-of-small-order-and-zeros": lambda x: torch.linalg.vector_norm(torch.relu(x), 0.5, dim=1),
    "sinc-at-zero": lambda x: torch.sinc(torch.relu(x)) * x,
    "power-zero": lambda x: x * (x - x.detach()) ** 0,
    "two-folds": lambda x: F.fold(F.unfold(x, 3), (16, 16), 3) + F.fold(F.unfold(x, 2), (16, 16), 2),
    "two-transposed": lambda x: x * F.conv_transpose2d(x, torch.ones(6, 1, 3, 3), padding=1)
    + x * F.conv_transpose2d(x[:, :, :8, :8], torch.ones(6, 1, 2, 2), stride=2),
    "lp-distance": lambda x: F.pairwise_distance(x.flatten(2), x.flip(1).flatten(2), p=3.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_computes_what_eager_pytorch_does(name: str) -> None:
    case = study_layers(Apply(FUNCTIONS[name]))
    case.check(run_graph(case.graph, case.inputs))


@pytest.mark.parametrize("function", [torch.log1p, torch.expm1, torch.asin], ids=["log1p", "expm1", "asin"])
def test_small_numbers_keep_their_digits_in_float32(function: Function) -> None:
    """Of what 1 + x would round away, and of what 1 − x² would."""
    values = torch.tensor([1e-7, -3e-6, 2e-4, -0.01, 0.3, 0.999]).repeat(4, 1)
    model = Student(Apply(function), nn.Linear(6, 5), nn.Linear(5, 3))
    graph = capture(student_parts(model), [SampleSpec("images", (4, 6), "float32")], True).graph
    node = next(node for node in graph.nodes if node.operator == "matmul")
    graph.outputs = {"y": node.inputs[0]}
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    found = run_graph(graph, state | {"images": values})["y"].reshape(4, 6).double()
    assert float((found / function(values.double()) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("layer", [nn.Hardswish(), nn.Hardtanh(), nn.ReLU6(), nn.Hardsigmoid(), nn.Softshrink()])
def test_the_gradient_at_a_kink_is_pytorchs(layer: nn.Module) -> None:
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0]).repeat(4, 1)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.layer = nn.Parameter(torch.zeros(8)), layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x + self.shift)

    case = study(Student(Shifted(), nn.Linear(8, 5), nn.Linear(5, 3)), {"images": values})
    case.check(run_graph(case.graph, case.inputs))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE),
    "bicubic-aligned": (lambda: nn.Upsample((9, 21), mode="bicubic", align_corners=True), IMAGE),
    "bilinear-fraction": (lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"), IMAGE),
    "nearest-exact": (lambda: nn.Upsample((5, 23), mode="nearest-exact"), IMAGE),
    "nearest-fraction": (lambda: nn.Upsample(scale_factor=1.7), IMAGE),
    "trilinear": (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), VOLUME),
    "conv3d-rectangular": (lambda: nn.Conv3d(6, 4, (2, 3, 3), stride=(2, 1, 2), dilation=(2, 1, 1)), VOLUME),
    "conv3d-grouped": (lambda: nn.Conv3d(6, 4, 3, groups=2), VOLUME),
    "conv-transpose3d-padded": (
        lambda: nn.ConvTranspose3d(6, 3, 3, stride=2, padding=1, output_padding=1),
        VOLUME,
    ),
    "conv-transpose3d-grouped": (lambda: nn.ConvTranspose3d(6, 4, 2, stride=2, groups=2), VOLUME),
    "conv-transpose3d-dilated": (lambda: nn.ConvTranspose3d(6, 2, 2, dilation=(2, 1, 3)), VOLUME),
    "conv-transpose1d-grouped": (lambda: nn.ConvTranspose1d(6, 6, 3, 2, 1, 1, groups=3), WINDOW),
    "avg-pool3d-padded": (lambda: nn.AvgPool3d(3, 2, 1), VOLUME),
    "avg-pool3d-without-padding": (
        lambda: nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        VOLUME,
    ),
    "max-pool3d-ceil": (lambda: nn.MaxPool3d(2, 3, ceil_mode=True), VOLUME),
    "max-pool1d-dilated": (lambda: nn.MaxPool1d(3, 1, 1, dilation=2), WINDOW),
    "reflection-pad3d": (lambda: nn.ReflectionPad3d(1), VOLUME),
    "circular-pad1d": (lambda: nn.CircularPad1d((3, 2)), WINDOW),
    "fold-padded": (lambda: nn.Sequential(nn.Unfold(3, 1, 1, 2), nn.Fold((16, 16), 3, 1, 1, 2)), IMAGE),
    "group-norm-1d": (lambda: nn.GroupNorm(3, 6), WINDOW),
    "glu-last": (lambda: nn.GLU(), WINDOW),
    "hardsigmoid": (nn.Hardsigmoid, WINDOW),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_eager_pytorch_does(name: str) -> None:
    layer, shape = LAYERS[name]
    case = study_layers(layer(), shape=shape)
    case.check(run_graph(case.graph, case.inputs))


# random numbers


DRAWS: dict[object, Callable[[], nn.Module]] = {
    aten.native_dropout.default: lambda: nn.Dropout(0.3),
    aten.bernoulli.p: lambda: Apply(lambda x: x * torch.bernoulli(x.detach(), 0.3)),
    aten.bernoulli.default: lambda: Apply(lambda x: x * torch.bernoulli(x.sigmoid().detach())),
    aten.rand.default: lambda: Apply(lambda x: x * (torch.rand(len(x), 1, 1) > 0.3)),
    aten.rand_like.default: lambda: Apply(lambda x: x + torch.rand_like(x)),
    aten.uniform.default: lambda: Apply(lambda x: x * torch.empty_like(x).uniform_(-1, 3)),
    aten.randn.default: lambda: Apply(lambda x: x * torch.randn(24)),
    aten.randn_like.default: lambda: Apply(lambda x: x + torch.randn_like(x)),
    aten.normal_functional.default: lambda: Apply(lambda x: x + torch.empty_like(x).normal_(2, 0.5)),
    aten.exponential.default: lambda: Apply(lambda x: F.gumbel_softmax(x, tau=0.7, hard=False, dim=1)),
    aten.lstm.input: lambda: Recurrent(nn.LSTM(6, 4, num_layers=2, dropout=0.4, batch_first=True)),
    aten.gru.input: lambda: Recurrent(nn.GRU(6, 4, num_layers=2, dropout=0.4, batch_first=True)),
    aten.rnn_tanh.input: lambda: Recurrent(nn.RNN(6, 4, num_layers=2, dropout=0.4, batch_first=True)),
    aten.rnn_relu.input: lambda: Recurrent(nn.RNN(6, 4, 2, "relu", dropout=0.4, batch_first=True)),
}


def test_every_random_operator_is_drawn_from() -> None:
    assert DRAWS.keys() == RANDOM


@pytest.mark.parametrize("overload", DRAWS, ids=str)
def test_a_random_operator_takes_the_numbers_that_the_step_is_given(
    overload: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = set()
    compute = Context.compute
    monkeypatch.setattr(
        Context, "compute", lambda c, node, *given: read.add(node.target) or compute(c, node, *given)
    )
    case = study_layers(DRAWS[overload](), shape=WINDOW)
    assert overload in read
    noise = {name for name in case.inputs if name.startswith("noise.")}
    assert noise == {f"noise.{i}" for i in range(len(noise))} and noise
    found = run_graph(case.graph, case.inputs)
    case.check(found)
    other = run_graph(case.graph, case.inputs | {name: case.inputs[name].flip(0) for name in noise})
    assert not torch.equal(found["latents"], other["latents"])


def test_dropout_keeps_what_is_below_and_scales_it() -> None:
    student = nn.Module()
    student.perception, student.representation = nn.Dropout(0.25), nn.Flatten()
    student.output = nn.Linear(6, 2)
    case = study(student, {"images": torch.ones(4, 6)}, training=True)
    (noise,) = [name for name in case.inputs if name.startswith("noise.")]
    numbers = torch.tensor([0, 0.5, 0.7499, 0.7501, 0.9, 0.9999], dtype=torch.float64).expand(4, 6)
    latents = run_graph(case.graph, case.inputs | {noise: numbers})["latents"]
    torch.testing.assert_close(latents[0], torch.tensor([4 / 3] * 3 + [0.0] * 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("draw", "mean", "std"),
    [(torch.randn_like, 0.0, 1.0), (lambda x: torch.empty_like(x).exponential_(2.0), 0.5, 0.5)],
)
def test_numbers_of_other_distributions(draw: Function, mean: float, std: float) -> None:
    student = nn.Module()
    student.perception, student.representation = Apply(lambda x: x + draw(x)), nn.Identity()
    student.output = nn.Linear(500, 2)
    case = study(student, {"images": torch.zeros(20, 500)})
    latents = run_graph(case.graph, case.inputs)["latents"]
    assert abs(float(latents.mean()) - mean) < 0.03 and abs(float(latents.std()) - std) < 0.03


UNKNOWN: dict[str, Function] = {
    "poisson": lambda x: torch.poisson(x.abs()),
    "multinomial": lambda x: x + torch.multinomial(x[0].abs(), 24, True),
    "randperm": lambda x: x[:, torch.randperm(6)],
    "randint": lambda x: x + torch.randint(0, 5, (24,)),
    "randint_like": lambda x: x + torch.randint_like(x, 3),
    "random": lambda x: x + torch.empty_like(x).random_(5),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "cauchy": lambda x: x + torch.empty_like(x).cauchy_(),
    "geometric": lambda x: x + torch.empty_like(x).geometric_(0.5),
    "log_normal": lambda x: x + torch.empty_like(x).log_normal_(),
    "binomial": lambda x: torch.binomial(torch.ones_like(x), x.sigmoid()),
    "normal": lambda x: torch.normal(x, torch.ones(())),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_random_operator_that_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(
        LoweringError, match=rf"perception\.1 \(Apply\): the random operator aten\.{name}"
    ) as error:
        study_layers(Apply(UNKNOWN[name]), shape=WINDOW)
    assert "torch.rand" in error.value.hint


REFUSALS: dict[str, tuple[Function, str]] = {
    "float64": (lambda x: x.double().float(), "a conversion to torch.float64"),
    "complex": (lambda x: torch.fft.fft(x).real, "the operator aten._fft_r2c"),
    "round": (lambda x: x.round(), "the operator aten.round"),
    "sort": (lambda x: x.sort(2).values, "the operator aten.sort"),
    "assignment": (
        lambda x: x.index_put((torch.tensor([0, 1]), x[:2, :, 0].argmax(1)), torch.tensor(0.5)),
        "an assignment by an index known only at run time",
    ),
    "far-axes": (lambda x: x[[0, 1], :, [2, 3]], "an index of axes that are not side by side"),
    "gather": (lambda x: x.gather(2, (x > 0).to(torch.int64)), "torch.gather of more than one entry"),
    "boolean-index": (
        lambda x: x[:, :, torch.arange(24) % 3 == 0],
        "a mask as index|aten.nonzero|aten.sym_size",
    ),
    "bits": (lambda x: x * (x.argmax(1, keepdim=True) & x.argmin(1, keepdim=True)), "bits of integers"),
    "positions": (
        lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2),
        r"perception\.1 \(Apply\): .*max_pool2d_with_indices",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_operator_is_refused_where_it_cannot_be_said(name: str) -> None:
    function, reason = REFUSALS[name]
    with pytest.raises(LoweringError, match=reason) as error:
        study_layers(Apply(function), shape=WINDOW)
    assert error.value.hint


def test_every_row_is_of_an_operator_that_exists() -> None:
    assert all(isinstance(overload, torch._ops.OpOverload) for overload in ATEN)
