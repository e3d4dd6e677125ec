"""The teachers of the experiments on one device: trained once for what decides them, kept with their outputs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.benchmarks.experiments.devices import divide
from edgestill.benchmarks.experiments.exports import ENGINE, export_cached
from edgestill.benchmarks.experiments.grid import Context
from edgestill.benchmarks.experiments.locks import locked
from edgestill.benchmarks.experiments.sources import load_data, load_transfer
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import digest_of_arrays
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.errors import UsageError
from edgestill.runtime.randomness import HELD_OUT, permutation
from edgestill.runtime.training.batches import TransferSet
from edgestill.runtime.training.evaluation import evaluate
from edgestill.runtime.training.plan import Run, TrainSettings, plan
from edgestill.runtime.training.schedule import Schedule
from edgestill.runtime.training.teacher import Teacher, TeacherOutputs
from edgestill.runtime.training.trainer import prepare, train
from edgestill.simulation.bundles import BundleRequest

TEACHER_THREADS = 1
"""As students have: sums over more threads come in another order on another machine."""


def stock_outputs(settings: Mapping[str, Any], context: Context, student: Bundle) -> TeacherOutputs:
    """The teacher's outputs with a row for every image of the training split; those of the stock are filled."""
    splits = load_data(context.data)
    stock = divide(splits.train.labels, **settings["division"]).stock
    outputs = _teacher_outputs(settings, context, student, splits.train.images[stock])
    everything = TeacherOutputs.zeros(len(splits.train), outputs.latents.shape[1], outputs.logits.shape[1])
    everything.latents[stock], everything.logits[stock] = outputs.latents, outputs.logits
    return everything


def transfer_set(settings: Mapping[str, Any], context: Context, student: Bundle) -> TransferSet:
    """The first `transfer_samples` auxiliary images in an order of their own, with the teacher's outputs on them.

    Errors: UsageError where there are fewer.
    """
    images = load_transfer(context.transfer)
    if settings["transfer_samples"] > len(images):
        raise UsageError(
            f"{context.transfer}: {len(images)} images, the experiment takes up to {settings['transfer_samples']}",
            "give --transfer with more images, such as CIFAR-100's",
        )
    outputs = _teacher_outputs(settings, context, student, images)
    chosen = permutation(0, HELD_OUT, 0, len(images))[: settings["transfer_samples"]]
    return TransferSet(images[chosen], outputs.take(chosen))


def _teacher_outputs(
    settings: Mapping[str, Any], context: Context, student: Bundle, images: np.ndarray
) -> TeacherOutputs:
    bundle, state = prepare_teacher(settings, context)
    digest = digest_of_arrays(images)
    cache = state.with_name(f"{state.stem}-{digest[:16]}.outputs.safetensors")
    with locked(cache.with_suffix(".lock")):
        teacher = Teacher(f"{bundle}:{state}", student, ENGINE, 1)
        try:
            return teacher.outputs(images, digest, cache)
        finally:
            teacher.close()


def prepare_teacher(settings: Mapping[str, Any], context: Context) -> tuple[Path, Path]:
    """Bundle and state file of the teacher, from the cache or trained now, which can take long."""
    described = {name: settings[name] for name in ("data", "division", "teacher")}
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    state = context.cache / "teachers" / f"{key}.safetensors"
    request, seed = _teacher_request(settings["teacher"]), settings["teacher"]["seed"]
    bundle = export_cached(request, context.cache / "bundles", seed)
    with locked(state.with_suffix(".lock")):
        if not state.exists():
            _train_teacher(settings, context, bundle, state)
    return bundle, state


def _teacher_request(teacher: Mapping[str, Any]) -> BundleRequest:
    options = ["--widths", ",".join(map(str, teacher["widths"]))]
    if "of_latent_size" in teacher:
        options += ["--freeze", "perception"]
    return BundleRequest(
        teacher["student"], teacher["batch"], teacher["latent_size"], "ce", "adamw", tuple(options)
    )


def _train_teacher(settings: Mapping[str, Any], context: Context, path: Path, state: Path) -> None:
    """Trains with flips, crops and a cosine schedule on the teacher's images.

    With `of_latent_size` only the representation and the output layer, on the perception module of the teacher with
    that latent size.
    """
    teacher = settings["teacher"]
    splits = load_data(context.data)
    dataset = splits.train.select(divide(splits.train.labels, **settings["division"]).teacher)
    with ExitStack() as stack:
        bundle = stack.enter_context(Bundle.open(path))
        initial = dict(bundle.initial_state())
        if "of_latent_size" in teacher:
            base = {
                name: value
                for name, value in teacher.items()
                if name not in ("of_latent_size", "base_epochs")
            }
            base |= {"latent_size": teacher["of_latent_size"], "epochs": teacher["base_epochs"]}
            trained = wire.load(prepare_teacher({**settings, "teacher": base}, context)[1]).arrays
            initial |= {name: array for name, array in trained.items() if name.startswith("perception.")}
        run = plan(
            bundle,
            dataset,
            TrainSettings(
                epochs=teacher["epochs"],
                seed=teacher["seed"],
                schedule=Schedule("cosine"),
                hyperparameters={"learning_rate": teacher["learning_rate"], "weight_decay": 0.01},
                augmentations=("flip", "crop"),
            ),
            initial_state=initial,
        )
        engine = open_engine(bundle, ENGINE, TEACHER_THREADS)
        stack.callback(engine.close)
        # named by the model: one that was exported by other code starts anew
        partial = state.with_name(f"{state.stem}-{bundle.model_digest[:16]}.unfinished")
        state.parent.mkdir(parents=True, exist_ok=True)
        _tell(teacher, f"{teacher['epochs']} epochs of {run.plan.steps_per_epoch} steps")
        train_to_the_end(
            engine, run, partial, lambda epoch: _tell(teacher, f"epoch {epoch} of {teacher['epochs']}")
        )
        partial.rename(state)


def _tell(teacher: Mapping[str, Any], what: str) -> None:
    print(f"reproduce: teacher with latents of {teacher['latent_size']}: {what}", file=sys.stderr, flush=True)


def score_teacher(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Trains the teacher if need be; its accuracy on all test images and the digest of its state."""
    path, state = prepare_teacher(settings, context)
    splits = load_data(context.data)
    arrays = wire.load(state).arrays
    with Bundle.open(path) as bundle:
        engine = open_engine(bundle, ENGINE, TEACHER_THREADS)
        try:
            engine.load_state(bundle.check_state(arrays, source=str(state)))
            accuracy = evaluate(engine, splits.test, bundle.batch, bundle.classes).accuracy
        finally:
            engine.close()
    return {"uni": accuracy, "digest": digest_of_arrays(*(arrays[name] for name in sorted(arrays)))}


def train_to_the_end(
    engine: Engine, run: Run, state: Path | None = None, on_epoch: Callable[[int], None] = lambda epoch: None
) -> float:
    """Trains what is left of the run; the mean loss of the last epoch made, NaN if none was.

    With `state` there are checkpoints, and an unfinished run in that file goes on. `on_epoch` hears of each epoch.
    """
    losses: deque[float] = deque(maxlen=run.plan.steps_per_epoch)
    first_step = prepare(engine, run, state)
    for record in train(engine, run, state, first_step=first_step, checkpoint_every=100):
        losses.append(record.loss)
        if record.step % run.plan.steps_per_epoch == 0:
            on_epoch(record.epoch)
    return float(np.mean(losses)) if losses else float("nan")
