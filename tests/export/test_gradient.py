"""Every operator's gradient rule against autograd in float64, at random shapes and attributes, and at kinks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgestill.export.lowering.gradient import _FLAT, MERGED, RULES, gradients
from edgestill.export.lowering.graph import Graph, LoweringError, Value, run_graph, run_operator
from edgestill.export.lowering.operators import OPERATORS
from tests.support.lowering import assert_alike
from tests.support.operator_cases import CASES, normal

SEEDS = 8
ONLY_IN_GRADIENTS = {
    "masked": "what the rules of kinks are made of; capture says where",
    "conv2d_weight_grad": "a gradient: no student is made of it",
    "max_pool2d_grad": "a gradient: no student is made of it",
    "batch_norm_grad": "a gradient: no student is made of it",
    "pooled_batch_norm_grad": "a gradient: no student is made of it",
}


def test_no_operator_is_forgotten() -> None:
    assert RULES.keys() | _FLAT | ONLY_IN_GRADIENTS.keys() == OPERATORS.keys()
    assert not RULES.keys() & _FLAT and not (RULES.keys() | _FLAT) & ONLY_IN_GRADIENTS.keys()
    assert CASES.keys() == RULES.keys()


# what autograd differentiates where an operator's own meaning is not differentiable, or would be the rule again


def _train_norm(x, weight, bias, eps):
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def _pool(x, kernel, stride, padding, dilation):
    (top, bottom), (left, right) = padding
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-1e30), kernel, stride, 0, dilation)


def _adjoint(
    forward: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], y: torch.Tensor
) -> torch.Tensor:
    x = torch.zeros(shape, dtype=y.dtype, requires_grad=True)
    return torch.autograd.grad(forward(x), x, y, create_graph=True)[0]


def _conv(x, weight, padding, **form):
    (top, bottom), (left, right) = padding
    return F.conv2d(
        F.pad(x, (left, right, top, bottom)),
        weight,
        None,
        form["stride"],
        0,
        form["dilation"],
        form["groups"],
    )


def _conv_adjoint(dy, weight, size, **form):
    shape = (len(dy), weight.shape[1] * form["groups"], *size)
    return _adjoint(lambda x: _conv(x, weight, **form), shape, dy)


def _average(x, kernel, stride, padding):
    (top, bottom), (left, right) = padding
    return F.avg_pool2d(F.pad(x, (left, right, top, bottom)), kernel, stride)


MEANINGS: dict[str, Callable[..., torch.Tensor]] = {
    "clamp": lambda x, low, high, closed: torch.clamp(x, low, high) if closed else F.hardtanh(x, low, high),
    "standardize": lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps),
    "batch_norm": _train_norm,
    "pooled_batch_norm": lambda x, w, b, eps, **pool: _pool(_train_norm(x, w, b, eps), **pool),
    "conv2d_transpose": _conv_adjoint,
    "avg_pool2d_grad": lambda dy, size, **a: _adjoint(lambda x: _average(x, **a), (*dy.shape[:2], *size), dy),
}


def differentiate(operator: str, arrays: list[np.ndarray], attributes: dict) -> tuple[dict, dict]:
    """(value and gradients by the graph, the same by autograd), of the sum of the operator's value times a probe."""
    graph, inputs, leaves = Graph(), {}, []
    for i, array in enumerate(arrays):
        kind = "int64" if array.dtype == np.int64 else "float32"
        graph.input(f"x{i}", array.shape, kind)
        inputs[f"x{i}"] = torch.tensor(array)
        leaves.append(inputs[f"x{i}"].clone().requires_grad_(kind == "float32"))
    y = graph.apply_many(operator, *graph.inputs, **attributes)[0]
    meaning = MEANINGS.get(operator, OPERATORS[operator])
    wanted = meaning(*leaves, **attributes)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    assert tuple(wanted.shape) == y.shape
    inputs["probe"] = torch.from_numpy(np.random.default_rng(1).standard_normal(y.shape))
    loss = (y * graph.input("probe", y.shape)).sum(*range(y.rank))
    trained = [v for v in graph.inputs if v.dtype == "float32" and v.name != "probe"]
    graph.output("y", y)
    for name, value in gradients(graph, loss, trained).items():
        graph.output(f"gradient.{name}", value)
    graph.prune()
    found = run_graph(graph, inputs)
    of_leaves = torch.autograd.grad(
        (wanted * inputs["probe"]).sum(), [t for t in leaves if t.requires_grad], allow_unused=True
    )
    expected = {"y": wanted.detach()}
    for value, gradient in zip(trained, of_leaves, strict=True):
        if gradient is not None:
            expected[f"gradient.{value.name}"] = gradient
        else:
            assert f"gradient.{value.name}" not in found
    for name, value in graph.outputs.items():
        assert value.shape == tuple(expected[name].shape), name
    return found, expected


