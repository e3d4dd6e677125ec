"""A task from bundles and data as a person names them: packs, checks that they fit together, stores the blobs."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgestill.coordinator.task.agreement import (
    check_alike,
    check_heads,
    check_objectives,
    check_training,
    refuse_several_tensors,
    warn_of_control_arms,
    warn_of_own_spaces,
    warn_of_unclipped,
)
from edgestill.coordinator.task.samples import (
    Reading,
    Warn,
    hold_out,
    keep_apart,
    keep_held_out,
    known_classes,
    load_test,
    load_transfer,
    warn_of_fewer,
)
from edgestill.coordinator.task.task import Task, parse_task
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.writer import zip_bundle
from edgestill.runtime.data.notice import Notice, Tell, tell_on_stderr
from edgestill.runtime.device.authority import only_certificate
from edgestill.runtime.device.local_training import Transfer, parameters_of, save_labels
from edgestill.runtime.errors import UsageError

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

FEW_VALIDATED = 100
"""Of accuracy on so many images the standard error is up to five points."""

AddBlob = Callable[[Path], str]


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
        check_alike(everyone)
        refuse_several_tensors(everyone)
        fields = _with_defaults(fields, bundles, whole)
        fields["common_head"] = check_heads(everyone, drafted, fields.get("common_head"), warn)
        drafted = parse_task(_with_stand_ins(fields, description))
        if drafted.exchange != "parameters":
            check_objectives(bundles, whole, drafted.exchange)
            warn_of_control_arms(bundles, drafted.exchange, warn)
            warn_of_own_spaces(everyone, drafted, warn)
        warn_of_unclipped("clip_norm", bundles, drafted.local.hyperparameters, warn)
        warn_of_unclipped("distil_clip_norm", [whole] if whole else [], drafted.distil.hyperparameters, warn)
        seed = _count(description, "seed", 0) or 0
        known = known_classes(fields.get("class_names"), everyone, description)
        if not known:
            tell(
                Notice(
                    "unnamed",
                    "nobody says what the classes are: each device numbers its own in the order of their names, and "
                    "must have the same ones; --class-names says it, here or where the students are exported",
                )
            )
        reading = Reading(
            first, known, bool(description.get("resize")), bool(description.get("skip_broken")), tell
        )
        transfer, rest = load_transfer(
            _text(description, "transfer"), reading, bool(description.get("transfer_labels")),
            _count(description, "transfer_count", 1), seed,
        )  # fmt: skip
        warn_of_fewer(description, "transfer", transfer, warn)
        evaluated = whole is not None or drafted.exchange == "parameters"
        if description.get("validation") is not None and not evaluated:
            warn("--validation is not used: no global model is trained of which it could choose the best round")
        if description.get("validation") is None and evaluated and transfer.labels is not None:
            transfer, rest = (transfer, rest) if rest is not None else hold_out(transfer, seed)
        else:
            rest = None
        if drafted.exchange != "parameters":
            check_training(bundles, whole, drafted, transfer)
        held = {}
        for name in ("test", "validation"):
            if description.get(name) is not None:
                count = _count(description, f"{name}_count", 1)
                held[name] = load_test(str(description[name]), reading, count, seed)
                warn_of_fewer(description, name, held[name], warn)
        reserved = [("the transfer set", transfer)]
        if rest is not None:
            # before the test set, which may be all of the same data
            rest = keep_held_out(rest, transfer, warn)
        if rest is not None:
            reserved.append(("the validation set", rest))
        for name in held:
            held[name] = keep_apart(held[name], name, reserved, warn)
            reserved.append((f"the {name} set", held[name]))
        if rest is not None:
            held["validation"] = rest
        if evaluated and "validation" in held and len(held["validation"]) < FEW_VALIDATED:
            warn(
                f"the best round is chosen by {len(held['validation'])} validation images, which is a lottery; give "
                "more with --validation, or a larger --transfer"
            )
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


def describe_transfer(transfer: Transfer, folder: Path, add_blob: AddBlob) -> dict[str, Any]:
    """Stores a transfer set, and apart from it its labels, which no device gets; its entry in a task."""
    entry = describe_samples(Transfer(transfer.images), folder / "transfer.safetensors", add_blob)
    if transfer.labels is None:
        return entry
    path = folder / "labels.safetensors"
    save_labels(path, transfer.labels)
    return entry | {"labelled": True, "labels": add_blob(path)}


def parameter_shapes(bundle: Bundle) -> dict[str, list[int]]:
    """Shape of every parameter and statistic, by name."""
    return {name: list(array.shape) for name, array in parameters_of(bundle, bundle.initial_state()).items()}


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
