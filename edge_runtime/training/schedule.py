"""The learning rate and the share of distillation of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgestill.runtime.errors import UsageError

SCHEDULES = ("constant", "cosine", "step")
_DROPS_AT = (0.5, 0.75)
_DROP = 0.1


@dataclass(frozen=True)
class Schedule:
    """`constant`; `cosine`: half a cosine down to zero; `step`: a tenth after 50 % and again 75 %.

    The first `warmup_steps` steps climb in a straight line to the full rate; the rest follows after them.
    """

    kind: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"no schedule is called {self.kind!r}", f"schedules: {', '.join(SCHEDULES)}")
        if self.warmup_steps < 0:
            raise UsageError(f"{self.warmup_steps} warm-up steps", "give --warmup-steps 0 or more")


def learning_rate(step: int, total_steps: int, base: float, schedule: Schedule) -> float:
    """The rate of step 0 … total_steps − 1."""
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    fraction = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    if schedule.kind == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    if schedule.kind == "step":
        return base * _DROP ** sum(fraction >= at for at in _DROPS_AT)
    return base


def distillation_share(step: int, total_steps: int, first: float, last: float) -> float:
    """α of step 0 … total_steps − 1, in a straight line from `first` to `last`."""
    return first + (last - first) * step / max(1, total_steps - 1)
