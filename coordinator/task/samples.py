"""The images of a task: how they are read, which classes they have, and which sets keep apart from which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.classes import KnownClasses, first_known, join_names
from edgestill.runtime.data.dataset import (
    Splits,
    class_names_from,
    class_names_of,
    load_splits,
    load_transfer_samples,
)
from edgestill.runtime.data.notice import Tell
from edgestill.runtime.data.overlap import find_apart
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.errors import DataError, UsageError
from edgestill.runtime.randomness import SUBSET, permutation
from edgestill.runtime.training.checkpoint import classes_of

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
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


def known_classes(
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


def load_transfer(
    source: str, reading: Reading, labelled: bool, count: int | None, seed: int
) -> tuple[Transfer, Transfer | None]:
    """At most `count` samples of a data set, drawn by the seed, and of those left up to half as many, or None."""
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
        return samples, None
    order = permutation(seed, SUBSET, 0, len(samples))
    return select(samples, order[:count]), select(samples, order[count : count + max(1, count // 2)])


def load_test(source: str, reading: Reading, count: int | None, seed: int) -> Transfer:
    """The test split of a data set, or all of one that has no splits."""
    dataset = reading.labelled(source).choose(None)
    return _take(Transfer(dataset.images, dataset.labels), count, seed)


def _take(samples: Transfer, count: int | None, seed: int) -> Transfer:
    if count is None or count >= len(samples.images):
        return samples
    return select(samples, permutation(seed, SUBSET, 0, len(samples.images))[:count])


def select(samples: Transfer, chosen: np.ndarray) -> Transfer:
    """Those of the samples, in their old order."""
    chosen = np.sort(chosen)
    labels = None if samples.labels is None else samples.labels[chosen]
    return Transfer(samples.images[chosen], labels)


def hold_out(transfer: Transfer, seed: int) -> tuple[Transfer, Transfer | None]:
    """Nine tenths of a labelled transfer set, and the tenth that the best round is chosen by."""
    order = permutation(seed, SUBSET, 1, len(transfer))
    count = len(transfer) // 10
    return (select(transfer, order[count:]), select(transfer, order[:count])) if count else (transfer, None)


def keep_held_out(held: Transfer, transfer: Transfer, warn: Warn) -> Transfer | None:
    """What is held out of a transfer set, less what is in the rest of it, too; None, and a warning, where it all is."""
    kept = find_apart(held.images, transfer.images)
    if len(kept) == 0:
        warn("the transfer set holds the same samples again and again: none are held out to choose the best round by")
        return None
    return select(held, kept)


def keep_apart(samples: Transfer, name: str, reserved: Sequence[tuple[str, Transfer]], warn: Warn) -> Transfer:
    """Without what is in the reserved sets. Errors: UsageError where nothing is left."""
    for what, others in reserved:
        kept = find_apart(samples.images, others.images)
        if len(kept) == 0:
            raise UsageError(
                f"every sample of --{name} is in {what}, too", f"give a {name} set of other samples"
            )
        if len(kept) < len(samples):
            warn(f"{len(samples) - len(kept)} samples of the {name} set are in {what}, too, and are left out of it")
            samples = select(samples, kept)
    return samples


def warn_of_fewer(description: Mapping[str, Any], name: str, taken: Transfer, warn: Warn) -> None:
    wanted = description.get(f"{name}_count")
    if wanted is not None and wanted > len(taken):
        warn(f"--{name}-count {wanted}: {description[name]} has {len(taken)} samples, all of which are taken")
