"""A run's state file: the state's tensors, and in the metadata how far which run has come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.classes import KnownClasses, join_names, names_as_metadata, names_in_metadata
from edgestill.runtime.errors import StateError, TrainingError, UsageError

FORMAT = "edgestill-state"


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` of `total_steps` steps of the run that `run` describes."""

    state: Mapping[str, np.ndarray]
    step: int
    total_steps: int
    run: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    """What the outputs mean, in their order; empty where nobody said."""
    first_losses: tuple[float, float] | None = None
    """Cross-entropy and distillation loss of the first step, by which divergence is told (divergence.py)."""

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes atomically; nothing in the file depends on the clock, so equal runs give equal bytes.

    Errors: TrainingError instead of writing a state that is not finite; WireError when the disk refuses.
    """
    for name, array in checkpoint.state.items():
        if not np.isfinite(array).all():
            raise TrainingError(
                f"after step {checkpoint.step} {name!r} is not finite",
                "train with a smaller --lr, or with --warmup-steps",
                f"; {path} is left as it was" if path.exists() else "",
            )
    progress: dict[str, Any] = {"step": checkpoint.step, "total_steps": checkpoint.total_steps}
    if checkpoint.first_losses is not None:
        progress["first_losses"] = list(checkpoint.first_losses)
    metadata = {
        "format": FORMAT,
        "progress": json.dumps(progress),
        "run": json.dumps(checkpoint.run, sort_keys=True),
        **names_as_metadata(checkpoint.class_names),
    }
    wire.save(path, checkpoint.state, metadata)


def load_checkpoint(path: Path, bundle: Bundle) -> Checkpoint:
    """Errors: StateError when the file is of no run, or of another bundle; WireError when it is damaged."""
    file = wire.load(path)
    try:
        if file.metadata["format"] != FORMAT:
            raise ValueError(file.metadata["format"])
        progress, run = json.loads(file.metadata["progress"]), json.loads(file.metadata["run"])
        step, total_steps = int(progress["step"]), int(progress["total_steps"])
        if not 0 <= step <= total_steps:
            raise ValueError("step")
        if not isinstance(run, dict):
            raise ValueError("run")
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise StateError(
            f"{path} exists and is not the state of a training run",
            "pass --restart to overwrite it, or --init to start from it and another --state",
        ) from error
    state = bundle.check_state(file.arrays, source=str(path))
    names = names_in_metadata(file.metadata)
    return Checkpoint(state, step, total_steps, run, names, _first_losses_in(progress))


def load_first_losses(path: Path) -> tuple[float, float] | None:
    """Those of a checkpoint; None where it does not say. Errors: WireError when it is damaged."""
    try:
        return _first_losses_in(json.loads(wire.load(path).metadata["progress"]))
    except (KeyError, ValueError):
        return None


def _first_losses_in(progress: Any) -> tuple[float, float] | None:
    try:
        ce_loss, distillation_loss = map(float, progress["first_losses"])
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return (ce_loss, distillation_loss) if np.isfinite((ce_loss, distillation_loss)).all() else None


def load_state(path: Path, bundle: Bundle) -> dict[str, np.ndarray]:
    """The tensors of any state file that fits the bundle. Errors: UsageError for no file, StateError, WireError."""
    return load_named_state(path, bundle)[0]


def load_named_state(path: Path, bundle: Bundle) -> tuple[dict[str, np.ndarray], KnownClasses]:
    """`load_state`, and what the outputs mean: as the file says, else as the bundle does, or nothing."""
    if not path.exists():
        raise UsageError(f"{path}: no such state", "give a file that `edgestill train` wrote with --state")
    file = wire.load(path)
    named = KnownClasses(names_in_metadata(file.metadata), f"the state {path}")
    return bundle.check_state(file.arrays, source=str(path)), named or classes_of(bundle)


def classes_of(bundle: Bundle) -> KnownClasses:
    """What the outputs of a bundle's student mean, as far as it says."""
    return KnownClasses(bundle.class_names, f"the bundle {bundle.source}")


def check_same_run(path: Path, saved: Checkpoint, run: Mapping[str, Any]) -> None:
    """Errors: StateError naming the settings in which a saved run differs from the one that is asked for."""
    names = sorted(name for name in {*saved.run, *run} if saved.run.get(name) != run.get(name))
    if names:
        changes = ", ".join(
            f"{name} {_short(saved.run.get(name))} → {_short(run.get(name))}" for name in names[:4]
        )
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        word = "a finished run" if saved.finished else f"a run at step {saved.step}"
        raise StateError(
            f"{path} holds {word} with other settings: {changes}{more}",
            "pass --restart to start anew, or another --state (with --init to go on from this one)",
        )


def check_same_classes(path: Path, saved: Sequence[str], wanted: Sequence[str]) -> None:
    """Errors: StateError where both name what the outputs mean, and not alike."""
    if saved and wanted and tuple(saved) != tuple(wanted):
        raise StateError(
            f"{path}: its outputs mean {join_names(saved)}; here they would mean {join_names(wanted)}",
            "give data and a bundle with the classes of that state; or, to train its outputs for other classes, start "
            "a new --state from it with --init and --new-classes",
        )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text
