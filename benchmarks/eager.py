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

from benchmarks.workload import hyperparameters

Arrays = Mapping[str, np.ndarray]


class EagerStep:
    """Trains a student of `perception`, `representation` and `output` with autograd on a bundle's batches.

    Its hyperparameters are those of `workload.hyperparameters`, taken at construction as an optimizer does,
    and every sample weighs one: a plain loop would not pay for the bundle's per-sample weights.
    """

    def __init__(
        self,
        student: nn.Module,
        manifest: Mapping[str, Any],
        state: Arrays | None = None,
        channels_last: bool = False,
    ) -> None:
        self.name = "torch-eager-channels-last" if channels_last else "torch-eager"
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._student = student.train()
        if state is not None:
            load_student_state(student, state)
        freeze_unwritten(student, manifest)
        student.to(memory_format=self._layout)
        self._objective = manifest["objective"]
        self._values = hyperparameters(manifest)
        self._optimizer = make_optimizer(student, manifest, self._values)
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


def load_student_state(student: nn.Module, state: Arrays) -> None:
    """Copies a bundle's parameters and statistics into the module; KeyError names one that it lacks."""
    with torch.no_grad():
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            # PyTorch counts batches only for momentum=None, which no bundle uses
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(np.array(state[name])))


def freeze_unwritten(student: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Gives no gradient to parameters that the step does not write, and leaves fixed statistics alone."""
    written = {spec["name"] for spec in manifest["state"]["tensors"] if spec["written"]}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in written)
    for name, module in student.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.running_mean" not in written:
            module.eval()


def make_optimizer(
    student: nn.Module, manifest: Mapping[str, Any], values: Mapping[str, float]
) -> torch.optim.Optimizer:
    """The bundle's optimizer as `torch.optim` has it."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if manifest["optimizer"]["name"] == "adamw":
        return torch.optim.AdamW(
            parameters,
            values["learning_rate"],
            (values["beta1"], values["beta2"]),
            values["epsilon"],
            values["weight_decay"],
        )
    return torch.optim.SGD(
        parameters,
        values["learning_rate"],
        values["momentum"],
        weight_decay=values["weight_decay"],
        nesterov=manifest["optimizer"].get("nesterov", False),
    )
