"""What `manifest.json` says, as frozen dataclasses; parsing refuses a used field that is not as agreed.

Format: docs/bundle.md. Unknown fields are ignored, so that newer writers may add some.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgestill.runtime.bundle.manifest_node import Node
from edgestill.runtime.errors import BundleError

FORMAT = "edgestill-bundle"
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
"""What an older version can say, a newer says alike."""
OBJECTIVES = {
    "ce": (),
    "kd": ("logits",),
    "lkd": ("latents",),
    "both": ("latents", "logits"),
    "crd": ("latents",),
    "lpd": ("latents",),
}
"""Which of a teacher's outputs enter the loss of each."""
KD_LOSSES = ("mse", "kl")
OPTIMIZERS = ("sgd", "adamw")
GRAPHS = ("train_step", "encode")
ROLES = ("parameter", "statistic", "slot")
DTYPES = {"float32": np.dtype("float32"), "uint8": np.dtype("uint8"), "int64": np.dtype("int64")}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOISE = re.compile(r"noise\.[0-9]{1,6}")
_MAX_ELEMENTS = 2**31
_MAX_RANK = 6


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: `dtype` is a NumPy name; `role` and `written` are of state tensors, `unit` of others."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    unit: str | None = None
    role: str | None = None
    written: bool = False

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def as_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        own = {"role": self.role, "written": self.written} if self.role else {"unit": self.unit}
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, **own}


@dataclass(frozen=True)
class GraphSpec:
    """One graph of one engine; inputs and outputs are tensor names in the graph's order."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: Mapping[str, int]
    planned_memory_bytes: int | None
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The manifest's entry as it stands, for what one engine alone needs."""


@dataclass(frozen=True)
class Student:
    name: str
    options: Mapping[str, Any]
    parameters: int


@dataclass(frozen=True)
class InputSpec:
    """One tensor of a sample: images (C, H, W), windows (channels, length), tokens (length,).

    The graph normalises uint8 samples by `mean` and `std` along their first axis; others enter as they are.
    """

    shape: tuple[int, ...] = (3, 32, 32)
    dtype: str = "uint8"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    name: str = "images"

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Objective:
    """`ce`, `lkd`, `lpd`, with `kd_loss` mse or kl `kd` or `both`, or `crd` with the three sizes below."""

    name: str = "lkd"
    kd_loss: str | None = None
    negatives: int | None = None
    features: int | None = None
    teacher_latent_size: int | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.name != "ce"

    @property
    def takes_latents(self) -> bool:
        """Whether a step is given the teacher's latent of each sample, of the student's own size."""
        return "latents" in self.learns_from and not self.relates_samples

    @property
    def takes_logits(self) -> bool:
        return "logits" in self.learns_from

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Which of a teacher's outputs enter the loss."""
        return OBJECTIVES[self.name]

    @property
    def relates_samples(self) -> bool:
        """Whether a sample's loss depends on other samples."""
        return self.name in ("crd", "lpd")


@dataclass(frozen=True)
class Optimizer:
    """`sgd` (momentum, Nesterov, weight decay) or `adamw` (Loshchilov and Hutter 2019).

    `clips`: whether the step clips the gradients by their global norm, to its input `clip_norm`.
    """

    name: str = "sgd"
    nesterov: bool = False
    clips: bool = False


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    edgestill_version: str
    student: Student
    latent_size: int
    classes: int
    batch: int
    input: InputSpec
    more_inputs: tuple[InputSpec, ...]
    objective: Objective
    optimizer: Optimizer
    freeze: tuple[str, ...]
    common_head: str | None
    """The state tensor with the weights of the common head; None where the student has an output layer of its own."""
    flops_per_step: int | None
    state_file: str
    state: tuple[TensorSpec, ...]
    inputs: Mapping[str, tuple[TensorSpec, ...]]
    outputs: Mapping[str, tuple[TensorSpec, ...]]
    graphs: Mapping[str, Mapping[str, GraphSpec]]
    parity: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, FileRecord]
    class_names: tuple[str, ...] = ()
    """What the outputs mean, in their order; empty where nobody said."""


def format_version(class_names: Sequence[str], clips: bool) -> int:
    """The oldest version whose readers do right by a bundle: those of 2 would count classes by the order of their
    folders, and not feed `clip_norm`."""
    return FORMAT_VERSION if class_names or clips else 2


