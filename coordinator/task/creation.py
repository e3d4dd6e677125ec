"""A task from bundles and data as a person names them: packs, checks that they fit together, stores the blobs."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.coordinator.task.task import Task, parse_task
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.common_head import common_head
from edgestill.runtime.bundle.writer import zip_bundle
from edgestill.runtime.data.classes import KnownClasses, first_known, join_names
from edgestill.runtime.data.dataset import (
    Dataset,
    Splits,
    class_names_from,
    class_names_of,
    load_splits,
    load_transfer_samples,
)
from edgestill.runtime.data.notice import Notice, Tell, tell_on_stderr
from edgestill.runtime.data.overlap import find_apart
from edgestill.runtime.device.authority import only_certificate
from edgestill.runtime.device.local_training import (
    EXCHANGED_OUTPUTS,
    Transfer,
    parameters_of,
    save_labels,
)
from edgestill.runtime.errors import DataError, UsageError
from edgestill.runtime.randomness import SUBSET, permutation
from edgestill.runtime.training.batches import TransferSet
from edgestill.runtime.training.checkpoint import classes_of
from edgestill.runtime.training.hyperparameters import taken_by
from edgestill.runtime.training.plan import TrainSettings, plan
from edgestill.runtime.training.teacher import TeacherOutputs

SOURCES = (
    "bundles", "global_bundle", "transfer", "transfer_count", "transfer_labels", "test", "test_count", "validation",
    "validation_count", "seed", "resize", "skip_broken", "ca_cert",
)  # fmt: skip
"""Fields of a description that name files or data; every other field is the task's own."""
ROUNDS = 8
LOCAL: Mapping[str, Any] = {"epochs": 2, "alpha": 0.8}
AUGMENT = "flip"
"""Of images."""
DISTIL: Mapping[str, Any] = {"epochs": 8}
DISTIL_RATE = {"adamw": 0.002}
"""Defaults of a description, with which a federation is worth it (docs/simulation.md); a task as JSON has others."""

AddBlob = Callable[[Path], str]
Warn = Callable[[str], None]


def make_task(
    description: Mapping[str, Any], add_blob: AddBlob, warn: Warn = lambda _: None, tell: Tell = tell_on_stderr
) -> Task:
    """Stores bundles, transfer set and test set as blobs and returns the task that names them.

    `warn` gets a sentence for all that is allowed and may not be meant, `tell` what was noticed while data were read.

    `description` has the fields of a task without students, `global_student`, `transfer` and `test`; in their
    place stand SOURCES. Errors: UsageError, BundleError, DataError, naming what does not fit.
    """
    fields = {name: value for name, value in description.items() if name not in SOURCES}
    for name in ("students", "global_student", "latent_size", "classes", "parameter_shapes"):
        if name in fields:
            raise UsageError(f"{name} comes from the bundles", "leave it out, and name the bundles instead")
    if description.get("ca_cert") is not None:
        fields["ca_cert"] = _certificate(_path(description["ca_cert"], "ca_cert"))
    drafted = parse_task(_with_stand_ins(fields, description))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgestill-task-")))
        bundles = [stack.enter_context(Bundle.open(path)) for path in _paths(description)]
        whole = None
        if description.get("global_bundle") is not None:
            whole = stack.enter_context(Bundle.open(_path(description["global_bundle"], "global_bundle")))
        first = bundles[0]
        everyone = [*bundles, *([] if whole is None else [whole])]
        _check_alike(everyone)
        _refuse_several_tensors(everyone)
        fields = _with_defaults(fields, bundles, whole)
        fields["common_head"] = _check_heads(everyone, drafted, fields.get("common_head"), warn)
        drafted = parse_task(_with_stand_ins(fields, description))
        if drafted.exchange != "parameters":
            _check_objectives(bundles, whole, drafted.exchange)
            _warn_of_control_arms(bundles, drafted.exchange, warn)
            _warn_of_own_spaces(everyone, drafted, warn)
        _warn_of_unclipped("clip_norm", bundles, drafted.local.hyperparameters, warn)
        _warn_of_unclipped("distil_clip_norm", [whole] if whole else [], drafted.distil.hyperparameters, warn)
        seed = _count(description, "seed", 0) or 0
        known = _known_classes(fields.get("class_names"), everyone, description)
        if not known:
            tell(
                Notice(
                    "unnamed",
                    "nobody says what the classes are: each device numbers its own in the order of their names, and "
                    "must have the same ones; --class-names says it, here or where the students are exported",
                )
            )
        reading = _Reading(
            first, known, bool(description.get("resize")), bool(description.get("skip_broken")), tell
        )
        transfer, rest = load_transfer(
            _text(description, "transfer"), reading, bool(description.get("transfer_labels")),
            _count(description, "transfer_count", 1), seed,
        )  # fmt: skip
        _warn_of_fewer(description, "transfer", transfer, warn)
        evaluated = whole is not None or drafted.exchange == "parameters"
        if description.get("validation") is None and evaluated and transfer.labels is not None:
            transfer, rest = (transfer, rest) if len(rest) else _hold_out(transfer, seed)
        else:
            rest = _NOTHING
        if drafted.exchange != "parameters":
            _check_training(bundles, whole, drafted, transfer)
        held = {}
        for name in ("test", "validation"):
            if description.get(name) is not None:
                count = _count(description, f"{name}_count", 1)
                held[name] = load_test(str(description[name]), reading, count, seed)
                _warn_of_fewer(description, name, held[name], warn)
        if len(rest):
            held["validation"] = rest
        reserved = [("the transfer set", transfer)]
        for name in held:
            held[name] = _apart(held[name], name, reserved, warn)
            reserved.append((f"the {name} set", held[name]))
        if fields.get("exchange") == "parameters":
            fields["parameter_shapes"] = parameter_shapes(first)
        return parse_task({
            **fields,
            "students": [describe_bundle(bundle, folder, add_blob) for bundle in bundles],
            "global_student": None if whole is None else describe_bundle(whole, folder, add_blob),
            "transfer": describe_transfer(transfer, folder, add_blob),
            **{
                name: describe_samples(samples, folder / f"{name}.safetensors", add_blob)
                for name, samples in held.items()
            },
            "latent_size": first.latent_size,
            "classes": first.classes,
            "seed": seed,
            "class_names": list(known.names),
        })  # fmt: skip


