"""The Python face of a bundle: opened on an engine, it trains, evaluates and predicts; `edgestill.open` makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.classes import KnownClasses, names_as_metadata, names_of_outputs, translate
from edgestill.runtime.data.dataset import (
    Dataset,
    fit_dataset,
    fit_tensors,
    load_splits,
    load_transfer_samples,
)
from edgestill.runtime.data.image_file import SUFFIXES
from edgestill.runtime.data.notice import tell_on_stderr
from edgestill.runtime.data.pictures import Unlabelled, load_pictures, load_unlabelled
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.batches import TransferSet
from edgestill.runtime.training.checkpoint import classes_of, load_named_state
from edgestill.runtime.training.evaluation import Evaluation, evaluate, probabilities
from edgestill.runtime.training.hyperparameters import CHECKPOINT_EVERY, EPOCHS, TRANSFER_FRACTION
from edgestill.runtime.training.plan import TrainSettings, plan
from edgestill.runtime.training.schedule import Schedule
from edgestill.runtime.training.teacher import TeacherOutputs, encode_all, in_order_of, split_teacher_name
from edgestill.runtime.training.trainer import StepRecord, prepare, train

Samples = np.ndarray | tuple[np.ndarray, ...]
"""Samples [N, …], or a tuple of the tensors of samples that have several."""
Data = str | Path | Dataset | tuple[Samples, np.ndarray]
"""What `edgestill train --data` takes, or samples and labels [N]."""


class Predictions(NamedTuple):
    """Latents [N, l] and logits [N, K], float32."""

    latents: np.ndarray
    logits: np.ndarray


class Classified(NamedTuple):
    """What a sample is, its class's name, and with what probability; `sample` is its file, or its place from 0."""

    sample: str
    class_name: str
    probability: float


