"""The hyperparameters of a training: one table of defaults, ranges and units, for every command and every party."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.errors import UsageError
from edgestill.runtime.fields import Node


@dataclass(frozen=True)
class Hyperparameter:
    """One number of a training: its default, its range and its unit.

    `instead`: the default with another optimizer or objective, by its name. `above` and `below` leave the range's ends
    out. `enters`: the input of the step through which it acts, where that has another name.
    """

    default: float
    low: float
    high: float
    unit: str
    about: str
    instead: Mapping[str, float] = field(default_factory=dict)
    above: bool = False
    below: bool = False
    whole: bool = False
    enters: str | None = None

    def allows(self, value: Any) -> bool:
        """Whether it is a number within the range; NaN is nowhere."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.whole and value != math.floor(value):
            return False
        inside = self.low < value if self.above else self.low <= value
        return inside and (value < self.high if self.below else value <= self.high)

    @property
    def range(self) -> str:
        """In words, as an error's hint has it."""
        return f"{'above ' * self.above}{_shown(self.low)} to {'below ' * self.below}{_shown(self.high)}"

    @property
    def help(self) -> str:
        """Its meaning with the defaults, for an option's help."""
        others = "".join(f"; {name}: {value:g}" for name, value in self.instead.items())
        return f"{self.about} ({_shown(self.default)}{others})"

    def check(self, name: str, value: float) -> float:
        """The value itself. Errors: UsageError, which calls it `name`."""
        if not self.allows(value):
            raise UsageError(f"{name} {value} is out of range", f"give {self.range}")
        return value

    def read(self, node: Node) -> float:
        """A field of a task. Errors: UsageError naming it, its value and the range."""
        if not self.allows(node.value) or (self.whole and not isinstance(node.value, int)):
            raise node.error(f"a {'whole ' * self.whole}number from {self.range}")
        return int(node.value) if self.whole else float(node.value)


def _shown(number: float) -> str:
    return str(int(number)) if number == math.floor(number) else f"{number:g}"


HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "learning_rate": Hyperparameter(0.01, 0, 1000, "1", "learning rate", {"adamw": 0.001}),
    "momentum": Hyperparameter(0.9, 0, 1, "1", "for sgd", below=True),
    "weight_decay": Hyperparameter(0, 0, 1000, "1", "L2 for sgd, decoupled for adamw", {"adamw": 0.01}),
    "beta1": Hyperparameter(0.9, 0, 1, "1", "for adamw", below=True),
    "beta2": Hyperparameter(0.999, 0, 1, "1", "for adamw", below=True),
    "epsilon": Hyperparameter(1e-8, 0, 1, "1", "for adamw"),
    "clip_norm": Hyperparameter(
        1, 0, 1e6, "norm", "for bundles exported with --clip-gradients: largest norm of all gradients together",
        above=True,
    ),
    "alpha": Hyperparameter(0.5, 0, 1, "share of the loss", "share of the distillation term"),
    "logit_share": Hyperparameter(
        0.5, 0, 1, "share of the distillation term", "share of the logits in the distillation term, for both"
    ),
    "temperature": Hyperparameter(
        4, 0, 1000, "1", "for kd and both with the KL divergence, for crd", {"crd": 0.07}, above=True
    ),
    "neighbours": Hyperparameter(
        5, 1, 100_000, "samples", "for lpd: neighbours of a sample within its batch",
        whole=True, enters="neighbour_weights",
    ),
    "neighbour_scale": Hyperparameter(
        1, 0, 1000, "root mean squared distances between neighbours", "for lpd: width of the neighbours' weights",
        above=True, enters="neighbour_weights",
    ),
}  # fmt: skip
"""What the steps of bundles take, by name."""

EPOCHS = Hyperparameter(1, 1, 1_000_000, "passes over the data", "passes over the data", whole=True)
TRANSFER_FRACTION = Hyperparameter(
    0.5, 0, 1, "share of a batch", "share of transfer samples in a batch", above=True, below=True
)
HOLDOUT = 0.1
"""Share of every class that tests a run on data without a test split."""
CHECKPOINT_EVERY = Hyperparameter(50, 1, 1_000_000, "steps", "how often the state is written", whole=True)
"""The same for what a run takes with every bundle."""


_Fields = make_dataclass(
    "_Fields",
    [("epochs", int, int(EPOCHS.default)), *((name, float | None, None) for name in HYPERPARAMETERS)],
    frozen=True,
)


class TrainingSettings(_Fields):
    """What a task says of a training, of its devices or in step 5: `epochs`, and every hyperparameter of the table, of
    which None is the default of each student's own step.

    What a student's step does not take (momentum with AdamW, temperature without KL divergence) is not used for it.
    """

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Those that are given."""
        named = ((name, getattr(self, name)) for name in HYPERPARAMETERS)
        return {name: value for name, value in named if value is not None}


def read_training(node: Node) -> dict[str, Any]:
    """The fields of `TrainingSettings` from a task's JSON. Errors: UsageError naming field, value and range."""
    given = {name: node.optional(name, row.read) for name, row in HYPERPARAMETERS.items()}
    return {"epochs": EPOCHS.read(node.get("epochs", int(EPOCHS.default))), **given}


def default(name: str, *kinds: str) -> float:
    """The default of a hyperparameter for a step of these kinds: names of an objective and an optimizer."""
    row = HYPERPARAMETERS[name]
    return next((row.instead[kind] for kind in kinds if kind in row.instead), row.default)


def taken_by(bundle: Bundle, given: Mapping[str, float]) -> dict[str, float]:
    """Of the given hyperparameters those that act in the bundle's step: a task's are for students of several kinds."""
    inputs = {spec.name for spec in bundle.inputs("train_step")}
    return {name: value for name, value in given.items() if (HYPERPARAMETERS[name].enters or name) in inputs}


def resolve(bundle: Bundle, given: Mapping[str, float]) -> dict[str, float]:
    """The value of every hyperparameter that acts in the bundle's step: the given one, else its default.

    Errors: UsageError for one that does not act in it, or a value outside its range.
    """
    kinds = (bundle.objective.name, bundle.optimizer.name)
    defaults = taken_by(bundle, {name: default(name, *kinds) for name in HYPERPARAMETERS})
    for name, value in given.items():
        if name not in HYPERPARAMETERS:
            raise UsageError(
                f"no hyperparameter is called {name!r}", f"there are {', '.join(HYPERPARAMETERS)}"
            )
        if name not in defaults:
            kind = f"objective {bundle.objective.name} and optimizer {bundle.optimizer.name}"
            raise UsageError(
                f"{bundle.source}: a step with {kind} takes no {name.replace('_', ' ')}",
                "export the student again with --clip-gradients"
                if name == "clip_norm"
                else f"it takes {', '.join(defaults).replace('_', ' ')}",
            )
        HYPERPARAMETERS[name].check(name.replace("_", " "), value)
    return {name: float(given.get(name, value)) for name, value in defaults.items()}
