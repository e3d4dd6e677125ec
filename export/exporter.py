"""From options to a bundle: builds the student, lowers its step for every engine, writes it all or nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgestill.export.lowering.capture import SampleSpec, capture
from edgestill.export.lowering.graph import LoweringError
from edgestill.export.parity.fidelity import check_fidelity
from edgestill.export.parts import Parts, frozen_names, resting_norms, student_parts
from edgestill.export.step.graphs import build_train_step, count_flops
from edgestill.export.step.objectives import complete, objective_parameters
from edgestill.export.step.relational import HEADS
from edgestill.export.step.spec import StepSpec
from edgestill.export.students import ARCHITECTURES, INSTANCE, StudentOptions, build_student
from edgestill.export.targets import open_target
from edgestill.runtime.bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    InputSpec,
    Objective,
    Optimizer,
    TensorSpec,
)
from edgestill.runtime.bundle.wire import save
from edgestill.runtime.errors import UsageError
from edgestill.runtime.files import sha256_of_file, write_atomically

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ExportOptions:
    """Everything that `edgestill export` can be told."""

    student: str | nn.Module = "cnn3"
    """A built-in student or `package.module:factory` by name; or a module with its weights, which stays as it is."""
    latent_size: int = 128
    classes: int = 10
    batch: int = 32
    widths: tuple[int, ...] | None = None
    normalization: str = "batch"
    input: InputSpec | None = None  # None: what a built-in student takes, else images of 3×32×32
    more_inputs: tuple[InputSpec, ...] = ()
    split: tuple[str, ...] = ()
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    freeze: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("onnxruntime", "executorch")
    seed: int = 0

    @property
    def student_name(self) -> str:
        """What the manifest calls the student."""
        return self.student if isinstance(self.student, str) else INSTANCE + type(self.student).__name__

    def build(self) -> nn.Module:
        if not isinstance(self.student, str):
            return copy.deepcopy(self.student)
        shape = self.samples[0].shape
        options = StudentOptions(shape, self.latent_size, self.classes, self.widths, self.normalization)
        return build_student(self.student, options, self.seed)

    @property
    def samples(self) -> tuple[InputSpec, ...]:
        """The tensors of a sample, as given."""
        return (self.input or default_input(self.student), *self.more_inputs)


def default_input(student: str | nn.Module) -> InputSpec:
    """What a built-in student takes where nothing else is said; images of 3×32×32 for others."""
    row = ARCHITECTURES.get(student) if isinstance(student, str) else None
    return InputSpec() if row is None else InputSpec(row.input_shape, row.input_dtype)


def prepare_step(options: ExportOptions, student: nn.Module) -> StepSpec:
    """What every target lowers. Errors: UsageError for options that make no sense, LoweringError for the student."""
    check_options(options)
    samples = tuple(_with_statistics(given) for given in options.samples)
    _check_weights(student)
    resting = resting_norms(student, frozen_names(student, options.freeze)) if options.freeze else []
    parts, prefix = student_parts(student, options.split, resting)
    shapes = [
        SampleSpec(s.name, (options.batch, *s.shape), "int64" if s.dtype == "int64" else "float32")
        for s in samples
    ]
    captured = {training: capture(parts, shapes, training, prefix) for training in (True, False)}
    for what, got, wanted in (
        ("latents", captured[True].latents.shape[1], options.latent_size),
        ("logits", captured[True].logits.shape[1], options.classes),
    ):
        if got != wanted:
            flag = "--latent-size" if what == "latents" else "--classes"
            raise UsageError(f"the student's {what} have size {got}, not {wanted}", hint=f"add {flag} {got}")
    check_fidelity(student, parts, prefix, captured, samples, options.batch)
    initial, statistics = _state_of(parts, prefix, captured)
    objective = complete(options.objective, options.latent_size)
    own = objective_parameters(objective, options.latent_size, options.seed)
    for name in own.keys() & initial.keys():
        raise UsageError(
            f"the student has a parameter {name}, as objective {objective.name} has", hint="rename it"
        )
    return StepSpec(
        captured[True],
        captured[False],
        initial | own,
        statistics,
        frozenset(name.removeprefix(prefix) for name in frozen_names(student, options.freeze)),
        options.batch,
        samples,
        objective,
        options.optimizer,
    )


def sizes_of(
    student: nn.Module, split: tuple[str, ...], samples: tuple[InputSpec, ...]
) -> tuple[int, int]:
    """Latent size and classes of a module, from one sample of zeros. Errors: UsageError where it cannot be called."""
    parts, _ = student_parts(copy.deepcopy(student), split)
    zeros = [
        torch.zeros(1, *one.shape, dtype=torch.int64 if one.dtype == "int64" else torch.float32)
        for one in samples
    ]
    try:
        with torch.no_grad():
            latents, logits = parts.eval()(*zeros)
        return int(latents.shape[1]), int(logits.shape[1])
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        shapes = " and ".join(str(one.shape) for one in samples)
        raise UsageError(
            f"{type(student).__name__} fails on a sample of {shapes}: {error}", "give the right input_shape"
        ) from error


def _check_weights(student: nn.Module) -> None:
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            if module.track_running_stats:
                raise LoweringError(
                    f"{name}: {type(module).__name__} with momentum=None averages over a count of its own",
                    hint="give it a fixed momentum, such as 0.1",
                )
    for name, tensor in student.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise LoweringError(
                f"the student's {name} holds NaN or infinity", hint="export it with weights that are numbers"
            )


def _state_of(parts: Parts, prefix: str, captured: dict) -> tuple[OrderedDict[str, np.ndarray], frozenset[str]]:
    """Parameters and the buffers that the graphs read or write, by their PyTorch names, and which are buffers."""
    used = {value.name for one in captured.values() for value in one.graph.inputs}
    used |= {name for one in captured.values() for name in one.written}
    parameters = {name.removeprefix(prefix) for name, _ in parts.named_parameters()}
    tensors: OrderedDict[str, np.ndarray] = OrderedDict()
    named = {**parts.state_dict(keep_vars=True), **dict(parts.named_buffers())}
    for name, tensor in ((name.removeprefix(prefix), tensor) for name, tensor in named.items()):
        if name in used:
            tensors[name] = tensor.detach().cpu().numpy().copy()
    unused = parameters - used
    if unused:
        raise LoweringError(
            f"the student's {', '.join(sorted(unused))} does not enter its outputs",
            hint="remove what `output(representation(perception(x)))` does not use",
        )
    return tensors, frozenset(tensors) - parameters


def export_bundle(
    options: ExportOptions,
    output: Path,
    progress: Callable[[str], None] = lambda line: None,
    overwrite: bool = False,
) -> Path:
    """Writes the bundle to the folder `output`, or to one file if it ends in `.zip`; returns its path.

    The bundle appears whole or not at all. Errors: UsageError, LoweringError, TargetError; an existing bundle is
    replaced only with `overwrite`, and anything else at `output` never.
    """
    output = Path(output)
    check_options(options)
    _check_output(output, overwrite)
    targets = {engine: open_target(engine) for engine in options.engines}
    progress(f"tracing {options.student_name}")
    student = options.build()
    spec = prepare_step(options, student)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir(mode=0o755)
        graphs = {}
        for engine, target in targets.items():
            progress(f"lowering the training step for {engine}")
            (folder / engine).mkdir()
            records = target.emit(spec, folder / engine)
            graphs[engine] = {
                name: record | {"file": f"{engine}/{record['file']}"} for name, record in records.items()
            }
        save(folder / "state.safetensors", spec.initial_state())
        manifest = _manifest(options, spec, graphs) | {"parity": {}}
        write_manifest(folder, manifest)
        publish(folder, output)
    progress(f"wrote {output}")
    return output


def write_manifest(folder: Path, manifest: dict) -> None:
    """Writes manifest.json with the digests of all other files in the folder."""
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_of_file(path),
            "size_bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    text = json.dumps(manifest | {"files": files}, indent=1) + "\n"
    write_atomically(folder / "manifest.json", [text.encode()])


def check_options(options: ExportOptions) -> None:
    """Errors: UsageError. Before the student is built, because PyTorch's own errors name no option."""
    for name in ("batch", "latent_size", "classes"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if min(*(options.widths or (1,)), *(min(s.shape, default=0) for s in options.samples)) < 1:
        raise UsageError("--input-shape and --widths need sizes of at least 1")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"--seed {options.seed} is out of range", hint="give 0 or more, below 2^63")
    if options.classes < 2:
        raise UsageError("--classes must be at least 2")
    given = options.objective
    for flag in ("negatives", "features", "teacher_latent_size"):
        value = getattr(given, flag)
        if value is not None and given.name != "crd":
            raise UsageError(f"--{flag.replace('_', '-')} is for --objective crd, not {given.name}")
        if value is not None and value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1, not {value}")
    if given.relates_samples and options.batch < 2:
        raise UsageError(
            f"--objective {given.name} compares samples, a batch has {options.batch}", hint="--batch 32"
        )
    if not options.engines:
        raise UsageError("--engines names no engine", hint="--engines onnxruntime,executorch")


