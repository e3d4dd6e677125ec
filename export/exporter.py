"""From options to a bundle: builds the student, lowers its step for every engine, writes it all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgestill.export.lowering.capture import Captured, SampleSpec, capture
from edgestill.export.lowering.graph import LoweringError
from edgestill.export.parity.fidelity import check_fidelity
from edgestill.export.parts import Parts, frozen_names, set_common_head, student_parts
from edgestill.export.step.graphs import build_train_step, count_flops
from edgestill.export.step.objectives import complete, objective_parameters
from edgestill.export.step.relational import HEADS
from edgestill.export.step.spec import StepSpec
from edgestill.export.students import ARCHITECTURES, INSTANCE, StudentOptions, build_student, find_student
from edgestill.export.targets import open_target
from edgestill.runtime.bundle.manifest import (
    FORMAT,
    InputSpec,
    Objective,
    Optimizer,
    TensorSpec,
    format_version,
)
from edgestill.runtime.bundle.wire import save
from edgestill.runtime.bundle.writer import check_output, replacing, write_manifest
from edgestill.runtime.data.dataset import class_names_from
from edgestill.runtime.errors import UsageError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
LOWERING = {"executorch": 4.0, "others": 0.2}
"""How long it takes, in times of tracing and checking: measured 2 to 5, and 0.1, at 200 to 3,000 operators."""
CRD_SIZES = ("negatives", "features", "teacher_latent_size")


@dataclass(frozen=True)
class ExportOptions:
    """Everything that `edgestill export` can be told."""

    student: str | nn.Module = "cnn3"
    """A built-in student or `package.module:factory` by name; or a module with its weights, which stays as it is."""
    latent_size: int | None = 128  # None: what the student has, as of classes
    classes: int | None = 10
    batch: int = 32
    widths: tuple[int, ...] | None = None
    normalization: str = "batch"
    input: InputSpec | None = None  # None: what a built-in student takes, else images of 3×32×32
    more_inputs: tuple[InputSpec, ...] = ()
    split: tuple[str, ...] = ()
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    freeze: tuple[str, ...] = ()
    common_head: bool = False
    engines: tuple[str, ...] = ("native", "onnxruntime", "executorch")
    seed: int = 0
    class_names: tuple[str, ...] = ()

    @property
    def student_name(self) -> str:
        """What the manifest calls the student."""
        return self.student if isinstance(self.student, str) else INSTANCE + type(self.student).__name__

    def build(self) -> nn.Module:
        if not isinstance(self.student, str):
            return self.student
        shape = self.samples[0].shape
        options = StudentOptions(shape, self.latent_size, self.classes, self.widths, self.normalization)
        return build_student(self.student, options, self.seed)

    @property
    def output_layer(self) -> str:
        """Where the output layer lies in the student."""
        return self.split[-1] if self.split else "output"

    @property
    def frozen(self) -> tuple[str, ...]:
        """What is not trained: what was asked for, and the common head."""
        return (*self.freeze, self.output_layer) if self.common_head else self.freeze

    @property
    def samples(self) -> tuple[InputSpec, ...]:
        """The tensors of a sample, as given."""
        return (self.input or default_input(self.student), *self.more_inputs)


def options_of(given: Mapping[str, Any]) -> ExportOptions:
    """From what the command and `edgestill.export` are given, by name; None is the default, other names are left alone.

    A student that is no name says itself what its sizes are. Errors: UsageError for one that is no student.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    student = given["student"]

    def filled(default: Any, *same: str, **others: str) -> Any:
        """With what is given of its fields: by the same name, or by another."""
        names = {name: name for name in same} | others
        return replace(default, **{own: given[name] for own, name in names.items() if name in given})

    if given.get("class_names"):
        given["class_names"] = class_names_from(given["class_names"])
        given.setdefault("classes", len(given["class_names"]))
    sample = filled(default_input(student), "mean", "std", shape="input_shape", dtype="input_dtype")
    sizes = {name: given.get(name) for name in ("latent_size", "classes")}
    options = filled(ExportOptions(), *(one.name for one in fields(ExportOptions)))
    if not isinstance(student, str):
        found = find_student(student, options.seed, sizes | {"input_shape": sample.shape})
        options = replace(options, student=found, **sizes)
    return replace(
        options,
        input=sample,
        objective=filled(Objective(), "kd_loss", *CRD_SIZES, name="objective"),
        optimizer=filled(Optimizer(), "nesterov", clips="clip_gradients", name="optimizer"),
    )


