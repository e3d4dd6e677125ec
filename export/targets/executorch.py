"""Stock ExecuTorch with XNNPACK: the step channels last, as delegated pieces of forward operators."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import DimOrderOpsRevertPass, FuseActivationPass, XNNPACKPassManager
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.lowered_backend_module import executorch_call_delegate
from executorch.exir.passes import MemoryPlanningPass

from edgestill.export.lowering.graph import Graph
from edgestill.export.lowering.layout import cancel_turns
from edgestill.export.lowering.operators import DTYPES
from edgestill.export.lowering.rewrite import rewrite_fully
from edgestill.export.step.graphs import build_encode, build_train_step
from edgestill.export.step.spec import StepSpec
from edgestill.export.targets.executorch_rewrites import PLAIN, WINDOWED
from edgestill.export.targets.torch_emitter import GraphModule


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
    module = GraphModule(graph).eval()
    example = tuple(torch.zeros(value.shape, dtype=DTYPES[value.dtype]) for value in graph.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        logging.disable(logging.WARNING)
        try:
            edge = to_edge(
                torch.export.export(module, example),
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            with mock.patch.object(xnnpack_preprocess, "XNNPACKPassManager", _NeededPasses):
                lowered = edge.to_backend(XnnpackPartitioner())
            operators = _operators(lowered.exported_program().graph_module)
            program = lowered.to_executorch(
                ExecutorchBackendConfig(
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
                )
            )
        finally:
            logging.disable(logging.NOTSET)
    with path.open("wb") as file:
        program.write_to_file(file)
    plan = program.executorch_program.execution_plan[0]
    return {
        "file": path.name,
        "inputs": [value.name for value in graph.inputs],
        "outputs": list(graph.outputs),
        "operators": operators,
        "planned_memory_bytes": sum(plan.non_const_buffer_sizes),
    }


class _NeededPasses(XNNPACKPassManager):
    """Of XNNPACK's seventeen passes those that find something in our graphs: each traces the whole step again, which
    takes two thirds of an export."""

    def __init__(self, program: torch.export.ExportedProgram, passes: object = None):
        super().__init__(program, [DimOrderOpsRevertPass, FuseActivationPass])


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
