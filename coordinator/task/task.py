"""What an operator asks for, as frozen dataclasses; JSON both ways. Form: docs/federation.md."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edgestill.coordinator.rounds.round import Rules
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import EXCHANGED_OUTPUTS, EXCHANGES
from edgestill.runtime.device.outputs import MOST_CLASS_COUNTS, PRECISIONS
from edgestill.runtime.fields import Node, field_error
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS, TrainingSettings, read_training

MODES = ("global", "consensus")
RULES = ("mean", "class_mean", "median", "trimmed_mean", "krum")
TASK_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_STUDENT = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:-]{0,199}")
_DAY_S = 86_400.0
_MAX_BYTES = 4 * 2**30
_MAX_GOAL = 100_000


@dataclass(frozen=True)
class StudentEntry:
    """A student that devices may train, as a bundle in the blobs."""

    student: str
    bundle: str
    size_bytes: int
    engines: tuple[str, ...]
    memory_bytes: int
    """What training it needs at most."""
    model_digest: str
    parameters: int = 0
    """How many it has; a device gets the largest that fits."""

    def fits(self, engines: Collection[str], memory_bytes: int | None) -> bool:
        """Whether a device with these engines and this much memory (None: unknown) can train it."""
        return bool(set(self.engines) & set(engines)) and (
            memory_bytes is None or self.memory_bytes <= memory_bytes
        )


@dataclass(frozen=True)
class TransferEntry:
    """Samples in the blobs: the transfer set, or what the global student is evaluated or chosen on."""

    blob: str
    samples: int
    size_bytes: int
    labelled: bool
    labels: str | None = None
    """Of a transfer set: the blob with its classes, which no device may read. Else labels lie beside the images."""


@dataclass(frozen=True)
class Aggregation:
    """How uploads become one: see `coordinator/distillation/aggregation.py`."""

    rule: str = "mean"
    clip: float | str | None = None
    """Largest norm; "median": that of the uploads, row by row, which a scaled upload cannot raise."""
    trim: float = 0.2
    byzantine: float = 0.2
    align: bool = False
    screen: bool = False
    """Whether uploads that disagree with the others are left out."""


@dataclass(frozen=True)
class Distil(TrainingSettings):
    """What step 5 trains the global student with, and how long it may take."""

    alpha: float = 1.0
    deadline_s: float = 600.0


@dataclass(frozen=True)
class Task:
    """One federation: its students, its data, and the rules of its rounds."""

    name: str
    students: tuple[StudentEntry, ...]
    transfer: TransferEntry
    exchange: str = "latents"
    mode: str = "consensus"
    global_student: StudentEntry | None = None
    test: TransferEntry | None = None
    validation: TransferEntry | None = None
    """What the best round is chosen by."""
    latent_size: int = 128
    classes: int = 10
    class_names: tuple[str, ...] = ()
    """What the outputs mean, in their order, by which devices find their classes; empty: nobody said."""
    aggregation: Aggregation = Aggregation()
    local: LocalSettings = LocalSettings()
    distil: Distil = Distil()
    common_head: bool = False
    """Whether all students, the global one too, have the common head."""
    precision: str = "fp16"
    rounds: int = 10
    goal: int = 2
    over_selection: float = 1.3
    minimum: int = 1
    deadline_s: float = 3600.0
    seed: int = 0
    """Of everything that rounds draw: batches, augmentation, dropout."""
    parameter_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of every parameter and statistic, with the exchange `parameters`."""
    ca_cert: str | None = None
    """The certificate, PEM, of the authority that vouches for the coordinator: devices take it by its fingerprint."""

    def as_json(self) -> dict[str, Any]:
        """What `parse_task` reads; lists for tuples, every field present."""
        return _as_json(self)

    def risks(self) -> list[str]:
        """What an operator should know of a task that is allowed and may not be meant, a sentence each."""
        spec, found = self.aggregation, []
        if self.exchange == "parameters" and spec.rule == "mean" and spec.clip is None:
            found.append(
                "the mean of parameters without clip: one hostile or broken device decides what all devices start "
                "from; where they are not all your own, add --clip median, or take --aggregation median"
            )
        if spec.rule == "krum" and share_of(self.minimum, spec.byzantine) == 0:
            found.append(
                f"Krum with --byzantine {spec.byzantine:g} of --minimum {self.minimum} uploads reckons with no hostile "
                "device, for the share is rounded down; raise --minimum and --goal, or --byzantine"
            )
        deaf = not self._labels_are_distilled and not self.common_head
        if self.mode == "global" and self.exchange == "latents" and deaf:
            found.append(
                "the global student cannot classify: latents without labels do not train its output layer; export "
                "students with --common-head, or take --exchange both, or a labelled transfer set (--transfer-labels) "
                "with --distil-alpha below 1"
            )
        return found

    @property
    def _labels_are_distilled(self) -> bool:
        return self.transfer.labelled and self.distil.alpha < 1

    def rules(self) -> Rules:
        return Rules(self.goal, self.minimum, self.over_selection, self.deadline_s, self.distil.deadline_s)

    def expected_upload(self, student: StudentEntry | None = None) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of an upload, and of the published outputs, by name.

        The same for every student: what is exchanged does not depend on the perception module.
        """
        if self.exchange == "parameters":
            return dict(self.parameter_shapes)
        widths = {"latents": self.latent_size, "logits": self.classes}
        return {name: (self.transfer.samples, widths[name]) for name in EXCHANGED_OUTPUTS[self.exchange]}

    def fitting_student(self, engines: Collection[str], memory_bytes: int | None) -> StudentEntry | None:
        """The largest student that a device can train, by parameters, then memory; None where none fits."""
        fitting = [entry for entry in self.students if entry.fits(engines, memory_bytes)]
        return max(fitting, key=lambda e: (e.parameters, e.memory_bytes, e.student, e.bundle), default=None)


def parse_task(data: Any) -> Task:
    """A task from JSON, with defaults for what is left out; an unknown field is an error, not a surprise.

    `mode` is `global` where a global student is given, else `consensus`; `minimum` is half of `goal`;
    `precision` is fp16 for outputs and fp32 for parameters; `distil.alpha` is 1 where the transfer set has no labels.
    Errors: UsageError naming the field, its value, and what is allowed.
    """
    node = Node(data, "")
    node.check_fields(Task)
    exchange = node.get("exchange", "latents").one_of(EXCHANGES)
    global_student = node.optional("global_student", _parse_student)
    goal = node.get("goal", 2).integer(1, _MAX_GOAL)
    transfer = _parse_transfer(node.get("transfer"))
    task = Task(
        name=node.get("name").matching(TASK_NAME, "1 to 40 of a-z, 0-9 and -, beginning with a letter"),
        students=tuple(_parse_student(entry) for entry in node.get("students").items(1, 64)),
        transfer=transfer,
        exchange=exchange,
        mode=node.get("mode", "consensus" if global_student is None else "global").one_of(MODES),
        global_student=global_student,
        test=node.optional("test", _parse_transfer),
        validation=node.optional("validation", _parse_transfer),
        latent_size=node.get("latent_size", 128).integer(1, 65_536),
        classes=node.get("classes", 10).integer(2, 100_000),
        ca_cert=node.optional("ca_cert", Node.text),  # whoever makes a task has checked it, once
        class_names=tuple(name.text() for name in node.get("class_names", []).items(0, 100_000)),
        aggregation=_parse_aggregation(node.get("aggregation", {})),
        local=_parse_local(node.get("local", {})),
        distil=_parse_distil(node.get("distil", {}), transfer.labelled),
        common_head=node.get("common_head", False).flag(),
        precision=node.get("precision", "fp32" if exchange == "parameters" else "fp16").one_of(PRECISIONS),
        rounds=node.get("rounds", 10).integer(1, 1_000_000),
        goal=goal,
        over_selection=node.get("over_selection", 1.3).number(1.0, 100.0),
        minimum=node.get("minimum", math.ceil(goal / 2)).integer(1, _MAX_GOAL),
        deadline_s=node.get("deadline_s", 3600.0).number(0.001, 30 * _DAY_S),
        seed=node.get("seed", 0).integer(0, 2**63 - 1),
        parameter_shapes=_parse_shapes(node.get("parameter_shapes", {})),
    )
    _check_consistency(task)
    return task


def _parse_student(node: Node) -> StudentEntry:
    node.check_fields(StudentEntry)
    engines = tuple(entry.matching(_WORD, "an engine's name") for entry in node.get("engines").items(1, 16))
    if len(set(engines)) != len(engines):
        raise node.get("engines").error("each engine once")
    return StudentEntry(
        student=node.get("student").matching(_STUDENT, "a student's name, or package.module:factory"),
        bundle=node.get("bundle").digest(),
        size_bytes=node.get("size_bytes").integer(1, _MAX_BYTES),
        engines=engines,
        memory_bytes=node.get("memory_bytes").integer(0, 2**50),
        model_digest=node.get("model_digest").digest(),
        parameters=node.get("parameters", 0).integer(0, 2**40),
    )


def _parse_transfer(node: Node) -> TransferEntry:
    node.check_fields(TransferEntry)
    return TransferEntry(
        blob=node.get("blob").digest(),
        samples=node.get("samples").integer(1, 10_000_000),
        size_bytes=node.get("size_bytes").integer(1, _MAX_BYTES),
        labelled=node.get("labelled").flag(),
        labels=node.optional("labels", Node.digest),
    )


def _parse_aggregation(node: Node) -> Aggregation:
    node.check_fields(Aggregation)
    return Aggregation(
        rule=node.get("rule", "mean").one_of(RULES),
        clip=node.optional("clip", _parse_clip),
        trim=node.get("trim", 0.2).number(0.0, 0.5, below=True),
        byzantine=node.get("byzantine", 0.2).number(0.0, 0.5, below=True),
        align=node.get("align", False).flag(),
        screen=node.get("screen", False).flag(),
    )


def clip_value(text: str) -> float | str:
    """`aggregation.clip` as a command line has it. Errors: ValueError."""
    return text if text == "median" else float(text)


def _parse_clip(node: Node) -> float | str:
    return node.one_of(("median",)) if isinstance(node.value, str) else node.number(1e-9, 1e30)


def _parse_local(node: Node) -> LocalSettings:
    node.check_fields(LocalSettings)
    return LocalSettings.from_json(node.mapping())


def _parse_distil(node: Node, labelled: bool) -> Distil:
    node.check_fields(Distil)
    given = read_training(node)
    if given["alpha"] is None:
        given["alpha"] = HYPERPARAMETERS["alpha"].default if labelled else 1.0
    return Distil(**given, deadline_s=node.get("deadline_s", 600.0).number(0.001, 30 * _DAY_S))


def _parse_shapes(node: Node) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name in node.mapping():
        entry = node.get(name)
        shapes[name] = tuple(size.integer(0, 2**31) for size in entry.items(0, 8))
    return shapes


def _check_consistency(task: Task) -> None:
    """Errors: UsageError for fields that are right alone and wrong together."""
    spec, names = task.aggregation, task.class_names
    if names and (len(set(names)) != task.classes or len(names) != task.classes or not all(names)):
        raise field_error("class_names", list(names), f"{task.classes} different names, one a class, or empty")
    if task.minimum > task.goal:
        raise field_error("minimum", task.minimum, f"at most goal, which is {task.goal}")
    if math.ceil(round(task.goal * task.over_selection, 9)) > _MAX_GOAL:
        raise field_error("over_selection", task.over_selection, f"at most {_MAX_GOAL} devices selected")
    if len({entry.bundle for entry in task.students}) != len(task.students):
        raise field_error("students", [entry.student for entry in task.students], "each bundle once")
    if task.exchange == "parameters":
        _check_parameters(task)
    elif task.parameter_shapes:
        raise field_error(
            "parameter_shapes", sorted(task.parameter_shapes)[:3], "empty unless parameters are exchanged"
        )
    if task.mode == "global" and task.global_student is None:
        raise field_error("global_student", None, "a student in mode global; or choose mode consensus")
    if task.mode == "consensus" and task.global_student is not None:
        raise field_error("global_student", task.global_student.student, "null in mode consensus")
    for name, samples in (("test", task.test), ("validation", task.validation)):
        if samples is not None and not samples.labelled:
            raise field_error(f"{name}.labelled", False, "true: accuracy needs labels")
    if spec.rule == "class_mean" and (task.exchange == "parameters" or not task.transfer.labelled):
        raise field_error(
            "aggregation.rule", spec.rule, "class_mean only for outputs on a labelled transfer set"
        )
    if spec.rule == "class_mean" and task.classes > MOST_CLASS_COUNTS:
        raise field_error(
            "aggregation.rule",
            spec.rule,
            f"another rule for {task.classes} classes: an upload has room for the counts of {MOST_CLASS_COUNTS}",
        )
    if spec.align and task.exchange not in ("latents", "both"):
        raise field_error("aggregation.align", True, "true only where latents are exchanged")
    if spec.rule == "krum":
        for uploads in range(task.minimum, task.goal + 1):
            hostile = share_of(uploads, spec.byzantine)
            if uploads <= 2 * hostile + 2:
                raise field_error(
                    "aggregation.byzantine",
                    spec.byzantine,
                    f"such that Krum has more than 2 * {hostile} + 2 uploads wherever a round may end, "
                    f"from minimum {task.minimum} to goal {task.goal}; with {uploads} it has not: raise --minimum and "
                    "--goal, or lower --byzantine",
                )


def _check_parameters(task: Task) -> None:
    if task.mode != "consensus":
        raise field_error("mode", task.mode, "consensus with exchange parameters: nothing is distilled")
    if len({entry.model_digest for entry in task.students}) != 1:
        raise field_error(
            "students", [e.student for e in task.students], "of one model_digest to exchange parameters"
        )
    if task.precision == "int8":
        # every device starts from what is published: rounding would add up over the rounds
        raise field_error("precision", task.precision, "fp32 or fp16 with exchange parameters")


def share_of(uploads: int, share: float) -> int:
    """How many of `uploads` a share of them is, rounded down; exact where the product is a whole number."""
    return math.floor(round(uploads * share, 9))


def _as_json(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {entry.name: _as_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_as_json(entry) for entry in value]
    return value
