"""A graph run on the engine `native`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgestill.export.lowering.graph import Graph
from edgestill.export.targets import native
from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines.native import open_runner


def run_native(
    graph: Graph, inputs: dict[str, torch.Tensor], folder: Path, threads: int = 1
) -> dict[str, torch.Tensor]:
    """The graph's outputs on the library; floating-point inputs are rounded to float32."""
    path = folder / "graph.plan"
    path.write_bytes(native.make_plan(graph).to_bytes())
    specs = [
        [TensorSpec(name, value.shape, value.dtype) for name, value in side]
        for side in ([(v.name, v) for v in graph.inputs], graph.outputs.items())
    ]
    runner = open_runner(threads)
    try:
        given, made = (runner.allocate(side) for side in specs)
        for name, array in given.items():
            array[...] = inputs[name].numpy()
        for array in made.values():
            array.reshape(-1).view(np.uint8).fill(255)  # so that what is not written shows
        program = runner.load(path, *specs)
        program.bind(given, made)()
        return {name: torch.from_numpy(array.copy()) for name, array in made.items()}
    finally:
        runner.close()
