"""What a device does, as figures in an event file: a curve over the steps of all rounds, and one over the rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgestill.runtime.training.event_file import EventFile


class RoundLog:
    """A `Watch` (device.py) that writes `train/…` at every step and `round/…` after every round.

    Steps count on from round to round: those of round r end at r times their number, with a gap before the second
    round where the first had fewer. A round that goes on replaces the steps that it makes again.
    """

    def __init__(self, folder: Path, watch: Callable[..., None]) -> None:
        """`watch` is told everything as well. Errors: UsageError for a folder that cannot be written."""
        self._watch = watch
        self._file = EventFile(folder)
        self._round, self._begun = 0, False

    def __call__(self, event: str, /, **details: Any) -> None:
        self._watch(event, **details)
        if event == "training":
            self._round = int(str(details["round"]).rpartition(".")[2])
        elif event == "step":
            step = (self._round - 1) * details["steps"] + details["step"]
            names = ("loss", "ce_loss", "distillation_loss", "accuracy", "learning_rate")
            figures = {f"train/{name}": details[name] for name in names}
            if not self._begun:  # not before: a start may make no step, and void none
                self._begun = True
                self._file.begin(step)
            self._file.add(step, figures | {"train/step_ms": details["ms"]})
        elif event == "trained":
            scores = {
                f"round/{test}_{when}": details[when].get(test)
                for when in ("before", "after")
                for test in ("t_priv", "t_uni")
            }
            self._file.add(self._round, scores | {"round/step_ms": details.get("step_ms")})

    def close(self) -> None:
        self._file.close()
