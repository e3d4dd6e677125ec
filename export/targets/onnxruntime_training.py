"""Makes a training step of a forward graph with onnxruntime-training's own gradient builder and kernels.

The forward graph (student in training mode, loss, running statistics) goes through the gradient builder in
the training environment; the optimizer, plain ONNX nodes, is put behind it here. The result is one graph that
an ordinary InferenceSession of the training build runs, with state outside, as docs/bundle.md says.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import helper

from edgestill.export.lowering.channels_first import CHANNELS_FIRST
from edgestill.export.lowering.onnx_emitter import to_onnx
from edgestill.export.step import StepSpec
from edgestill.export.step import build_encode as build_encode_graph
from edgestill.export.targets.onnxruntime_training_forward import GRADIENT, build_forward, build_optimizer
from edgestill.export.targets.onnxruntime_training_operators import (
    DIFFERENTIABLE,
    GradientError,
    attributes_of,
    check_artifact,
    check_gradients,
    needed_nodes,
)
from edgestill.runtime.engines.onnxruntime_training import INSTALL_HINT, find_interpreter

MAX_OPSET = 20
IR_VERSION = 9
"""onnxruntime 1.19.2 reads no newer one."""

_WORKER = Path(__file__).with_name("onnxruntime_training_worker.py")
_TIMEOUT_S = 300
_ZERO = "scratch/zero"
_OWN = "optimizer/"


def emit(spec: StepSpec, folder: Path) -> dict[str, dict]:
    """Writes `train_step.onnx` and `encode.onnx` into `folder`; returns what the manifest says of each graph.

    Errors: GradientError, EngineError.
    """
    outputs = ["next." + tensor["name"] for tensor in spec.state_specs() if tensor["written"]]
    outputs += [metric["name"] for metric in spec.metrics()]
    inputs = [tensor["name"] for tensor in spec.state_specs() + spec.step_inputs()]
    forward, optimizer = to_onnx(build_forward(spec)), to_onnx(build_optimizer(spec))
    train_step = build_train_step(forward, list(spec.trained()), optimizer, outputs, inputs)
    encode = build_encode(to_onnx(build_encode_graph(spec, CHANNELS_FIRST)))
    return {
        "train_step": _write(train_step, folder / "train_step.onnx"),
        "encode": _write(encode, folder / "encode.onnx"),
    }


def _write(model: onnx.ModelProto, path: Path) -> dict[str, object]:
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {
        "file": path.name,
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
        "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "planned_memory_bytes": None,
    }


def build_train_step(
    forward: onnx.ModelProto,
    trainable: Sequence[str],
    optimizer: onnx.ModelProto,
    outputs: Sequence[str],
    inputs: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """One graph that computes `forward`, the gradients of its output `loss` (one element) and `optimizer`.

    forward: has all state, batch and hyperparameters as inputs; its outputs hold `loss` and the metrics, and
        may hold `next.` statistics. BatchNormalization has training_mode 1 and momentum 0, so that its second
        and third output are the batch's own mean and biased variance.
    trainable: the inputs of `forward` to differentiate by.
    optimizer: takes `gradient.<parameter>` for every trainable one, inputs and outputs of `forward`, and
        inputs of its own (slots, hyperparameters); gives `next.` parameters and slots.
    outputs: the graph's outputs in order, each an output of either model.
    inputs: the graph's inputs in order; by default the forward graph's, then those that only the optimizer
        has. Inputs on which no output depends are left out in either case.

    Errors: GradientError naming the operator or tensor; EngineError without a training environment.
    """
    _check(forward, trainable, optimizer)
    with tempfile.TemporaryDirectory(prefix="edgestill-gradient-") as folder:
        before, after, merged_file = (
            Path(folder, name) for name in ("forward.onnx", "gradient.onnx", "train_step.onnx")
        )
        before.write_bytes(_loadable(forward).SerializeToString())
        _run_worker("gradient", before, after, "loss", stdin=json.dumps(sorted(trainable)))
        merged = merge(onnx.load(after), trainable, optimizer, outputs, inputs)
        merged_file.write_bytes(merged.SerializeToString())
        _run_worker("load", merged_file)
    return merged


def build_encode(encode: onnx.ModelProto) -> onnx.ModelProto:
    """The inference graph as the training build reads it. Errors: GradientError for a newer opset."""
    _check_opset(encode)
    return _loadable(encode)


def merge(
    gradient: onnx.ModelProto,
    trainable: Sequence[str],
    optimizer: onnx.ModelProto,
    outputs: Sequence[str],
    inputs: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Puts the optimizer behind a gradient graph (outputs `<parameter>_grad`) and keeps what `outputs` need.

    Errors: GradientError for a parameter without a gradient, or an output or input that nobody has.
    """
    computed = {name for model in (gradient, optimizer) for node in model.graph.node for name in node.output}
    computed |= {GRADIENT + name for name in trainable}
    given = {
        value.name: value
        for model in (optimizer, gradient)
        for value in model.graph.input
        if value.name not in computed
    }
    made = {value.name: value for model in (optimizer, gradient) for value in model.graph.output}
    missing = [name for name in trainable if f"{name}_grad" not in made]
    if missing:
        raise GradientError(f"the loss does not depend on {', '.join(missing)}", "freeze these parameters")
    unknown = [name for name in outputs if name not in made]
    if unknown:
        raise GradientError(f"neither the forward graph nor the optimizer has {', '.join(unknown)}")

    renamed = {f"{name}_grad": GRADIENT + name for name in trainable}
    nodes = _with_scratch_statistics([_renamed(node, renamed) for node in gradient.graph.node])
    initializers = [_renamed_tensor(tensor, renamed) for tensor in gradient.graph.initializer] + [_zero()]
    # Whatever the optimizer computes on the way gets names of its own.
    public = set(given) | set(made) | set(renamed.values())
    private = {name: _OWN + name for name in _names(optimizer.graph) - public}
    nodes += [_renamed(node, private, _OWN) for node in optimizer.graph.node]
    initializers += [_renamed_tensor(tensor, private) for tensor in optimizer.graph.initializer]

    nodes, needed = needed_nodes(nodes, outputs)
    # MaxPoolGrad has no shape inference: without the recorded type of its output, loading crashes.
    types = [
        value for value in gradient.graph.value_info if value.name in needed and value.name not in outputs
    ]
    order = inputs or [value.name for model in (gradient, optimizer) for value in model.graph.input]
    graph = helper.make_graph(
        nodes,
        "train_step",
        [given[name] for name in dict.fromkeys(order) if name in needed and name in given],
        [made[name] for name in outputs],
        [tensor for tensor in initializers if tensor.name in needed],
        value_info=types,
    )
    left_out = [name for name in needed & set(given) if name not in order]
    if left_out:
        raise GradientError(f"the step needs {', '.join(sorted(left_out))}, which `inputs` leaves out")
    check_artifact(graph)
    domains = {node.domain for node in nodes} | {""}
    versions = [version for version in gradient.opset_import if version.domain in domains]
    return helper.make_model(graph, opset_imports=versions, ir_version=IR_VERSION, producer_name="edgestill")


