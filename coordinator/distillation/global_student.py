"""Step 5: trains the global student on the transfer set from the aggregated outputs of the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device.local_training import Transfer, check_finite, check_transfer
from edgestill.runtime.engines.registry import Engine
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.evaluation import Evaluation, evaluate
from edgestill.runtime.training.hyperparameters import TrainingSettings, taken_by
from edgestill.runtime.training.plan import TrainSettings, plan
from edgestill.runtime.training.teacher import TeacherOutputs, encode_all
from edgestill.runtime.training.trainer import train


@dataclass(frozen=True)
class DistilResult:
    """`outputs`: latents [N, l] and logits [N, K] of the new state on the transfer set; `loss` is the mean over the
    last epoch."""

    state: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    loss: float
    steps: int


def distil(
    bundle: Bundle,
    engine: Engine,
    state: Mapping[str, np.ndarray],
    transfer: Transfer,
    aggregated: Mapping[str, np.ndarray],
    settings: TrainingSettings,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> DistilResult:
    """Trains `state` towards the aggregated outputs and encodes the transfer set; the same arguments give the same
    bits on the same engine.

    The labels of a labelled transfer set count with 1 − alpha; without labels there is nothing but the outputs to
    learn from, and alpha is 1. From latents alone the output layer learns nothing, so the classes of a global student
    need labels or logits. Optimizer slots go on from `state`. Errors: UsageError, DataError for what does not fit
    together; Interrupted when `should_stop` said so; TrainingError when the loss or the state is not finite.
    """
    check_transfer(bundle, transfer)
    labelled = transfer.labels is not None and settings.alpha != 1
    labels = np.zeros(len(transfer), np.int64) if transfer.labels is None else transfer.labels
    run = plan(
        bundle,
        Dataset(transfer.images, labels, ()),
        TrainSettings(settings.epochs, seed, hyperparameters=taken_by(bundle, settings.hyperparameters)),
        teacher=TeacherOutputs(**aggregated),
        labelled=labelled,
    )
    engine.load_state(bundle.check_state(state, source="the global student's state"))
    losses = [record.loss for record in train(engine, run, None, should_stop=should_stop)]
    after = engine.state()
    check_finite(after)
    outputs = encode_all(engine, transfer.images, bundle.batch)
    return DistilResult(
        after,
        {"latents": outputs.latents, "logits": outputs.logits},
        float(np.mean(losses[-run.plan.steps_per_epoch :])),
        len(losses),
    )


def evaluate_global(
    bundle: Bundle, engine: Engine, state: Mapping[str, np.ndarray], test: Transfer, name: str = "test"
) -> Evaluation:
    """How well the global student classifies a labelled set called `name`: accuracy, accuracy a class, loss.

    Errors: UsageError for a set without labels, or labels beyond the classes; DataError for other images.
    """
    check_transfer(bundle, test)
    if test.labels is None or test.labels.min() < 0 or test.labels.max() >= bundle.classes:
        raise UsageError(
            f"the {name} set has no labels, or labels outside 0 … {bundle.classes - 1}",
            f"give the task a labelled {name} set of the students' classes",
        )
    engine.load_state(bundle.check_state(state, source="the global student's state"))
    return evaluate(engine, Dataset(test.images, test.labels, ()), bundle.batch, bundle.classes)
