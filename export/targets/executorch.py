"""Stock ExecuTorch with XNNPACK: the step channels last, as delegated pieces of forward operators."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import FuseActivationPass, XNNPACKPassManager
from executorch.backends.xnnpack._passes.xnnpack_pass import XNNPACKPass
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir.lowered_backend_module import executorch_call_delegate
from executorch.exir.pass_base import PassResult
from executorch.exir.passes import MemoryPlanningPass
from torch.fx.passes.infra.partitioner import Partition

from edgestill.export.lowering.graph import Graph
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.rewrite import rewrite_fully
from edgestill.export.step.graphs import build_encode, build_train_step
from edgestill.export.step.spec import StepSpec
from edgestill.export.targets.edge_program import CONFIG, edge_program
from edgestill.export.targets.executorch_rewrites import PLAIN, WINDOWED

MOST_AXES = 6
"""Of a tensor of XNNPACK's; its partitioner takes more, which then fails on the device."""


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.pte` and `encode.pte` into `folder`; returns what the manifest says of each graph."""
    return {
        "train_step": _emit_graph(lower(build_train_step(spec)), folder / "train_step.pte"),
        "encode": _emit_graph(lower(build_encode(spec)), folder / "encode.pte"),
    }


def lower(graph: Graph) -> Graph:
    """The graph in operators that XNNPACK takes where it can be said in them, channels last."""
    graph = cancel_turns(rewrite_fully(graph, WINDOWED))
    return cancel_turns(rewrite_fully(graph, PLAIN))


def _emit_graph(graph: Graph, path: Path) -> dict:
    plan = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            edge = EdgeProgramManager(edge_program(graph), None, CONFIG)
            with mock.patch.object(xnnpack_preprocess, "XNNPACKPassManager", _NeededPasses):
                lowered = edge.to_backend(_Partitioner())
            operators = _operators(lowered.exported_program().graph_module)
            program = lowered.to_executorch(ExecutorchBackendConfig(memory_planning_pass=plan))
        finally:
            logging.disable(disabled)
    with path.open("wb") as file:
        program.write_to_file(file)
    arena = sum(program.executorch_program.execution_plan[0].non_const_buffer_sizes)
    return {
        "file": path.name,
        "inputs": [value.name for value in graph.inputs],
        "outputs": list(graph.outputs),
        "operators": operators,
        "planned_memory_bytes": max(arena, graph.peak_live_bytes()),  # XNNPACK keeps its values outside of the arena
    }


class _Partitioner(XnnpackPartitioner):
    """Takes the nodes that XNNPACK's own takes. That compares every two of them to find what can be one piece; here a
    piece is what lies before the same number of operators that are not delegated."""

    def generate_partitions(self, program: torch.export.ExportedProgram) -> list[Partition]:
        groups = [g for g in self.get_matched_nodes_from_configs(program) if max(map(_rank, g)) <= MOST_AXES]
        if any(sum(node.op == "call_function" for node in group) > 1 for group in groups):
            return super().generate_partitions(program)
        together = {node: group for group in groups for node in group}
        height: dict[torch.fx.Node, int] = {}
        pieces: dict[int, list[torch.fx.Node]] = {}
        for node in reversed(program.graph.nodes):
            taken, users = node in together, [user for user in node.users if user.op == "call_function"]
            height[node] = max((height[user] + (taken and user not in together) for user in users), default=0)
            if taken and node.op == "call_function":
                pieces.setdefault(height[node], []).extend(together[node])
        return [Partition(id=i, nodes=nodes) for i, nodes in sorted(pieces.items(), reverse=True)]


def _rank(node: torch.fx.Node) -> int:
    return max(one.meta["val"].dim() for one in (node, *node.all_input_nodes))


class _Untraced(XNNPACKPass):
    def call(self, module: torch.fx.GraphModule) -> PassResult:
        return PassResult(module, True)


class _FuseActivations(FuseActivationPass, _Untraced):
    """Without tracing the whole piece again for shapes that do not change."""


class _NeededPasses(XNNPACKPassManager):
    """Of XNNPACK's seventeen passes the one that finds something in our graphs: each traces the whole step again."""

    def __init__(self, program: torch.export.ExportedProgram, passes: object = None):
        super().__init__(program, [_FuseActivations])


def _operators(module: torch.fx.GraphModule) -> dict[str, int]:
    """Portable operators by name, and the delegated pieces and what they hold."""
    counts: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is executorch_call_delegate:
            counts["xnnpack.delegate"] += 1
            inside = getattr(module, node.args[0].target).original_module.graph_module
            counts.update("xnnpack." + _name(n) for n in inside.graph.nodes if n.op == "call_function")
        elif "getitem" not in str(node.target):
            counts[_name(node)] += 1
    return dict(sorted(counts.items()))


def _name(node: torch.fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("aten.").removeprefix("dim_order_ops.").rsplit(".", 1)[0]
