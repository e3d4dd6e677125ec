"""The oracle: a bundle's step in eager PyTorch with autograd and torch.optim, in any precision.

It shares nothing with the lowering but how a student is called (parts.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgestill.export.parity.fidelity import as_float
from edgestill.export.parity.noise import GivenNoise, default_dtype
from edgestill.export.parts import Parts, student_parts
from edgestill.export.students import StudentOptions, build_student
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import Objective, Optimizer
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS

Arrays = Mapping[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


def rebuild_student(bundle: Bundle, name: str | None = None) -> nn.Module:
    """The student that the bundle was exported from, with its initial state; `name` replaces the recorded factory.

    Errors: UsageError when it cannot be built or is another.
    """
    student = build_anew(bundle, bundle.student.options.get("seed", 0), name)
    try:
        load_student_state(student, bundle.initial_state())
    except (KeyError, RuntimeError) as error:
        message = f"{name or bundle.student.name} is not the student of {bundle.source}: {error}"
        raise UsageError(message, hint="name the factory that it was exported from") from error
    return student


def build_anew(bundle: Bundle, seed: int, name: str | None = None) -> nn.Module:
    """A student of the bundle's architecture as exporting it with this seed would have built it."""
    own, sizes = bundle.student.options, (bundle.input.shape, bundle.latent_size, bundle.classes)
    options = StudentOptions(*sizes, tuple(own.get("widths") or ()) or None, own.get("normalization", "batch"))
    return build_student(name or bundle.student.name, options, seed)


def load_student_state(student: nn.Module, state: Arrays) -> None:
    """Copies parameters and buffers into the module. Errors: KeyError for a parameter that the state lacks."""
    missing = {id(parameter): name for name, parameter in student.named_parameters()}
    with torch.no_grad():
        for name, tensor in student.state_dict(keep_vars=True).items():
            if name in state:
                tensor.copy_(torch.from_numpy(np.array(state[name])))
                missing.pop(id(tensor), None)
    for name in missing.values():
        raise KeyError(name)


def called_parts(bundle: Bundle, student: nn.Module) -> tuple[Parts, dict[str, nn.Parameter], Tensors]:
    """How the bundle calls its student, in training mode; parameters and buffers by the bundle's names.

    Only what the bundle trains asks for a gradient. Errors: UsageError when it is another student.
    """
    parts = student_parts(student, bundle.student.options.get("split", ()), bundle.manifest.freeze)
    parameters = parts.own(parts.named_parameters())
    written = {spec.name for spec in bundle.state_specs if spec.written}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in written)
    return parts.train(), parameters, parts.own(parts.named_buffers())


def make_optimizer(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], numbers: Mapping[str, float]
) -> torch.optim.Optimizer:
    """The bundle's optimizer as torch.optim has it, over those parameters that ask for a gradient."""
    kind, _, options = _OPTIMIZERS[optimizer.name]
    return kind([p for p in parameters if p.requires_grad], **options(optimizer, numbers))


