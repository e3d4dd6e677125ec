"""The local training loop: steps on an engine, checkpoints that survive a kill, and resuming bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.augmentation import check_augmentation
from edgestill.runtime.data.dataset import Dataset, digest_of_arrays
from edgestill.runtime.engines.registry import Engine
from edgestill.runtime.errors import Interrupted, TrainingError, UsageError
from edgestill.runtime.training.batches import BatchPlan, TransferSet
from edgestill.runtime.training.checkpoint import Checkpoint, check_same_run, load_checkpoint, save_checkpoint
from edgestill.runtime.training.schedule import Schedule, distillation_share, learning_rate
from edgestill.runtime.training.teacher import TeacherOutputs

DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0},
    "adamw": {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 1e-2},
}
OBJECTIVE_DEFAULTS = {"alpha": 0.5, "temperature": 4.0, "logit_share": 0.5}
CONTRASTIVE_TEMPERATURE = 0.07
NEIGHBOURS, NEIGHBOUR_SCALE = 5, 1.0


@dataclass(frozen=True)
class TrainSettings:
    """What a run is asked to do; `hyperparameters` overrides the defaults by name."""

    epochs: int = 1
    seed: int = 0
    schedule: Schedule = Schedule()
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    augmentations: tuple[str, ...] = ()
    transfer_fraction: float = 0.5
    alpha_end: float | None = None
    """α of the last step, reached in a straight line from the hyperparameter `alpha`; None: α stays as it is."""
    neighbours: int | None = None
    neighbour_scale: float | None = None
    """Of objective `lpd`; None is the default."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did; step counts from 1, losses and accuracy are of its batch before the update.

    `accuracy` is None for a batch without labels.
    """

    step: int
    steps: int
    """In the whole run."""
    epoch: int
    loss: float
    ce_loss: float
    distillation_loss: float | None
    accuracy: float | None
    learning_rate: float
    ms: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """Everything that determines the state after a step, but the engine."""

    bundle: Bundle
    plan: BatchPlan
    settings: TrainSettings
    hyperparameters: Mapping[str, float]
    initial_state: Mapping[str, np.ndarray] | None = None
    origins: Mapping[str, str | None] = field(default_factory=dict)
    """Digests of the teacher and of the transfer set."""

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.plan.steps_per_epoch

    def description(self) -> dict[str, Any]:
        """The run as JSON values, by which a state file knows the run that it belongs to."""
        settings = self.settings
        initial = self.initial_state
        return {
            "model": self.bundle.model_digest,
            "data": self.plan.dataset.digest,
            "initial_state": None if initial is None else digest_of_arrays(*initial.values()),
            "epochs": settings.epochs,
            "seed": settings.seed,
            "schedule": settings.schedule.kind,
            "warmup_steps": settings.schedule.warmup_steps,
            "augment": ",".join(settings.augmentations),
            "transfer_count": self.plan.transfer_count,
            "alpha_end": settings.alpha_end,
            "neighbours": self.plan.neighbours or None,
            "neighbour_scale": self.plan.neighbour_scale if self.plan.neighbours else None,
            **dict(self.hyperparameters),
            **{name: digest for name, digest in self.origins.items() if digest is not None},
        }

    def inputs(self, step: int) -> dict[str, np.ndarray]:
        """What `train_step` takes at a step, counted from 0."""
        rate = self.learning_rate(step)
        given = self.plan.inputs(step)
        given |= {name: np.array([value], np.float32) for name, value in self.hyperparameters.items()}
        given["learning_rate"] = np.array([rate], np.float32)
        if self.settings.alpha_end is not None:
            first, last = self.hyperparameters["alpha"], self.settings.alpha_end
            share = distillation_share(step, self.total_steps, first, last)
            given["alpha"] = np.array([share], np.float32)
        return {spec.name: given[spec.name] for spec in self.bundle.inputs("train_step")}

    def learning_rate(self, step: int) -> float:
        base = self.hyperparameters["learning_rate"]
        return learning_rate(step, self.total_steps, base, self.settings.schedule)


def check_seed(seed: int) -> None:
    """Errors: UsageError."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range", "give --seed 0 or more, below 2^63")


