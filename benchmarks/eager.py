"""The reference that engines are timed against: the same step written by hand for plain eager PyTorch.

Nothing here is slower than it has to be: `torch.optim` with its default (foreach) implementation,
inputs without a copy, images normalised in place; only what the bundle prescribes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgestill.benchmarks.workload import hyperparameters
from edgestill.export.parity.reference import losses, make_optimizer
from edgestill.runtime.bundle.manifest import Objective, Optimizer
from edgestill.runtime.errors import UsageError

Arrays = Mapping[str, np.ndarray]


class EagerStep:
    """Trains a student (called as `parts`: samples to latents and logits) with autograd on a bundle's batches: those
    parameters that ask for a gradient, in the mode that it is in.

    Its hyperparameters are those of `workload.hyperparameters`, taken at construction as an optimizer does, every
    sample weighs one (a plain loop would not pay for the bundle's per-sample weights), and dropout draws for itself.
    Errors: UsageError for an objective that compares samples.
    """

    def __init__(self, parts: nn.Module, manifest: Mapping[str, Any], channels_last: bool = False) -> None:
        self.name = "torch-eager-channels-last" if channels_last else "torch-eager"
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        self._parts = parts.to(memory_format=self._layout)
        self._objective = Objective(manifest["objective"]["name"], manifest["objective"]["kd_loss"])
        if self._objective.relates_samples:
            raise UsageError(
                f"eager PyTorch is not timed with objective {self._objective.name}",
                "give --engines without it, or a bundle of objective ce, kd, lkd or both",
            )
        values = hyperparameters(manifest)
        optimizer = Optimizer(**manifest["optimizer"])
        self._optimizer = make_optimizer(optimizer, parts.parameters(), values)
        self._clip_norm = values["clip_norm"] if optimizer.clips else None
        self._numbers = {name: torch.tensor([value]) for name, value in values.items()}
        self._samples = [self._normalizer(entry) for entry in (manifest["input"], *manifest.get("more_inputs", []))]

    def train_step(self, inputs: Arrays) -> dict[str, float]:
        """One step on a bundle's batch; gives the loss from before the update."""
        given = {name: torch.from_numpy(array) for name, array in inputs.items() if "_weights" not in name}
        samples = [self._prepared(given[name], *factors) for name, *factors in self._samples]
        latents, logits = self._parts(*samples)
        loss = losses(self._objective, given | self._numbers, latents, logits)["loss"]
        self._optimizer.zero_grad()
        loss.backward()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parts.parameters(), self._clip_norm)
        self._optimizer.step()
        return {"loss": loss.item()}

    def _normalizer(self, entry: Mapping[str, Any]) -> tuple[Any, ...]:
        """Name, and of uint8 samples (x/255 - mean)/std as one product and one sum a channel."""
        name = entry.get("name", "images")
        if entry["dtype"] != "uint8":
            return name, None, None
        shape = (1, -1, *(1,) * (len(entry["shape"]) - 1))
        mean, std = (torch.tensor(entry[key]).view(shape) for key in ("mean", "std"))
        return name, 1 / (255 * std), -mean / std

    def _prepared(self, x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
        layout = self._layout if x.dim() == 4 else torch.preserve_format
        if scale is None:
            return x.to(memory_format=layout)
        return x.to(torch.float32, memory_format=layout).mul_(scale).add_(shift)

    def close(self) -> None:
        """Nothing is held outside Python."""
