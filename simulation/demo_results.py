"""What a demo came to: its devices, its rounds, and how that stands to what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class DeviceResult:
    """One device: accuracies before its first training, after each round, and had it trained alone for as many epochs,
    and for as many steps; `unlabelled`: together without transfer labels, as recorded, or None."""

    name: str
    student: str
    engine: str
    samples: int
    class_counts: tuple[int, ...]
    before: Scores
    after: list[Scores]
    alone: Scores
    alone_steps: Scores
    unlabelled: Scores | None
    step_ms: float
    bytes_up: list[int]
    bytes_down: list[int]
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class RoundResult:
    """One round, and the accuracy of its global student on test and on validation images; `best` by the latter."""

    number: int
    phase: str
    t_uni: float | None
    validation_accuracy: float | None
    best: bool


@dataclass(frozen=True)
class Results:
    """Everything that the page shows.

    `same_as_recorded`: whether the figures are those that `make demo-seeds` has recorded of the seed, at the commit
    `recorded_by`; None where it has not, or with other settings. `rows_of_seeds`: its table, empty without records.
    """

    gamma: float
    local_epochs: int
    global_student: str
    transfer_samples: int
    validation_samples: int
    devices: tuple[DeviceResult, ...]
    rounds: tuple[RoundResult, ...]
    seed: int = 0
    same_as_recorded: bool | None = None
    recorded_by: str = ""
    rows_of_seeds: tuple[tuple[str, ...], ...] = ()