@contextmanager
def _as_it_was(student: nn.Module) -> Iterator[None]:
    """Puts modes, attributes and numbers of the user's own module back. It is no copy that is exported: a lambda or a
    closure in a copy would still call the original."""
    boxes = [box for module in student.modules() for box in (vars(module), *vars(module).values())]
    before = [(box, box.copy()) for box in boxes if isinstance(box, dict | list)]
    numbers = [(tensor, tensor.detach().clone()) for tensor in (*student.parameters(), *student.buffers())]
    try:
        yield
    finally:
        for box, held in before:
            box.clear()
            box.extend(held) if isinstance(box, list) else box.update(held)
        for tensor, held in numbers:
            tensor.detach().copy_(held)


def default_input(student: object) -> InputSpec:
    """What a built-in student takes where nothing else is said; images of 3×32×32 for others."""
    row = ARCHITECTURES.get(student) if isinstance(student, str) else None
    return InputSpec() if row is None else InputSpec(row.input_shape, row.input_dtype)


def prepare_step(options: ExportOptions, student: nn.Module) -> StepSpec:
    """What every target lowers. Errors: UsageError for options that make no sense, LoweringError for the student."""
    check_options(options)
    samples = tuple(_with_statistics(given) for given in options.samples)
    _check_weights(student)
    parts = student_parts(student, options.split, options.frozen)
    if options.common_head:
        set_common_head(student, options.output_layer)
    names = [sample.name for sample in samples]
    _check_names(names, [], parts.own([*parts.named_parameters(), *parts.named_buffers()]))
    shapes = [
        SampleSpec(s.name, (options.batch, *s.shape), "int64" if s.dtype == "int64" else "float32")
        for s in samples
    ]
    captured = {training: capture(parts, shapes, training, parts.prefix) for training in (True, False)}
    if captured[False].noise:
        raise LoweringError(
            "the student draws random numbers in inference mode, too",
            hint="use nn.Dropout, or F.dropout(x, p, self.training)",
        )
    latent_size, classes = captured[True].latents.shape[1], captured[True].logits.shape[1]
    for what, flag, got, wanted in (
        ("latents", "--latent-size", latent_size, options.latent_size),
        ("logits", "--classes", classes, options.classes),
    ):
        if wanted not in (None, got):
            raise UsageError(f"the student's {what} have size {got}, not {wanted}", hint=f"add {flag} {got}")
    check_fidelity(student, parts, captured, samples, options.batch)
    initial, statistics = _state_of(parts, captured)
    objective = complete(options.objective, latent_size)
    own = objective_parameters(objective, latent_size, options.seed)
    for name in own.keys() & initial.keys():
        raise UsageError(f"the student has a parameter {name}, as objective {objective.name} has", "rename it")
    spec = StepSpec(
        captured[True],
        captured[False],
        initial | own,
        statistics,
        frozen_names(student, options.frozen),
        options.batch,
        samples,
        objective,
        options.optimizer,
    )
    others = [tensor.name for tensor in (*spec.step_inputs()[len(names) :], *spec.metrics())]
    _check_names(names, others, spec.initial)
    return spec


