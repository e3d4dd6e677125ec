"""One ordinary inference model of a trained student: weights baked in, samples in, probabilities out; .onnx or .pte.

Made by PyTorch's own exporters from the student that the bundle names, not from a bundle's graphs: those have the batch
of training, and take their state as inputs.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgestill.export.parity.fidelity import as_float, random_samples
from edgestill.export.parity.reference import load_student_state, rebuild_student
from edgestill.export.parts import Parts, SplitModel, student_parts
from edgestill.export.targets import TargetError
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.data.classes import names_of_outputs
from edgestill.runtime.errors import UsageError
from edgestill.runtime.files import write_atomically
from edgestill.runtime.training.checkpoint import classes_of, load_named_state

OUTPUT = "probabilities"
TOLERANCE = 1e-4
"""Of a probability, between the written model and eager PyTorch."""
_CHECKED = 3  # samples


class Classifier(nn.Module):
    """Samples as the bundle takes them → probabilities [N, K]."""

    def __init__(self, parts: Parts, samples: Sequence[InputSpec]):
        super().__init__()
        self.parts = parts
        self.dtypes = [sample.dtype for sample in samples]
        for number, sample in enumerate(samples):
            if sample.dtype == "uint8":
                shape = (-1, *(1,) * (len(sample.shape) - 1))
                mean, std = (torch.tensor(values).reshape(shape) for values in (sample.mean, sample.std))
                self.register_buffer(f"scale{number}", 1 / (255 * std))
                self.register_buffer(f"shift{number}", -mean / std)

    def forward(self, *samples: torch.Tensor) -> torch.Tensor:
        prepared = [
            x.to(torch.float32) * getattr(self, f"scale{number}") + getattr(self, f"shift{number}")
            if dtype == "uint8"
            else x
            for number, (x, dtype) in enumerate(zip(samples, self.dtypes, strict=True))
        ]
        parts = self.parts
        if isinstance(parts, SplitModel):  # what it does to find the latent, no model needs
            return torch.softmax(parts.student(*prepared), 1)
        return torch.softmax(parts.output(parts.representation(parts.perception(*prepared))), 1)


def export_inference(
    bundle_path: str | Path,
    state: Path | None,
    output: Path,
    student: str | None = None,
    batch: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
    overwrite: bool = False,
) -> Path:
    """Writes the model, compares it with eager PyTorch, and returns its path.

    `state`: None is the bundle's initial one. `student` replaces the recorded factory. `batch`: samples a call; None is
    any number for .onnx, 1 for .pte. Errors: UsageError; TargetError where the exporter or the comparison fails.
    """
    write = _WRITERS.get(output.suffix)
    if write is None:
        raise UsageError(f"--output {output}: which format?", "give a file ending in .onnx or .pte")
    if batch is not None and batch < 1:
        raise UsageError(f"--batch must be at least 1, not {batch}")
    if output.is_dir() or (output.exists() and not overwrite):
        raise UsageError(f"{output} exists already", "add --overwrite, or give another --output")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: no folder {output.parent}", "make it, or give another --output")
    with Bundle.open(bundle_path) as bundle:
        if bundle.contains(output):
            raise UsageError(
                f"--output {output} lies in the bundle, which holds only what its manifest lists",
                "write the model elsewhere",
            )
        known = classes_of(bundle)
        arrays = bundle.initial_state()
        if state is not None:
            arrays, known = load_named_state(state, bundle)
        names = names_of_outputs(known.names, bundle.classes)
        progress(f"building {student or bundle.student.name}")
        module = rebuild_student(bundle, student)
        load_student_state(module, arrays)
        parts = student_parts(module, bundle.student.options.get("split", ()), bundle.manifest.freeze)
        classifier = Classifier(parts, bundle.samples).eval()
        drawn = random_samples(module, bundle.samples, batch or _CHECKED, np.random.default_rng(0))
        about = {"class_names": json.dumps(names, ensure_ascii=False), "student": bundle.student.name,
                 "edgestill_version": bundle.manifest.edgestill_version}  # fmt: skip
        progress(f"writing {output}")
        with _quiet(), torch.no_grad():
            try:
                body = write(classifier, [torch.from_numpy(array) for array in drawn], bundle, batch, about)
            except Exception as error:  # the exporters raise whatever they stumble over
                raise TargetError(
                    f"PyTorch's exporter fails for {output.suffix}: {_first_line(error)}",
                    "add --batch 1" if batch is None and output.suffix == ".onnx" else "try the other format",
                ) from error
        _check(output.suffix, body, classifier, drawn, batch, bundle)
        write_atomically(output, [body])
    return output


def _write_onnx(
    classifier: Classifier, samples: list[torch.Tensor], bundle: Bundle, batch: int | None, about: dict[str, str]
) -> bytes:
    names = list(bundle.sample_names)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in samples)
    program = torch.onnx.export(
        classifier, tuple(samples), dynamo=True, verbose=False, input_names=names, output_names=[OUTPUT],
        dynamic_shapes=(dynamic,) if batch is None else None,
    )  # fmt: skip
    model = program.model_proto
    model.producer_name, model.producer_version = "edgestill", metadata.version("edgestill")
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]  # they name files of this machine
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
    if batch is None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "N"
    return model.SerializeToString()


def _write_pte(
    classifier: Classifier, samples: list[torch.Tensor], bundle: Bundle, batch: int | None, about: dict[str, str]
) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(classifier, tuple(sample[: batch or 1] for sample in samples))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=about)
    return bytes(edge.to_executorch().buffer)


_WRITERS = {".onnx": _write_onnx, ".pte": _write_pte}


def _check(
    suffix: str, body: bytes, classifier: Classifier, drawn: list[np.ndarray], batch: int | None, bundle: Bundle
) -> None:
    """Errors: TargetError for a model that gives other probabilities than the student does in eager PyTorch."""
    count = batch or (1 if suffix == ".pte" else _CHECKED)
    given = [array[:count] for array in drawn]
    inputs = [as_float(array, spec) for array, spec in zip(given, bundle.samples, strict=True)]
    with torch.no_grad():
        expected = torch.softmax(classifier.parts(*inputs)[1], 1).numpy()
    found = run_model(suffix, body, dict(zip(bundle.sample_names, given, strict=True)))
    apart = float(np.abs(found - expected).max())
    if not apart <= TOLERANCE:
        raise TargetError(
            f"the {suffix} model gives probabilities {apart:.2g} off those of the student",
            "this is a defect of PyTorch's exporter for this student: try the other format",
        )


def run_model(suffix: str, body: bytes, samples: dict[str, np.ndarray]) -> np.ndarray:
    """The probabilities that a written model gives, by its own stock engine."""
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
        return session.run([OUTPUT], samples)[0]
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(body).load_method("forward")
    return method.execute([torch.from_numpy(array) for array in samples.values()])[0].numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
