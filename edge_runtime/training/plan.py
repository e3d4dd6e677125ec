"""The plan of a run: everything that determines its states, checked once, for whoever trains.

`edgestill train`, a device's local round, a simulation, step 5 of a coordinator and the Python API all call `plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.augmentation import check_augmentation
from edgestill.runtime.data.classes import join_names
from edgestill.runtime.data.dataset import Dataset, digest_of_arrays
from edgestill.runtime.errors import DataError, UsageError
from edgestill.runtime.randomness import noise
from edgestill.runtime.training.batches import BatchPlan, TransferSet
from edgestill.runtime.training.hyperparameters import EPOCHS, TRANSFER_FRACTION, resolve
from edgestill.runtime.training.schedule import Schedule, distillation_share, learning_rate
from edgestill.runtime.training.teacher import TeacherOutputs


@dataclass(frozen=True)
class TrainSettings:
    """What a run is asked to do; `hyperparameters` overrides the defaults by name."""

    epochs: int = int(EPOCHS.default)
    seed: int = 0
    schedule: Schedule = Schedule()
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    augmentations: tuple[str, ...] = ()
    transfer_fraction: float = TRANSFER_FRACTION.default
    alpha_end: float | None = None
    """α of the last step, reached in a straight line from the hyperparameter `alpha`; None: α stays as it is."""


@dataclass(frozen=True)
class Run:
    """Everything that determines the state after a step, but the engine."""

    bundle: Bundle
    plan: BatchPlan
    settings: TrainSettings
    hyperparameters: Mapping[str, float]
    """What the step takes."""
    initial_state: Mapping[str, np.ndarray] | None = None
    origins: Mapping[str, str | None] = field(default_factory=dict)
    """Digests of the teacher and of the transfer set."""

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.plan.steps_per_epoch

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the outputs mean, in their order; empty where nobody says."""
        return self.plan.dataset.class_names or self.bundle.class_names

    def description(self) -> dict[str, Any]:
        """The run as JSON values, by which a state file knows the run that it belongs to."""
        settings = self.settings
        initial = self.initial_state
        return {
            "model": self.bundle.model_digest,
            "data": self.plan.dataset.digest,
            "initial_state": None if initial is None else digest_of_arrays(*initial.values()),
            "epochs": settings.epochs,
            "seed": settings.seed,
            "schedule": settings.schedule.kind,
            "warmup_steps": settings.schedule.warmup_steps,
            "augment": ",".join(settings.augmentations),
            "transfer_count": self.plan.transfer_count,
            "alpha_end": settings.alpha_end,
            "neighbours": self.plan.neighbours or None,
            "neighbour_scale": self.plan.neighbour_scale if self.plan.neighbours else None,
            **dict(self.hyperparameters),
            **{name: digest for name, digest in self.origins.items() if digest is not None},
        }

    def inputs(self, step: int) -> dict[str, np.ndarray]:
        """What `train_step` takes at a step, counted from 0."""
        rate = self.learning_rate(step)
        given = self.plan.inputs(step)
        given |= {name: np.array([value], np.float32) for name, value in self.hyperparameters.items()}
        given["learning_rate"] = np.array([rate], np.float32)
        if self.settings.alpha_end is not None:
            first, last = self.hyperparameters["alpha"], self.settings.alpha_end
            share = distillation_share(step, self.total_steps, first, last)
            given["alpha"] = np.array([share], np.float32)
        for spec in self.bundle.noise_specs:
            given[spec.name] = noise(self.settings.seed, step, spec.name, spec.shape)
        return {spec.name: given[spec.name] for spec in self.bundle.inputs("train_step")}

    def learning_rate(self, step: int) -> float:
        base = self.hyperparameters["learning_rate"]
        return learning_rate(step, self.total_steps, base, self.settings.schedule)


