"""Builds a gradient graph: run as a script by the interpreter that has onnxruntime-training (which needs no
onnx there).

    onnxruntime_training_worker.py gradient FORWARD GRADIENT LOSS < JSON list of the trainable inputs
    onnxruntime_training_worker.py load MODEL

`gradient` writes the forward graph with its backward pass behind it; `load` proves that a session accepts a
graph. An error ends as one JSON line {"error": "..."} on stdout and exit code 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.capi import _pybind_state as training


def build_gradient(forward: bytes, trainable: set[str], loss: str) -> bytes:
    """The forward graph with outputs `<trainable>_grad` added.

    Source: onnxruntime 1.19.2, training/onnxblock/_training_graph_utils.py, whose package cannot be imported
    without torch.
    """
    options = SessionOptions()
    options.log_severity_level = 3
    # Prepares training, among other things: BatchNormalization gets the outputs that its gradient needs.
    prepared = training.get_optimized_model(forward, trainable, options)
    builder = training.GradientGraphBuilder(prepared, {loss}, trainable, loss, options)
    builder.build()
    return builder.get_model()


def load(model: bytes) -> None:
    options = SessionOptions()
    options.log_severity_level = 3
    InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main(arguments: list[str]) -> int:
    try:
        if arguments[0] == "gradient":
            forward, gradient, loss = arguments[1:]
            trainable = set(json.load(sys.stdin))
            Path(gradient).write_bytes(build_gradient(Path(forward).read_bytes(), trainable, loss))
        else:
            load(Path(arguments[1]).read_bytes())
    except Exception as error:  # the native builder raises every kind
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