class OpenedBundle:
    """A bundle on an engine; it begins with the bundle's initial state and keeps what it learns until it is closed.

    engine: None is the first that works here. threads: 0 is the engine's own choice. Of images in files, `resize`
    scales those of another size, and `skip_broken` leaves out, counts and names those that cannot be read.
    Errors: BundleError, UsageError, EngineError, which say what to do in their `hint`.
    """

    def __init__(
        self,
        bundle: str | Path,
        engine: str | None = None,
        threads: int = 0,
        resize: bool = False,
        skip_broken: bool = False,
    ) -> None:
        self._resize, self._skip_broken = resize, skip_broken
        with ExitStack() as stack:
            self.bundle = stack.enter_context(Bundle.open(bundle))
            self._engine = open_engine(self.bundle, engine, threads)
            stack.callback(self._engine.close)
            self._open = stack.pop_all()
        self._classes = classes_of(self.bundle)

    @property
    def engine(self) -> str:
        """The engine's name."""
        return self._engine.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the outputs mean, in their order: as the bundle says, the state, or the data it was trained on first."""
        return self._classes.names

    def train(
        self, data: Data, *, progress: Callable[[StepRecord], None] = lambda record: None, **settings: Any
    ) -> list[StepRecord]:
        """Trains on from the present state and returns a record of every step; `progress` is called with each.

        The settings are those of `steps`. Errors: those of `steps`, and TrainingError for a run that diverges.
        """
        records = []
        for record in self.steps(data, **settings):
            progress(record)
            records.append(record)
        return records

    def steps(
        self,
        data: Data,
        *,
        epochs: int = int(EPOCHS.default),
        seed: int = 0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        augment: tuple[str, ...] = (),
        teacher: str | Path | OpenedBundle | Mapping[str, np.ndarray] | None = None,
        transfer: str | Path | Samples | None = None,
        transfer_fraction: float = TRANSFER_FRACTION.default,
        alpha_end: float | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = int(CHECKPOINT_EVERY.default),
        restart: bool = False,
        new_classes: bool = False,
        **hyperparameters: float,
    ) -> Iterator[StepRecord]:
        """The same as an iterator that makes a step whenever it is asked for one.

        `teacher`: whose outputs on the data, and on the samples of `transfer`, a student that distils learns from;
        `BUNDLE[:STATE]`, an opened bundle, or its `latents` and/or `logits` on the data.
        `checkpoint`: a file that keeps the state; the same call goes on from it. `new_classes`: the data name other
        classes than those that the outputs meant so far. Hyperparameters by name, as
        `learning_rate=0.02`: docs/training.md has them all. Errors: UsageError, DataError, StateError.
        """
        known = None if new_classes else self._classes
        dataset = self._dataset(data, "train", known)
        names = dataset.class_names or self.class_names
        outputs, transfer_set = None, None
        if teacher is not None:
            outputs = self._taught(teacher, dataset.samples, names)
            if transfer is not None:
                if isinstance(teacher, Mapping):
                    raise UsageError(
                        "the teacher's outputs are given as arrays, of the data alone",
                        "give a bundle as teacher where there is a transfer set",
                    )
                images, *more = self._samples(transfer)
                transfer_set = TransferSet(images, self._taught(teacher, (images, *more), names), tuple(more))
        elif transfer is not None:
            raise UsageError("a transfer set without a teacher", "give the teacher, too")
        run = plan(
            self.bundle,
            dataset,
            TrainSettings(
                epochs,
                seed,
                Schedule(schedule, warmup_steps),
                hyperparameters,
                tuple(augment),
                transfer_fraction,
                alpha_end,
            ),
            teacher=outputs,
            transfer=transfer_set,
            initial_state=self.state(),
        )
        path = None if checkpoint is None else Path(checkpoint)
        first = prepare(self._engine, run, path, restart)
        self._classes = KnownClasses(names, "what it was trained on") if new_classes else self._classes
        self._classes = self._classes or KnownClasses(names, "what it was trained on")
        return train(self._engine, run, path, first_step=first, checkpoint_every=checkpoint_every)

    def evaluate(self, data: Data) -> Evaluation:
        """How well the present state classifies the data: accuracy, accuracy a class, loss, confusion matrix.

        Of data with splits the test split is used. Errors: DataError, UsageError.
        """
        dataset = self._dataset(data, None, self._classes)
        return evaluate(self._engine, dataset, self.bundle.batch, self.bundle.classes)

    def predict(self, samples: str | Path | Samples) -> Predictions:
        """Latents and logits of any number of samples in inference mode, of the samples that `classify` names.

        The last batch is filled up from the first samples, and its outputs are cut. Errors: DataError.
        """
        first, *more = self._unlabelled(samples).samples
        outputs = encode_all(self._engine, first, self.bundle.batch, tuple(more))
        return Predictions(outputs.latents, outputs.logits)

    def classify(self, samples: str | Path | Samples) -> list[Classified]:
        """The most probable class of each sample; a path is a picture, a folder of pictures, or data.

        Labels are not looked at; of data with splits the test split is taken.

        Errors: DataError, UsageError.
        """
        found = self._unlabelled(samples)
        first, *more = found.samples
        outputs = probabilities(encode_all(self._engine, first, self.bundle.batch, tuple(more)).logits)
        names = names_of_outputs(self.class_names, self.bundle.classes)
        best = outputs.argmax(axis=1)
        return [
            Classified(sample, names[number], float(row[number]))
            for sample, number, row in zip(found.names, best, outputs, strict=True)
        ]

    def state(self) -> dict[str, np.ndarray]:
        """A copy of parameters, statistics and optimizer slots, by their PyTorch names."""
        return self._engine.state()

    def load_state(self, state: str | Path | Mapping[str, np.ndarray]) -> None:
        """Replaces the state by that of a file or of arrays by name. Errors: StateError, WireError, UsageError."""
        if isinstance(state, Mapping):
            self._engine.load_state(self.bundle.check_state(state))
        else:
            loaded, self._classes = load_named_state(Path(state), self.bundle)
            self._engine.load_state(loaded)

    def save(self, path: str | Path) -> Path:
        """Writes the state as safetensors, whole or not at all, and returns the path. Errors: WireError."""
        wire.save(Path(path), self.state(), names_as_metadata(self.class_names))
        return Path(path)

    def close(self) -> None:
        """Frees the engine and what the bundle was unpacked to; closing twice is harmless."""
        self._open.close()

    def __enter__(self) -> OpenedBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        bundle = self.bundle
        return (
            f"<{bundle.student.name} of {bundle.source} on {self.engine}, objective {bundle.objective.name}>"
        )

    def _dataset(self, data: Data, split: str | None, known: KnownClasses | None) -> Dataset:
        bundle = self.bundle
        if isinstance(data, Dataset):
            if not known or not data.class_names or data.class_names == known.names:
                return data
            labels = translate(data.labels, data.class_names, known, "data", tell_on_stderr)
            return replace(data, labels=labels, class_names=known.names)
        if isinstance(data, str | Path):
            splits = load_splits(
                data,
                bundle.input,
                bundle.classes,
                self._resize,
                bundle.more_inputs,
                known=known,
                skip_broken=self._skip_broken,
            )
            return splits.choose(split)
        if not isinstance(data, tuple) or len(data) != 2:
            raise UsageError(
                f"data of type {type(data).__name__}", "give a path, or samples and labels: (x, y)"
            )
        samples, labels = data
        return fit_dataset(_tensors(samples), np.asarray(labels), bundle.samples, bundle.classes, "data")

    def _samples(self, samples: str | Path | Samples) -> tuple[np.ndarray, ...]:
        bundle = self.bundle
        if isinstance(samples, str | Path):
            return load_transfer_samples(
                samples, bundle.input, self._resize, bundle.more_inputs, skip_broken=self._skip_broken
            )
        return fit_tensors(_tensors(samples), bundle.samples, "samples")

    def _unlabelled(self, samples: str | Path | Samples) -> Unlabelled:
        forms = self.bundle.samples
        if not isinstance(samples, str | Path):
            tensors = self._samples(samples)
            return Unlabelled(tuple(map(str, range(len(tensors[0])))), tensors)
        how = (self._resize, self._skip_broken, tell_on_stderr)
        if Path(samples).suffix.lower() in SUFFIXES:
            return load_pictures([Path(samples)], forms, *how)
        return load_unlabelled(str(samples), forms, None, *how)

    def _taught(
        self, teacher: Any, samples: tuple[np.ndarray, ...], names: tuple[str, ...]
    ) -> TeacherOutputs:
        """The teacher's outputs on samples, for classes of these names. Errors: UsageError, BundleError, DataError."""
        if isinstance(teacher, Mapping):
            unknown = sorted(set(teacher) - {"latents", "logits"})
            if unknown or not teacher:
                raise UsageError(
                    f"a teacher of {unknown or 'nothing'}", "give its latents, its logits, or both"
                )
            return TeacherOutputs(**teacher)
        if isinstance(teacher, OpenedBundle):
            outputs = TeacherOutputs(*teacher.predict(samples))
            return in_order_of(outputs, teacher._classes, self.bundle, names)
        path, checkpoint = split_teacher_name(str(teacher))
        engine = self.engine if self.engine in _engines_of(path) else None
        with OpenedBundle(path, engine) as opened:
            if checkpoint is not None:
                opened.load_state(checkpoint)
            return self._taught(opened, samples, names)


def _engines_of(path: Path) -> tuple[str, ...]:
    with Bundle.open(path) as bundle:
        return bundle.engines


def _tensors(samples: Samples) -> list[np.ndarray]:
    return [np.asarray(one) for one in (samples if isinstance(samples, tuple) else (samples,))]