def plan_run(
    bundle: Bundle,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    teacher: TeacherOutputs | None = None,
    transfer: TransferSet | None = None,
    initial_state: Mapping[str, np.ndarray] | None = None,
    origins: Mapping[str, str | None] | None = None,
) -> Run:
    """Checks that everything fits together and makes a run of it. Errors: UsageError."""
    if settings.epochs < 1:
        raise UsageError(f"{settings.epochs} epochs", "give --epochs 1 or more")
    check_seed(settings.seed)
    if bundle.objective.needs_teacher and teacher is None:
        raise UsageError(
            f"{bundle.source}: objective {bundle.objective.name} needs a teacher",
            "pass --teacher BUNDLE[:CHECKPOINT], or export the student with --objective ce",
        )
    if teacher is not None and not bundle.objective.needs_teacher:
        raise UsageError(f"{bundle.source}: objective ce takes no teacher", "leave --teacher out")
    if transfer is not None and teacher is None:
        raise UsageError("a transfer set needs a teacher to say anything about it", "pass --teacher, too")
    check_augmentation(settings.augmentations, bundle.input.shape)
    plan = BatchPlan(
        dataset=dataset,
        batch=bundle.batch,
        seed=settings.seed,
        augmentations=settings.augmentations,
        teacher=teacher,
        transfer=transfer,
        transfer_count=0 if transfer is None else transfer_count(bundle.batch, settings.transfer_fraction),
        negatives=bundle.objective.negatives or 0,
        **_neighbourhood(bundle, settings),
    )
    _check_negatives(bundle, plan)
    hyperparameters = resolve_hyperparameters(bundle, settings.hyperparameters)
    if settings.alpha_end is not None:
        resolve_hyperparameters(bundle, {"alpha": settings.alpha_end})
    return Run(bundle, plan, settings, hyperparameters, initial_state, origins or {})


def _neighbourhood(bundle: Bundle, settings: TrainSettings) -> dict[str, int | float]:
    """Errors: UsageError for settings of `lpd` that another objective does not use, or out of range."""
    count, scale = settings.neighbours, settings.neighbour_scale
    if bundle.objective.name != "lpd":
        if count is not None or scale is not None:
            raise UsageError(
                f"{bundle.source}: objective {bundle.objective.name} knows no neighbours",
                "leave --neighbours and --neighbour-scale out, or export the student with --objective lpd",
            )
        return {}
    count, scale = NEIGHBOURS if count is None else count, NEIGHBOUR_SCALE if scale is None else scale
    if not 0 < count < bundle.batch:
        raise UsageError(
            f"{count} neighbours in a batch of {bundle.batch}", f"give --neighbours 1 to {bundle.batch - 1}"
        )
    if not 0 < scale < float("inf"):
        raise UsageError(f"a neighbour scale of {scale}", "give --neighbour-scale above 0")
    return {"neighbours": count, "neighbour_scale": scale}


def _check_negatives(bundle: Bundle, plan: BatchPlan) -> None:
    """Errors: UsageError where a batch may hold every sample, so that none is left to tell it from."""
    spare = len(plan.dataset) > plan.private_count
    if plan.transfer is not None:
        spare = spare or len(plan.transfer.images) > plan.transfer_count
    if plan.negatives and not spare:
        raise UsageError(
            f"{bundle.source}: objective crd tells the samples of a batch from others, "
            f"but one batch of {plan.batch} holds all {len(plan.dataset)}",
            "train on more samples, or export the student with a smaller --batch",
        )


def transfer_count(batch: int, fraction: float) -> int:
    """How many of a batch's samples come from the transfer set. Errors: UsageError."""
    count = round(batch * fraction)
    if not 0 < count < batch:
        raise UsageError(
            f"a transfer fraction of {fraction} gives {count} of {batch} samples a batch",
            f"give --transfer-fraction between {1 / batch:.3g} and {1 - 1 / batch:.3g}",
        )
    return count


