"""Whether a captured graph computes what the student does, in training and in inference mode: asked at every export."""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from edgestill.export.lowering.capture import Captured, is_state
from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph, LoweringError, run_graph
from edgestill.export.lowering.rewrite import inline
from edgestill.export.parity.noise import GivenNoise
from edgestill.export.parts import Parts
from edgestill.runtime.bundle.manifest import InputSpec

TOLERANCE = 1e-3
"""Of the largest entry; two orders of float32 operations differ by far less, another function by far more."""
GRADIENT_TOLERANCE, SEEDS = 0.1, 3
"""Of a gradient's norm, on one of so many random batches: an activation may lie on a kink."""


def check_fidelity(
    student: nn.Module, parts: Parts, captured: Mapping[bool, Captured], samples: Sequence[InputSpec], batch: int
) -> None:
    """Compares student(x), the parts called one by one, and the graph of each mode (True: training), on random samples.

    Errors: LoweringError saying what differs.
    """
    given = random_samples(student, samples, batch, np.random.default_rng(0))
    inputs = [as_float(array, spec) for array, spec in zip(given, samples, strict=True)]
    named = {spec.name: tensor for spec, tensor in zip(samples, inputs, strict=True)}
    state = parts.own((name, t.detach().clone()) for name, t in [*parts.named_buffers(), *parts.named_parameters()])
    for training, graph in captured.items():
        mode = "training" if training else "inference"
        parts.train(training)
        generator = GivenNoise()
        drawn_before = _drawn_elsewhere()
        with _unchanged(parts), torch.no_grad(), generator:
            torch.manual_seed(0)
            with _named(f"the student fails in {mode} mode below torch.no_grad(), on random samples"):
                expected = dict(zip(("latents", "logits"), parts(*_copied(inputs)), strict=True))
            _check_buffers(parts, graph, state, mode)
        if _drawn_elsewhere() != drawn_before:
            raise LoweringError(
                f"the student draws from Python's or NumPy's generator in {mode} mode, which a graph would not repeat",
                hint="draw with torch.rand, torch.randn or nn.Dropout",
            )
        with _unchanged(parts):
            own = _own_forward(student, parts, inputs, generator.drawn)
        for name, ours in own.items():
            _compare(ours, expected[name], f"student(x) gives other {name} than "
                     f"output(representation(perception(x))) in {mode} mode",
                     "a student's own forward() is not part of a bundle: put what it does into the three parts, or "
                     "export the model as it is with --split")  # fmt: skip
        if graph.noise != (drawn := tuple(tuple(tensor.shape) for tensor in generator.drawn)):
            raise LoweringError(
                f"the student draws {len(drawn)} random tensors in {mode} mode, its graph {len(graph.noise)}",
                hint="draw with torch.rand, torch.randn or nn.Dropout, the same number of times at every call",
            )
        noise = {f"noise.{i}": tensor for i, tensor in enumerate(generator.drawn)}
        with torch.no_grad():
            found = run_graph(graph.graph, state | named | noise)
        for name, ours in expected.items():
            _compare(found[name], ours, f"the captured graph gives other {name} than the student in {mode} mode",
                     "this is a defect of edgestill, or the student reads what no graph has: a clock, state outside of "
                     "its buffers, is_grad_enabled(), requires_grad, is_exporting()")  # fmt: skip
    parts.train()
    _check_gradients_are_torchs(parts, inputs)
    _check_gradients(student, parts, captured[True], samples, batch)


