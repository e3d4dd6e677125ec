"""How well a state classifies a dataset: accuracy, accuracy a class, mean loss, confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.data.classes import names_of_outputs
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.engines.registry import Engine
from edgestill.runtime.errors import EdgestillError
from edgestill.runtime.training.teacher import encode_all


@dataclass(frozen=True)
class Evaluation:
    """`confusion[t, p]` counts samples of class t taken for class p; `loss` is the mean cross-entropy."""

    confusion: np.ndarray
    loss: float
    class_names: tuple[str, ...]

    @property
    def samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.samples)

    @property
    def per_class(self) -> list[float | None]:
        """Accuracy a class; None for a class without samples."""
        totals, right = self.confusion.sum(axis=1), np.diag(self.confusion)
        return [float(r / t) if t else None for r, t in zip(right, totals, strict=True)]

    def as_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "per_class": self.per_class,
            "samples": self.samples,
            "loss": self.loss,
            "class_names": list(self.class_names),
            "confusion": self.confusion.tolist(),
        }


def evaluate(engine: Engine, dataset: Dataset, batch: int, classes: int) -> Evaluation:
    """Classifies the whole dataset with the engine's present state."""
    logits = encode_all(engine, dataset.images, batch, dataset.more).logits
    return score(logits, dataset.labels, classes, dataset.class_names)


def score(
    logits: np.ndarray, labels: np.ndarray, classes: int, class_names: tuple[str, ...] = ()
) -> Evaluation:
    """Logits [N, K] against labels [N]."""
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    # in float64 and shifted by the maximum, so that large logits do not overflow
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return Evaluation(confusion, float(losses.mean()), class_names)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax of logits [N, K], in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def draw_confusion(evaluation: Evaluation, path: Path, title: str) -> None:
    """Writes the confusion matrix as a PNG, rows scaled to shares of the true class.

    Errors: EdgestillError when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EdgestillError(
            "a PNG needs matplotlib", "pip install 'edgestill[plots]', or leave --confusion out"
        ) from error
    count = len(evaluation.confusion)
    names = names_of_outputs(evaluation.class_names, count)
    shares = evaluation.confusion / np.maximum(1, evaluation.confusion.sum(axis=1, keepdims=True))
    side = max(4.0, min(14.0, 0.55 * count + 2.2))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if count <= 30:
        axes.set_xticks(range(count), names, rotation=45, ha="right")
        axes.set_yticks(range(count), names)
    if count <= 15:
        for (row, column), number in np.ndenumerate(evaluation.confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=colour)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise EdgestillError(
            f"{path}: cannot write: {error.strerror or error}", "choose another file"
        ) from error
