"""A bundle made by hand, not by the exporter: linear student, `lkd`, SGD with momentum, gradient written out.

latents = x·Rᵀ + r, logits = latents·Oᵀ + o, with x = (images/255 − mean)/std flattened; on request with dropout of x
in training. A fixture for the runtime, and in `reference_step` the same step in NumPy. Of format 1 without dropout.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.common_head import common_head

BATCH, CHANNELS, SIZE, LATENT, CLASSES = 8, 3, 6, 5, 4
DROPOUT = 0.25
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
PARAMETERS = {
    "representation.weight": [LATENT, CHANNELS * SIZE * SIZE],
    "representation.bias": [LATENT],
    "output.weight": [CLASSES, LATENT],
    "output.bias": [CLASSES],
}
HYPERPARAMETERS = ("alpha", "learning_rate", "momentum", "weight_decay")
_KINDS = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}


def write_handmade_bundle(
    folder: Path, seed: int = 0, objective: str = "lkd", scale: float = 0.3, dropout: bool = False
) -> Path:
    """Writes the bundle and returns its folder; `objective` is `lkd` or `ce`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "onnxruntime").mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    state = {
        name: (scale * random.standard_normal(shape)).astype(np.float32) for name, shape in PARAMETERS.items()
    }
    state |= {f"optimizer.momentum.{name}": np.zeros(shape, np.float32) for name, shape in PARAMETERS.items()}
    wire.save(folder / "state.safetensors", state)
    graphs = {"train_step": _train_step(objective, dropout), "encode": _encode()}
    for name, graph in graphs.items():
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        (folder / f"onnxruntime/{name}.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, _manifest(folder, graphs, objective, dropout))
    return folder


def give_common_head(folder: Path) -> Path:
    """Makes a handmade bundle say that its output layer is the common head, with the weights of it."""
    state = wire.load(folder / "state.safetensors").arrays
    state["output.weight"] = common_head(CLASSES, LATENT)
    wire.save(folder / "state.safetensors", state)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, manifest | {"common_head": "output.weight", "files": file_records(folder)})
    return folder


def draw_images(random: np.random.Generator, centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A noisy image of its class' centre, uint8 [N, SIZE, SIZE, CHANNELS], for each label."""
    noisy = centres[labels] + random.normal(0, 25, (len(labels), SIZE, SIZE, CHANNELS))
    return noisy.clip(0, 255).astype(np.uint8)


def write_manifest(folder: Path, manifest: dict[str, object]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest))


def file_records(folder: Path) -> dict[str, dict[str, object]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size_bytes": path.stat().st_size,
        }
        for path in files
    }


def reference_step(
    state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The `lkd` step in float64 NumPy, with dropout where there is noise: (next state, metrics)."""
    state = {name: array.astype(np.float64) for name, array in state.items()}
    pixels = inputs["images"].astype(np.float64) / 255
    x = ((pixels - np.reshape(MEAN, (1, -1, 1, 1))) / np.reshape(STD, (1, -1, 1, 1))).reshape(BATCH, -1)
    if "noise.0" in inputs:
        x = x * (inputs["noise.0"] >= DROPOUT) / (1 - DROPOUT)
    latents = x @ state["representation.weight"].T + state["representation.bias"]
    logits = latents @ state["output.weight"].T + state["output.bias"]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    one_hot = np.eye(CLASSES)[inputs["labels"]]
    w = _normalised(inputs["label_weights"])
    v = _normalised(inputs["teacher_weights"])
    alpha = float(inputs["alpha"][0])
    difference = latents - inputs["teacher_latents"]
    ce = -(w * (one_hot * log_probabilities).sum(axis=1)).sum()
    distillation = (v * (difference**2).mean(axis=1)).sum()
    d_logits = (1 - alpha) * w[:, None] * (np.exp(log_probabilities) - one_hot)
    d_latents = d_logits @ state["output.weight"] + alpha * v[:, None] * difference * 2 / LATENT
    gradients = {
        "representation.weight": d_latents.T @ x,
        "representation.bias": d_latents.sum(axis=0),
        "output.weight": d_logits.T @ latents,
        "output.bias": d_logits.sum(axis=0),
    }
    after = {}
    for name, gradient in gradients.items():
        gradient = gradient + inputs["weight_decay"][0] * state[name]
        slot = inputs["momentum"][0] * state[f"optimizer.momentum.{name}"] + gradient
        after[f"optimizer.momentum.{name}"] = slot
        after[name] = state[name] - inputs["learning_rate"][0] * slot
    loss = (1 - alpha) * ce + alpha * distillation
    metrics = {"loss": [loss], "ce_loss": [ce], "distillation_loss": [distillation]}
    return after, {**{k: np.array(a) for k, a in metrics.items()}, "latents": latents, "logits": logits}


def _normalised(weights: np.ndarray) -> np.ndarray:
    total = weights.sum(dtype=np.float64)
    return weights / total if total > 0 else np.zeros(len(weights))


class _Nodes:
    """Collects nodes and constants; calling it adds one node and returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, value: object, dtype: str = "float32") -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name


