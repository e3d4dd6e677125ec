"""Students captured with a loss and its gradients, beside what eager PyTorch computes of them in float64."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.lowering import graph as graphs
from edgestill.export.lowering.capture import SampleSpec, capture
from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph
from edgestill.export.parity.noise import GivenNoise
from edgestill.export.parts import Parts, student_parts
from edgestill.export.targets.onnx_emitter import to_onnx
from tests.support.networks import BEYOND_EXPORT, NETWORKS

Tensors = dict[str, torch.Tensor]
BATCH = 4
ROUNDING = 3e-6
"""Of a tensor's largest entry: constants of a graph are float32 even where it computes in float64."""
MOVED = 1e-9
"""Of a number itself: far above rounding in float64, far below what a result may differ by."""


@dataclass(frozen=True)
class Studied:
    """A graph of latents, logits, `next.BUFFER` and `gradient.PARAMETER`, its inputs, and what eager PyTorch gives."""

    graph: Graph
    inputs: Tensors  # float64
    eager: Tensors  # in float64
    eager32: Tensors  # in float32, whose own error says how exact an engine can be
    moved: tuple[Tensors, ...] = ()  # in float64 of samples and state that are moved by `MOVED`

    def lies_at_a_jump(self, tolerance: float) -> bool:
        """Whether rounding decides a result, as of the floor of a mean that is zero: eager PyTorch alone says so, in
        which a tiny move of what is given then makes a large one."""
        return any(_furthest(moved, self.eager)[0] > tolerance for moved in self.moved)

    def check(self, found: Mapping[str, torch.Tensor], tolerance: float = ROUNDING) -> None:
        """Every output within `tolerance` of the largest entry of what eager PyTorch gives in float64."""
        assert_alike(found, self.eager, tolerance)


def study(
    student: nn.Module,
    samples: Tensors,
    training: bool = True,
    split: tuple[str, ...] = (),
    seed: int = 0,
    moves: int = 0,
) -> Studied:
    """The student captured in one mode; in training mode with the gradients of a loss of its latents and logits."""
    parts = student_parts(student, split)
    prefix = parts.prefix
    specs = [
        SampleSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in samples.items()
    ]
    state = {n: t.detach().clone() for n, t in [*parts.named_buffers(), *parts.named_parameters()]}
    captured = capture(parts, specs, training, prefix)
    graph, random = captured.graph, torch.Generator().manual_seed(seed)
    noise = {f"noise.{i}": torch.rand(shape, generator=random) for i, shape in enumerate(captured.noise)}
    probe = torch.randn(captured.latents.shape, generator=random)
    labels = torch.randint(0, captured.logits.shape[1], (captured.logits.shape[0],), generator=random)
    given = samples | noise | {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if training:
        given["probe"] = probe
        _add_gradients(
            graph, labels, [n.removeprefix(prefix) for n, p in parts.named_parameters() if p.requires_grad]
        )
    runs = [(parts, samples, torch.float64), (parts, samples, torch.float32)]
    runs += [(*_moved(parts, samples, random), torch.float64) for _ in range(moves)]
    results = [
        {name.replace(f".{prefix}", ".") if prefix else name: tensor for name, tensor in found.items()}
        for found in (_eager(*run, [*noise.values()], labels, probe) for run in runs)
    ]
    reads = {value.name for value in graph.inputs}
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in given.items() if n in reads}
    eager, eager32, *moved = ({n: t for n, t in r.items() if n in graph.outputs} for r in results)
    return Studied(graph, inputs, eager, eager32, tuple(moved))


def _add_gradients(graph: Graph, labels: torch.Tensor, trained: list[str]) -> None:
    """Outputs `gradient.NAME` of cross-entropy plus the mean of latents · probe; the probe is an input."""
    latents, logits = graph.outputs["latents"], graph.outputs["logits"]
    one_hot = graph.constant(F.one_hot(labels, logits.shape[1]).numpy().astype(np.float32))
    ce = (logits.apply("log_softmax") * one_hot).sum(0, 1).reshape(1) * (-1 / len(labels))
    loss = ce + (latents * graph.input("probe", latents.shape)).mean(0, 1).reshape(1)
    wanted = [value for value in graph.inputs if value.name in trained]
    for name, value in gradients(graph, loss, wanted).items():
        graph.output(f"gradient.{name}", value)
    graph.prune()


def _moved(parts: Parts, samples: Tensors, random: torch.Generator) -> tuple[Parts, Tensors]:
    """Both in float64, each number another one by about `MOVED` of itself; what is zero stays so."""

    def move(x: torch.Tensor) -> torch.Tensor:
        by = torch.randn(x.shape, generator=random, dtype=torch.float64)
        return x.double() * (1 + MOVED * by) if x.is_floating_point() else x

    own = copy.deepcopy(parts).double()
    with torch.no_grad():
        for tensor in [*own.parameters(), *own.buffers()]:
            tensor.copy_(move(tensor))
    return own, {name: move(tensor) for name, tensor in samples.items()}


