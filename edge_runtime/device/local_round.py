"""Steps 3 and 4 of a round as functions: train on what was published, then pack what is uploaded.

No files but the training's checkpoint, no network, no clock: a device (`device.py`) and a simulation call the same
functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device import outputs
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import (
    EXCHANGED_OUTPUTS,
    LocalResult,
    Transfer,
    own_outputs,
    parameters_of,
    train_locally,
    with_parameters,
)
from edgestill.runtime.device.participant import Work
from edgestill.runtime.device.privacy import epsilon_of_spent, noise_in_mean, privatise, spend
from edgestill.runtime.engines.registry import Engine
from edgestill.runtime.errors import StateError, UsageError
from edgestill.runtime.training.evaluation import evaluate

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

TrainLocally = Callable[..., LocalResult]
"""`train_locally`, or what a test puts in its place."""


@dataclass(frozen=True)
class Privacy:
    """Noise on what leaves the device (`edgestill.runtime.device.privacy`)."""

    clip: float
    noise_multiplier: float
    delta: float = 1e-5


@dataclass(frozen=True)
class Options:
    """What the device's owner decides; `precision` None is the task's."""

    precision: str | None = None
    privacy: Privacy | None = None
    share_class_counts: bool = True
    compress: bool = True
    compare_alone: bool = False
    """Train the student alone, too, and report how well that does."""


@dataclass(frozen=True)
class Equipment:
    """What a device takes part in a task with.

    `task`: the JSON of docs/federation.md. `tests`: `t_priv` and/or `t_uni`, which accuracy is reported on.
    """

    task: Mapping[str, Any]
    bundle: Bundle
    engine: Engine
    private: Dataset
    transfer: Transfer | None
    tests: Mapping[str, Dataset] = field(default_factory=dict)
    options: Options = Options()

    def __post_init__(self) -> None:
        if self.options.privacy is not None and self.exchange == "parameters":
            raise UsageError(
                "noise is added to latents and logits; this task exchanges parameters",
                "leave the privacy options out and start again, for which an enrolled work folder needs no other code; "
                "or join a task that exchanges latents or logits",
            )

    @property
    def exchange(self) -> str:
        return str(self.task["exchange"])

    @property
    def precision(self) -> str:
        return self.options.precision or str(self.task.get("precision", "fp32"))

    @property
    def shares_class_counts(self) -> bool:
        """Whether the owner lets them out and there is room for them in an upload."""
        return self.options.share_class_counts and self.bundle.classes <= outputs.MOST_CLASS_COUNTS

    def spend_privacy(self, spent: float | None) -> float | None:
        """What all releases have spent with one more body, `spent` without it; None: no noise bounds it."""
        if self.options.privacy is None:
            return None
        releases = 2 if self.exchange == "both" else 1
        return spend(spent, self.options.privacy.noise_multiplier, releases)


def expected_outputs(
    task: Mapping[str, Any], bundle: Bundle, transfer: Transfer | None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the task exchanges, in both directions. Errors: StateError."""
    exchange = task["exchange"]
    if exchange == "parameters":
        specs = {spec.name: spec.shape for spec in bundle.state_specs}
        return {name: specs[name] for name in parameters_of(bundle, dict.fromkeys(specs, np.zeros(0)))}
    if transfer is None:
        raise StateError(f"the task exchanges {exchange}, and has no transfer set")
    shapes = {
        "latents": (len(transfer), bundle.latent_size),
        "logits": (len(transfer), bundle.classes),
    }
    return {name: shapes[name] for name in EXCHANGED_OUTPUTS[exchange]}


def warn_of_noise(equipment: Equipment) -> str | None:
    """A sentence where the noise of a round's mean is longer than what it hides, so that students learn noise."""
    privacy, goal = equipment.options.privacy, int(equipment.task.get("goal", 1))
    if privacy is None:
        return None
    shapes = expected_outputs(equipment.task, equipment.bundle, equipment.transfer).values()
    ratio = max(noise_in_mean(privacy.noise_multiplier, rows, width, goal) for rows, width in shapes)
    if ratio <= 1:
        return None
    return (
        f"the mean of {goal} device{'s' * (goal != 1)} with this noise carries noise about {ratio:,.0f} times as long "
        "as a clipped row, and who learns from it gets worse, perhaps useless; it falls with the square root of the "
        "number of devices: more devices, a smaller alpha in the task, or less noise (docs/privacy.md)"
    )