def parse_manifest(text: bytes) -> Manifest:
    """Reads and checks a manifest. Errors: BundleError naming the field."""
    try:
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not valid JSON: {error}", "export the bundle again") from error
    root = Node(raw, "manifest.json")
    root.expect(dict)
    if root.get("format").value != FORMAT:
        raise BundleError(
            f"manifest.json: format is {root.get('format').value!r}, not {FORMAT!r}",
            "give a folder that `edgestill export` wrote",
        )
    version = root.get("format_version").value
    if version not in READABLE_VERSIONS:
        raise BundleError(
            f"manifest.json: format version {version!r}, this edgestill reads {FORMAT_VERSION} and older",
            "install the edgestill that wrote the bundle, or export it again",
        )
    student, objective, optimizer = root.get("student"), root.get("objective"), root.get("optimizer")
    state = root.get("state")
    manifest = Manifest(
        edgestill_version=root.get("edgestill_version").text(),
        student=Student(
            student.get("name").text(), student.get("options").expect(dict), student.get("parameters").size()
        ),
        latent_size=root.get("latent_size").size(1),
        classes=root.get("classes").size(1),
        batch=root.get("batch").size(1),
        input=_parse_input(root.get("input")),
        more_inputs=tuple(_parse_input(entry) for entry in root.get("more_inputs", []).items()),
        objective=Objective(
            objective.get("name").one_of(tuple(OBJECTIVES)),
            objective.get("kd_loss").one_of((None, *KD_LOSSES)),
            *(objective.optional_size(key) for key in ("negatives", "features", "teacher_latent_size")),
        ),
        optimizer=Optimizer(
            optimizer.get("name").one_of(OPTIMIZERS),
            *(optimizer.get(key, False).expect(bool) for key in ("nesterov", "clips")),
        ),
        freeze=tuple(entry.text() for entry in root.get("freeze", []).items()),
        common_head=None if root.get("common_head", None).value is None else root.get("common_head").text(),
        flops_per_step=root.optional_size("flops_per_step"),
        state_file=state.get("file").file_name(),
        state=tuple(_parse_tensor(entry, of_state=True) for entry in state.get("tensors").items()),
        inputs={
            graph: tuple(_parse_tensor(entry) for entry in root.get("inputs").get(graph).items())
            for graph in GRAPHS
        },
        outputs={
            graph: tuple(_parse_tensor(entry) for entry in root.get("outputs").get(graph).items())
            for graph in GRAPHS
        },
        graphs={
            engine: {graph: _parse_graph(entry.get(graph)) for graph in GRAPHS}
            for engine, entry in root.get("graphs").entries()
        },
        parity={engine: entry.expect(dict) for engine, entry in root.get("parity", {}).entries()},
        files={
            entry.check_file_name(name): FileRecord(
                entry.get("sha256").matching(_SHA256), entry.get("size_bytes").size()
            )
            for name, entry in root.get("files").entries()
        },
        class_names=tuple(entry.text() for entry in root.get("class_names", []).items()),
    )
    _check_consistency(manifest)
    _check_samples(manifest)
    return manifest


def _parse_input(node: Node) -> InputSpec:
    shape = tuple(entry.size(1) for entry in node.get("shape").items())
    if not 1 <= len(shape) <= _MAX_RANK:
        raise BundleError(f"{node.where}.shape: {list(shape)} is not the shape of a sample")
    dtype = node.get("dtype").one_of(tuple(DTYPES))
    mean, std = (
        () if dtype != "uint8" else tuple(entry.number() for entry in node.get(key).items())
        for key in ("mean", "std")
    )
    if dtype == "uint8" and (len(mean) != shape[0] or len(std) != shape[0]):
        raise BundleError(f"{node.where}: mean and std need {shape[0]} entries, one a channel")
    return InputSpec(shape, dtype, mean, std, node.get("name", "images").text())


def _parse_tensor(node: Node, of_state: bool = False) -> TensorSpec:
    shape = tuple(entry.size() for entry in node.get("shape").items())
    if math.prod(shape) > _MAX_ELEMENTS:
        raise BundleError(f"{node.where}.shape: {list(shape)} is too large")
    return TensorSpec(
        name=node.get("name").text(),
        shape=shape,
        dtype=node.get("dtype").one_of(tuple(DTYPES)),
        unit=node.get("unit", None).value,
        role=node.get("role").one_of(ROLES) if of_state else None,
        written=node.get("written").expect(bool) if of_state else False,
    )