@pytest.mark.parametrize("operator", sorted(CASES))
def test_a_rule_says_what_autograd_says(operator: str) -> None:
    for seed in range(SEEDS):
        arrays, attributes = CASES[operator](np.random.default_rng([seed, *operator.encode()]))
        if operator == "normalize":  # the statistics are given, not differentiated
            found, expected = differentiate_by_given_statistics(arrays, attributes)
        else:
            found, expected = differentiate(operator, arrays, attributes)
        try:
            assert_alike(found, expected, 1e-6)
        except AssertionError as error:
            raise AssertionError(
                f"seed {seed}, {[a.shape for a in arrays]}, {attributes}: {error}"
            ) from error


def differentiate_by_given_statistics(arrays: list[np.ndarray], attributes: dict) -> tuple[dict, dict]:
    graph, inputs = Graph(), {f"x{i}": torch.from_numpy(array) for i, array in enumerate(arrays)}
    values = [graph.input(name, tuple(tensor.shape)) for name, tensor in inputs.items()]
    y = graph.apply("normalize", *values, **attributes)
    loss = (y * y * y).sum(0, 1, 2, 3)
    for name, value in gradients(graph, loss, values[:3]).items():
        graph.output(f"gradient.{name}", value)
    leaves = [tensor.clone().requires_grad_() for tensor in list(inputs.values())[:3]]
    mean, variance = inputs["x3"], inputs["x4"]
    wanted = F.batch_norm(leaves[0], mean, variance, leaves[1], leaves[2], False, 0.0, attributes["eps"])
    of_leaves = torch.autograd.grad((wanted**3).sum(), leaves)
    return run_graph(graph, inputs), {f"gradient.x{i}": g for i, g in enumerate(of_leaves)}


@pytest.mark.parametrize("operator", ["batch_norm", "pooled_batch_norm", "standardize"])
def test_a_gradient_in_the_statistics_is_refused(operator: str) -> None:
    arrays, attributes = CASES[operator](np.random.default_rng(0))
    graph = Graph(path="perception.3")
    values = [graph.input(f"x{i}", array.shape) for i, array in enumerate(arrays)]
    statistic = graph.apply_many(operator, *values, **attributes)[1]
    with pytest.raises(LoweringError, match=rf"perception\.3.*{operator} in its statistics") as error:
        gradients(graph, statistic.sum(*range(statistic.rank)), values[:1])
    assert error.value.hint


@pytest.mark.parametrize("operator", sorted(ONLY_IN_GRADIENTS))
def test_an_operator_without_a_rule_is_refused_by_name(operator: str) -> None:
    graph = Graph(path="perception.1")
    x, mask = graph.input("x", (2, 3, 4, 4)), graph.input("mask", (2, 3, 4, 4))
    channels = [graph.input(name, (3,)) for name in "wmv"]
    weight = graph.input("weight", (3, 3, 1, 1))
    pool = {"kernel": (1, 1), "stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    conv = {key: value for key, value in pool.items() if key != "kernel"} | {"groups": 1, "bias": False}
    given: dict[str, tuple[list[Value], dict]] = {
        "masked": ([x, mask], {}),
        "conv2d_weight_grad": ([x, mask, weight], conv),
        "max_pool2d_grad": ([x, mask, mask], pool),
        "batch_norm_grad": ([x, mask, *channels], {"eps": 1e-3}),
        "pooled_batch_norm_grad": ([x, mask, *channels], pool | {"eps": 1e-3}),
    }
    inputs, attributes = given[operator]
    y = graph.apply(operator, *inputs, **attributes)
    with pytest.raises(LoweringError, match=rf"perception\.1: no gradient is known of {operator}"):
        gradients(graph, y.sum(*range(y.rank)), [x])


def test_flat_operators_stop_gradients() -> None:
    graph = Graph()
    x = graph.input("x", (3,))
    stopped = [x.apply(name) for name in ("floor", "stop_gradient")]
    stopped += [x.apply(name, 0.5) for name in ("greater", "greater_equal", "equal")]
    loss = sum(stopped[1:], stopped[0]).sum(0)
    assert gradients(graph, loss, [x]) == {}
    graph.output("gradient", gradients(graph, loss + (x * 2.0).sum(0), [x])["x"])
    assert run_graph(graph, {"x": torch.zeros(3)})["gradient"].tolist() == [2, 2, 2]


# kinks: PyTorch's conventions


def at(
    points: list[list[float]], function: Callable[[list[Value]], Value], eager: Callable[..., torch.Tensor]
) -> None:
    """Gradients of the sum of a function of small vectors equal PyTorch's exactly."""
    tensors = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in points]
    graph = Graph()
    values = [graph.input(f"x{i}", tuple(t.shape)) for i, t in enumerate(tensors)]
    y = function(values)
    for name, value in gradients(graph, y.sum(*range(y.rank)), values).items():
        graph.output(name, value)
    found = run_graph(graph, {f"x{i}": t.detach() for i, t in enumerate(tensors)})
    expected = torch.autograd.grad(eager(*tensors).sum(), tensors)
    for i, gradient in enumerate(expected):
        assert found[f"x{i}"].tolist() == gradient.tolist()