def resolve_hyperparameters(bundle: Bundle, given: Mapping[str, float]) -> dict[str, float]:
    """The value of every hyperparameter that the bundle's step takes: the given one, else the default.

    Errors: UsageError for one that the step does not take, or a value outside its range.
    """
    defaults = {**DEFAULTS[bundle.optimizer.name], **OBJECTIVE_DEFAULTS}
    if bundle.objective.name == "crd":
        defaults["temperature"] = CONTRASTIVE_TEMPERATURE
    taken = {spec.name for spec in bundle.inputs("train_step")}
    for name, value in given.items():
        if name not in taken:
            kind = f"objective {bundle.objective.name} and optimizer {bundle.optimizer.name}"
            raise UsageError(
                f"{bundle.source}: a step with {kind} takes no {name.replace('_', ' ')}",
                f"it takes {', '.join(n for n in defaults if n in taken).replace('_', ' ')}",
            )
        low, high, open_low = _RANGES.get(name, (0.0, float("inf"), False))
        if not (low < value if open_low else low <= value) or not value <= high or value == float("inf"):
            raise UsageError(f"{name.replace('_', ' ')} {value} is out of range", f"give {low} to {high}")
    return {name: float(given.get(name, value)) for name, value in defaults.items() if name in taken}


_RANGES = {
    "alpha": (0.0, 1.0, False),
    "logit_share": (0.0, 1.0, False),
    "temperature": (0.0, float("inf"), True),
    "momentum": (0.0, 1.0, False),
    "beta1": (0.0, 1.0, False),
    "beta2": (0.0, 1.0, False),
}


def prepare(engine: Engine, run: Run, state_path: Path | None, restart: bool = False) -> int:
    """Loads the state that the run goes on from into the engine; returns how many steps it has made already.

    Errors: StateError when the file holds a run with other settings.
    """
    if state_path is not None and state_path.exists() and not restart:
        saved = load_checkpoint(state_path, run.bundle)
        check_same_run(state_path, saved, run.description())
        engine.load_state(saved.state)
        return saved.step
    engine.load_state(run.bundle.initial_state() if run.initial_state is None else run.initial_state)
    return 0


def train(
    engine: Engine,
    run: Run,
    state_path: Path | None,
    *,
    first_step: int = 0,
    checkpoint_every: int = 50,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepRecord]:
    """Makes the steps from `first_step` on and yields a record of each; checkpoints on the way, none without a path.

    `should_stop` is asked after every step. Errors: Interrupted after a last checkpoint when it says so;
    TrainingError for a loss that is not finite, with the last checkpoint untouched.
    """
    if checkpoint_every < 1:
        raise UsageError(f"a checkpoint every {checkpoint_every} steps", "give --checkpoint-every 1 or more")
    description, total = {} if state_path is None else run.description(), run.total_steps
    for step in range(first_step, total):
        inputs = run.inputs(step)
        started = time.perf_counter()
        metrics = engine.train_step(inputs)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        record = _record(run, step, inputs, metrics, elapsed_ms)
        if not np.isfinite(record.loss):
            raise TrainingError(
                f"the loss of step {record.step} is {record.loss}"
                + ("" if state_path is None else f"; {state_path} keeps the last checkpoint"),
                "train with a smaller --lr, or with --warmup-steps",
            )
        stopping = should_stop()
        due = stopping or record.step == total or record.step % checkpoint_every == 0
        if due and state_path is not None:
            save_checkpoint(state_path, Checkpoint(engine.state(), record.step, total, description))
        yield record
        if stopping and record.step < total:
            raise Interrupted(
                f"stopped after step {record.step} of {total}"
                + ("" if state_path is None else f"; {state_path} holds the state"),
                None if state_path is None else "run the same command again to go on",
            )


def _record(
    run: Run,
    step: int,
    inputs: Mapping[str, np.ndarray],
    metrics: Mapping[str, np.ndarray],
    elapsed_ms: float,
) -> StepRecord:
    labelled = inputs["label_weights"] > 0
    right = metrics["logits"].argmax(axis=1) == inputs["labels"]
    distillation = metrics.get("distillation_loss")
    return StepRecord(
        step=step + 1,
        steps=run.total_steps,
        epoch=run.plan.epoch(step) + 1,
        loss=float(metrics["loss"][0]),
        ce_loss=float(metrics["ce_loss"][0]),
        distillation_loss=None if distillation is None else float(distillation[0]),
        accuracy=float(right[labelled].mean()) if labelled.any() else None,
        learning_rate=run.learning_rate(step),
        ms=round(elapsed_ms, 3),
    )