def _parse_graph(node: Node) -> GraphSpec:
    return GraphSpec(
        file=node.get("file").file_name(),
        inputs=tuple(entry.text() for entry in node.get("inputs").items()),
        outputs=tuple(entry.text() for entry in node.get("outputs").items()),
        operators={name: count.size() for name, count in node.get("operators", {}).entries()},
        planned_memory_bytes=node.optional_size("planned_memory_bytes"),
        details=node.expect(dict),
    )


def _check_consistency(manifest: Manifest) -> None:
    """Every name that a graph or a file entry uses must be explained elsewhere in the manifest."""
    state_names = [spec.name for spec in manifest.state]
    if len(set(state_names)) != len(state_names):
        raise BundleError("manifest.json: state.tensors names a tensor twice")
    written = {"next." + spec.name for spec in manifest.state if spec.written}
    for engine, graphs in manifest.graphs.items():
        for name, graph in graphs.items():
            where = f"manifest.json: graphs.{engine}.{name}"
            _check_names(
                f"{where}.inputs", graph.inputs, {*state_names, *(s.name for s in manifest.inputs[name])}
            )
            outputs = {spec.name for spec in manifest.outputs[name]} | (
                written if name == "train_step" else set()
            )
            _check_names(f"{where}.outputs", graph.outputs, outputs)
            if not outputs <= set(graph.outputs):
                raise BundleError(f"{where}.outputs lacks {min(outputs - set(graph.outputs))!r}")
            if graph.file not in manifest.files:
                raise BundleError(f"{where}.file: {graph.file!r} is not listed in files")
    if manifest.common_head is not None and manifest.common_head not in state_names:
        raise BundleError(
            f"manifest.json: common_head: there is no state tensor {manifest.common_head!r}",
            "export the bundle again",
        )
    names = manifest.class_names
    if names and (len(names) != manifest.classes or len(set(names)) != len(names) or not all(names)):
        raise BundleError(
            f"manifest.json: class_names has {len(set(names))} different names for {manifest.classes} classes",
            "export the bundle again",
        )
    if manifest.state_file not in manifest.files:
        raise BundleError(f"manifest.json: state.file: {manifest.state_file!r} is not listed in files")
    if manifest.objective.takes_logits and manifest.objective.kd_loss is None:
        raise BundleError(
            f"manifest.json: objective.kd_loss is missing for objective {manifest.objective.name}"
        )
    if manifest.objective.name == "crd" and not (
        manifest.objective.negatives and manifest.objective.teacher_latent_size
    ):
        raise BundleError(
            "manifest.json: objective.negatives or .teacher_latent_size is missing for objective crd"
        )


def _check_samples(manifest: Manifest) -> None:
    """The tensors of a sample enter both graphs as the manifest describes them, and noise is numbered."""
    samples = {spec.name: spec for spec in (manifest.input, *manifest.more_inputs)}
    if len(samples) != 1 + len(manifest.more_inputs):
        raise BundleError(
            "manifest.json: input and more_inputs name a tensor twice", "export the bundle again"
        )
    for graph in GRAPHS:
        found = {spec.name: (spec.shape, spec.dtype) for spec in manifest.inputs[graph]}
        for name, spec in samples.items():
            if found.get(name) != ((manifest.batch, *spec.shape), spec.dtype):
                raise BundleError(
                    f"manifest.json: inputs.{graph}: {name!r} is {found.get(name, 'missing')}, the samples are {spec}",
                    "export the bundle again",
                )
    if [spec.name for spec in manifest.inputs["encode"]] != list(samples):
        raise BundleError(
            f"manifest.json: inputs.encode is not {', '.join(samples)}", "export the bundle again"
        )
    for spec in manifest.inputs["train_step"]:
        if spec.name.startswith("noise.") and (not _NOISE.fullmatch(spec.name) or spec.dtype != "float32"):
            raise BundleError(
                f"manifest.json: inputs.train_step: {spec.name!r} is not noise.0, noise.1, … of float32",
                "export the bundle again",
            )


def _check_names(where: str, names: tuple[str, ...], known: set[str]) -> None:
    if len(set(names)) != len(names):
        raise BundleError(f"{where} has a name twice")
    for name in names:
        if name not in known:
            raise BundleError(
                f"{where}: {name!r} is explained nowhere in the manifest", "export the bundle again"
            )
