"""Whether the students of a task can learn from each other: outputs, heads, objectives and training steps that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgestill.coordinator.task.samples import Warn
from edgestill.coordinator.task.task import Task
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.common_head import common_head
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device.local_training import EXCHANGED_OUTPUTS, Transfer
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.batches import TransferSet
from edgestill.runtime.training.hyperparameters import taken_by
from edgestill.runtime.training.plan import TrainSettings, plan
from edgestill.runtime.training.teacher import TeacherOutputs


def check_alike(bundles: Sequence[Bundle]) -> None:
    """Errors: UsageError for students whose outputs could not be compared."""
    first = bundles[0]
    for bundle in bundles[1:]:
        for what, mine, theirs in (
            ("latent size", bundle.latent_size, first.latent_size),
            ("classes", bundle.classes, first.classes),
            ("input shape", tuple(bundle.input.shape), tuple(first.input.shape)),
            ("input dtype", bundle.input.dtype, first.input.dtype),
        ):
            if mine != theirs:
                raise UsageError(
                    f"{bundle.source} has {what} {mine}, {first.source} has {theirs}",
                    "export all students of a task alike in everything but the perception module",
                )


def refuse_several_tensors(bundles: Sequence[Bundle]) -> None:
    """Errors: UsageError for a student whose samples a transfer or test set cannot hold."""
    for bundle in bundles:
        if bundle.more_inputs:
            raise UsageError(
                f"{bundle.source}: takes {len(bundle.samples)} tensors a sample ({', '.join(bundle.sample_names)}), "
                "a task's transfer and test sets hold one",
                "train it with `edgestill train`, or export a student that takes one tensor",
            )


def check_heads(bundles: Sequence[Bundle], drafted: Task, wanted: bool | None, warn: Warn) -> bool:
    """Whether all students have the common head. Errors: UsageError where the task wants it and one has another."""
    for bundle in bundles:
        name = bundle.manifest.common_head
        if name is None:
            continue
        weights = bundle.initial_state()[name]
        if not np.array_equal(weights, common_head(bundle.classes, bundle.latent_size)):
            raise UsageError(
                f"{bundle.source}: its {name} is not the common head that its manifest names",
                "export it again with --common-head",
            )
    own = [bundle for bundle in bundles if not bundle.has_common_head]
    if own and wanted:
        raise UsageError(
            f"the task wants the common head, and {_named(own)} has an output layer of its own",
            "export it again with --common-head, or leave --common-head out here",
        )
    if 0 < len(own) < len(bundles) and drafted.exchange != "parameters" and wanted is None:
        warn(
            f"heads are mixed: {_named(own)} has an output layer of its own, the others have the common head; a latent "
            "of the one means nothing to the other; export all with --common-head"
        )
    return not own


def check_objectives(bundles: Sequence[Bundle], whole: Bundle | None, exchange: str) -> None:
    """Errors: UsageError for a student whose training step learns nothing from what is exchanged.

    Devices of objective `ce` may take part: they give outputs, and learn from their labels alone.
    """
    teachable = [bundle for bundle in bundles if bundle.objective.needs_teacher]
    for bundle in [*teachable, *([] if whole is None else [whole])]:
        objective = bundle.objective
        exchanged = EXCHANGED_OUTPUTS[exchange]
        if not set(objective.learns_from) & set(exchanged):
            raise UsageError(
                f"{bundle.source}: objective {objective.name} does not learn from {exchange}",
                "export it with --objective lkd, crd or lpd for latents, kd for logits, both for either",
            )
        heads = objective.teacher_latent_size
        if heads is not None and heads != bundle.latent_size:
            raise UsageError(
                f"{bundle.source}: its heads take latents of {heads}, this task's are of {bundle.latent_size}",
                f"export it with --teacher-latent-size {bundle.latent_size}",
            )


def check_training(
    bundles: Sequence[Bundle], whole: Bundle | None, drafted: Task, transfer: Transfer
) -> None:
    """Plans a device's round and step 5 as they will be planned, on samples and outputs that stand in for real ones.

    Errors: UsageError where a student cannot train as the task asks it to.
    """
    samples = len(transfer)
    for bundle in (bundle for bundle in bundles if bundle.objective.needs_teacher):
        plan(
            bundle,
            _stand_in_samples(bundle, 1),
            TrainSettings(
                hyperparameters=taken_by(bundle, drafted.local.hyperparameters),
                augmentations=drafted.local.augmentations,
                transfer_fraction=drafted.local.transfer_fraction,
            ),
            transfer=TransferSet(transfer.images, _stand_in_outputs(bundle, samples, drafted.exchange)),
        )
    if whole is not None:
        plan(
            whole,
            _stand_in_samples(whole, samples),
            TrainSettings(hyperparameters=taken_by(whole, drafted.distil.hyperparameters)),
            teacher=_stand_in_outputs(whole, samples, drafted.exchange),
        )


def _stand_in_samples(bundle: Bundle, samples: int) -> Dataset:
    form = bundle.input
    # one row of memory, however many samples
    inputs = np.broadcast_to(np.zeros(1, form.dtype), (samples, *form.shape))
    return Dataset(inputs, np.zeros(samples, np.int64), ())


def _stand_in_outputs(bundle: Bundle, samples: int, exchange: str) -> TeacherOutputs:
    widths = {"latents": bundle.latent_size, "logits": bundle.classes}
    return TeacherOutputs(
        **{name: np.zeros((samples, widths[name]), np.float32) for name in EXCHANGED_OUTPUTS[exchange]}
    )


def warn_of_own_spaces(bundles: Sequence[Bundle], drafted: Task, warn: Warn) -> None:
    """`crd` and `lpd` keep relations between samples, not coordinates: each student has a latent space of its own."""
    own = [bundle for bundle in bundles if bundle.objective.relates_samples]
    if own and drafted.exchange in ("latents", "both") and not drafted.aggregation.align:
        warn(
            f"latents of {_named(own)} are in a space of their own, for objective {own[0].objective.name} learns how "
            "samples lie to one another, not where: their mean with others says little; take --align"
        )


def warn_of_control_arms(bundles: Sequence[Bundle], exchange: str, warn: Warn) -> None:
    """Students of objective `ce` are legitimate, to compare with, and easily exported by mistake."""
    deaf = [bundle for bundle in bundles if not bundle.objective.needs_teacher]
    if deaf:
        who = "no device" if len(deaf) == len(bundles) else f"no device with {_named(deaf)}"
        warn(
            f"{who} learns from the others: objective {deaf[0].objective.name} takes labels alone, not the exchanged "
            f"{exchange}; unless that is meant, to compare with, export with --objective both"
        )


def warn_of_unclipped(
    option: str, bundles: Sequence[Bundle], given: Mapping[str, float], warn: Warn
) -> None:
    """What a student's step does not take is not used for it; of clipping nobody would notice."""
    unclipped = [bundle for bundle in bundles if not bundle.optimizer.clips]
    if unclipped and "clip_norm" in given:
        flag = option.replace("_", "-")
        warn(f"--{flag} does nothing with {_named(unclipped)}: export with --clip-gradients")


def _named(bundles: Sequence[Bundle]) -> str:
    return " or ".join(str(bundle.source) for bundle in bundles)