def _with_statistics(given: InputSpec) -> InputSpec:
    """The input with mean and standard deviation filled in and checked."""
    channels = given.shape[0]
    if given.dtype != "uint8":
        if given.mean or given.std:
            raise UsageError(
                f"--mean and --std are for uint8 inputs; {given.dtype} inputs enter the student as they are",
                hint="normalise your windows before, or put a BatchNorm first in the perception module",
            )
        return given
    mean = given.mean or (CIFAR10_MEAN if channels == 3 else (0.5,) * channels)
    std = given.std or (CIFAR10_STD if channels == 3 else (0.25,) * channels)
    if (
        len(mean) != channels or len(std) != channels or min(std) <= 0
        or not all(map(math.isfinite, (*mean, *std))) or not all(0 <= m <= 1 for m in mean)
    ):  # fmt: skip
        raise UsageError(
            f"--mean and --std need {channels} numbers each, one a channel, --mean from 0 to 1, --std above zero",
            hint="--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 (of pixel values from 0 to 1)",
        )
    return replace(given, mean=tuple(mean), std=tuple(std))


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    is_bundle = _is_bundle(output)
    if not (is_bundle and overwrite):
        raise UsageError(
            f"{output} exists already",
            hint="add --overwrite to replace the bundle" if is_bundle else "give another --output",
        )