def _check_names(samples: list[str], others: list[str], state: Iterable[str]) -> None:
    """Errors: UsageError where a step would have two tensors of one name."""
    own = ("noise.", "next.", "optimizer.")
    for i, name in enumerate(samples):
        if name in samples[:i] + others or name.startswith(own):
            raise UsageError(f"a sample has a tensor {name}, as a step has", hint="give it another name")
    for name in state:
        if name in samples + others or name.startswith(own):
            raise UsageError(f"the student has a tensor {name}, as a step has", hint="rename it, or its module")


def _check_weights(student: nn.Module) -> None:
    for name, module in student.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise LoweringError(f"{name}: a module of torch.jit", hint="take the module that it was made of")
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and module.track_running_stats and module.momentum is None:
            raise LoweringError(
                f"{name}: {type(module).__name__} with momentum=None averages over a count of its own",
                hint="give it a fixed momentum, such as 0.1",
            )
    for name, tensor in student.named_parameters():
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise LoweringError(
                f"the student's {name} has a backward hook, which would be lost",
                hint="leave it out: a step's gradients are those of its forward pass",
            )
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise LoweringError(f"the student's {name} has no shape yet", hint="call the student on a sample first")
        if not bool(torch.isfinite(tensor).all()):
            raise LoweringError(
                f"the student's {name} holds NaN or infinity", hint="export it with weights that are numbers"
            )


