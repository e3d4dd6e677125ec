"""Step 3 of a round on one device: private samples with labels, transfer samples with the global outputs as teacher."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import Dataset, digest_of_arrays
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.engines.registry import Engine
from edgestill.runtime.errors import DataError, StateError, TrainingError, UsageError, WireError
from edgestill.runtime.training.batches import TransferSet
from edgestill.runtime.training.hyperparameters import taken_by
from edgestill.runtime.training.plan import Run, TrainSettings, plan
from edgestill.runtime.training.teacher import TeacherOutputs, encode_all
from edgestill.runtime.training.trainer import StepRecord, prepare, train

EXCHANGED_OUTPUTS = {"latents": ("latents",), "logits": ("logits",), "both": ("latents", "logits")}
EXCHANGES = (*EXCHANGED_OUTPUTS, "parameters")
_EXCHANGED_ROLES = ("parameter", "statistic")


@dataclass(frozen=True)
class Transfer:
    """The transfer set: samples [N, …] as the bundle takes them, in one tensor, perhaps labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(cls, path: str | Path) -> Transfer:
        """Reads the safetensors file of docs/federation.md. Errors: DataError; WireError for a damaged file."""
        arrays = wire.load(path, wire.Limits(finite=True)).arrays
        unknown = sorted(set(arrays) - {"images", "labels"})
        if "images" not in arrays or unknown:
            raise DataError(
                f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, not images and perhaps labels",
                "make a transfer set with `edgestill task create`",
            )
        images, labels = arrays["images"], arrays.get("labels")
        if images.ndim < 2 or images.dtype not in (np.uint8, np.float32, np.int64) or images.size == 0:
            raise DataError(
                f"{path}: images are {images.dtype}{list(images.shape)}, not uint8, float32 or int64 [N, …]"
            )
        if labels is not None and (labels.shape != (len(images),) or labels.dtype != np.int64):
            raise DataError(
                f"{path}: labels are {labels.dtype}{list(labels.shape)}, not int64[{len(images)}]"
            )
        return cls(images, labels)

    def save(self, path: str | Path) -> None:
        """Writes that file, labels too where there are some; equal sets give equal bytes. Errors: WireError."""
        arrays = {"images": self.images}
        if self.labels is not None:
            arrays["labels"] = self.labels
        wire.save(path, arrays)


def save_labels(path: str | Path, labels: np.ndarray) -> None:
    """Writes the classes of a transfer set, int64 [N], which the coordinator alone keeps. Errors: WireError."""
    wire.save(path, {"labels": labels})


def load_labels(path: str | Path) -> np.ndarray:
    """Reads that file. Errors: DataError, WireError."""
    arrays = wire.load(path).arrays
    labels = arrays.get("labels")
    if set(arrays) != {"labels"} or labels is None or labels.ndim != 1 or labels.dtype != np.int64:
        raise DataError(f"{path}: holds no labels int64 [N]", "make the task again")
    return labels


@dataclass(frozen=True)
class LocalResult:
    """What a local training came to.

    `steps` are those of the whole training, `loss` (mean) and `step_ms` (median) are of the steps that this call
    made: None where it found the training finished.
    """

    state: dict[str, np.ndarray]
    steps: int
    loss: float | None
    step_ms: float | None
    samples: int


