"""Stock ONNX Runtime: the whole step as plain ONNX operators, channels first."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from edgestill.export.lowering.channels_first import CHANNELS_FIRST
from edgestill.export.lowering.onnx_emitter import to_onnx
from edgestill.export.step import StepSpec, build_encode, build_train_step


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.onnx` and `encode.onnx` into `folder`; returns what the manifest says of each graph."""
    records = {}
    for name, build in (("train_step", build_train_step), ("encode", build_encode)):
        graph = build(spec, CHANNELS_FIRST)
        model = to_onnx(graph)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        records[name] = {
            "file": f"{name}.onnx",
            "inputs": [value.name for value in graph.inputs],
            "outputs": list(graph.outputs),
            "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
            "planned_memory_bytes": graph.peak_live_bytes(),
        }
    return records
