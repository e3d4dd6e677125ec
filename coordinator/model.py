"""The global model of a task after a round, as a state file that predicts, trains and loads into PyTorch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import read_blob
from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.task.task import StudentEntry, Task
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.classes import names_as_metadata
from edgestill.runtime.device import outputs
from edgestill.runtime.device.local_training import with_parameters

BEST, LAST = "best", "last"


@dataclass(frozen=True)
class GlobalModel:
    """Where the model after a round is; `body_of` makes its file: the whole state of `student`'s bundle."""

    task: Task
    round: int
    best: bool
    """Whether it is the best round's, by the task's validation images."""
    student: StudentEntry
    blob: str
    """Of the state; or with exchanged parameters, of these."""

    @property
    def file_name(self) -> str:
        return f"{self.task.name}-round-{self.round}.safetensors"

    @property
    def mark(self) -> str:
        """Of everything that `body_of` makes the file of, as a digest: another one for any other file."""
        form = 1  # to be raised when the same makes another file
        made_of = [form, self.task.name, self.round, self.student.bundle, self.blob, self.task.class_names]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def find_model(service: Service, name: str, wanted: str | None) -> GlobalModel:
    """Of the round `best`, `last` or one by its number; None: of the best where one is marked, else of the last.

    Errors: Problem `no_such_task`, `no_model` saying which rounds there are.
    """
    task = task_of(service, name)
    student, rounds = model_student(task), service.rounds(name)
    found = _choose(name, rounds, wanted)
    blob = found.published if task.exchange == "parameters" else found.student_state
    if blob is None or service.blobs.size(blob) is None:
        kept = [str(one.number) for one in rounds if _is_kept(service, one)]
        raise Problem(
            "no_model",
            f"of round {name}.{found.number} the model is no longer there: those of the best and of the last round "
            f"are kept, here {' and '.join(kept) or 'none'}",
        )
    return GlobalModel(task, found.number, found.best, student, blob)


def body_of(service: Service, model: GlobalModel) -> bytes:
    """A safetensors file of the whole state of the bundle, with task, round and class names in it.

    Errors: BlobError, WireError.
    """
    task, stored = model.task, read_blob(service.blobs, model.blob)
    if task.exchange == "parameters":
        arrays, _ = outputs.unpack(stored, "identity", task.expected_upload(), source="the global model")
        with Bundle.open(service.blobs.path(model.student.bundle)) as bundle:
            state = with_parameters(bundle, bundle.initial_state(), arrays)
    else:
        state = wire.decode(stored, source=f"the model of {task.name}.{model.round}").arrays
    about = {"task": task.name, "round": str(model.round), "bundle": model.student.bundle}
    return b"".join(wire.encode(state, about | names_as_metadata(task.class_names)))


def task_of(service: Service, name: str) -> Task:
    """Errors: Problem `no_such_task`."""
    for record in service.tasks():
        if record.name == name:
            return record.task
    raise Problem("no_such_task", f"there is no task {name}")


def model_student(task: Task) -> StudentEntry:
    """Whose state the global model is. Errors: Problem `no_model` where devices agree on outputs alone."""
    student = task.students[0] if task.exchange == "parameters" else task.global_student
    if student is None:
        raise Problem(
            "no_model",
            f"task {task.name} has no global model, because it has no global bundle: what was learned are the students "
            "of its devices, each in the work folder of its device",
        )
    return student


def _choose(name: str, rounds: list[RoundOverview], wanted: str | None) -> RoundOverview:
    ended = [one for one in rounds if one.published is not None]
    if not ended:
        raise Problem("no_model", f"task {name} has not completed a round yet")
    best = next((one for one in ended if one.best), None)
    if wanted in (None, LAST):
        return best if best is not None and wanted is None else ended[-1]
    if wanted == BEST:
        if best is None:
            raise Problem("no_model", f"task {name} has no validation images, by which a round could be the best")
        return best
    for one in ended:
        if str(one.number) == wanted:
            return one
    numbers = ", ".join(str(one.number) for one in ended)
    raise Problem("no_model", f"task {name} has completed no round {wanted:.20}, but {numbers}")


def _is_kept(service: Service, one: RoundOverview) -> bool:
    return one.student_state is not None and service.blobs.size(one.student_state) is not None
