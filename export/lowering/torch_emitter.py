"""A lowered graph as a PyTorch module: what ExecuTorch exports, and what tests run against eager PyTorch."""

from __future__ import annotations

import torch

from edgestill.export.lowering.graph import Graph
from edgestill.export.lowering.operators import OPERATORS


class GraphModule(torch.nn.Module):
    """Takes the graph's inputs positionally and returns its outputs as a tuple, both in the graph's order."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph
        for node in graph.nodes:
            for value in node.inputs:
                if value.constant is not None and not hasattr(self, value.name):
                    self.register_buffer(value.name, torch.from_numpy(value.constant.copy()))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {value.name: tensor for value, tensor in zip(self.graph.inputs, inputs, strict=True)}
        for node in self.graph.nodes:
            operands = [
                getattr(self, value.name) if value.constant is not None else values[value.name]
                for value in node.inputs
            ]
            results = OPERATORS[node.operator](*operands, **node.attributes)
            results = results if isinstance(results, tuple) else (results,)
            values.update((value.name, result) for value, result in zip(node.outputs, results, strict=True))
        return tuple(values[value.name] for value in self.graph.outputs.values())
