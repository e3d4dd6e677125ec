"""The batch of any step, as a pure function of the step's number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgestill.runtime.data.augmentation import augment
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.randomness import ORDER, TRANSFER_ORDER, permutation
from edgestill.runtime.training.relations import draw_negatives, neighbour_weights
from edgestill.runtime.training.teacher import TeacherOutputs


@dataclass(frozen=True)
class TransferSet:
    """Unlabelled samples and the teacher's outputs on them; `images` and `more` as in `Dataset`."""

    images: np.ndarray
    outputs: TeacherOutputs
    more: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class BatchPlan:
    """How batches of `batch` samples are made: `transfer_count` from the transfer set, the rest private.

    Private samples have labels, and a teacher's outputs where there is one; transfer samples have outputs alone. What
    a sample lacks has a weight of zero. An epoch is one pass over the private samples in an order of its own; its last
    batch is filled up from the start of that order, never with zeros, which BatchNorm would see.
    """

    dataset: Dataset
    batch: int
    seed: int
    augmentations: tuple[str, ...] = ()
    teacher: TeacherOutputs | None = None
    transfer: TransferSet | None = None
    transfer_count: int = 0
    teacher_sizes: tuple[int, int] | None = None
    """Latent size and classes of a step that takes a teacher, for samples that have none."""
    labelled: bool = True
    """Whether the labels of `dataset` count."""
    negatives: int = 0
    """How many teacher latents of samples outside of the batch a step takes."""
    neighbours: int | None = None
    """How many neighbours of each sample a step is told of, among the samples of the batch with a teacher; None: the
    step takes no neighbours."""
    neighbour_scale: float = 1.0
    names: tuple[str, ...] = ("images",)
    """What the step calls the tensors of a sample."""

    @property
    def private_count(self) -> int:
        return self.batch - self.transfer_count

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset) // self.private_count)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def inputs(self, step: int) -> dict[str, np.ndarray]:
        """Samples, labels, weights and teacher outputs of a step, by the names of docs/bundle.md."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, ORDER, epoch, len(self.dataset))
        chosen = _wrapped(order, position * self.private_count, self.private_count)
        samples = [array[chosen] for array in self.dataset.samples]
        labels = self.dataset.labels[chosen]
        label_weights = np.full(self.batch, self.labelled, np.float32)
        teacher_weights = np.ones(self.batch, np.float32)
        outputs = None if self.teacher is None else self.teacher.take(chosen)
        if outputs is None and self.teacher_sizes is not None:
            outputs = TeacherOutputs.zeros(self.private_count, *self.teacher_sizes)
            teacher_weights[: self.private_count] = 0
        batch_samples = chosen if self.teacher is not None else chosen[:0]
        if self.transfer is not None and self.transfer_count:
            others = self._transfer_indices(step)
            drawn = [array[others] for array in (self.transfer.images, *self.transfer.more)]
            samples = [np.concatenate(pair) for pair in zip(samples, drawn, strict=True)]
            # a label is needed by the graph's shape; its weight of zero takes it out of the loss
            labels = np.concatenate([labels, np.zeros(len(others), np.int64)])
            label_weights[self.private_count :] = 0
            outputs = TeacherOutputs.joined(outputs, self.transfer.outputs.take(others))
            before = 0 if self.teacher is None else len(self.dataset)
            batch_samples = np.concatenate([batch_samples, before + others])
        samples[0] = augment(samples[0], self.augmentations, self.seed, epoch, position)
        inputs = {
            **dict(zip(self.names, samples, strict=True)),
            "labels": labels,
            "label_weights": label_weights,
        }
        if outputs is not None:
            inputs["teacher_latents"], inputs["teacher_logits"] = outputs.latents, outputs.logits
            inputs["teacher_weights"] = teacher_weights
        if self.neighbours is not None:
            inputs["neighbour_weights"] = neighbour_weights(
                outputs.latents, teacher_weights > 0, self.neighbours, self.neighbour_scale
            )
        if self.negatives:
            inputs["teacher_negatives"] = self._negatives(step, batch_samples)
        return inputs

    def _negatives(self, step: int, batch_samples: np.ndarray) -> np.ndarray:
        """Teacher latents, of private samples where they have a teacher and, after them, of transfer samples."""
        pool = [] if self.teacher is None else [self.teacher.latents]
        if self.transfer is not None and self.transfer_count:
            pool.append(self.transfer.outputs.latents)
        if not pool:
            return np.zeros((self.negatives, self.teacher_sizes[0]), np.float32)
        drawn = draw_negatives(self.seed, step, self.negatives, sum(map(len, pool)), batch_samples)
        first = drawn < len(pool[0])
        latents = np.empty((len(drawn), pool[0].shape[1]), np.float32)
        latents[first] = pool[0][drawn[first]]
        if not first.all():
            latents[~first] = pool[1][drawn[~first] - len(pool[0])]
        return latents

    def _transfer_indices(self, step: int) -> np.ndarray:
        """The next samples in an endless row of orders of the transfer set."""
        count = len(self.transfer)
        positions = np.arange(step * self.transfer_count, (step + 1) * self.transfer_count)
        return np.array(
            [_order(self.seed, TRANSFER_ORDER, int(p) // count, count)[p % count] for p in positions]
        )


def _wrapped(order: np.ndarray, start: int, count: int) -> np.ndarray:
    return order[np.arange(start, start + count) % len(order)]


@lru_cache(maxsize=4)
def _order(seed: int, stream: int, epoch: int, count: int) -> np.ndarray:
    return permutation(seed, stream, epoch, count)