def plan(
    bundle: Bundle,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    teacher: TeacherOutputs | None = None,
    transfer: TransferSet | None = None,
    labelled: bool = True,
    initial_state: Mapping[str, np.ndarray] | None = None,
    origins: Mapping[str, str | None] | None = None,
) -> Run:
    """Checks that everything fits together and makes a run of it.

    `teacher`: outputs on the samples of `dataset`; `transfer`: more samples, without labels, with outputs on them. A
    student that distils needs one of them, or alpha 0. Outputs may be latents or logits alone: objective `both` then
    learns from these alone. `labelled`: whether the labels of `dataset` count; without them alpha is 1.
    Errors: UsageError and DataError.
    """
    if not EPOCHS.allows(settings.epochs):
        raise UsageError(f"{settings.epochs} epochs", f"give --epochs {EPOCHS.range}")
    check_seed(settings.seed)
    check_augmentation(settings.augmentations, *(spec.shape for spec in bundle.samples))
    if len(dataset) == 0:
        raise DataError("no samples to train on", "give some data")
    named = dataset.class_names
    if named and bundle.class_names and named != bundle.class_names:
        raise DataError(
            f"{bundle.source}: its outputs mean {join_names(bundle.class_names)}; "
            f"the data's labels mean {join_names(named)}",
            "read the data with `known=classes_of(bundle)`, or leave their class_names out",
        )
    objective = bundle.objective
    given = dict(settings.hyperparameters)
    if objective.needs_teacher and teacher is None and transfer is None and given.get("alpha") != 0:
        raise UsageError(
            f"{bundle.source}: objective {objective.name} needs a teacher",
            "pass --teacher BUNDLE[:CHECKPOINT], train on labels alone with --alpha 0, or export the student with "
            "--objective ce",
        )
    if not objective.needs_teacher and not (teacher is None and transfer is None):
        raise UsageError(f"{bundle.source}: objective ce takes no teacher", "leave --teacher out")
    if teacher is not None:
        teacher, implied = _complete(bundle, teacher, len(dataset))
        given |= implied
    if transfer is not None:
        outputs, implied = _complete(bundle, transfer.outputs, len(transfer))
        transfer = replace(transfer, outputs=outputs)
        given |= implied
        if teacher is not None and outputs.latents.shape[1] != teacher.latents.shape[1]:
            raise UsageError(
                f"{bundle.source}: latents of size {teacher.latents.shape[1]} on the data and of size "
                f"{outputs.latents.shape[1]} on the transfer set, whose samples objective {objective.name} compares",
                "take both from one teacher",
            )
    if not labelled:
        given["alpha"] = 1.0
    hyperparameters = resolve(bundle, given)
    if settings.alpha_end is not None:
        resolve(bundle, {"alpha": settings.alpha_end})
    sizes = _teacher_sizes(bundle)
    if transfer is not None:
        sizes = (transfer.outputs.latents.shape[1], transfer.outputs.logits.shape[1])
    count = 0 if transfer is None else transfer_count(bundle.batch, settings.transfer_fraction)
    taught = bundle.batch if teacher is not None else count
    batches = BatchPlan(
        dataset=dataset,
        batch=bundle.batch,
        seed=settings.seed,
        augmentations=settings.augmentations,
        teacher=teacher,
        transfer=transfer,
        transfer_count=count,
        teacher_sizes=sizes if objective.needs_teacher else None,
        labelled=labelled,
        negatives=objective.negatives or 0,
        names=bundle.sample_names,
        **_neighbourhood(bundle, hyperparameters, given, taught),
    )
    _check_negatives(bundle, batches)
    in_step = {spec.name for spec in bundle.inputs("train_step")}
    numbers = {name: value for name, value in hyperparameters.items() if name in in_step}
    return Run(bundle, batches, settings, numbers, initial_state, origins or {})


def check_seed(seed: int) -> None:
    """Errors: UsageError."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range", "give --seed 0 or more, below 2^63")


def transfer_count(batch: int, fraction: float) -> int:
    """How many of a batch's samples come from the transfer set. Errors: UsageError."""
    count = round(batch * fraction)
    if not 0 < count < batch:
        raise UsageError(
            f"a transfer fraction of {fraction} gives {count} of {batch} samples a batch",
            f"give --transfer-fraction between {1 / batch:.3g} and {1 - 1 / batch:.3g}",
        )
    return count


