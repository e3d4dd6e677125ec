"""One job, step 5 of a round: accepted uploads in, the next global outputs out; reads blobs, writes nothing.

A pure function of the task, the accepted set, the global outputs before and the global student before: repeated
after a crash it gives the same bytes (on the same engine).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgestill.coordinator.credentials import derive_seed
from edgestill.coordinator.distillation.aggregation import Upload, aggregate, left_out
from edgestill.coordinator.distillation.global_student import distil, evaluate_global
from edgestill.coordinator.store.blobs import Blobs, read_blob
from edgestill.coordinator.store.records import UploadRecord
from edgestill.coordinator.task.task import StudentEntry, Task
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.device import outputs
from edgestill.runtime.device.local_training import Transfer, load_labels, with_parameters
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.errors import EdgestillError, Interrupted
from edgestill.runtime.training.evaluation import score

VALIDATION = "validation_accuracy"
"""The metric by which the best round is chosen; `t_uni`, of the test set, never is."""

Read = TypeVar("Read")
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Job:
    """A distillation that is due, and who holds its lease: one who has lost it cannot end the round."""

    task: str
    number: int
    owner: str
    deadline_s: float
    """When the round is abandoned, seconds since the epoch."""

    @property
    def round_name(self) -> str:
        return f"{self.task}.{self.number}"

    def seconds_left(self, now_s: float) -> float:
        return max(0.0, self.deadline_s - now_s)


@dataclass(frozen=True)
class Inputs:
    """What the store knows of a round whose collection has ended."""

    task: Task
    uploads: Sequence[UploadRecord]
    previous: str | None
    """Blob of the global outputs before."""
    student_state: str | None
    """Blob of the global student's state before."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Of the devices that have one, by name."""


@dataclass(frozen=True)
class Result:
    """What is published and kept."""

    body: bytes
    """The new global outputs, in the task's precision, not compressed: `WORK` names no encoding."""
    state: Mapping[str, np.ndarray] | None
    """The global student, where there is one."""
    metrics: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    """What the outputs of `state` mean."""


def compute(
    job: Job, inputs: Inputs, blobs: Blobs, should_stop: Stop = lambda: False, threads: int = 0
) -> Result:
    """Aggregates, distils where the task has a global student, and evaluates where it has a test set.

    Errors: EdgestillError of many kinds, naming what does not fit; Interrupted when `should_stop` said so.
    """
    started_s, task = time.perf_counter(), inputs.task
    expected = task.expected_upload()
    uploads = [
        _load_upload(upload, inputs.numbers.get(upload.device, 0), blobs, expected, job)
        for upload in inputs.uploads
    ]
    previous = None
    if inputs.previous is not None:
        previous, _ = outputs.unpack(
            read_blob(blobs, inputs.previous), "identity", expected, source="the global outputs before"
        )
    transfer = None
    if task.global_student is not None or (task.transfer.labelled and task.exchange != "parameters"):
        transfer = _load_transfer(task, blobs)
    labels = None if transfer is None else transfer.labels
    aggregated = aggregate(uploads, task.aggregation, previous, labels)
    metrics: dict[str, Any] = {
        "uploads": len(inputs.uploads),
        "left_out": len(left_out(uploads, task.aggregation, previous)),
        "samples": sum(upload.samples for upload in inputs.uploads),
    }
    del uploads
    if should_stop():
        raise Interrupted(
            f"round {job.round_name}: step 5 ran past its deadline", "give distil.deadline_s more"
        )
    state = None
    if task.global_student is not None and transfer is not None:
        state, aggregated = _distil(job, inputs, task.global_student, transfer, aggregated, blobs, metrics,
                                    should_stop, threads)  # fmt: skip
    elif task.exchange == "parameters":
        _evaluate_parameters(task, aggregated, blobs, metrics, threads)
    if labels is not None and "logits" in aggregated:
        metrics["transfer_accuracy"] = score(aggregated["logits"], labels, task.classes).accuracy
    packed = outputs.pack(
        aggregated, task.precision, {"task": task.name, "round": str(job.number)}, compress=False
    )
    metrics["max_error"] = max(packed.max_error.values(), default=0.0)
    metrics["seconds"] = time.perf_counter() - started_s
    # a loss of NaN is no number in PostgreSQL's JSON, and a figure less is no reason to lose the round
    finite = {k: value for k, value in metrics.items() if math.isfinite(value)}
    return Result(packed.body, state, finite, task.class_names)


