"""What a simulation is asked to do, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edgestill.coordinator.task.creation import DISTIL, LOCAL, ROUNDS
from edgestill.coordinator.task.task import EXCHANGES, MODES, RULES
from edgestill.runtime.device.local_round import Privacy
from edgestill.runtime.errors import UsageError
from edgestill.runtime.machine import cores
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS, TRANSFER_FRACTION

TRANSFER = "cifar10-transfer-mini"
"""The shipped transfer set: other images of the classes of `cifar10-mini`."""
ATTACKS = ("scale", "shuffle", "random")
OBJECTIVES = {"latents": "lkd", "logits": "kd", "both": "both", "parameters": "ce"}
"""What students are trained with by default, so that what is exchanged can be their teacher."""


@dataclass(frozen=True)
class Poison:
    """A share of the devices that always upload spoiled outputs."""

    share: float
    attack: str

    @classmethod
    def parse(cls, text: str) -> Poison:
        """`0.2:scale` as 20 % of the devices with attack `scale`. Errors: UsageError."""
        share, _, attack = text.partition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1 or attack not in ATTACKS:
            raise UsageError(
                f"--poison {text!r}", f"give a share and an attack, one of {', '.join(ATTACKS)}: 0.2:scale"
            )
        return cls(value, attack)


@dataclass(frozen=True)
class SimulationSettings:
    """One simulation; together with the data and the bundles these values decide every result.

    `workers`, `ray` and `work_dir` alone change nothing but how long it takes.
    """

    devices: int = 8
    rounds: int = ROUNDS
    gamma: float = 0.5
    by_user: bool = False
    """Every device is one of the users that the data name; gamma says nothing then."""
    students: tuple[str, ...] = ("cnn3",)
    global_student: str | None = None
    """None: the last of `students`."""
    bundles: tuple[Path, ...] = ()
    """Exported bundles to use instead of exporting `students`."""
    global_bundle: Path | None = None
    width_divisor: int = 4
    latent_size: int = 128
    batch: int = 32
    objective: str | None = None
    """Of exported students; None: by what is exchanged."""
    optimizer: str = "adamw"
    common_head: bool | None = None
    """Of exported students; None: unless parameters are exchanged."""
    exchange: str = "latents"
    mode: str = "global"
    aggregation: str = "mean"
    align: bool = False
    screen: bool = False
    clip: float | str | None = None
    trim: float = 0.2
    byzantine: float = 0.2
    precision: str = "fp16"
    goal: int | None = None
    """None: as many as are expected to come through, from availability and dropout."""
    minimum: int | None = None
    """None: half of the goal."""
    deadline_s: float = 600.0
    availability: float = 1.0
    dropout: float = 0.0
    poison: Poison | None = None
    data: str = "cifar10-mini"
    transfer: str = TRANSFER
    transfer_count: int = 600
    transfer_labels: bool | None = None
    """Whether the coordinator knows the classes of the transfer set, which devices never do; None: of the shipped."""
    validation: str | None = None
    """What the best round of a global model is chosen by; None: the shipped transfer set's own, "" nothing."""
    resize: bool = False
    skip_broken: bool = False
    """Of images in folders."""
    test_samples: int = 200
    """Of a device's T_priv, and of its T_uni."""
    noise_multiplier: float | None = None
    """Of the devices' differential privacy; None: no privacy."""
    privacy_clip: float = 1.0
    """The norm that private outputs are shortened to, a row."""
    local_epochs: int = LOCAL["epochs"]
    learning_rate: float | None = None
    weight_decay: float | None = None
    alpha: float | None = LOCAL["alpha"]
    transfer_fraction: float = TRANSFER_FRACTION.default
    augment: str | None = None
    distil_epochs: int = DISTIL["epochs"]
    distil_learning_rate: float | None = None
    """Of these, None is the default of `edgestill task create`."""
    local_only: bool = True
    seed: int = 0
    workers: int | None = None
    """None: one a core, and no more than devices."""
    ray: bool = False

    def __post_init__(self) -> None:
        counts = ("devices", "rounds", "width_divisor", "latent_size", "batch", "local_epochs",
                  "distil_epochs", "transfer_count", "test_samples", "workers")  # fmt: skip
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{_option(name)} {getattr(self, name)}", "give 1 or more")
        for name in ("availability", "trim", "byzantine"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{_option(name)} {getattr(self, name)}", "give a share between 0 and 1")
        for name in ("learning_rate", "weight_decay", "alpha", "distil_learning_rate"):
            if (value := getattr(self, name)) is not None:
                HYPERPARAMETERS[name.removeprefix("distil_")].check(_option(name), value)
        TRANSFER_FRACTION.check("--transfer-fraction", self.transfer_fraction)
        if not (0 <= (self.noise_multiplier or 0) < math.inf and 0 < self.privacy_clip < math.inf):
            raise UsageError(
                f"--noise-multiplier {self.noise_multiplier} with --privacy-clip {self.privacy_clip}",
                "give a finite multiplier from 0 up, and a finite norm above 0",
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout}", "give a share of at least 0, below 1")
        if self.availability == 0:
            raise UsageError("--availability 0", "some devices must be there")
        for name, known in (("exchange", EXCHANGES), ("mode", MODES), ("aggregation", RULES)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{_option(name)} {getattr(self, name)!r}", f"give one of {', '.join(known)}"
                )
        if self.exchange == "parameters" and self.number_of_students != 1:
            raise UsageError(
                f"--exchange parameters with {self.number_of_students} different students",
                "parameters can be averaged between equal students only: give one",
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}", "give 0 or more, below 2^63")
        if not 1 <= self.minimum_uploads <= self.goal_uploads:
            raise UsageError(
                f"--minimum {self.minimum_uploads} with a goal of {self.goal_uploads} uploads",
                "give a minimum of at least 1 and at most the goal",
            )

    @property
    def processes(self) -> int:
        """Workers that train."""
        return self.workers or min(cores(), self.devices)

    @property
    def labelled(self) -> bool:
        return self.transfer == TRANSFER if self.transfer_labels is None else self.transfer_labels

    @property
    def validation_source(self) -> str | None:
        if not self.distils and self.exchange != "parameters":
            return None
        if self.validation is None:
            return TRANSFER if self.transfer == TRANSFER and self.labelled else None
        return self.validation or None

    @property
    def exports_common_head(self) -> bool:
        return self.exchange != "parameters" if self.common_head is None else self.common_head

    @property
    def number_of_students(self) -> int:
        return len(self.bundles) or len(self.students)

    @property
    def exported_objective(self) -> str:
        return self.objective or OBJECTIVES[self.exchange]

    @property
    def distils(self) -> bool:
        """Whether the coordinator trains a global student of its own."""
        return self.mode == "global" and self.exchange != "parameters"

    @property
    def privacy(self) -> Privacy | None:
        """What every device protects its uploads with."""
        if self.noise_multiplier is None:
            return None
        return Privacy(self.privacy_clip, self.noise_multiplier)

    @property
    def goal_uploads(self) -> int:
        if self.goal is not None:
            return self.goal
        return max(1, math.floor(self.devices * self.availability * (1 - self.dropout)))

    @property
    def minimum_uploads(self) -> int:
        return max(1, self.goal_uploads // 2) if self.minimum is None else self.minimum

    @property
    def over_selection(self) -> float:
        """As many more than the goal as are expected to drop out."""
        return 1 / (1 - self.dropout)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