def train_locally(
    engine: Engine,
    bundle: Bundle,
    dataset: Dataset,
    transfer: Transfer | None,
    global_outputs: Mapping[str, np.ndarray] | None,
    settings: LocalSettings,
    seed: int,
    state: Mapping[str, np.ndarray],
    state_path: Path | None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> LocalResult:
    """Trains `state` on private samples, and on the transfer set where there are global outputs on it.

    `global_outputs`: latents [N, l] and/or logits [N, K]; None, or a bundle of objective `ce`: labels alone. `state`
    holds parameters, statistics and optimizer slots. Where outputs are exchanged the model stays the device's own, so
    its slots go on from round to round; received parameters are another model, whose gradients these slots never
    summed up, so `with_parameters` starts them anew. A file at `state_path` that holds this very training is gone on
    from, to the same bits as without the break; any other is replaced. No file is touched with None.
    Errors: UsageError and DataError for what does not fit together; Interrupted when `should_stop` said so, with a
    checkpoint; TrainingError when the loss or the state is not finite.
    """
    run = _plan(bundle, dataset, transfer, global_outputs, settings, seed, state, state_path is not None)
    first_step = _prepare(engine, run, state_path)
    losses, times_ms = [], []
    steps = train(
        engine,
        run,
        state_path,
        first_step=first_step,
        checkpoint_every=settings.checkpoint_every,
        should_stop=should_stop,
    )
    for record in steps:
        losses.append(record.loss)
        times_ms.append(record.ms)
        on_step(record)
    after = engine.state()
    check_finite(after)
    return LocalResult(
        after,
        run.total_steps,
        float(np.mean(losses)) if losses else None,
        statistics.median(times_ms) if times_ms else None,
        len(dataset),
    )


def own_outputs(
    engine: Engine, bundle: Bundle, transfer: Transfer | None, exchange: str
) -> dict[str, np.ndarray]:
    """What a device uploads in step 4, of the engine's present state, float32 by the names of docs/federation.md.

    Errors: UsageError without a transfer set where outputs on it are exchanged; DataError where it does not fit.
    """
    if exchange not in EXCHANGES:
        raise UsageError(f"no exchange is called {exchange!r}", f"exchanges: {', '.join(EXCHANGES)}")
    if exchange == "parameters":
        return parameters_of(bundle, engine.state())
    if transfer is None:
        raise UsageError(f"exchange {exchange} needs a transfer set", "give the task's transfer set")
    check_transfer(bundle, transfer)
    outputs = encode_all(engine, transfer.images, bundle.batch)
    return {name: getattr(outputs, name) for name in EXCHANGED_OUTPUTS[exchange]}


def parameters_of(bundle: Bundle, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every parameter and statistic of a state, by name, without the optimizer's slots."""
    return {spec.name: state[spec.name] for spec in bundle.state_specs if spec.role in _EXCHANGED_ROLES}


def with_parameters(
    bundle: Bundle, state: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The state with received parameters and statistics in it, and the optimizer's slots as in a new bundle.

    A slot sums up gradients at parameters that are gone now: momentum kept would push the average of all devices into
    one device's old direction. Errors: StateError for parameters that are not exactly the bundle's.
    """
    initial = bundle.initial_state()
    expected = {spec.name for spec in bundle.state_specs if spec.role in _EXCHANGED_ROLES}
    slots = {spec.name: initial[spec.name] for spec in bundle.state_specs if spec.name not in expected}
    if stray := sorted(set(parameters) & set(slots)):
        raise StateError(
            f"received parameters hold the optimizer's {stray[0]!r}", "exchange parameters and statistics"
        )
    return bundle.check_state({**slots, **parameters}, source="received parameters")


def check_transfer(bundle: Bundle, transfer: Transfer) -> None:
    """Errors: DataError for samples of another shape or dtype than the bundle takes, or in several tensors."""
    if bundle.more_inputs:
        raise DataError(
            f"a transfer set holds one tensor a sample, the bundle takes {len(bundle.samples)} "
            f"({', '.join(bundle.sample_names)})",
            "use students that take one tensor a sample",
        )
    form = bundle.input
    found = (transfer.images.dtype, transfer.images.shape[1:])
    if len(transfer) == 0 or found != (np.dtype(form.dtype), form.shape):
        raise DataError(
            f"the transfer set holds {len(transfer)} samples of {found[0]}{list(found[1])}, "
            f"the bundle takes {form}",
            "use a transfer set and students of one task",
        )


def check_finite(state: Mapping[str, np.ndarray]) -> None:
    """Errors: TrainingError naming a tensor that holds NaN or infinity."""
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise TrainingError(
                f"after training {name!r} is not finite", "train with a smaller learning rate"
            )


def _plan(
    bundle: Bundle,
    dataset: Dataset,
    transfer: Transfer | None,
    global_outputs: Mapping[str, np.ndarray] | None,
    settings: LocalSettings,
    seed: int,
    state: Mapping[str, np.ndarray],
    described: bool,
) -> Run:
    """`described`: whether a file will hold the run; only then digests are worth their time."""
    given = taken_by(bundle, settings.hyperparameters)
    transfer_set, origins = None, {}
    if bundle.objective.needs_teacher and global_outputs is None:
        given["alpha"] = 0.0
    elif bundle.objective.needs_teacher:
        if transfer is None:
            raise UsageError("global outputs without a transfer set", "give the task's transfer set")
        check_transfer(bundle, transfer)
        transfer_set = TransferSet(transfer.images, TeacherOutputs(**global_outputs))
        if described:
            origins = {
                "transfer": digest_of_arrays(transfer.images),
                "global_outputs": digest_of_arrays(
                    *(global_outputs[name] for name in sorted(global_outputs))
                ),
            }
    return plan(
        bundle,
        dataset,
        TrainSettings(
            settings.epochs,
            seed,
            hyperparameters=given,
            augmentations=settings.augmentations,
            transfer_fraction=settings.transfer_fraction,
        ),
        transfer=transfer_set,
        initial_state=bundle.check_state(state),
        origins=origins,
    )


def _prepare(engine: Engine, run: Run, state_path: Path | None) -> int:
    try:
        return prepare(engine, run, state_path)
    # another training, or a damaged file: this one starts from its first step
    except (StateError, WireError):
        return prepare(engine, run, state_path, restart=True)