def _check_gradients_are_torchs(parts: Parts, inputs: list[torch.Tensor]) -> None:
    """A torch.autograd.Function has a backward() of its own, of which a trace of the forward pass knows nothing."""
    hooked = [name for name, m in parts.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if hooked:
        raise LoweringError(
            f"the student's {hooked[0]} has a backward hook, which would be lost",
            hint="leave it out: a step's gradients are those of its forward pass",
        )
    with _unchanged(parts):
        left, seen = [tensor.grad_fn for tensor in parts(*_copied(inputs))], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            name = type(node).__name__.removesuffix("Backward")
            raise LoweringError(
                f"the student calls {name}, a torch.autograd.Function whose backward() would be lost",
                hint="say its forward pass in PyTorch's operators, with detach() for what is to have no gradient",
            )


def _copied(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A student may change its input in place."""
    return [tensor.clone() for tensor in inputs]


def _drawn_elsewhere() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return python_random.getstate(), keys.tobytes(), *rest


def _check_buffers(parts: Parts, graph: Captured, before: Mapping[str, torch.Tensor], mode: str) -> None:
    """After a forward pass: what has changed is what the graph writes, and in inference mode nothing."""
    for name, tensor in parts.own(parts.named_buffers()).items():
        if torch.equal(tensor, before[name]) or not is_state(tensor, True):
            continue
        if mode == "inference":
            raise LoweringError(
                f"the student changes its buffer {name} in inference mode", hint="change it in training alone"
            )
        if name not in graph.written:
            raise LoweringError(
                f"the student gives its buffer {name} another tensor, which a graph would not keep",
                hint=f"change it in place: self.{name.rpartition('.')[2]}.copy_(…)",
            )


def _check_gradients(
    student: nn.Module, parts: Parts, captured: Captured, samples: Sequence[InputSpec], batch: int
) -> None:
    """Errors: LoweringError for a parameter whose gradient by the rules is not what autograd gives."""
    trained = {n: p for n, p in parts.own(parts.named_parameters()).items() if p.requires_grad}
    if not trained:
        return
    graph = Graph()
    values = {value.name: graph.input(value.name, value.shape, value.dtype) for value in captured.graph.inputs}
    found = inline(graph, captured.graph, values)
    weighted = [found[name] * graph.input(f"weight of {name}", found[name].shape) for name in ("latents", "logits")]
    loss = sum(part.sum(0, 1) for part in weighted)
    rules = gradients(graph, loss, [values[name] for name in trained if name in values])
    graph.outputs = dict(rules)
    graph.prune()
    state = parts.own((n, t.detach().clone()) for n, t in [*parts.named_buffers(), *parts.named_parameters()])
    worst = ""
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        arrays = random_samples(student, samples, batch, random)
        inputs = [as_float(array, spec) for array, spec in zip(arrays, samples, strict=True)]
        factors = [torch.from_numpy(random.standard_normal(v.shape).astype(np.float32)) for v in
                   (captured.latents, captured.logits)]  # fmt: skip
        generator = GivenNoise()
        with _unchanged(parts), torch.enable_grad(), generator:
            torch.manual_seed(seed)
            total = sum(
                (one * factor).sum() for one, factor in zip(parts(*_copied(inputs)), factors, strict=True)
            )
            with _named("the student's gradient fails in PyTorch itself, on random samples"):
                autograd = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        given = state | {spec.name: tensor for spec, tensor in zip(samples, inputs, strict=True)}
        given |= {f"noise.{i}": tensor for i, tensor in enumerate(generator.drawn)}
        given |= {f"weight of {n}": f for n, f in zip(("latents", "logits"), factors, strict=True)}
        with torch.no_grad():
            ours = run_graph(graph, given)
        if not (worst := _worst(ours, dict(zip(trained, autograd, strict=True)))):
            return
    raise LoweringError(
        f"the gradient of the student's {worst} is not autograd's",
        hint="leave out what changes a gradient on its way: hooks, changes in place below torch.no_grad(), closures "
        "over another copy of the module",
    )


def _worst(ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor | None]) -> str:
    """The name of a gradient that differs, or none; small beside the others are those that only rounding makes."""
    sizes = {name: 0.0 if tensor is None else float(tensor.norm()) for name, tensor in expected.items()}
    if not all(map(np.isfinite, sizes.values())):
        return ""  # eager PyTorch itself gives no number here
    floor = 1e-3 * max(sizes.values(), default=0.0) + 1e-12
    for name, tensor in expected.items():
        apart = ours[name] if tensor is None and name in ours else tensor
        if tensor is not None and name in ours:
            apart = ours[name] - tensor
        if apart is not None and not float(apart.norm()) <= GRADIENT_TOLERANCE * max(sizes[name], floor):
            return name
    return ""


def random_samples(
    student: nn.Module, samples: Sequence[InputSpec], batch: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Random samples as a data set would have them; indices are below the smallest vocabulary of the student."""
    sizes = [m.num_embeddings for m in student.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    arrays = []
    for spec in samples:
        shape = (batch, *spec.shape)
        if spec.dtype == "uint8":
            arrays.append(random.integers(0, 256, shape).astype(np.uint8))
        elif spec.dtype == "int64":
            arrays.append(random.integers(0, min(sizes, default=2), shape))
        else:
            arrays.append(random.standard_normal(shape).astype(np.float32))
    return arrays


def as_float(array: np.ndarray, spec: InputSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A sample tensor as the student's perception module takes it: grey levels normalised, others as they are."""
    tensor = torch.from_numpy(np.asarray(array))
    if spec.dtype == "int64":
        return tensor
    tensor = tensor.to(dtype)
    if spec.dtype != "uint8":
        return tensor
    shape = (1, -1, *(1,) * (tensor.ndim - 2))
    mean, std = (torch.tensor(values, dtype=dtype).reshape(shape) for values in (spec.mean, spec.std))
    return (tensor / 255 - mean) / std


def _own_forward(
    student: nn.Module, parts: Parts, inputs: list[torch.Tensor], noise: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the student's own forward() gives, by name; nothing where it has none."""
    if parts.prefix or type(student).forward is nn.Module.forward:
        return {}
    try:
        with torch.no_grad(), GivenNoise(noise):
            result = student(*_copied(inputs))
    except NotImplementedError:
        return {}
    except Exception as error:
        raise LoweringError(
            f"student(x) fails where output(representation(perception(x))) works: {type(error).__name__}: {error}",
            hint="leave forward() out, let it return (latents, logits), or export with --split",
        ) from error
    if isinstance(result, torch.Tensor):
        return {"logits": result}
    pair = isinstance(result, tuple | list) and len(result) == 2
    return dict(zip(("latents", "logits"), result, strict=True)) if pair else {}


def _compare(ours: torch.Tensor, expected: torch.Tensor, message: str, hint: str) -> None:
    if ours.shape != expected.shape:
        raise LoweringError(f"{message}: shape {list(ours.shape)}, not {list(expected.shape)}", hint)
    if not bool(torch.isfinite(expected).all()):
        raise LoweringError(
            "the student gives NaN or infinity for random samples", hint="check its weights and its input"
        )
    difference = float((ours - expected).abs().max())
    if not difference <= TOLERANCE * max(float(expected.abs().max()), 1e-6):
        raise LoweringError(f"{message}: by up to {difference:.3g}", hint)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """PyTorch's own errors become a LoweringError that begins with `what`."""
    try:
        yield
    except RuntimeError as error:
        raise LoweringError(
            f"{what}: {error}", "call the student, and backward(), on such samples yourself"
        ) from error


@contextmanager
def _unchanged(parts: Parts) -> Iterator[None]:
    """Puts buffers and torch's generator back afterwards."""
    saved = [tensor.clone() for tensor in parts.buffers()]
    with torch.random.fork_rng(devices=[]):
        yield
    with torch.no_grad():
        for tensor, before in zip(parts.buffers(), saved, strict=True):
            tensor.copy_(before)
