"""Each engine's lowered graph beside the graph that it was made of, in float64; the layout pass and simplification."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph, Value, run_graph, run_operator
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.operators import OPERATORS
from edgestill.export.lowering.rewrite import EXPANSIONS, fuse_pooled_norms, rewrite_fully
from edgestill.export.targets import (
    ENGINES,
    native,
    native_kernels,
    onnx_emitter,
    onnxruntime,
    onnxruntime_training,
)
from edgestill.export.targets import executorch as executorch_target
from edgestill.export.targets.native_graph import join_shapes, join_slopes, move_parts
from tests.support.lowering import assert_alike, of_the_corpus, studied
from tests.support.operator_cases import CASES, FLAT_CASES, with_gradients

LOWER: dict[str, Callable[[Graph], Graph]] = {
    "onnxruntime": onnxruntime.lower,
    "executorch": executorch_target.lower,
    "onnxruntime-training": onnxruntime_training.lower,
    "native": native.lower,
}
CLOSED = {
    "native": native_kernels.TAKEN,
    "onnxruntime": onnx_emitter.RULES.keys(),
    "onnxruntime-training": onnx_emitter.RULES.keys() | onnxruntime_training.GRADIENTS.keys(),
    # What PyTorch's functions say in core ATen; inspect shows which of them XNNPACK leaves to portable kernels.
    "executorch": OPERATORS.keys()
    - EXPANSIONS.keys()
    - set(
        "conv2d conv2d_transpose conv2d_weight_grad max_pool2d max_pool2d_grad avg_pool2d normalize".split()
    )
    - set("reduce_sum reduce_mean reduce_max log_softmax greater greater_equal masked erf expand".split()),
}
RANDOM = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOLERANCE = {"executorch": 1e-4}  # its erf is an approximation within 1.5e-7
SEEDS = st.integers(0, 2**32 - 1)


def test_every_engine_is_compared() -> None:
    assert LOWER.keys() == CLOSED.keys() == set(ENGINES)


@pytest.mark.parametrize("engine", LOWER)
@pytest.mark.parametrize("name", of_the_corpus(120, "engines"))
def test_a_lowered_network_computes_what_it_is_made_of(name: str, engine: str) -> None:
    case = studied(name)
    lowered = LOWER[engine](case.graph)
    assert lowered.operators().keys() <= CLOSED[engine]
    assert list(lowered.outputs) == list(case.graph.outputs)
    case.check(run_graph(lowered, case.inputs), TOLERANCE.get(engine, 1e-5))


@pytest.mark.parametrize("operator", sorted(CASES | FLAT_CASES))
@settings(RANDOM, max_examples=12)
@given(seed=SEEDS)
def test_a_lowered_operator_and_its_gradients_are_what_they_were(operator: str, seed: int) -> None:
    arrays, attributes = (CASES | FLAT_CASES)[operator](np.random.default_rng(seed))
    graph, inputs = with_gradients(operator, arrays, attributes, np.random.default_rng(seed))
    expected = run_graph(graph, inputs)
    for engine, lower in LOWER.items():
        lowered = lower(graph)
        assert lowered.operators().keys() <= CLOSED[engine] | {"equal"}, engine
        found = run_graph(lowered, inputs)
        try:
            assert_alike(found, expected, 3e-6)
            assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
        except AssertionError as error:
            raise AssertionError(f"{engine}, {[a.shape for a in arrays]}, {attributes}: {error}") from error


LEVELS = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}


@pytest.mark.parametrize("engine", LOWER)
@settings(RANDOM, max_examples=25)
@given(seed=SEEDS)
def test_one_pixel_of_a_window_of_ties_gets_the_gradient(engine: str, seed: int) -> None:
    """Where pixels tie, engines pass the whole gradient of a window to one of the largest."""
    random = np.random.default_rng(seed)
    arrays, a = CASES["max_pool2d"](random)
    a = (
        LEVELS
        if random.random() < 0.2
        else a | {"stride": a["kernel"], "padding": LEVELS["padding"], "dilation": (1, 1)}
    )
    size = [a["kernel"][i] * int(random.integers(1, 4)) for i in range(2)]
    x = torch.from_numpy(random.integers(0, 2, (2, 3, *size)).astype(float))
    graph = Graph()
    y = graph.input("x", tuple(x.shape)).apply("max_pool2d", **a)
    graph.output("dx", gradients(graph, y.sum(0, 1, 2, 3), graph.inputs)["x"])
    dx = run_graph(LOWER[engine](graph), {"x": x})["dx"]
    windows = [t.reshape(2, 3, size[0] // a["kernel"][0], a["kernel"][0], -1, a["kernel"][1]).permute(0, 1, 2, 4, 3, 5)
               for t in (x, dx)]  # fmt: skip
    values, shares = (w.flatten(4) for w in windows)
    assert torch.equal(shares.sum(4), torch.ones_like(shares.sum(4))) and torch.equal(shares, shares.round())
    assert bool((values[shares > 0] == values.amax(4).flatten()).all())


@settings(RANDOM, max_examples=15)
@given(seed=SEEDS)
def test_a_norm_joined_with_its_pooling_is_what_it_was(seed: int) -> None:
    random = np.random.default_rng(seed)
    (x, weight, bias), a = CASES["batch_norm"](random)
    size, pool = (4, 3), {"kernel": (2, 2), "stride": (1, 2), "padding": ((1, 0), (0, 1)), "dilation": (1, 1)}
    assert x.shape[2:] == size
    graph = Graph()
    values = [graph.input(name, t.shape) for name, t in (("x", x), ("weight", weight), ("bias", bias))]
    normalised, mean, variance = graph.apply_many("batch_norm", *values, **a)
    graph.output("y", normalised.apply("max_pool2d", **pool))
    graph.output("mean", mean)
    graph.output("variance", variance)
    inputs = {"x": torch.from_numpy(x), "weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
    fused = fuse_pooled_norms(graph)
    assert fused.operators() == {"pooled_batch_norm": 1}
    assert fuse_pooled_norms(graph, never={"weight"}.__contains__).operators() == graph.operators()
    for made in (fused, rewrite_fully(fused, EXPANSIONS)):
        assert_alike(run_graph(made, inputs), run_graph(graph, inputs), 1e-6)


def test_a_norm_that_something_else_reads_is_not_joined() -> None:
    graph = Graph()
    values = [graph.input("x", (2, 3, 4, 4)), graph.input("weight", (3,)), graph.input("bias", (3,))]
    normalised = graph.apply("batch_norm", *values, eps=1e-5)
    graph.output("y", normalised.apply("max_pool2d", **LEVELS))
    graph.output("z", normalised.apply("tanh"))
    assert "pooled_batch_norm" not in fuse_pooled_norms(graph).operators()


# random graphs of movement and arithmetic, computed as they are asked for


class Growing:
    """A graph that grows by random operators; beside it the same operators on tensors, one by one."""

    def __init__(self, seed: int, steps: int, turns: float):
        self.random, self.graph, self.pairs = np.random.default_rng(seed), Graph(), []
        self.inputs: dict[str, torch.Tensor] = {}
        for i in range(2):
            shape = self.random.integers(1, 5, self.random.integers(2, 5)).tolist()
            self.inputs[f"x{i}"] = torch.from_numpy(self.random.standard_normal(shape))
            self.pairs.append((self.graph.input(f"x{i}", tuple(shape)), self.inputs[f"x{i}"]))
        for _ in range(steps):
            kinds = STEPS if self.random.random() > turns else {"transpose": STEPS["transpose"]}
            name = list(kinds)[self.random.integers(0, len(kinds))]
            pair = self.pairs[max(0, len(self.pairs) - 1 - int(self.random.integers(0, 3)))]
            kinds[name](self, *pair)
        for i, (value, tensor) in enumerate(self.pairs[-3:]):
            self.graph.output(f"y{i}", value)
            self.inputs.setdefault(f"y{i}", tensor)
        self.expected = {f"y{i}": tensor for i, (_, tensor) in enumerate(self.pairs[-3:])}
        self.inputs = {name: tensor for name, tensor in self.inputs.items() if name.startswith("x")}

    def add(
        self, operator: str, *pairs: tuple[Value | float, torch.Tensor | float], **attributes: object
    ) -> None:
        value = self.graph.apply(operator, *(p[0] for p in pairs), **attributes)
        tensors = [
            p[1] if isinstance(p[1], torch.Tensor) else torch.tensor(p[1], dtype=torch.float64) for p in pairs
        ]
        (tensor,) = run_operator(operator, tensors, attributes)
        if value.size <= 2000 and value.rank <= 6:
            self.pairs.append((value, tensor.double()))

    def axis(self, value: Value) -> int:
        return int(self.random.integers(0, value.rank))

    def transpose(self, v: Value, t: torch.Tensor) -> None:
        self.add("transpose", (v, t), permutation=tuple(self.random.permutation(v.rank).tolist()))

    def unary(self, v: Value, t: torch.Tensor) -> None:
        self.add(str(self.random.choice(["tanh", "relu", "abs", "sin", "sigmoid"])), (v, t))

    def number(self, v: Value, t: torch.Tensor) -> None:
        number = float(self.random.choice([0.0, 1.0, -1.0, 2.0]))
        operator = str(self.random.choice(["add", "subtract", "multiply", "maximum"]))
        pairs = [(v, t), (number, number)]
        self.add(operator, *(pairs if self.random.random() < 0.5 else pairs[::-1]))

    def binary(self, v: Value, t: torch.Tensor) -> None:
        """With another value that broadcasts with it, if need be a reduction of itself."""
        others = [p for p in self.pairs if _broadcast(p[0].shape, v.shape)] or [
            (v.sum(0), t.sum(0, keepdim=True))
        ]
        other = others[self.random.integers(0, len(others))]
        operator = str(self.random.choice(["add", "subtract", "multiply", "maximum", "greater"]))
        self.add(operator, *((v, t), other)[:: 1 if self.random.random() < 0.5 else -1])

    def reduce(self, v: Value, t: torch.Tensor) -> None:
        axes = tuple(sorted(self.random.permutation(v.rank)[: self.random.integers(1, v.rank + 1)].tolist()))
        self.add(str(self.random.choice(["reduce_sum", "reduce_mean", "reduce_max"])), (v, t), axes=axes)

    def slice(self, v: Value, t: torch.Tensor) -> None:
        axis = self.axis(v)
        start = int(self.random.integers(0, v.shape[axis]))
        stop = int(self.random.integers(start + 1, v.shape[axis] + 1))
        self.add("slice", (v, t), axis=axis, start=start, stop=stop, step=int(self.random.integers(1, 3)))

    def pad(self, v: Value, t: torch.Tensor) -> None:
        begins, ends = (tuple((self.random.integers(0, 4, v.rank) // 2).tolist()) for _ in range(2))
        self.add("pad", (v, t), begins=begins, ends=ends, value=0.5)

    def concat(self, v: Value, t: torch.Tensor) -> None:
        others = [p for p in self.pairs if p[0].shape == v.shape]
        parts = [others[self.random.integers(0, len(others))] for _ in range(self.random.integers(1, 3))]
        self.add("concat", (v, t), *parts, axis=self.axis(v))

    def reshape(self, v: Value, t: torch.Tensor) -> None:
        """Two neighbouring axes joined, one split, or one of size 1 added."""
        axis, shape = self.axis(v), list(v.shape)
        if self.random.random() < 0.4 and axis + 1 < len(shape):
            shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
        elif self.random.random() < 0.5:
            factor = math.gcd(shape[axis], 2)
            shape[axis : axis + 1] = [factor, shape[axis] // factor]
        else:
            shape.insert(axis, 1)
        self.add("reshape", (v, t), shape=tuple(shape))

    def expand(self, v: Value, t: torch.Tensor) -> None:
        self.add("expand", (v, t), shape=tuple(3 if size == 1 else size for size in v.shape))

    def matmul(self, v: Value, t: torch.Tensor) -> None:
        if v.rank < 2:
            return
        turned = v.swap(), t.transpose(-1, -2)
        self.add("matmul", *((v, t), turned)[:: 1 if self.random.random() < 0.5 else -1], transpose_a=False,
                 transpose_b=False)  # fmt: skip


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))


STEPS: dict[str, Callable[..., None]] = {
    name: getattr(Growing, name)
    for name in "transpose unary number binary reduce slice pad concat reshape expand matmul".split()
}


def moved_elements(graph: Graph) -> int:
    """By transposes that other nodes or outputs read."""
    return sum(node.outputs[0].size for node in graph.nodes if node.operator == "transpose")


@settings(RANDOM, max_examples=120)
@given(seed=SEEDS)
def test_a_simplified_graph_computes_what_was_asked_for(seed: int) -> None:
    made = Growing(seed, 12, 0.1)
    found = run_graph(made.graph, made.inputs)
    for name, tensor in made.expected.items():
        assert found[name].shape == tensor.shape == torch.Size(made.graph.outputs[name].shape)
    assert_alike(found, made.expected, 1e-9)


@pytest.mark.parametrize("change", [cancel_turns, join_shapes, join_slopes, move_parts])
@settings(RANDOM, max_examples=150)
@given(seed=SEEDS)
def test_a_pass_over_a_graph_keeps_values(change: Callable[[Graph], Graph], seed: int) -> None:
    made = Growing(seed, 10, 0.35)
    made.graph.prune()
    laid_out = change(made.graph)
    assert list(laid_out.outputs) == list(made.graph.outputs)
    found = run_graph(laid_out, made.inputs)
    for name, tensor in made.expected.items():
        assert found[name].shape == tensor.shape
    assert_alike(found, made.expected, 1e-9)


@settings(RANDOM, max_examples=150)
@given(seed=SEEDS)
def test_the_layout_pass_adds_no_transposes(seed: int) -> None:
    made = Growing(seed, 10, 0.35)
    made.graph.prune()
    assert moved_elements(cancel_turns(made.graph)) <= moved_elements(made.graph)


def test_turns_meet_and_cancel() -> None:
    graph = Graph()
    x, y = graph.input("x", (2, 3, 4, 5)), graph.input("y", (2, 3, 4, 5))
    there = (x.transpose(0, 2, 3, 1) + y.transpose(0, 2, 3, 1)).apply("relu")
    padded = there.pad((0, 1, 0, 0), (0, 1, 2, 0)).narrow(2, 1, 5).sum(1)
    graph.output("z", padded.reshape(2, 4, 3).transpose(0, 2, 1))
    laid_out = cancel_turns(graph)
    assert "transpose" not in laid_out.operators()
    inputs = {name: torch.randn(2, 3, 4, 5, dtype=torch.float64) for name in "xy"}
    assert_alike(run_graph(laid_out, inputs), run_graph(graph, inputs), 1e-12)


def test_simplification_leaves_nothing_to_compute() -> None:
    graph = Graph()
    x = graph.input("x", (2, 3, 4))
    same = [
        x + 0.0, 0.0 + x, x - 0.0, x * 1.0, 1.0 * x, x / 1.0, x.reshape(6, 4).reshape(2, 3, 4), x.narrow(1, 0, 3),
        x.transpose(2, 0, 1).transpose(1, 2, 0), x.pad((0, 0, 0), (0, 0, 0)), x.expand(2, 3, 4),
        graph.apply("concat", x, axis=1),
    ]  # fmt: skip
    assert all(value is x for value in same)
    assert (x * 2.0 * 3.0) is (x * 6.0)
    one = x.narrow(1, 0, 1)
    assert one.sum(1) is one and one.apply("reduce_max", axes=(1,)) is one
    assert (x + one.expand(2, 3, 4)) is (x + one)
    turned = x.swap().apply("matmul", x)
    assert turned.node.attributes == {"transpose_a": True, "transpose_b": False} and turned.node.inputs == (
        x,
        x,
    )