def test_kinks_of_elementwise_operators() -> None:
    at([[-1, 0, 1]], lambda v: v[0].apply("relu"), torch.relu)
    at([[-1, 0, 1]], lambda v: v[0].apply("abs"), torch.abs)
    tied = [[-1, 2, 3, 0], [1, 2, -3, 0]]
    at(tied, lambda v: v[0].apply("maximum", v[1]), torch.maximum)
    at(tied, lambda v: v[0].apply("minimum", v[1]), torch.minimum)
    ends = [[-2, -1, 0, 1, 2]]
    for low, high in ((-1.0, 1.0), (-math.inf, 1.0), (-1.0, math.inf)):
        bounds = {"low": low, "high": high}
        at(
            ends,
            lambda v, b=bounds: v[0].apply("clamp", **b, closed=True),
            lambda x, b=bounds: x.clamp(*b.values()),
        )
        at(
            ends,
            lambda v, b=bounds: v[0].apply("clamp", **b, closed=False),
            lambda x, b=bounds: F.hardtanh(x, *b.values()),
        )


def test_all_that_tie_share_the_gradient_of_a_largest() -> None:
    rows = [[[3, 1, 3, 3], [0, 0, 0, 0], [1, 2, 3, 4]]]
    at(rows, lambda v: v[0].apply("reduce_max", axes=(1,)), lambda x: x.amax(1))
    at(rows, lambda v: v[0].apply("reduce_max", axes=(0, 1)), lambda x: x.amax())


@pytest.mark.parametrize("form", [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 1, 0, 2), ((4, 1), 1, 0, 1)])
def test_the_first_of_the_pixels_that_tie_gets_the_gradient(form: tuple) -> None:
    """Images of few levels, as behind ReLU, where most windows tie."""
    kernel, stride, padding, dilation = form
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    a = {
        "kernel": pair(kernel),
        "stride": pair(stride),
        "padding": (pair(padding),) * 2,
        "dilation": pair(dilation),
    }
    images = np.random.default_rng(3).integers(0, 2, (2, 2, 6, 6)).astype(float)
    at([images.tolist()], lambda v: v[0].apply("max_pool2d", **a), lambda x: F.max_pool2d(x, *form))


# sums of gradients


def gradients_beside(function: Callable, given: dict[str, np.ndarray], eager: Callable) -> Graph:
    """Checks the gradients of a function of given tensors against autograd's; returns the graph."""
    graph, inputs = Graph(), {name: torch.from_numpy(array) for name, array in given.items()}
    values = {name: graph.input(name, tuple(tensor.shape)) for name, tensor in inputs.items()}
    y = function(values)
    for name, value in gradients(graph, y.sum(*range(y.rank)), values.values()).items():
        graph.output(f"gradient.{name}", value)
    graph.prune()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    eager(leaves).sum().backward()
    assert_alike(run_graph(graph, inputs), {f"gradient.{n}": t.grad for n, t in leaves.items()}, 1e-6)
    return graph