def _check(forward: onnx.ModelProto, trainable: Sequence[str], optimizer: onnx.ModelProto) -> None:
    for model in (forward, optimizer):
        _check_opset(model)
    if _opset(forward) != _opset(optimizer):
        raise GradientError(
            f"the forward graph has opset {_opset(forward)}, the optimizer {_opset(optimizer)}"
        )
    inputs = {value.name for value in forward.graph.input}
    strangers = [name for name in trainable if name not in inputs]
    if strangers:
        raise GradientError(f"the forward graph has no input {', '.join(strangers)}")
    if "loss" not in {value.name for value in forward.graph.output}:
        raise GradientError("the forward graph has no output `loss`")
    check_gradients(forward.graph, trainable)


def _with_scratch_statistics(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Gives every training BatchNormalization running statistics that it may overwrite.

    Its kernel writes the running outputs over the running inputs, even where these are graph inputs that
    others read: the state before the step would be lost. It reads them with weight 0 (momentum), so zeros do.
    They are computed from the real ones and not constant, for constants of one value may be folded into one,
    and NaN once written would stay.
    """
    result = []
    for node in nodes:
        normalizes = node.op_type in ("BatchNormalization", "BatchNormInternal")
        if normalizes and attributes_of(node).get("training_mode"):
            scratch = [f"{name}/scratch" for name in node.input[3:5]]
            result += [
                helper.make_node("Mul", [name, _ZERO], [output], name=output)
                for name, output in zip(node.input[3:5], scratch, strict=True)
            ]
            node.input[3:5] = scratch
        result.append(node)
    return result


def _zero() -> onnx.TensorProto:
    return helper.make_tensor(_ZERO, onnx.TensorProto.FLOAT, [], [0.0])


def _check_opset(model: onnx.ModelProto) -> None:
    if _opset(model) > MAX_OPSET:
        raise GradientError(
            f"{model.graph.name} has opset {_opset(model)}; the training build takes at most {MAX_OPSET}",
            f"emit it with opset {MAX_OPSET}",
        )


def _opset(model: onnx.ModelProto) -> int:
    return next(version.version for version in model.opset_import if version.domain == "")


def _loadable(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(copy.ir_version, IR_VERSION)
    return copy


def _run_worker(*arguments: str | Path, stdin: str = "") -> None:
    # -I: this folder's modules are named after engines and must not shadow the packages.
    command = [str(find_interpreter()), "-I", str(_WORKER), *map(str, arguments)]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise GradientError(f"the gradient builder did not finish within {_TIMEOUT_S} s") from error
    if done.returncode == 0:
        return
    try:
        reason = json.loads(done.stdout.splitlines()[-1])["error"]
    except (IndexError, KeyError, ValueError):
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise GradientError(
            f"{command[0]} ended with exit code {done.returncode}: {tail}", INSTALL_HINT
        ) from None
    raise GradientError(
        f"onnxruntime-training refuses the graph ({arguments[0]}): {reason}",
        "use only operators that it differentiates: " + ", ".join(sorted(DIFFERENTIABLE)),
    )


def _names(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in (*node.input, *node.output) if name} | {
        tensor.name for tensor in graph.initializer
    }


def _renamed(node: onnx.NodeProto, names: dict[str, str], prefix: str = "") -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name if node.name else ""
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


def _renamed_tensor(tensor: onnx.TensorProto, names: dict[str, str]) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = names.get(tensor.name, tensor.name)
    return copy