def _teacher_sizes(bundle: Bundle) -> tuple[int, int]:
    """Latent size and classes of the outputs that a step takes."""
    return bundle.objective.teacher_latent_size or bundle.latent_size, bundle.classes


def _complete(
    bundle: Bundle, outputs: TeacherOutputs, samples: int
) -> tuple[TeacherOutputs, dict[str, float]]:
    """The outputs, with zeros for what is missing or not learnt from, and the hyperparameters that follow from them.

    Errors: UsageError where an output that the step takes is missing or has another shape.
    """
    objective = bundle.objective
    found = {"latents": outputs.latents, "logits": outputs.logits}
    there = [name for name, array in found.items() if array is not None]
    learnt = [name for name in there if name in objective.learns_from]
    if not learnt:
        raise UsageError(
            f"{bundle.source}: objective {objective.name} learns from {' and '.join(objective.learns_from)}, "
            f"not from {' and '.join(there) or 'nothing'}",
            "export the student with --objective lkd, crd or lpd for latents, kd for logits, both for either",
        )
    sizes = dict(zip(found, _teacher_sizes(bundle), strict=True))
    for name in learnt:
        array = found[name]
        assert array is not None
        # the nearest neighbours of any latent space will do
        size = array.shape[-1] if objective.name == "lpd" else sizes[name]
        if array.shape != (samples, size):
            raise UsageError(
                f"{bundle.source}: {name} of shape {list(array.shape)}, not {[samples, size]}",
                "use a teacher, or students of one task, of the student's latent size and classes",
            )
    whole = {
        name: np.zeros((samples, sizes[name]), np.float32)
        if array is None or name not in learnt
        else np.ascontiguousarray(array, np.float32)
        for name, array in found.items()
    }
    implied = (
        {"logit_share": float(learnt == ["logits"])} if objective.name == "both" and len(there) == 1 else {}
    )
    return TeacherOutputs(**whole), implied


def _neighbourhood(
    bundle: Bundle, hyperparameters: Mapping[str, float], given: Mapping[str, float], taught: int
) -> dict[str, int | float]:
    """Of objective `lpd`, where `taught` samples of a batch have a teacher. Errors: UsageError for none beside them."""
    if bundle.objective.name != "lpd":
        return {}
    if not taught:
        return {"neighbours": 0}
    if taught < 2:
        raise UsageError(
            f"{bundle.source}: objective lpd compares samples that have a teacher, a batch of {bundle.batch} has one",
            "give a larger transfer fraction, or export the student with a larger --batch",
        )
    count = int(hyperparameters["neighbours"])
    if count >= taught:
        if "neighbours" in given:
            raise UsageError(
                f"{count} neighbours in a batch of {bundle.batch}, {taught} of which have a teacher",
                f"give --neighbours 1 to {taught - 1}",
            )
        count = taught - 1
    return {"neighbours": count, "neighbour_scale": hyperparameters["neighbour_scale"]}


def _check_negatives(bundle: Bundle, batches: BatchPlan) -> None:
    """Errors: UsageError where a batch may hold every sample with a teacher, so that none is left to tell it from."""
    if not batches.negatives or (batches.teacher is None and batches.transfer is None):
        return
    pools = []
    if batches.teacher is not None:
        pools.append((len(batches.dataset), batches.private_count))
    if batches.transfer is not None:
        pools.append((len(batches.transfer), batches.transfer_count))
    if all(there <= taken for there, taken in pools):
        raise UsageError(
            f"{bundle.source}: objective crd tells the samples of a batch from others, "
            f"but one batch of {batches.batch} holds all {sum(there for there, _ in pools)} that have a teacher",
            "train on more samples, or export the student with a smaller --batch",
        )
