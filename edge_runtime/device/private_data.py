"""A device's own samples: read, without what the task shares, dealt, and divided into training and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.classes import KnownClasses, first_known
from edgestill.runtime.data.dataset import Dataset, Splits, load_splits
from edgestill.runtime.data.notice import Notice, Tell
from edgestill.runtime.data.overlap import without
from edgestill.runtime.data.shares import deal, draw_tests, parse_share, share_of
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.errors import DataError, UsageError
from edgestill.runtime.training.checkpoint import classes_of


@dataclass(frozen=True)
class PrivateSettings:
    """What `edgestill join` is told of the data: sources, `share` as K/N of them drawn by `gamma` and `seed`."""

    data: str
    test: str | None
    share: str | None
    gamma: float | None
    seed: int
    resize: bool
    skip_broken: bool


def load_private(
    wanted: PrivateSettings,
    bundle: Bundle,
    known: KnownClasses | None,
    tell: Tell,
    transfer: Transfer | None = None,
) -> tuple[Dataset, dict[str, Dataset]]:
    """This device's training samples, and its tests `t_priv` and `t_uni`, without those that the transfer set holds.

    Errors: UsageError, DataError.
    """

    def load(source: str, known: KnownClasses | None) -> Splits:
        return load_splits(
            source, bundle.input, bundle.classes, wanted.resize, bundle.more_inputs,
            known=known, skip_broken=wanted.skip_broken, tell=tell,
        )  # fmt: skip

    def keep_apart(dataset: Dataset, source: str) -> Dataset:
        return dataset if transfer is None else _leave_out_shared(dataset, transfer, source, tell)

    splits = load(wanted.data, known)
    private = splits.train
    if not known and private.class_names:
        if len(private.class_names) != bundle.classes:
            raise UsageError(
                f"{wanted.data} has {len(private.class_names)} classes, the task has {bundle.classes} without names",
                "labels count the classes in order: make a folder for each of the task's, empty where you have none",
            )
        known = KnownClasses(private.class_names, wanted.data)
        counted = ", ".join(f"{number} {name}" for number, name in enumerate(private.class_names[:12]))
        tell(
            Notice(
                "classes",
                f"the task does not name its classes; these are counted {counted}"
                f"{', …' if bundle.classes > 12 else ''}, and must be the same on every device",
                {"names": list(private.class_names)},
            )
        )
    private = keep_apart(private, wanted.data)
    number = 1
    if wanted.share is not None:
        number, devices = parse_share(wanted.share)
        gamma = 0.5 if wanted.gamma is None else wanted.gamma
        private = share_of(private, number, devices, gamma, wanted.seed)
    held_out = splits.test
    if wanted.test is not None:
        held_out = load(wanted.test, known).choose(None)
    if held_out is not None:
        held_out = keep_apart(held_out, wanted.test or wanted.data)
        t_priv, t_uni = draw_tests(private.labels, held_out.labels, wanted.seed, device=number - 1)
        return private, {"t_priv": held_out.select(t_priv), "t_uni": held_out.select(t_uni)}
    try:
        # one device gets all that is not held out, so gamma says nothing here
        own = deal(private, 1, 1.0, wanted.seed)[0]
    except DataError:  # too few samples to hold any out
        return private, {}
    return own.train, {"t_priv": own.t_priv, "t_uni": own.t_uni}


def _leave_out_shared(dataset: Dataset, transfer: Transfer, source: str, tell: Tell) -> Dataset:
    """The samples that are not in the transfer set. Errors: DataError where none is left."""
    kept, lost = without(dataset, transfer.images)
    if len(kept) == 0:
        raise DataError(
            f"{source}: every sample is in the task's transfer set, too", "give samples that nobody else has"
        )
    if lost:
        tell(
            Notice(
                "shared",
                f"{lost} samples of {source} are in the task's transfer set, too, and are left out: what is private "
                "stays apart from what is shared",
                {"samples": lost},
            )
        )
    return kept


def find_known_classes(task: Mapping[str, Any], bundle: Bundle) -> KnownClasses | None:
    """What the task's classes are: as it says, else as the student's bundle does."""
    return first_known(KnownClasses(tuple(task.get("class_names") or ()), "the task"), classes_of(bundle))
