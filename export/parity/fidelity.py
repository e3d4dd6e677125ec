"""Whether a captured graph computes what the student does, in training and in inference mode: asked at every export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from edgestill.export.lowering.capture import Captured
from edgestill.export.lowering.graph import LoweringError, run_graph
from edgestill.export.parity.noise import GivenNoise
from edgestill.export.parts import Parts
from edgestill.runtime.bundle.manifest import InputSpec

TOLERANCE = 1e-3
"""Of the largest entry; two orders of float32 operations differ by far less, another function by far more."""


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
        with _unchanged(parts), torch.no_grad(), generator:
            torch.manual_seed(0)
            expected = dict(zip(("latents", "logits"), parts(*inputs), strict=True))
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
                     "this is a defect of edgestill, or the student keeps state outside of its buffers")  # fmt: skip
    parts.train()
    _check_gradients_are_torchs(parts, inputs)


def _check_gradients_are_torchs(parts: Parts, inputs: list[torch.Tensor]) -> None:
    """A torch.autograd.Function has a backward() of its own, of which a trace of the forward pass knows nothing."""
    hooked = [name for name, p in parts.named_parameters() if p._backward_hooks]
    hooked += [name for name, m in parts.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if hooked:
        raise LoweringError(
            f"the student's {hooked[0]} has a backward hook, which would be lost",
            hint="leave it out: a step's gradients are those of its forward pass",
        )
    with _unchanged(parts):
        left, seen = [tensor.grad_fn for tensor in parts(*inputs)], set()
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
            result = student(*inputs)
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
def _unchanged(parts: Parts) -> Iterator[None]:
    """Puts buffers and torch's generator back afterwards."""
    saved = [tensor.clone() for tensor in parts.buffers()]
    with torch.random.fork_rng(devices=[]):
        yield
    with torch.no_grad():
        for tensor, before in zip(parts.buffers(), saved, strict=True):
            tensor.copy_(before)