def _certificate(path: Path) -> str:
    """Errors: UsageError for a file that is not one certificate."""
    try:
        return only_certificate(path.read_text("ascii"))
    except (OSError, ValueError, ssl.SSLError) as error:
        raise UsageError(
            f"--ca-cert {path}: not one certificate in PEM ({error})",
            "give the certificate of the authority alone, without those below it and without any key",
        ) from error


def describe_bundle(bundle: Bundle, folder: Path, add_blob: AddBlob) -> dict[str, Any]:
    """Stores a bundle; its entry in a task."""
    packed = bundle.source
    if packed.is_dir():
        packed = zip_bundle(packed, folder / "bundle.zip")
    return {
        "student": bundle.student.name,
        "bundle": add_blob(packed),
        "size_bytes": packed.stat().st_size,
        "engines": list(bundle.engines),
        "memory_bytes": bundle.training_memory_bytes,
        "model_digest": bundle.model_digest,
        "parameters": bundle.student.parameters,
    }


def describe_samples(samples: Transfer, path: Path, add_blob: AddBlob) -> dict[str, Any]:
    """Stores a transfer or test set; its entry in a task."""
    samples.save(path)
    return {
        "blob": add_blob(path),
        "samples": len(samples.images),
        "size_bytes": path.stat().st_size,
        "labelled": samples.labels is not None,
    }


def _known_classes(
    given: Any, bundles: Sequence[Bundle], description: Mapping[str, Any]
) -> KnownClasses:
    """What the outputs of the task's students mean: as it is said, as the bundles say, else as the labelled data do.

    Errors: UsageError for students whose outputs mean different things.
    """
    if given:
        if not isinstance(given, str) and not (
            isinstance(given, Sequence) and all(isinstance(name, str) for name in given)
        ):
            raise UsageError(f"class_names is {given!r}", 'write class_names = ["apple", "banana"]')
        known = KnownClasses(class_names_from(given), "the task")
    else:
        known = first_known(*map(classes_of, bundles)) or KnownClasses((), "the task")
    for bundle in bundles:
        if bundle.class_names and bundle.class_names != known.names:
            raise UsageError(
                f"{bundle.source} has classes {join_names(bundle.class_names)}; "
                f"{known.whose} has {join_names(known.names)}",
                "export all students of a task with the same --class-names",
            )
    sources = [description.get("test"), description["transfer"] if description.get("transfer_labels") else None]
    for source in sources:
        if not known and source is not None and Path(source).suffix != ".safetensors":
            with suppress(DataError):  # data need not name their classes
                known = KnownClasses(class_names_of(source), str(source))
    if given or len(known.names) == bundles[0].classes:
        return known
    return KnownClasses((), "the task")


@dataclass(frozen=True)
class _Reading:
    """How a task's data are read."""

    bundle: Bundle
    known: KnownClasses
    resize: bool
    skip_broken: bool
    tell: Tell

    def labelled(self, source: str) -> Splits:
        return load_splits(
            source, self.bundle.input, self.bundle.classes, self.resize,
            known=self.known, skip_broken=self.skip_broken, tell=self.tell,
        )  # fmt: skip

    def unlabelled(self, source: str) -> np.ndarray:
        form, how = self.bundle.input, {"skip_broken": self.skip_broken, "tell": self.tell}
        return load_transfer_samples(source, form, self.resize, **how)[0]