@pytest.mark.parametrize("steps", [MERGED - 1, MERGED, MERGED + 3])
@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False), (True, True)])
def test_a_weight_used_many_times_gets_one_product(steps: int, flags: tuple[bool, bool]) -> None:
    random = np.random.default_rng(steps)
    turn = lambda shape, flag: shape[::-1] if flag else shape  # noqa: E731
    given = {f"x{i}": normal(random, *turn((3, 4), flags[0])) for i in range(steps)}
    given |= {"weight": normal(random, *turn((4, 5), flags[1])), "bias": normal(random, 5)}

    def graph_of(v: dict[str, Value]) -> Value:
        rows = [
            v[f"x{i}"].apply("matmul", v["weight"], transpose_a=flags[0], transpose_b=flags[1])
            for i in range(steps)
        ]
        return sum((r + v["bias"]).apply("tanh") for r in rows)

    def eager(v: dict[str, torch.Tensor]) -> torch.Tensor:
        w = v["weight"].T if flags[1] else v["weight"]
        xs = [v[f"x{i}"].T if flags[0] else v[f"x{i}"] for i in range(steps)]
        return sum(torch.tanh(x @ w + v["bias"]) for x in xs)

    graph = gradients_beside(graph_of, given, eager)
    products = graph.operators()["matmul"] - 2 * steps  # besides the forward pass and each x's own gradient
    assert products == (1 if steps >= MERGED else steps)


def test_products_of_other_flags_are_summed_one_by_one() -> None:
    random = np.random.default_rng(0)
    given = {f"x{i}": normal(random, 4, 4) for i in range(MERGED + 1)} | {"w": normal(random, 4, 4)}

    def graph_of(v: dict[str, Value]) -> Value:
        return sum(
            v[f"x{i}"].apply("matmul", v["w"], transpose_a=False, transpose_b=bool(i % 2)).apply("tanh")
            for i in range(MERGED + 1)
        )

    gradients_beside(
        graph_of,
        given,
        lambda v: sum(torch.tanh(v[f"x{i}"] @ (v["w"].T if i % 2 else v["w"])) for i in range(MERGED + 1)),
    )


@pytest.mark.parametrize(
    ("spans", "joined"),
    [([(0, 2), (2, 5), (5, 6)], True), ([(5, 6), (0, 2), (2, 5)], True), ([(0, 2), (3, 6)], False),
     ([(0, 4), (2, 6)], False), ([(0, 2), (2, 5)], False)],
)  # fmt: skip
def test_gradients_of_slices_are_put_end_to_end_where_they_leave_no_gap(
    spans: list[tuple[int, int]], joined: bool
) -> None:
    functions = ("tanh", "sin", "sigmoid")
    given = {"x": normal(np.random.default_rng(1), 3, 6, 2)}

    def graph_of(v: dict[str, Value]) -> Value:
        parts = [v["x"].narrow(1, *span).apply(f) for f, span in zip(functions, spans, strict=False)]
        return sum(part.sum(0, 1, 2) for part in parts)

    graph = gradients_beside(
        graph_of,
        given,
        lambda v: sum(
            getattr(torch, f)(v["x"][:, a:b]).sum() for f, (a, b) in zip(functions, spans, strict=False)
        ),
    )
    assert ("pad" not in graph.operators()) is joined


def test_slices_of_two_axes_are_summed() -> None:
    given = {"x": normal(np.random.default_rng(1), 4, 4)}
    gradients_beside(
        lambda v: (
            v["x"].narrow(0, 0, 2).apply("tanh").sum(0, 1) + v["x"].narrow(1, 2, 4).apply("sin").sum(0, 1)
        ),
        given,
        lambda v: torch.tanh(v["x"][:2]).sum() + torch.sin(v["x"][:, 2:]).sum(),
    )


def test_a_value_that_does_not_reach_the_loss_has_no_gradient() -> None:
    graph = Graph()
    x, y = graph.input("x", (2,)), graph.input("y", (2,))
    _ = y * 3.0
    found = gradients(graph, (x * x).sum(0), [x, y])
    assert found.keys() == {"x"}


def test_the_meaning_of_a_mask_is_exact() -> None:
    a, b = torch.tensor([1.0, 2, 3, -0.0]), torch.tensor([2.0, 2, 2, 0.0])
    for operator, expected in (
        ("greater", [0, 0, 1, 0]),
        ("greater_equal", [0, 1, 1, 1]),
        ("equal", [0, 1, 0, 1]),
    ):
        (mask,) = run_operator(operator, [a, b], {})
        assert mask.dtype == torch.float32 and mask.tolist() == expected
