"""The oracle: a bundle's step in eager PyTorch with autograd and torch.optim, sharing nothing with the lowering."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.student import StudentOptions, build_student
from edgestill.runtime.bundle.bundle import Bundle

Arrays = Mapping[str, np.ndarray]


def rebuild_student(bundle: Bundle, name: str | None = None) -> nn.Module:
    """The student that the bundle was exported from, with the bundle's initial state, training only what the bundle
    trains. `name` replaces the recorded factory. Errors: UsageError when it cannot be built or is another."""
    student = build_anew(bundle, bundle.student.options.get("seed", 0), name)
    load_student_state(student, bundle.initial_state())
    set_training(student, bundle)
    return student


def build_anew(bundle: Bundle, seed: int, name: str | None = None) -> nn.Module:
    """A student of the bundle's architecture as exporting it with this seed would have built it."""
    options = bundle.student.options
    widths = options.get("widths")
    return build_student(
        name or bundle.student.name,
        StudentOptions(
            bundle.input.shape,
            bundle.latent_size,
            bundle.classes,
            tuple(widths) if widths else None,
            options.get("normalization", "batch"),
        ),
        seed,
    )


def load_student_state(student: nn.Module, state: Arrays) -> None:
    """Copies parameters and statistics into the module. Errors: KeyError for one that the state lacks."""
    with torch.no_grad():
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(np.array(state[name])))


def set_training(student: nn.Module, bundle: Bundle) -> None:
    """Training mode for what the step writes: other parameters get no gradient, other BatchNorms keep statistics."""
    student.train()
    written = {spec.name for spec in bundle.state_specs if spec.written}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in written)
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" not in written:
            module.eval()


def make_optimizer(
    student: nn.Module,
    name: str,
    nesterov: bool,
    hyperparameters: Mapping[str, float],
    more: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The bundle's optimizer as `torch.optim` has it, over what `set_training` left to train and `more`."""
    trained = [*(parameter for parameter in student.parameters() if parameter.requires_grad), *more]
    h = hyperparameters
    if name == "sgd":
        return torch.optim.SGD(
            trained, h["learning_rate"], h["momentum"], weight_decay=h["weight_decay"], nesterov=nesterov
        )
    return torch.optim.AdamW(
        trained, h["learning_rate"], (h["beta1"], h["beta2"]), h["epsilon"], h["weight_decay"]
    )


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
        own = dict(student.named_parameters())
        initial = bundle.initial_state()
        self.heads = {  # what the objective trains besides the student
            spec.name: nn.Parameter(torch.from_numpy(np.array(initial[spec.name])).to(dtype))
            for spec in bundle.state_specs
            if spec.role == "parameter" and spec.name not in own
        }
        self.optimizer = make_optimizer(
            student, bundle.optimizer.name, bundle.optimizer.nesterov, hyperparameters, self.heads.values()
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
            for name, tensor in [*self._parameters(), *self.student.named_buffers()]
            if not name.endswith("num_batches_tracked")
        }
        for name, parameter in self._parameters():
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

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.student.named_parameters(), *self.heads.items()]

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
        if objective.name == "crd":
            rows = self._contrastive_rows(given, latents)
        elif objective.name == "lpd":
            apart = (latents.unsqueeze(1) - latents.unsqueeze(0)).square().mean(2)
            rows = (given["neighbour_weights"] * apart).sum(1) / 2
        else:
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

    def _contrastive_rows(self, given, latents: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropies of the critic h = e^(g/τ) / (e^(g/τ) + N·z), sample by sample."""

        def project(side: str, x: torch.Tensor) -> torch.Tensor:
            return F.normalize(F.linear(x, self.heads[f"crd.{side}.weight"], self.heads[f"crd.{side}.bias"]))

        def entropies(scores: torch.Tensor, count: int, related: float) -> torch.Tensor:
            scores = scores / temperature - math.log(count) - 1 / (2 * student.shape[1] * temperature**2)
            targets = torch.full_like(scores, related)
            return F.binary_cross_entropy_with_logits(scores, targets, reduction="none")

        temperature = given["temperature"]
        student = project("student_head", latents)
        teacher = project("teacher_head", given["teacher_latents"])
        others = project("teacher_head", given["teacher_negatives"])
        rows = []
        for i in range(len(student)):
            rest = torch.cat([student[:i], student[i + 1 :]])
            positive = (student[i] @ teacher[i]).reshape(1)
            of_student = entropies(others @ student[i], len(others), 0.0).sum()
            of_teacher = entropies(rest @ teacher[i], len(rest), 0.0).sum()
            rows.append(
                entropies(positive, len(others), 1.0)[0] + of_student
                + entropies(positive, len(rest), 1.0)[0] + of_teacher
            )  # fmt: skip
        return torch.stack(rows)