def _eager(parts: Parts, samples: Tensors, dtype, noise: list[torch.Tensor], labels, probe) -> Tensors:
    own = copy.deepcopy(parts).to(dtype).train(parts.training)
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in samples.values()]
    with default_dtype(dtype), GivenNoise([tensor.to(dtype) for tensor in noise]):
        latents, logits = own(*inputs)
    results = {"latents": latents.detach(), "logits": logits.detach()}
    if parts.training:
        loss = F.cross_entropy(logits, labels) + (latents * probe.to(dtype)).mean()
        loss.backward()
        results |= {f"gradient.{n}": p.grad for n, p in own.named_parameters() if p.grad is not None}
        results |= {f"next.{name}": buffer for name, buffer in own.named_buffers()}
    return results


@contextmanager
def exact_constants() -> Iterator[None]:
    """Graphs made here have constants in float64, for `run_graph`: rounding them decides no floor and no comparison."""
    before, graphs.FLOAT = graphs.FLOAT, np.float64
    try:
        yield
    finally:
        graphs.FLOAT = before


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of tensors that a student makes, and of what its `.float()` gives."""
    before, cast = torch.get_default_dtype(), torch.Tensor.float
    torch.set_default_dtype(dtype)
    torch.Tensor.float = lambda tensor: tensor.to(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.Tensor.float = cast


def assert_alike(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    """Gradients that cancel, as of a bias before BatchNorm, are zero but for rounding: of the largest gradient."""
    assert found.keys() >= expected.keys(), f"missing: {expected.keys() - found.keys()}"
    worst = _furthest(found, expected)
    assert worst[0] <= tolerance, f"{worst[1]} differs by {worst[0]:.2e} of its largest entry"


def _furthest(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """How far what is found differs at most, in largest entries, and where; NaN is further than anything."""
    return max(
        ((float((found[n].double() - wanted).abs().max()) / size, n) for n, wanted, size in _sizes(expected)),
        default=(0.0, ""),
        key=lambda pair: (pair[0] != pair[0], pair[0]),
    )


def _sizes(expected: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, float]]:
    largest = max(
        (float(t.abs().max()) for n, t in expected.items() if n.startswith("gradient.")), default=0.0
    )
    for name, tensor in expected.items():
        floor = 1e-2 * largest if name.startswith("gradient.") else 1e-12
        if tensor.numel():
            yield name, tensor, max(float(tensor.abs().max()), floor, 1e-12)


def assert_as_exact_as_eager(
    found: Mapping[str, torch.Tensor], studied: Studied, times: float = 30.0
) -> None:
    """Each tensor's error is a small multiple of eager float32's own, or what one rounding of it is."""
    for name, wanted, size in _sizes(studied.eager):
        error = float((found[name].double() - wanted).abs().max()) / size
        own = float((studied.eager32[name].double() - wanted).abs().max()) / size
        assert error <= max(times * own, 2e-5), f"{name} differs by {error:.2e}, eager float32 by {own:.2e}"


def run_onnx(graph: Graph, inputs: Tensors) -> Tensors:
    """The emitted model in stock ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = to_onnx(graph).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {v.name: _as_given(inputs[v.name]).numpy() for v in graph.inputs}
    results = session.run(list(graph.outputs), feeds)
    return {
        name: torch.from_numpy(np.asarray(result))
        for name, result in zip(graph.outputs, results, strict=True)
    }


def _as_given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


# the corpus


@lru_cache(maxsize=64)
def studied(name: str, training: bool = True, seed: int = 0) -> Studied:
    """A network of the corpus, its weights and samples by a seed."""
    network = NETWORKS[name]
    torch.manual_seed(seed)
    student = network.build()
    with torch.no_grad():  # a normalization's factors of both signs, none 0 or 1 by accident
        for module in student.modules():
            for part in ("weight", "bias"):
                if isinstance(module, nn.modules.batchnorm._NormBase) and getattr(module, part) is not None:
                    getattr(module, part).copy_(torch.randn_like(getattr(module, part)))
    return study(student, {"images": network.example(BATCH, seed)}, training, seed=seed)


def place(name: str, salt: str = "") -> int:
    """A number of 0 to 999 that a name always has."""
    return int.from_bytes(hashlib.sha256(f"{salt}{name}".encode()).digest()[:4], "big") * 1000 >> 32


def of_the_corpus(per_mille: int, salt: str = "") -> list:
    """Every network of the corpus: of each thousand this many, by the hash of the name, in CI, the others in `long`."""
    return [
        pytest.param(
            name, marks=[] if place(name, salt) < per_mille else [pytest.mark.long, pytest.mark.timeout(900)]
        )
        for name in NETWORKS
        if name not in BEYOND_EXPORT
    ]
