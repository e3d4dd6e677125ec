"""What the runtime asks of an engine: hold the state, make a step, encode images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Engine(Protocol):
    """One bundle opened on one engine; it owns the state between steps.

    Names, shapes and dtypes are those of the bundle's manifest (docs/bundle.md).
    """

    name: str

    def load_state(self, state: Arrays) -> None:
        """Replaces the whole state; arrays are copied. The caller has checked names, shapes and dtypes."""

    def state(self) -> dict[str, np.ndarray]:
        """A copy of the whole state, by name."""

    def train_step(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Makes one step on a batch and hyperparameters (everything that `train_step` takes besides state), keeps the
        new state and returns the metrics by name."""

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents [B, l] and logits [B, K] of one batch of exactly B images, in inference mode."""

    def close(self) -> None:
        """Frees what the engine holds outside Python (a subprocess, a native module)."""
