"""Everything that decides a student's graphs, whatever the engine: forward pass, state, and what it is given."""

from __future__ import annotations

from collections import OrderedDict
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
    initial: OrderedDict[str, np.ndarray]  # parameters (the student's, then the objective's) and statistics, float32
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
        return {
            name: data.shape
            for name, data in self.initial.items()
            if name not in self.statistics and name not in self.frozen
        }

    def state_specs(self) -> list[TensorSpec]:
        """Every state tensor in the bundle's order."""
        trained, written = self.trained(), set(self.training.written)
        specs = [
            TensorSpec(
                name,
                data.shape,
                "float32",
                role="statistic" if name in self.statistics else "parameter",
                written=name in trained or name in written,
            )
            for name, data in self.initial.items()
        ]
        return specs + [
            TensorSpec(name, shape, "float32", role="slot", written=True)
            for name, shape in slots(self.optimizer, trained).items()
        ]

    def sample_inputs(self) -> list[TensorSpec]:
        units = {"uint8": "grey levels 0-255", "int64": "index"}
        return [
            TensorSpec(s.name, (self.batch, *s.shape), s.dtype, units.get(s.dtype, "as the student takes them"))
            for s in self.samples
        ]

    def step_inputs(self) -> list[TensorSpec]:
        """What a step takes besides state."""
        return [
            *self.sample_inputs(),
            *objective_inputs(self.objective, self.batch, self.latent_size, self.classes),
            *hyperparameters(self.optimizer),
            *(
                TensorSpec(f"noise.{i}", shape, "float32", NOISE_UNIT)
                for i, shape in enumerate(self.training.noise)
            ),
        ]

    def encode_inputs(self) -> list[TensorSpec]:
        return self.sample_inputs()

    def metrics(self) -> list[TensorSpec]:
        names = ["loss", "ce_loss"] + (["distillation_loss"] if self.objective.needs_teacher else [])
        return [TensorSpec(name, (1,), "float32", "nat") for name in names] + self.encodings()

    def encodings(self) -> list[TensorSpec]:
        return [
            TensorSpec("latents", (self.batch, self.latent_size), "float32", "latent units"),
            TensorSpec("logits", (self.batch, self.classes), "float32", "nat"),
        ]

    def initial_state(self) -> dict[str, np.ndarray]:
        zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in self.state_specs()}
        return zeros | dict(self.initial)


