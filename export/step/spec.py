"""Everything that decides a student's graphs, whatever the engine: forward pass, state, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgestill.export.lowering.capture import Captured
from edgestill.export.step.objectives import objective_inputs
from edgestill.export.step.optimizers import hyperparameters, slots
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer, TensorSpec

NOISE_UNIT = "uniform, at least 0 and below 1"


@dataclass(frozen=True)
class StepSpec:
    """What every target lowers."""

    training: Captured
    inference: Captured
    initial: dict[str, np.ndarray]  # parameters (the student's, then the objective's) and statistics, float32
    statistics: frozenset[str]
    frozen: frozenset[str]  # parameters that are not trained
    batch: int
    samples: tuple[InputSpec, ...]
    objective: Objective
    optimizer: Optimizer

    @property
    def latent_size(self) -> int:
        return self.training.latents.shape[1]

    @property
    def classes(self) -> int:
        return self.training.logits.shape[1]

    def trained(self) -> dict[str, tuple[int, ...]]:
        untrained = self.statistics | self.frozen
        return {name: data.shape for name, data in self.initial.items() if name not in untrained}

    def state_specs(self) -> list[TensorSpec]:
        """Every state tensor in the bundle's order."""
        trained = self.trained()
        written = trained.keys() | self.training.written
        given = [
            (name, data.shape, "statistic" if name in self.statistics else "parameter", name in written)
            for name, data in self.initial.items()
        ]
        kept = [(name, shape, "slot", True) for name, shape in slots(self.optimizer, trained).items()]
        return [
            TensorSpec(name, shape, "float32", role=role, written=written)
            for name, shape, role, written in given + kept
        ]

    def step_inputs(self) -> list[TensorSpec]:
        """What a step takes besides state."""
        noise = enumerate(self.training.noise)
        return [
            *self.encode_inputs(),
            *objective_inputs(self.objective, self.batch, self.latent_size, self.classes),
            *hyperparameters(self.optimizer),
            *(TensorSpec(f"noise.{i}", shape, "float32", NOISE_UNIT) for i, shape in noise),
        ]

    def encode_inputs(self) -> list[TensorSpec]:
        """The tensors of a batch of samples."""
        units = {"uint8": "grey levels 0-255", "int64": "index", "float32": "as the student takes them"}
        return [TensorSpec(s.name, (self.batch, *s.shape), s.dtype, units[s.dtype]) for s in self.samples]

    def metrics(self) -> list[TensorSpec]:
        names = ["loss", "ce_loss"] + (["distillation_loss"] if self.objective.needs_teacher else [])
        return [TensorSpec(name, (1,), "float32", "nat") for name in names] + self.encodings()

    def encodings(self) -> list[TensorSpec]:
        return [
            TensorSpec("latents", (self.batch, self.latent_size), "float32", "latent units"),
            TensorSpec("logits", (self.batch, self.classes), "float32", "nat"),
        ]

    def initial_state(self) -> dict[str, np.ndarray]:
        return {spec.name: np.zeros(spec.shape, np.float32) for spec in self.state_specs()} | self.initial
