"""The protocol that the experiments on one device share: what a run is, in full or quick, and one student's run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.benchmarks.experiments.devices import deal_device
from edgestill.benchmarks.experiments.exports import ENGINE, export_cached
from edgestill.benchmarks.experiments.grid import Cell, Context, Options, Stage
from edgestill.benchmarks.experiments.sources import load_data
from edgestill.benchmarks.experiments.states import KeptAs, keep_state
from edgestill.benchmarks.experiments.teachers import (
    score_teacher,
    stock_outputs,
    train_to_the_end,
    transfer_set,
)
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.training.checkpoint import Checkpoint
from edgestill.runtime.training.evaluation import evaluate
from edgestill.runtime.training.plan import TrainSettings, plan
from edgestill.runtime.training.schedule import Schedule
from edgestill.simulation.bundles import BundleRequest

TEACHER_CPU_MINUTES = 32.0
LEAST_STEPS = 400


def epochs_for(samples: int, options: Options) -> int:
    """The usual epochs, or in full as many as make LEAST_STEPS steps: few images would be left half learnt."""
    base = base_settings(options)
    if options.quick:
        return base["epochs"]
    return max(base["epochs"], math.ceil(LEAST_STEPS / math.ceil(samples / base["batch"])))


def student_cpu_minutes(samples: int, epochs: int | None = None) -> float:
    """Minutes of one core of a full-width student's run: 70 ms a step on one of two busy cores of an AMD EPYC."""
    steps = samples / 32 * 12 if epochs is None else samples / 32 * epochs
    return (max(steps, LEAST_STEPS) * 0.07 + 2) / 60


def teacher_stage(experiment: str, options: Options) -> Stage:
    """A stage of one run: the teacher, trained while nothing else runs."""
    settings = {name: base_settings(options)[name] for name in ("data", "division", "teacher")}
    return lambda records: [Cell(experiment, {"stage": "teacher", **settings})]


def make_run(settings: Mapping[str, Any], context: Context, keep_as: KeptAs | None = None) -> dict[str, Any]:
    """One run, of the teacher where `stage` says so, else of a student."""
    if settings.get("stage") == "teacher":
        return score_teacher(settings, context)
    return train_student(settings, context, keep_as)


def base_settings(options: Options) -> dict[str, Any]:
    """What all runs of an experiment have in common, quick or in full; docs/experiments.md explains the values."""
    common = {"data": options.data, "student": "cnn3", "latent_size": 128, "batch": 32, "learning_rate": 1e-3,
              "augmentations": ["flip"]}  # fmt: skip
    if options.quick:
        return common | {
            "widths": [8, 16, 16],
            "latent_size": 32,
            "epochs": 20,
            "tests": 200,
            "validation_tests": 100,
            "division": {"teacher": 1200, "validation": 200},
            "teacher": {"student": "cnn4", "widths": [8, 16, 32, 32], "latent_size": 32, "epochs": 10,
                        "batch": 64, "learning_rate": 2e-3, "seed": 0},
        }  # fmt: skip
    return common | {
        "widths": None,
        "epochs": 12,
        "tests": 1000,
        "validation_tests": 500,
        "division": {"teacher": 20000, "validation": 2000},
        "teacher": {"student": "cnn4", "widths": [64, 128, 256, 256], "latent_size": 128, "epochs": 12,
                    "batch": 64, "learning_rate": 2e-3, "seed": 0},
    }  # fmt: skip


def train_student(
    settings: Mapping[str, Any], context: Context, keep_as: KeptAs | None = None
) -> dict[str, Any]:
    """One run: a device's student trained as `settings` say; its accuracies `priv` and `uni` and how it was trained.

    With `keep_as` and a folder for states, the final state is written there.
    """
    splits = load_data(context.data)
    device = deal_device(splits, settings)
    dataset = splits.train.select(device.private)
    with ExitStack() as stack:
        path = export_student(settings, context)
        bundle = stack.enter_context(Bundle.open(path))
        teacher, transfer = None, None
        if bundle.objective.needs_teacher:
            teacher = stock_outputs(settings, context, bundle).take(device.private)
        if settings.get("transfer_samples"):
            transfer = transfer_set(settings, context, bundle)
        run = plan(
            bundle,
            dataset,
            TrainSettings(
                epochs=settings["epochs"],
                seed=settings["seed"],
                schedule=Schedule("cosine"),
                hyperparameters={
                    "learning_rate": settings["learning_rate"],
                    "weight_decay": 0.0,
                    **settings.get("hyperparameters", {}),
                },
                transfer_fraction=settings.get("transfer_fraction", 0.5),
                alpha_end=settings.get("alpha_end"),
                augmentations=tuple(settings["augmentations"]),
            ),
            teacher=teacher,
            transfer=transfer,
        )
        engine = open_engine(bundle, ENGINE, threads=1)
        stack.callback(engine.close)
        loss = train_to_the_end(engine, run)
        result = {
            "priv": evaluate(engine, device.priv, bundle.batch, bundle.classes).accuracy,
            "uni": evaluate(engine, device.uni, bundle.batch, bundle.classes).accuracy,
            "priv_samples": len(device.priv),
            "uni_samples": len(device.uni),
            "last_loss": loss,
            "steps": run.total_steps,
            "class_counts": np.bincount(dataset.labels, minlength=bundle.classes).tolist(),
        }
        if keep_as is not None and context.keep_states is not None:
            final = Checkpoint(engine.state(), run.total_steps, run.total_steps, run.description())
            keep_state(context.keep_states, keep_as, path, final)
    return result


def export_student(settings: Mapping[str, Any], context: Context) -> Path:
    """The bundle of a run, from the cache or exported; its initial weights follow the run's seed."""
    options = list(settings.get("export_options", ()))
    if settings.get("widths"):
        options += ["--widths", ",".join(map(str, settings["widths"]))]
    request = BundleRequest(
        settings["student"], settings["batch"], settings["latent_size"], settings["objective"], "adamw",
        tuple(options))  # fmt: skip
    return export_cached(request, context.cache / "bundles", settings["seed"])