def _state_of(parts: Parts, captured: Mapping[bool, Captured]) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Parameters and the buffers that the graphs read or write, by their PyTorch names, and which are buffers."""
    used = {value.name for one in captured.values() for value in one.graph.inputs}
    used |= {name for one in captured.values() for name in one.written}
    parameters = parts.own(parts.named_parameters()).keys()
    if unused := parameters - used:
        raise LoweringError(
            f"the student's {', '.join(sorted(unused))} does not enter its outputs",
            hint="remove what `output(representation(perception(x)))` does not use",
        )
    named = parts.own({**parts.state_dict(keep_vars=True), **dict(parts.named_buffers())}.items())
    tensors = {name: tensor.detach().cpu().numpy().copy() for name, tensor in named.items() if name in used}
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
    check_output(output, overwrite)
    targets = {engine: open_target(engine) for engine in options.engines}
    progress(f"tracing {options.student_name}")
    student, started = options.build(), time.monotonic()
    with _as_it_was(student):
        spec = prepare_step(options, student)
    with replacing(output) as folder:
        graphs, took = {}, time.monotonic() - started
        for engine, target in targets.items():
            left = took * LOWERING.get(engine, LOWERING["others"])
            progress(f"lowering the training step for {engine}" + f", about {left:.0f} s" * (left >= 5))
            (folder / engine).mkdir()
            records = target.emit(spec, folder / engine)
            graphs[engine] = {name: record | {"file": f"{engine}/{record['file']}"} for name, record in records.items()}
        save(folder / "state.safetensors", spec.initial_state())
        write_manifest(folder, _manifest(options, spec, graphs))
    progress(f"wrote {output}")
    return output


def check_options(options: ExportOptions) -> None:
    """Errors: UsageError. Before the student is built, because PyTorch's own errors name no option."""
    given, crd = options.objective, CRD_SIZES
    for name in crd:
        if getattr(given, name) is not None and given.name != "crd":
            raise UsageError(f"--{name.replace('_', '-')} is for --objective crd, not {given.name}")
    for name, least in {"batch": 1, "latent_size": 1, "classes": 2, **dict.fromkeys(crd, 1)}.items():
        value = getattr(given if name in crd else options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if options.class_names and len(options.class_names) != options.classes:
        named = len(options.class_names)
        raise UsageError(f"--class-names gives {named} names, --classes {options.classes}", hint="leave --classes out")
    if min(*(options.widths or (1,)), *(min(s.shape, default=0) for s in options.samples)) < 1:
        raise UsageError("--input-shape and --widths need sizes of at least 1")
    check_seed(options.seed)
    if given.kd_loss and not given.takes_logits:
        raise UsageError(f"--kd-loss is for --objective kd or both, not {given.name}")
    if options.optimizer.nesterov and options.optimizer.name != "sgd":
        raise UsageError(f"--nesterov is for --optimizer sgd, not {options.optimizer.name}")
    if given.relates_samples and options.batch < 2:
        message = f"--objective {given.name} compares samples, a batch has {options.batch}"
        raise UsageError(message, hint="--batch 32")
    if not options.engines:
        raise UsageError("--engines names no engine", hint="--engines onnxruntime,executorch")


def check_seed(seed: int) -> None:
    """Errors: UsageError."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} is out of range", hint="give 0 or more, below 2^63")


def _with_statistics(given: InputSpec) -> InputSpec:
    """The input with mean and standard deviation filled in and checked."""
    if given.dtype != "uint8":
        if given.mean or given.std:
            raise UsageError(
                f"--mean and --std are for uint8 inputs; {given.dtype} inputs enter the student as they are",
                hint="normalise your windows before, or put a BatchNorm first in the perception module",
            )
        return given
    channels = given.shape[0]
    mean = tuple(given.mean) or (CIFAR10_MEAN if channels == 3 else (0.5,) * channels)
    std = tuple(given.std) or (CIFAR10_STD if channels == 3 else (0.25,) * channels)
    right = all(0 <= m <= 1 for m in mean) and all(0 < s < math.inf for s in std)
    if not (right and len(mean) == len(std) == channels):
        raise UsageError(
            f"--mean and --std need {channels} numbers each, one a channel, --mean from 0 to 1, --std above zero",
            hint="--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 (of pixel values from 0 to 1)",
        )
    return replace(given, mean=mean, std=std)


def _manifest(options: ExportOptions, spec: StepSpec, graphs: dict) -> dict:
    try:
        own_version = version("edgestill")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own_version = "0+unknown"
    own_student = {"seed": options.seed, **({"split": list(options.split)} if options.split else {})}
    if ":" not in options.student_name:
        own_student = {"widths": options.widths, "normalization": options.normalization, "seed": options.seed}
    parameters = [
        data.size for name, data in spec.initial.items() if name not in spec.statistics and not name.startswith(HEADS)
    ]
    first, *more = (_input_entry(sample) for sample in spec.samples)
    return {
        "format": FORMAT,
        "format_version": format_version(options.class_names, options.optimizer.clips),
        "edgestill_version": own_version,
        "student": {"name": options.student_name, "options": own_student, "parameters": sum(parameters)},
        "latent_size": spec.latent_size,
        "classes": spec.classes,
        **({"class_names": list(options.class_names)} if options.class_names else {}),
        "batch": options.batch,
        "input": first,
        "more_inputs": more,
        "objective": {k: v for k, v in asdict(spec.objective).items() if k == "kd_loss" or v is not None},
        "optimizer": {k: v for k, v in asdict(options.optimizer).items() if k != "clips" or v},
        "freeze": list(options.frozen),
        "common_head": f"{options.output_layer}.weight" if options.common_head else None,
        "flops_per_step": count_flops(build_train_step(spec)),
        "state": {"file": "state.safetensors", "tensors": _entries(spec.state_specs())},
        "inputs": {"train_step": _entries(spec.step_inputs()), "encode": _entries(spec.encode_inputs())},
        "outputs": {"train_step": _entries(spec.metrics()), "encode": _entries(spec.encodings())},
        "graphs": graphs,
        "parity": {},
    }


def _entries(specs: Iterable[TensorSpec]) -> list[dict]:
    return [spec.as_json() for spec in specs]


def _input_entry(sample: InputSpec) -> dict:
    entry = {"name": sample.name, "shape": list(sample.shape), "dtype": sample.dtype}
    return entry | ({"mean": list(sample.mean), "std": list(sample.std)} if sample.dtype == "uint8" else {})
