"""The local training loop: steps on an engine, checkpoints that survive a kill, and resuming bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.engines.registry import Engine
from edgestill.runtime.errors import Interrupted, TrainingError
from edgestill.runtime.training.checkpoint import (
    Checkpoint,
    check_same_classes,
    check_same_run,
    load_checkpoint,
    load_first_losses,
    save_checkpoint,
)
from edgestill.runtime.training.divergence import Growth
from edgestill.runtime.training.hyperparameters import CHECKPOINT_EVERY
from edgestill.runtime.training.plan import Run


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


def prepare(engine: Engine, run: Run, state_path: Path | None, restart: bool = False) -> int:
    """Loads the state that the run goes on from into the engine; returns how many steps it has made already.

    Errors: StateError when the file holds a run with other settings.
    """
    if state_path is not None and state_path.exists() and not restart:
        saved = load_checkpoint(state_path, run.bundle)
        check_same_run(state_path, saved, run.description())
        check_same_classes(state_path, saved.class_names, run.class_names)
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
    checkpoint_every: int = int(CHECKPOINT_EVERY.default),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepRecord]:
    """Makes the steps from `first_step` on and yields a record of each; checkpoints on the way, none without a path.

    `should_stop` is asked after every step. Errors: Interrupted after a last checkpoint when it says so;
    TrainingError for a loss that is not finite and for a run that has diverged (divergence.py), with the last
    checkpoint untouched.
    """
    CHECKPOINT_EVERY.check("--checkpoint-every", checkpoint_every)
    description, total = {} if state_path is None else run.description(), run.total_steps
    initial_state = run.bundle.initial_state() if run.initial_state is None else run.initial_state
    first_losses = None if state_path is None or not first_step else load_first_losses(state_path)
    growth, kept = Growth(run.bundle, initial_state, first_losses), first_step
    for step in range(first_step, total):
        inputs = run.inputs(step)
        started = time.perf_counter()
        metrics = engine.train_step(inputs)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        record = _record(run, step, inputs, metrics, elapsed_ms)
        if not np.isfinite(record.loss):
            raise _diverged(f"the loss of step {record.step} is {record.loss}", state_path, kept)
        if record.distillation_loss is None:
            growth.add(record.ce_loss)
        else:
            growth.add(record.ce_loss, record.distillation_loss, float(inputs["alpha"][0]))
        stopping = should_stop()
        due = stopping or record.step == total or record.step % checkpoint_every == 0
        if due and (state_path is not None or record.step == total):
            state = engine.state()
            if (how := growth.judge(state, record.step == total)) is not None:
                raise _diverged(f"the run has diverged by step {record.step}: {how}", state_path, kept)
            if state_path is not None:
                checkpoint = Checkpoint(
                    state, record.step, total, description, run.class_names, growth.first_losses
                )
                save_checkpoint(state_path, checkpoint)
                kept = record.step
        yield record
        if stopping and record.step < total:
            raise Interrupted(
                f"stopped after step {record.step} of {total}"
                + ("" if state_path is None else f"; {state_path} holds the state"),
                None if state_path is None else "run the same command again to go on",
            )


def _diverged(what: str, state_path: Path | None, kept: int) -> TrainingError:
    """`kept`: the step whose state the file holds; 0 where this run has written none."""
    where = f"; {state_path} keeps the state of step {kept}" if state_path is not None and kept else ""
    return TrainingError(what, "train with a smaller learning rate, or with warm-up steps", where)


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
