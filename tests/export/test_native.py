"""Engine `native`: plans on the library itself, against the same graph in float64."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph, run_graph
from edgestill.export.targets import native, native_kernels, native_plan, native_programs
from edgestill.export.targets.native_plan import KERNELS
from edgestill.export.targets.native_programs import STEPS
from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines import native as native_engine
from edgestill.runtime.engines.native import open_runner
from edgestill.runtime.errors import EngineError
from edgestill.runtime.native import plan_work
from edgestill.runtime.native.compile import SOURCES, compile_library
from tests.support.lowering import assert_alike, assert_as_exact_as_eager, of_the_corpus, studied
from tests.support.native.errors import FORM, MAGNITUDES, SHAPES, Case, errors
from tests.support.native.hostile import Words, check_plan, hostile_plans
from tests.support.native.plans import run_native
from tests.support.operator_cases import CASES, FLAT_CASES, with_gradients

RANDOM = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.contract
@pytest.mark.parametrize("name", of_the_corpus(150, "native"))
def test_a_network(name: str, tmp_path: Path) -> None:
    for seed in range(3):  # rounding may decide a kink
        case = studied(name, seed=seed)
        try:
            found = run_native(native.lower(case.graph), case.inputs, tmp_path)
            assert_as_exact_as_eager(found, case)
            return
        except AssertionError as error:
            last = error
    raise last


@pytest.mark.parametrize("operator", sorted(CASES | FLAT_CASES))
@settings(RANDOM, max_examples=10)
@given(seed=SEEDS)
def test_an_operator_and_its_gradients(
    operator: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arrays, attributes = (CASES | FLAT_CASES)[operator](np.random.default_rng(seed))
    rounded = [a.astype(np.float32).astype(a.dtype) if a.dtype.kind == "f" else a for a in arrays]
    graph, inputs = with_gradients(operator, rounded, attributes, np.random.default_rng(seed))
    expected = run_graph(graph, inputs)
    found = run_native(native.lower(graph), inputs, tmp_path_factory.mktemp("plan"))
    try:
        assert_alike(found, expected, 2e-5)
    except AssertionError as error:
        raise AssertionError(f"{[a.shape for a in arrays]}, {attributes}: {error}") from error


CHANNELS = [1, 2, 3, 15, 16, 17, 33, 40]
"""Fewer than a vector, a vector, and what is left over after one or two."""


def windows_and_what_follows(random: np.random.Generator) -> tuple[Graph, dict[str, torch.Tensor]]:
    """A convolution, its adjoint or a pooling of any shape, a program after it or none, and gradients."""

    def of(values: Sequence[int]) -> int:
        return int(random.choice(values))

    graph, a, size = Graph(), {"stride": [], "padding": [], "dilation": []}, []
    winograd = random.random() < 0.15
    operators = ["conv2d", "conv2d", "conv2d_transpose", "max_pool2d", "avg_pool2d"][: 3 if winograd else 5]
    operator = str(random.choice(operators))
    pooled = operator.endswith("pool2d")
    kernel = [3, 3] if winograd or random.random() < 0.3 else [of([1, 2, 3, 4, 5, 7]) for _ in range(2)]
    plain = winograd or random.random() < 0.5
    for k in kernel:
        dilation = 1 if plain or operator == "avg_pool2d" else of([1, 1, 2, 3])
        sides = random.integers(0, k // 2 + 1 if pooled else k + 1, 2).tolist()
        a["stride"].append(k if plain and pooled else 1 if plain else of([1, 1, 2, 3, 4, 8]))
        a["padding"].append((0, 0) if plain and pooled else tuple(sides))
        a["dilation"].append(dilation)
        least = max(1, dilation * (k - 1) + 1 - sum(sides) * (not (plain and pooled)))
        size.append(least + of([*range(12), 25]))
    if plain and pooled:  # side by side
        size = [k * of([1, 2, 3, 4]) for k in kernel]
    elif random.random() < 0.1:
        size[of([0, 1])] += 100  # more than a block
    a = {key: tuple(values) for key, values in a.items()}
    out = [
        (n + sum(pad) - d * (k - 1) - 1) // s + 1
        for n, k, s, pad, d in zip(size, kernel, a["stride"], a["padding"], a["dilation"], strict=True)
    ]
    images, channels = of([1, 2, 3, 5]), of(CHANNELS[4 if winograd else 0 :])
    x = graph.input("x", (images, channels, *size))
    trained = [x]
    if pooled:
        if operator == "avg_pool2d":
            del a["dilation"]
        source = x * 2.0 if random.random() < 0.5 else x  # exact, so that the same pixels are the largest
        y = source.apply(operator, kernel=tuple(kernel), **a)
    else:
        groups = 1 if winograd else of([1, 1, 1, 2, channels])
        inputs = channels if groups in (1, channels) else groups * of([1, 3, 8, 16, 17])
        outputs = channels if groups == channels > 1 else groups * of([16, 17, 40] if winograd else [1, 3, 16, 17, 40])
        graph, a = Graph(), a | {"groups": groups}
        w = graph.input("w", (outputs, inputs // groups, *kernel))
        if operator == "conv2d":
            x = graph.input("x", (images, inputs, *size))
            y = x.apply(operator, w, **a)
        else:
            x = graph.input("x", (images, outputs, *out))
            y = x.apply(operator, w, size=tuple(size), **a)
        trained = [x, w]
    channels, follows = y.shape[1], of([0, 1, 2, 3])
    if follows > 1:
        trained.append(graph.input("b", (channels,)))
        y = (y + trained[-1].reshape(1, channels, 1, 1)).apply("softplus")
    if follows in (1, 3) and y.size > 2 * channels:
        count = y.size // channels
        left = y - y.sum(0, 2, 3) * (1 / count)
        y = left * ((left * left).sum(0, 2, 3) * (1 / count) + 0.1).apply("rsqrt")
    graph.output("y", y)
    probe = graph.input("probe", y.shape)
    for name, value in gradients(graph, (y * probe).sum(0, 1, 2, 3).reshape(1), trained).items():
        graph.output(f"gradient.{name}", value)
    given = {v.name: random.standard_normal(v.shape).astype(np.float32) for v in graph.inputs}
    return graph, {name: torch.from_numpy(array.astype(float)) for name, array in given.items()}


@settings(RANDOM, max_examples=120)
@given(seed=SEEDS)
def test_windows_of_any_shape(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    graph, inputs = windows_and_what_follows(np.random.default_rng(seed))
    expected = run_graph(graph, inputs)
    found = run_native(native.lower(graph), inputs, tmp_path_factory.mktemp("plan"), 1 + seed % 3)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, wanted in expected.items():  # 1: what a normalization leaves of equal numbers is rounding
        error = float((found[name].double() - wanted).abs().max())
        size = max(float(wanted.abs().max()), largest / 100, 1.0)
        assert error <= 2e-5 * size, f"{name} of {size:.1e} differs by {error:.1e}"


@pytest.mark.parametrize("columns", [17, 300, 700])
def test_statistics_where_the_first_row_is_far_from_the_others(columns: int, tmp_path: Path) -> None:
    graph = Graph()
    x, w = graph.input("x", (4, 3, 10, 9)), graph.input("w", (columns, 3, 1, 1))
    x = x.apply("conv2d", w, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
    mean = x.sum(0, 2, 3) * (1 / 360)
    left = x - mean
    graph.output("mean", mean)
    graph.output("variance", (left * left).sum(0, 2, 3) * (1 / 360))
    x = torch.full((4, 3, 10, 9), 0.3)  # the same distance again and again: rounded the same way each time
    x[:, :, 0, 0] = 7.0 + torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    inputs = {"x": x, "w": torch.rand(columns, 3, 1, 1, generator=torch.Generator().manual_seed(1))}
    expected = run_graph(graph, {name: value.double() for name, value in inputs.items()})
    assert_alike(run_native(native.lower(graph), inputs, tmp_path), expected, 2e-5)


def test_broadcasting_along_more_axes_than_a_program_has(tmp_path: Path) -> None:
    graph = Graph()
    x, y = graph.input("x", (2, 1, 3, 1, 2, 1)), graph.input("y", (1, 4, 1, 3, 1, 2))
    graph.output("z", (x + y) * x)
    inputs = {v.name: torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for v in graph.inputs}
    assert_alike(run_native(native.lower(graph), inputs, tmp_path), run_graph(graph, inputs), 1e-6)


@pytest.mark.parametrize("count", [3, 30, 60, 200])
def test_a_program_of_more_values_than_registers(count: int, tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", (64,))
    parts = [(x * (0.1 * i + 2.0)).apply("tanh") for i in range(count)]
    total = parts[-1]
    for part in parts[::-1]:
        total = total * part + 1.0
    for part in parts:  # all of them are read once more, so all of them stay
        total = total + part
    graph.output("z", total)
    inputs = {"x": torch.randn(64, generator=torch.Generator().manual_seed(0))}
    assert_alike(run_native(native.lower(graph), inputs, tmp_path), run_graph(graph, inputs), 1e-5)


FUNCTIONS = {
    # function, its input, and the error that docs/native.md states, in units of the last place of the result
    "exp": (torch.exp, (-104.0, 88.7), 2),
    "log": (torch.log, (1e-38, 1e38), 2),
    "sqrt": (torch.sqrt, (0.0, 1e30), 0.5),
    "rsqrt": (torch.rsqrt, (1e-30, 1e30), 1.5),
    "tanh": (torch.tanh, (-12.0, 12.0), 3),
    "sigmoid": (torch.sigmoid, (-80.0, 80.0), 4),
    "softplus": (torch.nn.functional.softplus, (-80.0, 80.0), 4),
    "erf": (torch.erf, (-5.0, 5.0), 8),
    "sin": (torch.sin, (-1e5, 1e5), 1),
    "cos": (torch.cos, (-1e5, 1e5), 1),
    "atan": (torch.atan, (-1e6, 1e6), 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_of_a_function(name: str, tmp_path: Path) -> None:
    function, (low, high), most = FUNCTIONS[name]
    random, n = np.random.default_rng(0), 200_000
    if low > 0 or name in ("sqrt",):
        x = np.exp(random.uniform(np.log(max(low, 1e-38)), np.log(high), n))
    else:  # over the whole range, and near zero
        x = np.concatenate([random.uniform(low, high, n // 2), random.standard_normal(n // 2) * 0.5])
    x = torch.from_numpy(x.astype(np.float32))
    graph = Graph()
    graph.output("y", graph.input("x", tuple(x.shape)).apply(name))
    found = run_native(graph, {"x": x}, tmp_path)["y"].double()
    expected = function(x.double()) if name != "softplus" else function(x.double(), threshold=1e9)
    place = torch.from_numpy(np.spacing(np.abs(expected.numpy()).astype(np.float32)).astype(float))
    place = place.clamp_min(float(np.spacing(np.float32(1.2e-38))))
    assert float(((found - expected).abs() / place).max()) <= most


@pytest.mark.parametrize(
    "name", ["exp", "log", "tanh", "sigmoid", "softplus", "erf", "sqrt", "rsqrt", "relu", "abs", "floor"]
)
def test_a_function_of_what_is_no_number(name: str, tmp_path: Path) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
    graph = Graph()
    graph.output("y", graph.input("x", (9,)).apply(name))
    found = run_native(graph, {"x": x}, tmp_path)["y"]
    expected = run_graph(graph, {"x": x})["y"]
    assert torch.equal(found.isnan(), expected.isnan()), (found, expected)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-38, equal_nan=True), (found, expected)


@pytest.mark.parametrize("name", ["conv2d-strided", "resnet20", "mobilenet-v1", "lstm", "vit"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str, tmp_path: Path) -> None:
    case = studied(name)
    graph = native.lower(case.graph)
    first, *others = (run_native(graph, case.inputs, tmp_path, threads) for threads in (1, 2, 3, 8))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_the_bits_do_not_depend_on_the_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of AVX-512 it is twice as high; here on whatever this processor has."""
    other = native_engine.load_library(compile_library(output=tmp_path / "other.so", more=["-DROWS=12"]))
    for name in ("conv2d-strided", "resnet20", "mobilenet-v1", "vit"):
        case = studied(name)
        graph = native.lower(case.graph)
        first = run_native(graph, case.inputs, tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(native_engine, "_library", lambda: other)
            second = run_native(graph, case.inputs, tmp_path)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("threads", [2, 3])
def test_an_interrupt_leaves_no_thread_waiting(threads: int) -> None:
    runner, barrier = open_runner(threads), threading.Barrier(threads)
    seen: list[int] = []

    def call(number: int) -> None:
        seen.append(number)
        barrier.wait()
        if number == 0 and len(seen) == threads:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        runner.run(call)
        threading.Event().wait(60)  # where the signal comes late
    runner.run(call)
    assert sorted(seen) == sorted([*range(threads)] * 2)
    runner.close()


def small_plan() -> tuple[Graph, bytes]:
    graph = Graph()
    x, w = graph.input("x", (2, 3, 8, 8)), graph.input("w", (4, 3, 3, 3))
    a = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
    y = (
        x.apply("conv2d", w, **a)
        .apply("relu")
        .apply("max_pool2d", kernel=(2, 2), stride=(2, 2), padding=((0, 0), (0, 0)), dilation=(1, 1))
    )
    loss = (y * y).sum(0, 1, 2, 3).reshape(1)
    graph.output("dw", gradients(graph, loss, [w])["w"])
    graph.output("loss", loss)
    graph = native.lower(graph)
    return graph, native.make_plan(graph).to_bytes()


@settings(RANDOM, max_examples=400)
@given(data=st.data())
def test_a_hostile_plan_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    graph, plan = small_plan()
    words = np.frombuffer(plan[: len(plan) // 8 * 8], np.int64).copy()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(words) - 1))
        value = data.draw(
            st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**40, -(2**63), 2**63 - 1])
            | st.integers(-(2**63), 2**63 - 1)
        )
        words[place] = value
    cut = data.draw(st.integers(0, 8)) if data.draw(st.booleans()) else 0
    path = tmp_path_factory.mktemp("hostile") / "graph.plan"
    path.write_bytes(words.tobytes()[: len(plan) - cut])
    sides = [
        [TensorSpec(name, value.shape, value.dtype) for name, value in side]
        for side in ([(v.name, v) for v in graph.inputs], graph.outputs.items())
    ]
    runner = open_runner(1)
    given_, made = (runner.allocate(side) for side in sides)
    try:
        program = runner.load(path, *sides)
    except EngineError as error:
        assert str(path.name) in error.message
        return
    if len(words) < 5000 and words[3] < 2**24 and words[4] < 2**24:
        program.bind(given_, made)()
    assert not any(array.any() for array in given_.values())  # what is only read stays as it was


def test_why_a_plan_is_refused() -> None:
    for name, plan, why in hostile_plans():
        assert check_plan(plan) == why, name


def test_what_is_no_plan(tmp_path: Path) -> None:
    graph, plan = small_plan()
    sides = [
        [TensorSpec(name, value.shape, value.dtype) for name, value in side]
        for side in ([(v.name, v) for v in graph.inputs], graph.outputs.items())
    ]
    path, runner = tmp_path / "graph.plan", open_runner(1)
    for data, message in (
        (b"", "no plan"),
        (b"0" * 64, "no plan"),
        (plan[:-8], "cut off"),
        (plan + b"\0" * 8, "cut off"),
        (plan[:8] + (9).to_bytes(8, "little") + plan[16:], "another version"),
    ):
        path.write_bytes(data)
        with pytest.raises(EngineError, match=message):
            runner.load(path, *sides)
    path.write_bytes(plan)
    with pytest.raises(EngineError, match="other tensors"):
        runner.load(path, sides[0][:1], sides[1])
    for memory, written in ((2, 1), (4, 0)):  # the first input and the first output
        words = Words(plan)
        words.memories[2 * memory + 1], words.calls = written, []
        path.write_bytes(words.to_bytes())
        with pytest.raises(EngineError, match="writes to its inputs, or not to its outputs"):
            runner.load(path, *sides)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_what_winograd_loses(shape: tuple[int, ...], tmp_path: Path) -> None:
    """The bounds of docs/native.md; more shapes: python -m tests.support.native.errors."""
    for magnitude in MAGNITUDES:
        case = Case(*shape, magnitude)
        assert max(errors(case, tmp_path).values()) < 2.5e-5, case
        assert max(errors(case, tmp_path, winograd=False).values()) < 3e-6, case


@pytest.mark.parametrize(("images", "parts"), [(8, 1), (9, 2), (20, 3)])
def test_a_weight_gradient_in_parts_of_the_images(images: int, parts: int, tmp_path: Path) -> None:
    """36 tiles an image: of eight a chain of sums is full."""
    graph = Graph()
    x, dy = graph.input("x", (images, 16, 24, 24)), graph.input("dy", (images, 24, 24, 24))
    w = graph.input("w", (24, 16, 3, 3))
    graph.output("dw", graph.apply_many("conv2d_weight_grad", x, dy, w, bias=False, **FORM)[0])
    assert native.make_plan(native.lower(graph)).kernels()["winograd_grad"] == parts
    assert max(errors(Case(images, 16, 24, 24, "normal"), tmp_path).values()) < 2.5e-5
    inputs = {v.name: torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for v in graph.inputs}
    one, three = (run_native(native.lower(graph), inputs, tmp_path, threads)["dw"] for threads in (1, 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize("change", [{"groups": 2}, {"stride": (2, 2)}, {"dilation": (2, 2)}, {}])
def test_where_a_convolution_is_no_winograd(change: dict) -> None:
    """Few channels or pixels, or another form."""
    form = FORM | change
    for channels, outputs, size in ((32, 32, 8), (15, 32, 8), (32, 15, 8), (32, 32, 3)):
        graph = Graph()
        if channels % form["groups"] or outputs % form["groups"]:
            continue
        x = graph.input("x", (2, channels, size, size))
        w = graph.input("w", (outputs, channels // form["groups"], 3, 3))
        graph.output("y", x.apply("conv2d", w, **form))
        kernels = native.make_plan(native.lower(graph)).kernels()
        assert ("winograd" in kernels) == (not change and (channels, outputs, size) == (32, 32, 8))


def library_numbers() -> dict[str, int]:
    """What layout.h, plan.h and vectors.h call by a name: defines and enumerators."""
    numbers: dict[str, int] = {}
    text = "".join((SOURCES / name).read_text() for name in ("vectors.h", "plan.h", "layout.h"))
    text = re.sub(r"/[*].*?[*]/", "", text, flags=re.DOTALL)
    for define, value, enumerators in re.findall(r"#define ([A-Z_]+) ([0-9A-Zxa-f_ *()]+)\n|enum \{([^}]*)\}", text):
        if define:
            numbers[define] = eval(value, {}, numbers)
        counted = -1
        for enumerator in enumerators.split(",") if enumerators else ():
            name, _, given = enumerator.partition("=")
            counted = numbers[name.strip()] = eval(given, {}, numbers) if given else counted + 1
    return numbers


def test_the_library_and_the_planner_number_alike() -> None:
    text = (SOURCES / "kernels.c").read_text()
    table = text[text.index("KERNELS[] = {") :]
    named = [part.split("_tasks")[0].split()[-1] for part in table.split("};")[0].split("{")[2:]]
    assert tuple(named) == KERNELS
    library = library_numbers()
    assert [library[name.upper()] for name in STEPS] == list(range(library["OPERATORS"]))
    for module in (native_kernels, native_plan, native_programs, plan_work):
        own = {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}
        both = own.keys() & library.keys()
        assert {name: own[name] for name in both} == {name: library[name] for name in both}, module.__name__
    words = {
        "CONV_GROUPS": plan_work.GROUPS, "CONV_ADJOINT": plan_work.ADJOINT,
        "UNPOOLED": native_programs.UNPOOLED, "MAP_LOADS": 5, "MAP_BODY": 10, "LOAD_WORDS": 9,
        "PRODUCT_BATCHES": 8, "PRODUCT_K": 11, "CONV_N": 10, "COPY_ITEM": 4, "COPY_SIZES": 8, "REDUCE_OUTER": 7,
        "REDUCE_INNER": 9, "ROWS_COUNT": 7, "INDEX_OUTER": 7, "INDEX_INNER": 10,
    }  # fmt: skip
    assert {name: library[name] for name in words} == words  # as plan_work.py reads a call
    assert {"BLOCK", "MAP_TASK", "SUM_ROWS", "REGISTERS", "LANES", "TASK_ROWS", "RUN", "SPOTS", "VERSION"} <= {
        name for module in (native_kernels, native_programs, plan_work) for name in vars(module)
    }