def _is_bundle(path: Path) -> bool:
    """Whether a bundle of whatever version, damaged or not, is at `path`; no other folder is ever deleted."""
    try:
        if path.is_dir():
            text = (path / "manifest.json").read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                text = archive.read("manifest.json")
        manifest = json.loads(text)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def publish(folder: Path, output: Path) -> None:
    """Moves a finished folder to `output`, replacing an older bundle there; packs it if that ends in `.zip`."""
    if output.suffix == ".zip":
        part = folder.parent / "bundle.zip"
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(folder).as_posix())
        os.replace(part, output)
        return
    if output.is_dir() and any(output.iterdir()):
        old = folder.parent / "replaced"
        output.rename(old)  # stays until the scratch folder goes, so that a failing rename loses nothing
        try:
            folder.rename(output)
        except OSError:
            old.rename(output)
            raise
        return
    if output.is_dir():
        output.rmdir()
    shutil.move(folder, output)


def _manifest(options: ExportOptions, spec: StepSpec, graphs: dict) -> dict:
    try:
        own_version = version("edgestill")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own_version = "0+unknown"
    first, *more = (_input_entry(sample) for sample in spec.samples)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "edgestill_version": own_version,
        "student": {
            "name": options.student_name,
            "options": {
                "widths": options.widths,
                "normalization": options.normalization,
                "seed": options.seed,
            }
            if ":" not in options.student_name
            else {"seed": options.seed, **({"split": list(options.split)} if options.split else {})},
            "parameters": sum(
                data.size
                for name, data in spec.initial.items()
                if name not in spec.statistics and not name.startswith(HEADS)
            ),
        },
        "latent_size": options.latent_size,
        "classes": options.classes,
        "batch": options.batch,
        "input": first,
        "more_inputs": more,
        "objective": {
            key: value
            for key, value in asdict(spec.objective).items()
            if key == "kd_loss" or value is not None
        },
        "optimizer": asdict(options.optimizer),
        "freeze": list(options.freeze),
        "flops_per_step": count_flops(build_train_step(spec)),
        "state": {"file": "state.safetensors", "tensors": _entries(spec.state_specs())},
        "inputs": {"train_step": _entries(spec.step_inputs()), "encode": _entries(spec.encode_inputs())},
        "outputs": {"train_step": _entries(spec.metrics()), "encode": _entries(spec.encodings())},
        "graphs": graphs,
    }


def _entries(specs: Iterable[TensorSpec]) -> list[dict]:
    return [spec.as_json() for spec in specs]


def _input_entry(sample: InputSpec) -> dict:
    entry = {"name": sample.name, "shape": list(sample.shape), "dtype": sample.dtype}
    return entry | ({"mean": list(sample.mean), "std": list(sample.std)} if sample.dtype == "uint8" else {})
