"""The reference that engines are timed against: the same step written by hand for plain eager PyTorch.

Nothing here is slower than it has to be: `torch.optim` with its default (foreach) implementation,
`F.cross_entropy`, inputs without a copy, images normalised in place; only what the bundle prescribes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.benchmarks.workload import hyperparameters
from edgestill.export.reference import make_optimizer
from edgestill.runtime.errors import UsageError

Arrays = Mapping[str, np.ndarray]


class EagerStep:
    """Trains a student of `perception`, `representation` and `output` with autograd on a bundle's batches, in the
    mode that `edgestill.export.reference.set_training` left it in.

    Its hyperparameters are those of `workload.hyperparameters`, taken at construction as an optimizer does,
    and every sample weighs one: a plain loop would not pay for the bundle's per-sample weights.
    Errors: UsageError for an objective that compares samples.
    """

    def __init__(
        self,
        student: nn.Module,
        manifest: Mapping[str, Any],
        channels_last: bool = False,
    ) -> None:
        self.name = "torch-eager-channels-last" if channels_last else "torch-eager"
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._student = student.to(memory_format=self._layout)
        self._objective = manifest["objective"]
        if self._objective["name"] in ("crd", "lpd"):
            raise UsageError(
                f"eager PyTorch is not timed with objective {self._objective['name']}",
                "give --engines without it, or a bundle of objective ce, kd, lkd or both",
            )
        self._values = hyperparameters(manifest)
        optimizer = manifest["optimizer"]
        self._optimizer = make_optimizer(
            student, optimizer["name"], optimizer.get("nesterov", False), self._values
        )
        self._normalize = manifest["input"]["dtype"] == "uint8"
        if self._normalize:
            # (x/255 - mean)/std as one product and one sum a channel
            mean, std = (torch.tensor(manifest["input"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
            self._scale, self._shift = 1 / (255 * std), -mean / std

    def train_step(self, inputs: Arrays) -> dict[str, float]:
        """One step on a bundle's batch; gives the loss from before the update."""
        images = torch.from_numpy(inputs["images"])
        if self._normalize:
            images = images.to(torch.float32, memory_format=self._layout).mul_(self._scale).add_(self._shift)
        else:
            images = images.to(memory_format=self._layout)
        latents = self._student.representation(self._student.perception(images))
        logits = self._student.output(latents)
        loss = F.cross_entropy(logits, torch.from_numpy(inputs["labels"]))
        if self._objective["name"] != "ce":
            alpha = self._values["alpha"]
            loss = (1 - alpha) * loss + alpha * self._distillation(inputs, latents, logits)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return {"loss": loss.item()}

    def _distillation(self, inputs: Arrays, latents: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        name = self._objective["name"]
        if name == "kd":
            return self._of_logits(inputs, logits)
        of_latents = F.mse_loss(latents, torch.from_numpy(inputs["teacher_latents"]))
        if name == "lkd":
            return of_latents
        share = self._values["logit_share"]
        return (1 - share) * of_latents + share * self._of_logits(inputs, logits)

    def _of_logits(self, inputs: Arrays, logits: torch.Tensor) -> torch.Tensor:
        teacher = torch.from_numpy(inputs["teacher_logits"])
        if self._objective["kd_loss"] == "mse":
            return F.mse_loss(logits, teacher)
        temperature = self._values["temperature"]
        return temperature**2 * F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(teacher / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )

    def close(self) -> None:
        """Nothing is held outside Python."""