def _forward(node: _Nodes, dropout: bool = False) -> tuple[str, str, str]:
    pixels = node("Div", node("Cast", "images", to=TensorProto.FLOAT), node.constant(255.0))
    centred = node("Sub", pixels, node.constant(np.reshape(MEAN, (1, -1, 1, 1))))
    scaled = node("Div", centred, node.constant(np.reshape(STD, (1, -1, 1, 1))))
    x = node("Reshape", scaled, node.constant([BATCH, -1], "int64"))
    if dropout:
        kept = node("Cast", node("GreaterOrEqual", "noise.0", node.constant(DROPOUT)), to=TensorProto.FLOAT)
        x = node("Mul", x, node("Div", kept, node.constant(1 - DROPOUT)))
    latents = node("Gemm", x, "representation.weight", "representation.bias", transB=1, output="latents")
    return x, latents, node("Gemm", latents, "output.weight", "output.bias", transB=1, output="logits")


def _weights(node: _Nodes, name: str) -> str:
    total = node("ReduceSum", name, keepdims=1)
    return node(
        "Reshape",
        node("Div", name, node("Max", total, node.constant([1e-12]))),
        node.constant([-1, 1], "int64"),
    )


def _encode() -> onnx.GraphProto:
    node = _Nodes()
    _forward(node)
    inputs = [_value(name, shape, "float32") for name, shape in PARAMETERS.items()]
    inputs.append(_value("images", [BATCH, CHANNELS, SIZE, SIZE], "uint8"))
    outputs = [_value(spec["name"], spec["shape"], spec["dtype"]) for spec in _latents_and_logits()]
    return helper.make_graph(node.nodes, "encode", inputs, outputs, node.constants)


def _train_step(objective: str, dropout: bool) -> onnx.GraphProto:
    node = _Nodes()
    x, latents, logits = _forward(node, dropout)
    log_probabilities = node("LogSoftmax", logits, axis=1)
    one_hot = node("OneHot", "labels", node.constant(CLASSES, "int64"), node.constant([0.0, 1.0]))
    ce_each = node(
        "Neg", node("ReduceSum", node("Mul", one_hot, log_probabilities), node.constant([1], "int64"))
    )
    w = _weights(node, "label_weights")
    vector = node.constant([1], "int64")
    ce = node("Reshape", node("ReduceSum", node("Mul", w, ce_each), keepdims=0), vector, output="ce_loss")
    d_logits = node("Mul", w, node("Sub", node("Softmax", logits, axis=1), one_hot))
    if objective == "lkd":
        difference = node("Sub", latents, "teacher_latents")
        v = _weights(node, "teacher_weights")
        each = node("ReduceMean", node("Mul", difference, difference), node.constant([1], "int64"))
        total = node("ReduceSum", node("Mul", v, each), keepdims=0)
        distillation = node("Reshape", total, vector, output="distillation_loss")
        beta = node("Sub", node.constant([1.0]), "alpha")
        node("Add", node("Mul", beta, ce), node("Mul", "alpha", distillation), output="loss")
        d_logits = node("Mul", beta, d_logits)
        pull = node("Mul", node("Mul", v, difference), node("Mul", "alpha", node.constant([2 / LATENT])))
        d_latents = node("Add", node("MatMul", d_logits, "output.weight"), pull)
    else:
        node("Identity", ce, output="loss")
        d_latents = node("MatMul", d_logits, "output.weight")
    rows = node.constant([0], "int64")
    gradients = {
        "representation.weight": node("Gemm", d_latents, x, transA=1),
        "representation.bias": node("ReduceSum", d_latents, rows, keepdims=0),
        "output.weight": node("Gemm", d_logits, latents, transA=1),
        "output.bias": node("ReduceSum", d_logits, rows, keepdims=0),
    }
    for name, gradient in gradients.items():
        decayed = node("Add", gradient, node("Mul", "weight_decay", name))
        kept = node("Mul", "momentum", f"optimizer.momentum.{name}")
        slot = node("Add", kept, decayed, output=f"next.optimizer.momentum.{name}")
        node("Sub", name, node("Mul", "learning_rate", slot), output=f"next.{name}")
    state = [(name, shape) for name, shape in _state_shapes().items()]
    inputs = [_value(name, shape, "float32") for name, shape in state]
    inputs += [
        _value(spec["name"], spec["shape"], spec["dtype"]) for spec in _step_inputs(objective, dropout)
    ]
    outputs = [_value(f"next.{name}", shape, "float32") for name, shape in state]
    outputs += [_value(spec["name"], spec["shape"], spec["dtype"]) for spec in _step_outputs(objective)]
    return helper.make_graph(node.nodes, "train_step", inputs, outputs, node.constants)


