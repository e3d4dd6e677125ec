"""A lowered graph as a PyTorch module: what ExecuTorch exports, and what tests run against eager PyTorch."""

from __future__ import annotations

import torch

from edgestill.export.lowering.graph import Graph, Value, run_operator


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
        turned: dict[str, torch.Tensor] = {}  # one transpose of a matrix serves all its products

        def of(value: Value) -> torch.Tensor:
            return getattr(self, value.name) if value.constant is not None else values[value.name]

        def turn(value: Value) -> torch.Tensor:
            if value.name not in turned:
                turned[value.name] = of(value).transpose(-1, -2)
            return turned[value.name]

        for node in self.graph.nodes:
            attributes, operands = node.attributes, [of(value) for value in node.inputs]
            if node.operator == "matmul":
                flags = (attributes["transpose_a"], attributes["transpose_b"])
                operands = [turn(v) if flag else of(v) for v, flag in zip(node.inputs, flags, strict=True)]
                attributes = {}
            results = run_operator(node.operator, operands, attributes)
            values.update((value.name, result) for value, result in zip(node.outputs, results, strict=True))
        return tuple(of(value) for value in self.graph.outputs.values())