def load_transfer(
    source: str, reading: _Reading, labelled: bool, count: int | None, seed: int
) -> tuple[Transfer, Transfer]:
    """At most `count` samples of a data set, drawn by the seed, and up to half as many of the others."""
    if Path(source).suffix == ".safetensors" and Path(source).is_file():
        samples = Transfer.load(Path(source))
        images, labels = samples.images, samples.labels if labelled else None
        if labelled and labels is None:
            raise UsageError(
                f"{source} has no labels", "leave transfer_labels out, or add labels to the file"
            )
    elif labelled:
        dataset = reading.labelled(source).train
        images, labels = dataset.images, dataset.labels
    else:
        images, labels = reading.unlabelled(source), None
    samples = Transfer(images, labels)
    if count is None or count >= len(samples):
        return samples, _NOTHING
    order = permutation(seed, SUBSET, 0, len(samples))
    return _select(samples, order[:count]), _select(samples, order[count : count + max(1, count // 2)])


def describe_transfer(transfer: Transfer, folder: Path, add_blob: AddBlob) -> dict[str, Any]:
    """Stores a transfer set, and apart from it its labels, which no device gets; its entry in a task."""
    entry = describe_samples(Transfer(transfer.images), folder / "transfer.safetensors", add_blob)
    if transfer.labels is None:
        return entry
    path = folder / "labels.safetensors"
    save_labels(path, transfer.labels)
    return entry | {"labelled": True, "labels": add_blob(path)}


def load_test(source: str, reading: _Reading, count: int | None, seed: int) -> Transfer:
    """The test split of a data set, or all of one that has no splits."""
    dataset = reading.labelled(source).choose(None)
    return _take(Transfer(dataset.images, dataset.labels), count, seed)


def parameter_shapes(bundle: Bundle) -> dict[str, list[int]]:
    """Shape of every parameter and statistic, by name."""
    return {name: list(array.shape) for name, array in parameters_of(bundle, bundle.initial_state()).items()}


def _take(samples: Transfer, count: int | None, seed: int) -> Transfer:
    if count is None or count >= len(samples.images):
        return samples
    return _select(samples, permutation(seed, SUBSET, 0, len(samples.images))[:count])


def _select(samples: Transfer, chosen: np.ndarray) -> Transfer:
    """Those of the samples, in their old order."""
    chosen = np.sort(chosen)
    labels = None if samples.labels is None else samples.labels[chosen]
    return Transfer(samples.images[chosen], labels)


_NOTHING = Transfer(np.zeros((0, 1), np.uint8))


def _hold_out(transfer: Transfer, seed: int) -> tuple[Transfer, Transfer]:
    """Nine tenths of a labelled transfer set, and the tenth that the best round is chosen by."""
    order = permutation(seed, SUBSET, 1, len(transfer))
    count = len(transfer) // 10
    return (_select(transfer, order[count:]), _select(transfer, order[:count])) if count else (transfer, _NOTHING)


def _apart(samples: Transfer, name: str, reserved: Sequence[tuple[str, Transfer]], warn: Warn) -> Transfer:
    """Without what is in the reserved sets. Errors: UsageError where nothing is left."""
    for what, others in reserved:
        kept = find_apart(samples.images, others.images)
        if len(kept) == 0:
            raise UsageError(
                f"every sample of --{name} is in {what}, too", f"give a {name} set of other samples"
            )
        if len(kept) < len(samples):
            warn(f"{len(samples) - len(kept)} samples of the {name} set are in {what}, too, and are left out of it")
            samples = _select(samples, kept)
    return samples


def _with_defaults(
    fields: Mapping[str, Any], bundles: Sequence[Bundle], whole: Bundle | None
) -> dict[str, Any]:
    """The fields with this module's defaults for what is not given."""

    def given(name: str) -> dict[str, Any]:
        return {key: value for key, value in (fields.get(name) or {}).items() if value is not None}

    local, distil = dict(LOCAL), dict(DISTIL)
    if all(bundle.input.is_image for bundle in bundles):
        local["augment"] = AUGMENT
    if whole is not None and whole.optimizer.name in DISTIL_RATE:
        distil["learning_rate"] = DISTIL_RATE[whole.optimizer.name]
    return {"rounds": ROUNDS, **fields, "local": local | given("local"), "distil": distil | given("distil")}


def _check_heads(bundles: Sequence[Bundle], drafted: Task, wanted: bool | None, warn: Warn) -> bool:
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


def _with_stand_ins(fields: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """The task with made-up digests: a wrong field is found before any bundle is opened or blob stored."""
    entry = {"student": "x", "size_bytes": 1, "engines": ["x"], "memory_bytes": 0, "model_digest": "0" * 64}
    samples = {"blob": "0" * 64, "samples": 1, "size_bytes": 1}
    students = [{**entry, "bundle": f"{index:064x}"} for index in range(len(_paths(description)))]
    return {
        **{name: value for name, value in fields.items() if name != "class_names"},
        "students": students,
        "global_student": None if description.get("global_bundle") is None else {**entry, "bundle": "f" * 64},
        "transfer": {**samples, "labelled": bool(description.get("transfer_labels"))},
        **{
            name: {**samples, "labelled": True}
            for name in ("test", "validation")
            if description.get(name) is not None
        },
        **({"parameter_shapes": {"x": [1]}} if fields.get("exchange") == "parameters" else {}),
    }


def _paths(description: Mapping[str, Any]) -> list[Path]:
    bundles = description.get("bundles")
    if isinstance(bundles, str):
        raise UsageError(f"bundles is {bundles!r}, no list", f'write bundles = ["{bundles}"]')
    if not isinstance(bundles, Sequence) or not bundles:
        raise UsageError(
            "no bundle is given",
            "make one with `edgestill export --student NAME --output DIR` and name it with --bundle",
        )
    return [_path(bundle, "bundles") for bundle in bundles]


def _path(value: Any, name: str) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise UsageError(f"{name} is {value!r}", "give the path of a bundle's folder or .zip")
    return Path(value)


def _text(description: Mapping[str, Any], name: str) -> str:
    value = description.get(name)
    if value is None:
        raise UsageError(f"no {name} set is given", f"name a data set or a path with --{name}")
    if not isinstance(value, str | Path) or not str(value):
        raise UsageError(f"{name} is {value!r}", "give the name of a data set, or a path")
    return str(value)


def _count(description: Mapping[str, Any], name: str, least: int) -> int | None:
    value = description.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} is {value!r}", f"give a whole number of {least} or more")
    return value


def _check_alike(bundles: Sequence[Bundle]) -> None:
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


def _refuse_several_tensors(bundles: Sequence[Bundle]) -> None:
    """Errors: UsageError for a student whose samples a transfer or test set cannot hold."""
    for bundle in bundles:
        if bundle.more_inputs:
            raise UsageError(
                f"{bundle.source}: takes {len(bundle.samples)} tensors a sample ({', '.join(bundle.sample_names)}), "
                "a task's transfer and test sets hold one",
                "train it with `edgestill train`, or export a student that takes one tensor",
            )


def _check_objectives(bundles: Sequence[Bundle], whole: Bundle | None, exchange: str) -> None:
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


def _check_training(
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


def _warn_of_own_spaces(bundles: Sequence[Bundle], drafted: Task, warn: Warn) -> None:
    """`crd` and `lpd` keep relations between samples, not coordinates: each student has a latent space of its own."""
    own = [bundle for bundle in bundles if bundle.objective.relates_samples]
    if own and drafted.exchange in ("latents", "both") and not drafted.aggregation.align:
        warn(
            f"latents of {_named(own)} are in a space of their own, for objective {own[0].objective.name} learns how "
            "samples lie to one another, not where: their mean with others says little; take --align"
        )


def _warn_of_control_arms(bundles: Sequence[Bundle], exchange: str, warn: Warn) -> None:
    """Students of objective `ce` are legitimate, to compare with, and easily exported by mistake."""
    deaf = [bundle for bundle in bundles if not bundle.objective.needs_teacher]
    if deaf:
        who = "no device" if len(deaf) == len(bundles) else f"no device with {_named(deaf)}"
        warn(
            f"{who} learns from the others: objective {deaf[0].objective.name} takes labels alone, not the exchanged "
            f"{exchange}; unless that is meant, to compare with, export with --objective both"
        )


def _warn_of_unclipped(
    option: str, bundles: Sequence[Bundle], given: Mapping[str, float], warn: Warn
) -> None:
    """What a student's step does not take is not used for it; of clipping nobody would notice."""
    unclipped = [bundle for bundle in bundles if not bundle.optimizer.clips]
    if unclipped and "clip_norm" in given:
        flag = option.replace("_", "-")
        warn(f"--{flag} does nothing with {_named(unclipped)}: export with --clip-gradients")


def _named(bundles: Sequence[Bundle]) -> str:
    return " or ".join(str(bundle.source) for bundle in bundles)


def _warn_of_fewer(description: Mapping[str, Any], name: str, taken: Transfer, warn: Warn) -> None:
    wanted = description.get(f"{name}_count")
    if wanted is not None and wanted > len(taken):
        warn(f"--{name}-count {wanted}: {description[name]} has {len(taken)} samples, all of which are taken")