def read_published(body: bytes, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The global outputs in a blob, which may be compressed: blobs carry no Content-Encoding. Errors: WireError."""
    encoding = "zstd" if body.startswith(_ZSTD_MAGIC) else "identity"
    return outputs.unpack(body, encoding, expected, source="global outputs")[0]


def train_round(
    equipment: Equipment,
    work: Work,
    published: Mapping[str, np.ndarray] | None,
    student: Mapping[str, np.ndarray],
    *,
    scores: Mapping[str, float | None] | None = None,
    train: TrainLocally = train_locally,
    **how: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Step 3: the trained state, and the part of the report that follows from it.

    `student`: the state between rounds; `scores`: its accuracies where they are known; `how`: `state_path`,
    `should_stop`, `on_step` of `train_locally`.
    Errors: those of `train_locally`.
    """
    bundle, engine = equipment.bundle, equipment.engine
    teacher = published
    start = dict(student)
    if equipment.exchange == "parameters":
        teacher = None
        if published is not None:
            start, scores = with_parameters(bundle, start, published), None
    engine.load_state(start)
    before = score_tests(equipment) if scores is None else dict(scores)
    result = train(
        engine,
        bundle,
        equipment.private,
        equipment.transfer if teacher is not None else None,
        teacher,
        LocalSettings.from_json(equipment.task.get("local", {})),
        work.seed,
        start,
        **{"state_path": None, **how},
    )
    engine.load_state(result.state)
    report: dict[str, Any] = {
        "engine": engine.name,
        "samples": result.samples,
        "before": before,
        "after": score_tests(equipment),
    }
    if result.step_ms is not None:
        report["step_ms"] = result.step_ms
    if equipment.shares_class_counts:
        report["class_counts"] = class_counts(equipment)
    return result.state, report


def train_alone(
    equipment: Equipment,
    work: Work,
    student: Mapping[str, np.ndarray],
    *,
    train: TrainLocally = train_locally,
    **how: Any,
) -> dict[str, np.ndarray]:
    """The same training as a round's without what others know: the trained state.

    `student`: the state that came of it in the rounds before. Errors: those of `train_locally`.
    """
    equipment.engine.load_state(student)
    settings = LocalSettings.from_json(equipment.task.get("local", {}))
    result = train(
        equipment.engine, equipment.bundle, equipment.private, None, None, settings, work.seed, dict(student),
        **{"state_path": None, **how},
    )  # fmt: skip
    return result.state


def pack_round(
    equipment: Equipment,
    state: Mapping[str, np.ndarray],
    random: np.random.Generator | None,
    privacy_spent: float | None,
) -> tuple[outputs.Packed, dict[str, Any]]:
    """Step 4: the body, and the part of the report that follows from it.

    `random` makes the noise of privacy, where it is asked for: seeded by the operating system, or it protects
    nobody. `privacy_spent`: by all bodies that the device has released, this one included. Without privacy the same
    state gives the same bytes. Errors: WireError, TrainingError, UsageError.
    """
    options, privacy = equipment.options, equipment.options.privacy
    equipment.engine.load_state(state)
    own = own_outputs(equipment.engine, equipment.bundle, equipment.transfer, equipment.exchange)
    report: dict[str, Any] = {"epsilon": None}
    if privacy is not None:
        random = np.random.default_rng() if random is None else random
        own = {
            name: privatise(array, privacy.clip, privacy.noise_multiplier, random)
            for name, array in own.items()
        }
        if privacy_spent is not None:
            report["epsilon"] = epsilon_of_spent(privacy_spent, privacy.delta)
    metadata = {"samples": str(len(equipment.private))}
    if equipment.shares_class_counts:
        metadata["class_counts"] = json.dumps(class_counts(equipment), separators=(",", ":"))
    packed = outputs.pack(own, equipment.precision, metadata, options.compress)
    report |= {"max_error": max(packed.max_error.values(), default=None), "bytes_up": len(packed.body)}
    return packed, report


def class_counts(equipment: Equipment) -> list[int]:
    """Private samples of each class."""
    counts = np.bincount(equipment.private.labels, minlength=equipment.bundle.classes)
    return [int(count) for count in counts]


def score_tests(equipment: Equipment) -> dict[str, float | None]:
    """Accuracy on each test, and the mean loss on the first of them, of the engine's present state."""
    bundle = equipment.bundle
    scores: dict[str, float | None] = {"t_priv": None, "t_uni": None, "loss": None}
    for name, dataset in equipment.tests.items():
        found = evaluate(equipment.engine, dataset, bundle.batch, bundle.classes)
        scores[name] = found.accuracy
        if scores["loss"] is None and math.isfinite(found.loss):
            scores["loss"] = found.loss
    return scores
