"""Whether a run has diverged: a loss or weights that grew by orders of magnitude, though still finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle

LOSS_GROWTH = 10.0
"""Times the first loss, of labels and of distillation each, or the loss of guessing where that is more."""
WEIGHT_GROWTH = 100.0
"""Times the norm that all parameters together started with."""
WINDOW_STEPS = 20
"""Fewer losses than this are judged only where a run ends with them: the first steps may leap."""
_SMALL = 0.01  # the root mean square of weights that count as started from nothing


class Growth:
    """Watches losses, and now and then the state, of one run that starts from `initial_state`.

    `first_losses`: cross-entropy and distillation loss of the run's first step, where that was made before.
    """

    def __init__(
        self,
        bundle: Bundle,
        initial_state: Mapping[str, np.ndarray],
        first_losses: tuple[float, float] | None = None,
    ) -> None:
        self._names = [spec.name for spec in bundle.state_specs if spec.role == "parameter"]
        count = sum(initial_state[name].size for name in self._names)
        self._norm = max(self._norm_of(initial_state), _SMALL * math.sqrt(count))
        self._guessing = math.log(max(2, bundle.classes))
        self.first_losses = first_losses
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._growths: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._alpha = 0.0

    def add(self, ce_loss: float, distillation_loss: float = 0.0, alpha: float = 0.0) -> None:
        """Both losses of a step, and the second one's share: it may change, so the sum says nothing of growth."""
        self.first_losses = self.first_losses or (ce_loss, distillation_loss)
        self._alpha = alpha
        self._losses.append(_mix(ce_loss, distillation_loss, alpha))
        start = (max(first, self._guessing) for first in self.first_losses)
        self._growths.append(self._losses[-1] / _mix(*start, alpha))

    def judge(self, state: Mapping[str, np.ndarray], last: bool) -> str | None:
        """How the run has diverged, by the losses of its latest steps and its weights, in words; None if it has not.

        `last`: whether the run ends here.
        """
        if self.first_losses is None or (len(self._losses) < WINDOW_STEPS and not last):
            return None
        if median(self._growths) > LOSS_GROWTH:
            first = _mix(*self.first_losses, self._alpha)
            return f"its loss went from {first:.4g} to {median(self._losses):.4g}"
        if not (norm := self._norm_of(state)) <= WEIGHT_GROWTH * self._norm:
            return f"the norm of its weights went from {self._norm:.4g} to {norm:.4g}"
        return None

    def _norm_of(self, state: Mapping[str, np.ndarray]) -> float:
        squares = (float(np.square(state[name], dtype=np.float64).sum()) for name in self._names)
        return math.sqrt(sum(squares))


def _mix(ce_loss: float, distillation_loss: float, alpha: float) -> float:
    return (1 - alpha) * ce_loss + alpha * distillation_loss
