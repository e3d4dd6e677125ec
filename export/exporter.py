"""From options to a bundle: builds the student, lowers its step for every engine, writes it all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from edgestill.export.lowering.capture import LoweringError, capture_student
from edgestill.export.objectives import Objective, complete, objective_parameters
from edgestill.export.optimizers import Optimizer
from edgestill.export.relational import HEADS
from edgestill.export.step import InputOptions, StepSpec, frozen_layers, frozen_names, student_state
from edgestill.export.student import StudentOptions, build_student
from edgestill.export.targets import open_target
from edgestill.runtime.bundle.manifest import FORMAT, FORMAT_VERSION
from edgestill.runtime.bundle.wire import save
from edgestill.runtime.errors import UsageError
from edgestill.runtime.files import sha256_of_file, write_atomically

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ExportOptions:
    """Everything that `edgestill export` can be told."""

    student: str = "cnn3"
    latent_size: int = 128
    classes: int = 10
    batch: int = 32
    widths: tuple[int, ...] | None = None
    normalization: str = "batch"
    input: InputOptions = field(default_factory=InputOptions)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    freeze: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("onnxruntime", "executorch")
    seed: int = 0

    def build(self) -> nn.Module:
        options = StudentOptions(
            self.input.shape, self.latent_size, self.classes, self.widths, self.normalization
        )
        return build_student(self.student, options, self.seed)


def prepare_step(options: ExportOptions, student: nn.Module) -> StepSpec:
    """What every target lowers. Errors: UsageError for options that make no sense, LoweringError for the student."""
    check_options(options)
    captured = capture_student(student, options.batch, options.input.shape)
    for what, got, wanted in (
        ("latents", captured.latent_size, options.latent_size),
        ("logits", captured.classes, options.classes),
    ):
        if got != wanted:
            flag = "--latent-size" if what == "latents" else "--classes"
            raise UsageError(f"the student's {what} have size {got}, not {wanted}", hint=f"add {flag} {got}")
    initial, statistics = student_state(student)
    used = {name for layer in captured.layers for name in layer.parameters.values()}
    for name in initial.keys() - used:
        raise LoweringError(
            f"the student's {name} does not enter its outputs",
            hint="remove what `output(representation(perception(images)))` does not use",
        )
    objective = complete(options.objective, options.latent_size)
    own = objective_parameters(objective, options.latent_size, options.seed)
    for name in own.keys() & initial.keys():
        raise UsageError(
            f"the student has a parameter {name}, as objective {objective.name} has", hint="rename it"
        )
    frozen = frozen_names(student, list(options.freeze)) if options.freeze else frozenset()
    return StepSpec(
        captured,
        initial | own,
        statistics,
        frozen,
        frozen_layers(captured.layers, frozen),
        options.batch,
        _with_statistics(options.input),
        objective,
        options.optimizer,
    )


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
    progress(f"tracing {options.student}")
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
    if min(options.input.shape) < 1 or min(options.widths or (1,)) < 1:
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


def _with_statistics(given: InputOptions) -> InputOptions:
    """The input with mean and standard deviation filled in and checked."""
    channels = given.shape[0]
    if given.dtype == "float32":
        if given.mean or given.std:
            raise UsageError(
                "--mean and --std are for uint8 inputs; float32 inputs enter the student as they are",
                hint="normalise your windows before, or put a BatchNorm2d first in the perception module",
            )
        return given
    mean = given.mean or (CIFAR10_MEAN if channels == 3 else (0.5,) * channels)
    std = given.std or (CIFAR10_STD if channels == 3 else (0.25,) * channels)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UsageError(
            f"--mean and --std need {channels} numbers each, one a channel, --std above zero",
            hint="--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 (of pixel values from 0 to 1)",
        )
    return InputOptions(given.shape, given.dtype, tuple(mean), tuple(std))


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
    step_inputs = spec.step_inputs()
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "edgestill_version": own_version,
        "student": {
            "name": options.student,
            "options": {
                "widths": options.widths,
                "normalization": options.normalization,
                "seed": options.seed,
            }
            if ":" not in options.student
            else {"seed": options.seed},
            "parameters": sum(
                data.size
                for name, data in spec.initial.items()
                if name not in spec.statistics and not name.startswith(HEADS)
            ),
        },
        "latent_size": options.latent_size,
        "classes": options.classes,
        "batch": options.batch,
        "input": {key: value for key, value in asdict(spec.input).items() if value is not None},
        "objective": {
            key: value
            for key, value in asdict(spec.objective).items()
            if key == "kd_loss" or value is not None
        },
        "optimizer": asdict(options.optimizer),
        "freeze": list(options.freeze),
        "flops_per_step": spec.flops(),
        "state": {"file": "state.safetensors", "tensors": spec.state_specs()},
        "inputs": {"train_step": step_inputs, "encode": step_inputs[:1]},
        "outputs": {"train_step": spec.metrics(), "encode": spec.encodings()},
        "graphs": graphs,
    }