def _load(blobs: Blobs, digest: str, what: str, read: Callable[[Path], Read]) -> Read:
    """A blob read from its file. Errors: those of `read`, which name `what` and not where this machine keeps it."""
    path = blobs.path(digest)
    try:
        return read(path)
    except EdgestillError as error:
        raise EdgestillError(
            error.message.replace(str(path), f"{what}, blob {digest}"), error.hint
        ) from error


def _load_transfer(task: Task, blobs: Blobs) -> Transfer:
    """The transfer set with its labels, which lie apart, where no device may read them."""
    transfer = _load(blobs, task.transfer.blob, "the transfer set", Transfer.load)
    if task.transfer.labels is None:
        return transfer
    labels = _load(blobs, task.transfer.labels, "the transfer set's labels", load_labels)
    if labels.shape != (len(transfer),):
        raise EdgestillError(
            f"the transfer set has {len(transfer)} samples and {len(labels)} labels", "make the task again"
        )
    return replace(transfer, labels=labels)


def _load_upload(
    upload: UploadRecord, number: int, blobs: Blobs, expected: Mapping[str, tuple[int, ...]], job: Job
) -> Upload:
    source = f"round {job.round_name}: the outputs of {upload.device}"
    body = read_blob(blobs, upload.digest)
    arrays, _ = outputs.unpack(body, upload.content_encoding, expected, source=source)
    return Upload(upload.device, arrays, upload.samples, upload.class_counts, number)


def _distil(
    job: Job,
    inputs: Inputs,
    student: StudentEntry,
    transfer: Transfer,
    aggregated: Mapping[str, np.ndarray],
    blobs: Blobs,
    metrics: dict[str, Any],
    should_stop: Stop,
    threads: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The global student after training, and its outputs; adds to `metrics`."""
    task = inputs.task
    with _load(blobs, student.bundle, "the global student's bundle", Bundle.open) as bundle:
        engine = open_engine(bundle, threads=threads)
        if inputs.student_state is None:
            state = bundle.initial_state()
        else:
            state = _load(blobs, inputs.student_state, "the global student's state", wire.load).arrays
        seed = derive_seed(task.seed, job.number, "coordinator")
        result = distil(bundle, engine, state, transfer, aggregated, task.distil, seed, should_stop)
        metrics |= {"distil_loss": result.loss, "distil_steps": result.steps}
        _evaluate(task, bundle, engine, result.state, blobs, metrics)
    exchanged = {name: result.outputs[name] for name in task.expected_upload()}
    return result.state, exchanged


def _evaluate_parameters(
    task: Task,
    aggregated: Mapping[str, np.ndarray],
    blobs: Blobs,
    metrics: dict[str, Any],
    threads: int,
) -> None:
    if task.test is None and task.validation is None:
        return
    with _load(blobs, task.students[0].bundle, "the student's bundle", Bundle.open) as bundle:
        engine = open_engine(bundle, threads=threads)
        state = with_parameters(bundle, bundle.initial_state(), aggregated)
        _evaluate(task, bundle, engine, state, blobs, metrics)


def _evaluate(
    task: Task,
    bundle: Bundle,
    engine: Engine,
    state: Mapping[str, np.ndarray],
    blobs: Blobs,
    metrics: dict[str, Any],
) -> None:
    """How good the global model is: on test images for people, on validation images for the choice of the best."""
    if task.test is not None:
        test = _load(blobs, task.test.blob, "the test set", Transfer.load)
        evaluation = evaluate_global(bundle, engine, state, test)
        metrics |= {"t_uni": evaluation.accuracy, "loss": evaluation.loss}
    if task.validation is not None:
        validation = _load(blobs, task.validation.blob, "the validation set", Transfer.load)
        metrics[VALIDATION] = evaluate_global(bundle, engine, state, validation, "validation").accuracy
