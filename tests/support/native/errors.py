"""What the convolutions of the engine `native` lose: their error against float64, of many shapes and magnitudes.

`python -m tests.support.native.errors` prints the table of docs/native.md. An error is the largest of a result, divided
by the largest element of the same convolution of magnitudes, Σ|x|·|w|: to what is lost where numbers cancel, every
kernel in float32 is subject.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from edgestill.export.lowering.graph import Graph
from edgestill.export.targets import native, native_kernels
from tests.support.native.plans import run_native

FORM = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
MAGNITUDES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "after ReLU": lambda random, shape: np.maximum(random.standard_normal(shape), 0),
    "mean 100": lambda random, shape: random.standard_normal(shape) + 100,
    "1e-20": lambda random, shape: random.standard_normal(shape) * 1e-20,
    "1e15": lambda random, shape: random.standard_normal(shape) * 1e15,
    "six decades": lambda random, shape: random.standard_normal(shape) * 10 ** random.uniform(-6, 0, shape),
    "one pixel": lambda random, shape: random.standard_normal(shape) * 1e-3 + (random.uniform(size=shape) < 1e-3),
}
KERNELS = ("forward", "adjoint", "weight gradient")


@dataclass(frozen=True)
class Case:
    images: int
    channels: int
    size: int
    outputs: int
    magnitude: str


SHAPES = ((2, 16, 4, 16), (4, 16, 9, 24), (8, 64, 16, 64), (16, 32, 32, 32), (2, 256, 8, 128), (1, 512, 4, 512))


def errors(case: Case, folder: Path, winograd: bool = True) -> dict[str, float]:
    """Of each kernel: its largest error, as said above; of F(4×4, 3×3), or of the plain sum."""
    random = np.random.default_rng([case.images, case.channels, case.size])
    make = MAGNITUDES[case.magnitude]
    image = (case.images, case.channels, case.size, case.size)
    x, dy = (make(random, (*image[:1], c, *image[2:])) for c in (case.channels, case.outputs))
    w = random.standard_normal((case.outputs, case.channels, 3, 3)) / math.sqrt(9 * case.channels)
    given = {name: torch.from_numpy(a.astype(np.float32)) for name, a in (("x", x), ("dy", dy), ("w", w))}
    graph = Graph()
    values = {name: graph.input(name, tuple(a.shape)) for name, a in given.items()}
    graph.output("forward", values["x"].apply("conv2d", values["w"], **FORM))
    graph.output("adjoint", values["dy"].apply("conv2d_transpose", values["w"], size=image[2:], **FORM))
    graph.output(
        "weight gradient",
        graph.apply_many("conv2d_weight_grad", values["x"], values["dy"], values["w"], bias=False, **FORM)[0],
    )
    rule = native_kernels.has_winograd
    try:
        if not winograd:
            native_kernels.has_winograd = lambda *_: False
        found = run_native(native.lower(graph), given, folder)
    finally:
        native_kernels.has_winograd = rule
    exact, sizes = (_exact({k: of(v.double()) for k, v in given.items()}) for of in (torch.clone, torch.abs))
    return {n: float((found[n].double() - exact[n]).abs().max() / sizes[n].abs().max()) for n in KERNELS}


def _exact(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    x, dy, w = (given[name].clone().requires_grad_(name != "dy") for name in ("x", "dy", "w"))
    y = F.conv2d(x, w, padding=1)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return {"forward": y.detach(), "adjoint": dx, "weight gradient": dw}


def main() -> int:
    print("| images, channels, pixels → outputs | " + " | ".join(KERNELS) + " |")
    print("| --- " * (1 + len(KERNELS)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            found = [[errors(Case(*shape, m), Path(folder), fast) for m in MAGNITUDES] for fast in (True, False)]
            cells = [" / ".join(f"{max(row[name] for row in found[i]):.1e}" for i in (0, 1)) for name in KERNELS]
            images, channels, size, outputs = shape
            print(f"| {images}, {channels}, {size}×{size} → {outputs} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