_OPTIMIZERS = {
    "sgd": (
        torch.optim.SGD,
        {"momentum": "momentum_buffer"},
        lambda optimizer, numbers: {
            "lr": numbers["learning_rate"],
            "momentum": max(numbers["momentum"], 1e-30),  # for 0, torch keeps no slot
            "weight_decay": numbers["weight_decay"],
            "nesterov": optimizer.nesterov,
        },
    ),
    "adamw": (
        torch.optim.AdamW,
        {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
        lambda optimizer, numbers: {
            "lr": numbers["learning_rate"],
            "betas": (numbers["beta1"], numbers["beta2"]),
            "eps": numbers["epsilon"],
            "weight_decay": numbers["weight_decay"],
        },
    ),
}
"""torch.optim's class, {a slot's name in the bundle: torch.optim's}, and its options from the hyperparameters."""
_FIRST = dict.fromkeys(HYPERPARAMETERS, 0.5)


class ReferenceStep:
    """A bundle in eager PyTorch behind the engine protocol; its numbers and its state's are of precision `dtype`."""

    name = "torch-eager"

    def __init__(self, bundle: Bundle, student: nn.Module, dtype: torch.dtype = torch.float32):
        self.bundle, self.dtype, self.student = bundle, dtype, student.to(dtype)
        self.samples = bundle.samples
        self.parts, parameters, self.buffers = called_parts(bundle, student)
        initial, trained = bundle.initial_state(), [s for s in bundle.state_specs if s.role == "parameter"]
        self.heads = {  # what the objective trains besides the student
            spec.name: nn.Parameter(torch.tensor(initial[spec.name], dtype=dtype))
            for spec in trained
            if spec.name not in parameters
        }
        self.parameters = parameters | self.heads
        self.optimizer = make_optimizer(bundle.optimizer, self.parameters.values(), _FIRST)
        self.load_state(initial)

    def load_state(self, state: Arrays) -> None:
        """Replaces the whole state, optimizer slots and the count of steps included."""
        given = {name: torch.tensor(array, dtype=self.dtype) for name, array in state.items()}
        with torch.no_grad():
            for name, tensor in (self.buffers | self.parameters).items():
                if name in given:
                    tensor.copy_(given[name])
        for slots, theirs, ours in self._slots():
            slots[theirs] = given[ours]
            slots.setdefault("step", torch.zeros(()))  # torch.optim fills a state only where it is empty
        self.corrections = [given[name] for name in given if name.startswith("optimizer.bias_correction")]

    def state(self) -> dict[str, np.ndarray]:
        """A copy of parameters, statistics and slots by the bundle's names."""
        found = self.buffers | self.parameters | {ours: slots[theirs] for slots, theirs, ours in self._slots()}
        found |= {f"optimizer.bias_correction{i}": value for i, value in enumerate(self.corrections, 1)}
        return {spec.name: found[spec.name].detach().numpy().copy() for spec in self.bundle.state_specs}

    def train_step(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One step on a batch, random numbers and hyperparameters; the metrics of docs/bundle.md."""
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
        # random numbers stay float32: a mask must not depend on the precision that they are compared in
        noise = [given.pop(name) for name in [f"noise.{i}" for i in range(len(given))] if name in given]
        given = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in given.items()}
        self.parts.train()
        with default_dtype(self.dtype), GivenNoise(noise):
            latents, logits = self._outputs([inputs[spec.name] for spec in self.samples])
            found = losses(self.bundle.objective, given | self.heads, latents, logits)
            self.optimizer.zero_grad()
            found["loss"].backward()
        self._update({name: float(tensor) for name, tensor in given.items() if tensor.shape == (1,)})
        found |= {"latents": latents, "logits": logits}
        return {name: tensor.detach().numpy().reshape(tensor.shape or 1) for name, tensor in found.items()}

    def encode(self, *samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.parts.eval()
        with torch.no_grad(), default_dtype(self.dtype), GivenNoise(()):
            latents, logits = self._outputs(samples)
        return latents.numpy(), logits.numpy()

    def close(self) -> None:
        """Nothing is held outside Python."""

    def _update(self, numbers: Mapping[str, float]) -> None:
        options = _OPTIMIZERS[self.bundle.optimizer.name][2](self.bundle.optimizer, numbers)
        self.optimizer.param_groups[0].update(options)
        if self.corrections:  # 1 − βᵗ says how many steps there were; that of β₂ keeps its digits longest
            betas, left = (numbers["beta1"], numbers["beta2"]), 1 - float(self.corrections[1])
            count = round(math.log(left) / math.log(betas[1])) if 0 < left < 1 else 10**6 * (left < 1)
            for slots, _, _ in self._slots():
                slots["step"] = torch.tensor(float(count))
            self.corrections = [torch.tensor([1 - b ** (count + 1)], dtype=self.dtype) for b in betas]
        if self.bundle.optimizer.clips:
            trained = [p for p in self.parameters.values() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, numbers["clip_norm"])
        self.optimizer.step()

    def _slots(self) -> list[tuple[dict, str, str]]:
        """torch.optim's slots of a parameter, the name of a slot there, and the bundle's."""
        trained = [(name, self.optimizer.state[p]) for name, p in self.parameters.items() if p.requires_grad]
        pairs = _OPTIMIZERS[self.bundle.optimizer.name][1].items()
        return [(slots, theirs, f"optimizer.{ours}.{name}") for name, slots in trained for ours, theirs in pairs]

    def _outputs(self, arrays: Iterable[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.parts(*(as_float(a, spec, self.dtype) for a, spec in zip(arrays, self.samples, strict=True)))


def losses(objective: Objective, given: Tensors, latents: torch.Tensor, logits: torch.Tensor) -> Tensors:
    """The losses of docs/bundle.md by name; samples whose weights are not `given` weigh one each."""

    def weighted(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if weights is None:
            return rows.mean()
        total = weights.sum()
        return (rows * weights).sum() / (total if total > 0 else 1)

    ce = weighted(F.cross_entropy(logits, given["labels"], reduction="none"), given.get("label_weights"))
    if objective.name == "ce":
        return {"loss": ce, "ce_loss": ce}
    rows = TERMS[objective.name](objective, given, latents, logits)
    distillation, alpha = weighted(rows, given.get("teacher_weights")), given["alpha"][0]
    loss = (1 - alpha) * ce + alpha * distillation
    return {"loss": loss, "ce_loss": ce, "distillation_loss": distillation}


def _latents(objective: Objective, given: Tensors, latents: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return (latents - given["teacher_latents"]).square().mean(1)


def _logits(objective: Objective, given: Tensors, latents: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if objective.kd_loss == "mse":
        return (logits - given["teacher_logits"]).square().mean(1)
    t = given["temperature"]
    ours, teacher = (F.log_softmax(x / t, 1) for x in (logits, given["teacher_logits"]))
    return t**2 * F.kl_div(ours, teacher, reduction="none", log_target=True).sum(1)


def _both(objective: Objective, given: Tensors, *outputs: torch.Tensor) -> torch.Tensor:
    share = given["logit_share"]
    return (1 - share) * _latents(objective, given, *outputs) + share * _logits(objective, given, *outputs)


def _contrastive(objective: Objective, given: Tensors, latents: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropies of the critic h = e^(g/τ) / (e^(g/τ) + N·z): a sample's own pair, then those of others."""

    def project(side: str, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.linear(x, given[f"crd.{side}.weight"], given[f"crd.{side}.bias"]))

    temperature, student = given["temperature"], project("student_head", latents)
    teacher, others = (project("teacher_head", given[f"teacher_{name}"]) for name in ("latents", "negatives"))
    log_z, rows = 1 / (2 * student.shape[1] * temperature**2), torch.zeros(())
    apart = ~torch.eye(len(student), dtype=torch.bool)
    for far in (student @ others.T, (teacher @ student.T)[apart].view(len(student), -1)):
        near = (student * teacher).sum(1, keepdim=True)
        scores = torch.cat((near, far), 1) / temperature - math.log(far.shape[1]) - log_z
        targets = torch.zeros_like(scores)
        targets[:, 0] = 1
        rows = rows + F.binary_cross_entropy_with_logits(scores, targets, reduction="none").sum(1)
    return rows


def _neighbours(objective: Objective, given: Tensors, latents: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    apart = (latents.unsqueeze(1) - latents.unsqueeze(0)).square().mean(2)
    return (given["neighbour_weights"] * apart).sum(1) / 2


TERMS = {
    "lkd": _latents,
    "kd": _logits,
    "both": _both,
    "crd": _contrastive,
    "lpd": _neighbours,
}
"""The distillation term of each sample [B], by the objective's name."""
