"""The oracle: a bundle's step in eager PyTorch with autograd and torch.optim, sharing nothing with the lowering."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edge_runtime.bundle import Bundle
from export.student import StudentOptions, build_student

Arrays = Mapping[str, np.ndarray]


def rebuild_student(bundle: Bundle, name: str | None = None) -> nn.Module:
    """The student that the bundle was exported from, with the bundle's initial state, training only what the bundle
    trains. `name` replaces the recorded factory. Errors: UsageError when it cannot be built or is another."""
    options = bundle.student.options
    widths = options.get("widths")
    student = build_student(
        name or bundle.student.name,
        StudentOptions(
            bundle.input.shape,
            bundle.latent_size,
            bundle.classes,
            tuple(widths) if widths else None,
            options.get("normalization", "batch"),
        ),
        options.get("seed", 0),
    )
    load_student_state(student, bundle.initial_state())
    written = {spec.name for spec in bundle.state_specs if spec.written}
    for parameter_name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter_name in written)
    return student


def load_student_state(student: nn.Module, state: Arrays) -> None:
    """Copies parameters and statistics into the module. Errors: KeyError for one that the state lacks."""
    with torch.no_grad():
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(np.array(state[name])))


def set_training(student: nn.Module, bundle: Bundle) -> None:
    """Training mode, but a BatchNorm whose statistics the step does not write keeps them."""
    student.train()
    written = {spec.name for spec in bundle.state_specs if spec.written}
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" not in written:
            module.eval()


class ReferenceStep:
    """A student trained the plain PyTorch way, with the bundle's inputs and the bundle's names for its state."""

    def __init__(
        self,
        bundle: Bundle,
        student: nn.Module,
        hyperparameters: Mapping[str, float],
        dtype: torch.dtype = torch.float32,
    ):
        self.bundle = bundle
        self.dtype = dtype
        self.student = student.to(dtype)
        h = hyperparameters
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if bundle.optimizer.name == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                trained,
                h["learning_rate"],
                h["momentum"],
                weight_decay=h["weight_decay"],
                nesterov=bundle.optimizer.nesterov,
            )
        else:
            self.optimizer = torch.optim.AdamW(
                trained, h["learning_rate"], (h["beta1"], h["beta2"]), h["epsilon"], h["weight_decay"]
            )

    def train_step(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One step; the metrics of docs/bundle.md."""
        given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        given = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in given.items()
        }
        set_training(self.student, self.bundle)
        latents, logits = self.outputs(given["images"])
        losses = self._losses(given, latents, logits)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        metrics = {name: loss.detach().numpy().reshape(1) for name, loss in losses.items()}
        return metrics | {"latents": latents.detach().numpy(), "logits": logits.detach().numpy()}

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.student.eval()
        with torch.no_grad():
            latents, logits = self.outputs(torch.from_numpy(images))
        return latents.numpy(), logits.numpy()

    def state(self) -> dict[str, np.ndarray]:
        """A copy of parameters, statistics and slots by the bundle's names."""
        state = {
            name: tensor.detach().numpy().copy()
            for name, tensor in [*self.student.named_parameters(), *self.student.named_buffers()]
            if not name.endswith("num_batches_tracked")
        }
        for name, parameter in self.student.named_parameters():
            slots = self.optimizer.state.get(parameter, {})
            for ours, theirs in (
                ("momentum", "momentum_buffer"),
                ("exp_avg", "exp_avg"),
                ("exp_avg_sq", "exp_avg_sq"),
            ):
                if slots.get(theirs) is not None:
                    state[f"optimizer.{ours}.{name}"] = slots[theirs].numpy().copy()
            if "step" in slots:
                for i, beta in enumerate(self.optimizer.defaults["betas"], 1):
                    state[f"optimizer.bias_correction{i}"] = np.array([1 - beta ** float(slots["step"])])
        return state

    def outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and logits in the mode that the student is in."""
        images = images.to(self.dtype)
        if self.bundle.input.dtype == "uint8":
            mean, std = (
                torch.tensor(values, dtype=self.dtype).reshape(1, -1, 1, 1)
                for values in (self.bundle.input.mean, self.bundle.input.std)
            )
            images = (images / 255 - mean) / std
        latents = self.student.representation(self.student.perception(images))
        return latents, self.student.output(latents)

    def _losses(self, given, latents, logits) -> dict[str, torch.Tensor]:
        def weighted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            total = weights.sum()
            return (rows * weights).sum() / total if total > 0 else (rows * 0).sum()

        ce = weighted(F.cross_entropy(logits, given["labels"], reduction="none"), given["label_weights"])
        objective = self.bundle.objective
        if objective.name == "ce":
            return {"loss": ce, "ce_loss": ce}
        rows = 0.0
        logit_share = given["logit_share"][0] if objective.name == "both" else float(objective.takes_logits)
        if objective.takes_latents:
            of_latents = F.mse_loss(latents, given["teacher_latents"], reduction="none").mean(1)
            rows = rows + (1 - logit_share) * of_latents
        if objective.kd_loss == "mse":
            of_logits = F.mse_loss(logits, given["teacher_logits"], reduction="none").mean(1)
            rows = rows + logit_share * of_logits
        elif objective.kd_loss == "kl":
            t = given["temperature"]
            of_logits = t**2 * F.kl_div(
                F.log_softmax(logits / t, 1),
                F.log_softmax(given["teacher_logits"] / t, 1),
                reduction="none",
                log_target=True,
            ).sum(1)
            rows = rows + logit_share * of_logits
        distillation = weighted(rows, given["teacher_weights"])
        alpha = given["alpha"][0]
        return {
            "loss": (1 - alpha) * ce + alpha * distillation,
            "ce_loss": ce,
            "distillation_loss": distillation,
        }
