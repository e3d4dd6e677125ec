"""From a PyTorch student to a list of layers: torch.export traces it, this module reads the trace or refuses it."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgestill.runtime.errors import EdgestillError

aten = torch.ops.aten


class LoweringError(EdgestillError):
    """A student holds something that cannot be lowered to forward operators."""


@dataclass(frozen=True)
class Layer:
    """One operation of the student. Names are those of the trace; shapes include the batch, channels first."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    path: str  # of the module in the student, "perception.0.0"
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: dict[str, str] = field(default_factory=dict)  # "weight" → its name in the state
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CapturedStudent:
    layers: tuple[Layer, ...]
    images: str
    latents: str
    logits: str
    latent_size: int
    classes: int


class _Outputs(nn.Module):
    def __init__(self, student: nn.Module):
        super().__init__()
        self.perception = student.perception
        self.representation = student.representation
        self.output = student.output

    def forward(self, images):
        latents = self.representation(self.perception(images))
        return latents, self.output(latents)


def capture_student(student: nn.Module, batch: int, input_shape: tuple[int, ...]) -> CapturedStudent:
    """Reads the student's layers.

    `student` has the modules `perception`, `representation` (to latents [B, l]) and `output` (to logits [B, K]).
    Raises LoweringError naming the module's path, the operator and what to use instead.
    """
    for part in ("perception", "representation", "output"):
        if not isinstance(getattr(student, part, None), nn.Module):
            raise LoweringError(
                f"the student {type(student).__name__} has no module `{part}`",
                hint="give it `perception`, `representation` (ending in the latent) and `output` (latent to logits)",
            )
    for path, module in student.named_modules():
        _check_module(path, module)
    outputs = _Outputs(student).eval()
    images = torch.zeros(batch, *input_shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's tracing warns of PyTorch's own code
            program = torch.export.export(outputs, (images,)).run_decompositions({})
    except Exception as error:
        raise LoweringError(
            f"PyTorch cannot trace the student on images of shape {tuple(images.shape)}: {_first_line(error)}",
            hint="check --input-shape, put nn.Flatten() before the first nn.Linear, and keep Python branches on "
            "tensor values out of forward()",
        ) from error
    return _read(program)


def _check_module(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        raise LoweringError(
            f"{path}: {type(module).__name__}(p={module.p}) draws random numbers in the graph",
            hint="remove it or set p=0; use --weight-decay or augmentation to regularise",
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if not module.track_running_stats or module.momentum is None or not module.affine:
            raise LoweringError(
                f"{path}: {type(module).__name__} needs track_running_stats=True, affine=True and a fixed momentum",
                hint="use nn.BatchNorm2d(channels), or nn.GroupNorm(groups, channels) for no running statistics",
            )
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
        raise LoweringError(
            f"{path}: padding_mode={module.padding_mode!r} is not supported", hint="use padding_mode='zeros'"
        )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _read(program: torch.export.ExportedProgram) -> CapturedStudent:
    signature = program.graph_signature
    state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    if signature.inputs_to_lifted_tensor_constants:
        raise LoweringError(
            "the student's forward() makes tensors of its own",
            hint="register them as parameters of a supported module",
        )
    alias: dict[str, str] = {}
    layers: list[Layer] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target
        if target is operator.getitem or target in _NOTHING:
            if target is operator.getitem and node.args[1] != 0:
                raise _refusal(node, str(node.args[0].target))
            alias[node.name] = alias.get(node.args[0].name, node.args[0].name)
            continue
        reader = _READERS.get(target)
        if reader is None:
            raise _refusal(node, str(target))
        kind, tensors, attributes = reader(node, _Arguments(node))
        parameters = {
            key: state[value.name]
            for key, value in tensors.items()
            if value is not None and value.name in state
        }
        if any(value is not None and value.name not in state for value in tensors.values()):
            raise _refusal(node, f"{target} with a weight that is computed")
        sources = [arg for arg in node.args[: 2 if kind == "add" else 1] if isinstance(arg, torch.fx.Node)]
        if any(source.name in state for source in sources) or (kind == "add" and len(sources) != 2):
            raise _refusal(node, f"{target} of a parameter or a number")
        layers.append(
            Layer(
                kind,
                tuple(alias.get(s.name, s.name) for s in sources),
                node.name,
                _path(node),
                tuple(_shape(sources[0])),
                tuple(_shape(node)),
                parameters,
                attributes,
            )
        )
    statistics = [layer.parameters["running_mean"] for layer in layers if layer.kind == "batch_norm"]
    for name in {name for name in statistics if statistics.count(name) > 1}:
        raise LoweringError(
            f"{name.rpartition('.')[0]}: one BatchNorm2d normalises two activations",
            hint="give each activation a BatchNorm2d of its own",
        )
    latents, logits = (alias.get(spec.arg.name, spec.arg.name) for spec in signature.output_specs)
    shapes = {layer.output: layer.output_shape for layer in layers}
    for name, value in (("latents of `representation`", latents), ("logits of `output`", logits)):
        if len(shapes.get(value, ())) != 2:
            raise LoweringError(
                f"the {name} have shape {shapes.get(value)}, not [batch, size]",
                hint="put nn.Flatten() before the first nn.Linear of `representation`",
            )
    (images,) = signature.user_inputs
    return CapturedStudent(tuple(layers), images, latents, logits, shapes[latents][1], shapes[logits][1])


def _shape(node: torch.fx.Node) -> torch.Size:
    value = node.meta["val"]
    return (value[0] if isinstance(value, tuple | list) else value).shape


def _path(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] if stack else "") or "forward()"


def _refusal(node: torch.fx.Node, what: str) -> LoweringError:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = stack[-1][1].rsplit(".", 1)[-1] if stack else ""
    return LoweringError(
        f"{_path(node)} ({name}): the operator {what} cannot be lowered to a training graph",
        hint=_INSTEAD.get(name)
        or "supported: Conv2d, Linear, BatchNorm2d, GroupNorm, ReLU, ReLU6, Hardswish, MaxPool2d, "
        "AvgPool2d, AdaptiveAvgPool2d, Flatten and the addition of two activations",
    )


_INSTEAD = {
    "GELU": "use nn.Hardswish or nn.ReLU",
    "SiLU": "use nn.Hardswish",
    "Sigmoid": "use nn.ReLU6 or nn.Hardswish",
    "Tanh": "use nn.ReLU6",
    "LeakyReLU": "use nn.ReLU",
    "PReLU": "use nn.ReLU",
    "ELU": "use nn.ReLU",
    "LayerNorm": "use nn.GroupNorm(1, channels)",
    "InstanceNorm2d": "use nn.GroupNorm(channels, channels)",
    "Conv1d": "use nn.Conv2d with a kernel of (1, k) on windows of shape channels,1,length",
    "Conv3d": "use nn.Conv2d",
    "ConvTranspose2d": "use nn.Conv2d",
    "BatchNorm1d": "use nn.BatchNorm2d before nn.Flatten",
    "Softmax": "return logits: the objectives apply softmax",
}

_NOTHING = {aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default}


class _Arguments:
    """A node's arguments by the names of the operator's schema, defaults filled in."""

    def __init__(self, node: torch.fx.Node):
        schema = node.target._schema.arguments
        given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
        self.values = {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def pair(self, name: str) -> tuple[int, int]:
        value = self.values[name]
        value = [value] if isinstance(value, int) else list(value)
        return (value[0], value[-1])


Read = tuple[str, dict[str, Any], dict[str, Any]]


def _conv2d(node: torch.fx.Node, a: _Arguments) -> Read:
    weight = a["weight"].meta["val"].shape
    dilation = a.pair("dilation")
    if a["padding"] == "valid":
        padding = (0, 0)
    elif a["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
        if any(t % 2 for t in total):
            raise _refusal(node, "convolution with padding='same' and an even kernel")
        padding = (total[0] // 2, total[1] // 2)
    else:
        padding = a.pair("padding")
    attributes = {
        "kernel": tuple(weight[2:]),
        "stride": a.pair("stride"),
        "padding": padding,
        "dilation": dilation,
        "groups": a["groups"],
    }
    return "conv2d", {"weight": a["weight"], "bias": a["bias"]}, attributes


def _linear(node: torch.fx.Node, a: _Arguments) -> Read:
    if len(_shape(node)) != 2:
        raise _refusal(node, f"aten.linear on a tensor of shape {tuple(_shape(node.args[0]))}")
    return "linear", {"weight": a["weight"], "bias": a["bias"]}, {}


def _batch_norm(node: torch.fx.Node, a: _Arguments) -> Read:
    if len(_shape(node.args[0])) != 4:
        raise _refusal(node, f"batch normalization of shape {tuple(_shape(node.args[0]))}")
    tensors = {key: a[key] for key in ("weight", "bias", "running_mean", "running_var")}
    return "batch_norm", tensors, {"momentum": a["momentum"], "eps": a["eps"]}


def _group_norm(node: torch.fx.Node, a: _Arguments) -> Read:
    if a["weight"] is None or len(_shape(node.args[0])) != 4:
        raise _refusal(node, "group normalization without weight and bias, or not on images")
    return (
        "group_norm",
        {"weight": a["weight"], "bias": a["bias"]},
        {"groups": a["num_groups"], "eps": a["eps"]},
    )


def _hardtanh(node: torch.fx.Node, a: _Arguments) -> Read:
    return "clipped_relu", {}, {"low": float(a["min_val"]), "high": float(a["max_val"])}


def _max_pool(node: torch.fx.Node, a: _Arguments) -> Read:
    kernel = a.pair("kernel_size")
    stride = a.pair("stride") if a["stride"] else kernel
    if a["ceil_mode"]:
        _refuse_partial_windows(node, a, kernel, stride)
    return (
        "max_pool2d",
        {},
        {"kernel": kernel, "stride": stride, "padding": a.pair("padding"), "dilation": a.pair("dilation")},
    )


def _avg_pool(node: torch.fx.Node, a: _Arguments) -> Read:
    kernel = a.pair("kernel_size")
    stride = a.pair("stride") if a["stride"] else kernel
    if a["ceil_mode"]:
        _refuse_partial_windows(node, a, kernel, stride)
    if a["divisor_override"] or (not a["count_include_pad"] and any(a.pair("padding"))):
        raise _refusal(node, "average pooling with count_include_pad=False or a divisor of its own")
    return "avg_pool2d", {}, {"kernel": kernel, "stride": stride, "padding": a.pair("padding")}


def _refuse_partial_windows(
    node: torch.fx.Node, a: _Arguments, kernel: tuple[int, int], stride: tuple[int, int]
) -> None:
    size, padding = _shape(node.args[0])[2:], a.pair("padding")
    dilation = a.pair("dilation") if "dilation" in a.values else (1, 1)
    for i in range(2):
        if (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) % stride[i]:
            raise _refusal(
                node, f"pooling with ceil_mode=True over a size of {size[i]} that leaves a partial window"
            )


def _adaptive_avg_pool(node: torch.fx.Node, a: _Arguments) -> Read:
    size, wanted = _shape(node.args[0])[2:], _shape(node)[2:]
    if any(s % w for s, w in zip(size, wanted, strict=True)):
        raise _refusal(
            node, f"adaptive average pooling from {tuple(size)} to {tuple(wanted)}, which does not divide it,"
        )
    kernel = (size[0] // wanted[0], size[1] // wanted[1])
    return "avg_pool2d", {}, {"kernel": kernel, "stride": kernel, "padding": (0, 0)}


def _mean(node: torch.fx.Node, a: _Arguments) -> Read:
    size = _shape(node.args[0])
    if len(size) != 4 or sorted(d % 4 for d in a["dim"]) != [2, 3]:
        raise _refusal(node, f"mean over the dimensions {a['dim']}")
    return (
        ("avg_pool2d" if a["keepdim"] else "global_mean"),
        {},
        {"kernel": tuple(size[2:]), "stride": tuple(size[2:]), "padding": (0, 0)},
    )


def _reshape(node: torch.fx.Node, a: _Arguments) -> Read:
    before, after = _shape(node.args[0]), _shape(node)
    if len(after) != 2 or after[0] != before[0] or after[1] != math.prod(before[1:]):
        raise _refusal(node, f"reshape from {tuple(before)} to {tuple(after)}")
    return "flatten", {}, {}


def _add(node: torch.fx.Node, a: _Arguments) -> Read:
    if (
        a["alpha"] != 1
        or not isinstance(a["other"], torch.fx.Node)
        or _shape(node.args[0]) != _shape(a["other"])
    ):
        raise _refusal(node, "addition with a number, a factor or broadcasting")
    return "add", {}, {}


_READERS: dict[Any, Callable[[torch.fx.Node, _Arguments], Read]] = {
    aten.conv2d.default: _conv2d,
    aten.conv2d.padding: _conv2d,
    aten.linear.default: _linear,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.group_norm.default: _group_norm,
    aten.relu.default: lambda node, a: ("relu", {}, {}),
    aten.hardtanh.default: _hardtanh,
    aten.relu6.default: lambda node, a: ("clipped_relu", {}, {"low": 0.0, "high": 6.0}),
    aten.hardswish.default: lambda node, a: ("hardswish", {}, {}),
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.mean.dim: _mean,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.add.Tensor: _add,
}
