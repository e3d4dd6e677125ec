"""A lowered graph as ExecuTorch's Edge program: what its partitioner and emitter take.

`to_edge` would trace the whole step a dozen times, which for twelve layers of attention takes a minute. Here each
operator is traced once for each combination of shapes and attributes, and put in wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig
from executorch.exir.passes.dim_order_ops_registry import DimOrderOpsMap
from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge
from executorch.exir.program._program import _default_decomposition_table
from executorch.exir.verification.verifier import EXIREdgeDialectVerifier
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_structure

from edgestill.export.lowering.graph import Graph, Node, Value, run_operator
from edgestill.export.lowering.operators import DTYPES

CONFIG = EdgeCompileConfig(_check_ir_validity=False)


def edge_program(graph: Graph) -> ExportedProgram:
    """Takes the graph's inputs positionally and returns its outputs as a tuple, both in the graph's order."""
    return _Builder(graph).build()


class _Builder:
    def __init__(self, graph: Graph):
        self.graph, self.fx = graph, torch.fx.Graph()
        self.mode, self.table = FakeTensorMode(), _default_decomposition_table()
        self.known: dict[str, torch.fx.Node] = {}
        self.turned: dict[str, torch.fx.Node] = {}  # one transpose of a matrix serves all its products
        self.traced: dict[tuple, torch.fx.Graph] = {}

    def build(self) -> ExportedProgram:
        constants = {v.name: v for n in self.graph.nodes for v in n.inputs if v.constant is not None}
        constants |= {v.name: v for v in self.graph.outputs.values() if v.constant is not None}
        given = [(value, InputKind.BUFFER) for value in constants.values()]
        given += [(value, InputKind.USER_INPUT) for value in self.graph.inputs]
        inputs = [self._input(i, value, kind) for i, (value, kind) in enumerate(given)]
        for node in self.graph.nodes:
            self._add(node)
        results = tuple(self.known[value.name] for value in self.graph.outputs.values())
        self.fx.output(results)
        outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
        tensors = {name: torch.from_numpy(value.constant.copy()) for name, value in constants.items()}
        root = torch.nn.Module()
        for name, tensor in tensors.items():
            root.register_buffer(name, tensor)
        examples = tuple(torch.zeros(v.shape, dtype=DTYPES[v.dtype]) for v in self.graph.inputs)
        call = ModuleCallSignature([], [], tree_structure((examples, {})), tree_structure(results))
        return ExportedProgram(
            torch.fx.GraphModule(root, self.fx), self.fx, ExportGraphSignature(inputs, outputs), tensors, {},
            [ModuleCallEntry("", call)], (examples, {}), {},
            verifiers=[EXIREdgeDialectVerifier(edge_compile_config=CONFIG, class_only=True)],
        )  # fmt: skip

    def _fake(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def _input(self, i: int, value: Value, kind: InputKind) -> InputSpec:
        node = self.fx.placeholder(f"b_{value.name}" if kind is InputKind.BUFFER else f"input_{i}")
        node.meta["val"] = self._fake(value.shape, DTYPES[value.dtype])
        self.known[value.name] = node
        buffer = kind is InputKind.BUFFER
        return InputSpec(
            kind, TensorArgument(node.name), value.name if buffer else None, True if buffer else None
        )

    def _add(self, node: Node) -> None:
        attributes, operands = node.attributes, [self.known[value.name] for value in node.inputs]
        if node.operator == "matmul":
            flags = attributes["transpose_a"], attributes["transpose_b"]
            operands = [self._turn(one) if flag else one for one, flag in zip(operands, flags, strict=True)]
            attributes = {}
        results = self._inlined(node.operator, operands, attributes)
        self.known.update((value.name, result) for value, result in zip(node.outputs, results, strict=True))

    def _turn(self, matrix: torch.fx.Node) -> torch.fx.Node:
        if matrix.name not in self.turned:
            rank = matrix.meta["val"].dim()
            order = (*range(rank - 2), rank - 1, rank - 2)
            (self.turned[matrix.name],) = self._inlined("transpose", [matrix], {"permutation": order})
        return self.turned[matrix.name]

    def _inlined(self, operator: str, operands: list[torch.fx.Node], attributes: Any) -> list[torch.fx.Node]:
        given = [node.meta["val"] for node in operands]
        key = (operator, tuple((tuple(t.shape), t.dtype) for t in given), repr(sorted(attributes.items())))
        if key not in self.traced:
            function = partial(_as_tuple, operator, dict(attributes))
            fakes = [self._fake(t.shape, t.dtype) for t in given]
            with torch.no_grad(), self.mode:
                self.traced[key] = make_fx(function, self.table)(*fakes).graph
        copied: dict[torch.fx.Node, torch.fx.Node] = {}
        operands = iter(operands)
        for node in self.traced[key].nodes:
            if node.op == "placeholder":
                copied[node] = next(operands)
            elif node.op == "output":
                return [copied[result] for result in node.args[0]]
            else:
                copied[node] = self._copy(node, copied)
        raise AssertionError("a traced graph ends in its output")

    def _copy(self, node: torch.fx.Node, copied: dict[torch.fx.Node, torch.fx.Node]) -> torch.fx.Node:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), copied.__getitem__)
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if target.is_view:
                target = getattr(getattr(torch.ops.aten, f"{target._opname}_copy"), target._overloadname)
            target = aten_to_edge(target)
            if target in DimOrderOpsMap:
                target = DimOrderOpsMap[target]
                kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
                kwargs["dim_order"] = list(range(node.meta["val"].dim()))
        new = self.fx.call_function(target, args, kwargs)
        new.meta["val"] = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: self._fake(t.shape, t.dtype), node.meta["val"]
        )
        return new


def _as_tuple(operator: str, attributes: dict[str, Any], *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return run_operator(operator, operands, attributes)
