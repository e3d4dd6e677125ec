"""Whether a run has diverged: a loss or weights that grew by orders of magnitude, though still finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle

LOSS_GROWTH = 10.0
"""Times the first loss, or the loss of guessing where that is more."""
WEIGHT_GROWTH = 100.0
"""Times the norm that all parameters together started with."""
WINDOW_STEPS = 20
"""Fewer losses than this are judged only where a run ends with them: the first steps may leap."""
_SMALL = 0.01  # the root mean square of weights that count as started from nothing


class Growth:
    """Watches losses, and now and then the state, of one run that starts from `initial_state`."""

    def __init__(self, bundle: Bundle, initial_state: Mapping[str, np.ndarray]) -> None:
        self._names = [spec.name for spec in bundle.state_specs if spec.role == "parameter"]
        count = sum(initial_state[name].size for name in self._names)
        self._norm = max(self._norm_of(initial_state), _SMALL * math.sqrt(count))
        self._guessing = math.log(max(2, bundle.classes))
        self._first: float | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def add(self, loss: float) -> None:
        """The loss of a step."""
        self._first = loss if self._first is None else self._first
        self._losses.append(loss)

    def judge(self, state: Mapping[str, np.ndarray], last: bool) -> str | None:
        """How the run has diverged, by the losses of its latest steps and its weights, in words; None if it has not.

        `last`: whether the run ends here.
        """
        if self._first is None or (len(self._losses) < WINDOW_STEPS and not last):
            return None
        recent = median(self._losses)
        if recent > LOSS_GROWTH * max(self._first, self._guessing):
            return f"its loss went from {self._first:.4g} to {recent:.4g}"
        if not (norm := self._norm_of(state)) <= WEIGHT_GROWTH * self._norm:
            return f"the norm of its weights went from {self._norm:.4g} to {norm:.4g}"
        return None

    def _norm_of(self, state: Mapping[str, np.ndarray]) -> float:
        squares = (float(np.square(state[name], dtype=np.float64).sum()) for name in self._names)
        return math.sqrt(sum(squares))