def _value(name: str, shape: list[int], dtype: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _KINDS[dtype], shape)


def _state_shapes() -> dict[str, list[int]]:
    return PARAMETERS | {f"optimizer.momentum.{name}": shape for name, shape in PARAMETERS.items()}


def _spec(name: str, shape: list[int], dtype: str = "float32", unit: str = "1") -> dict[str, object]:
    return {"name": name, "shape": shape, "dtype": dtype, "unit": unit}


def _step_inputs(objective: str, dropout: bool) -> list[dict[str, object]]:
    specs = [
        _spec("images", [BATCH, CHANNELS, SIZE, SIZE], "uint8", "grey levels 0-255"),
        _spec("labels", [BATCH], "int64"),
        _spec("label_weights", [BATCH]),
    ]
    teacher = [_spec("teacher_latents", [BATCH, LATENT]), _spec("teacher_weights", [BATCH])]
    names = HYPERPARAMETERS if objective == "lkd" else HYPERPARAMETERS[1:]
    specs += (teacher if objective == "lkd" else []) + [_spec(name, [1]) for name in names]
    noise = _spec("noise.0", [BATCH, CHANNELS * SIZE * SIZE], unit="uniform, at least 0 and below 1")
    return [*specs, noise] if dropout else specs


def _latents_and_logits() -> list[dict[str, object]]:
    return [_spec("latents", [BATCH, LATENT]), _spec("logits", [BATCH, CLASSES])]


def _step_outputs(objective: str) -> list[dict[str, object]]:
    losses = ["loss", "ce_loss", *(["distillation_loss"] if objective == "lkd" else [])]
    return [_spec(name, [1], unit="nat") for name in losses] + _latents_and_logits()


def _manifest(
    folder: Path, graphs: dict[str, onnx.GraphProto], objective: str, dropout: bool
) -> dict[str, object]:
    return {
        "format": "edgestill-bundle",
        "format_version": 2 if dropout else 1,
        "edgestill_version": "0.1.0",
        "student": {"name": "handmade-linear", "options": {}, "parameters": 569},
        "latent_size": LATENT,
        "classes": CLASSES,
        "batch": BATCH,
        "input": {"shape": [CHANNELS, SIZE, SIZE], "dtype": "uint8", "mean": list(MEAN), "std": list(STD)},
        "objective": {"name": objective, "kd_loss": None},
        "optimizer": {"name": "sgd", "nesterov": False},
        "freeze": [],
        "flops_per_step": 6 * BATCH * 560,
        "state": {
            "file": "state.safetensors",
            "tensors": [
                {
                    "name": name,
                    "shape": shape,
                    "dtype": "float32",
                    "role": "slot" if name.startswith("optimizer.") else "parameter",
                    "written": True,
                }
                for name, shape in _state_shapes().items()
            ],
        },
        "inputs": {
            "train_step": _step_inputs(objective, dropout),
            "encode": [_spec("images", [BATCH, CHANNELS, SIZE, SIZE], "uint8", "grey levels 0-255")],
        },
        "outputs": {"train_step": _step_outputs(objective), "encode": _latents_and_logits()},
        "graphs": {
            "onnxruntime": {
                name: {
                    "file": f"onnxruntime/{name}.onnx",
                    "inputs": [value.name for value in graph.input],
                    "outputs": [value.name for value in graph.output],
                    "operators": _count(graph),
                    "planned_memory_bytes": None,
                }
                for name, graph in graphs.items()
            }
        },
        "parity": {},
        "files": file_records(folder),
    }


def _count(graph: onnx.GraphProto) -> dict[str, int]:
    operators = [node.op_type for node in graph.node]
    return {operator: operators.count(operator) for operator in sorted(set(operators))}
