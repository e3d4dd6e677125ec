"""What every engine of one benchmark gets: the same batches in the same order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.randomness import noise
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS, default

BATCHES = 4


def read_manifest(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle's folder, unchecked: engines check it when they open the bundle."""
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def hyperparameters(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The default of every hyperparameter, as `edgestill train` has it: the settings of workload W1."""
    kinds = (manifest["objective"]["name"], manifest["optimizer"]["name"])
    return {name: default(name, *kinds) for name in HYPERPARAMETERS}


def make_batches(manifest: Mapping[str, Any], seed: int, count: int = BATCHES) -> list[dict[str, np.ndarray]]:
    """`count` batches with exactly the inputs that `train_step` takes besides state, from one seed.

    Noise images cost an engine the same time as photographs do: no graph has a branch that depends on values.
    """
    entries = manifest["inputs"]["train_step"]
    specs = [TensorSpec(entry["name"], tuple(entry["shape"]), entry["dtype"]) for entry in entries]
    generator, values = np.random.default_rng(seed), hyperparameters(manifest)

    def draw(spec: TensorSpec, step: int) -> np.ndarray:
        if spec.name in values:
            return np.full(spec.shape, values[spec.name], spec.numpy_dtype)
        if spec.name == "labels":
            return generator.integers(0, manifest["classes"], spec.shape).astype(spec.numpy_dtype)
        if spec.name.endswith("_weights"):
            return np.ones(spec.shape, spec.numpy_dtype)
        if spec.name.startswith("noise."):
            return noise(seed, step, spec.name, spec.shape)
        if spec.dtype == "float32":
            return generator.standard_normal(spec.shape, dtype=np.float32)
        # grey levels, or tokens, of which every vocabulary has two
        return generator.integers(0, 256 if spec.dtype == "uint8" else 2, spec.shape, dtype=spec.numpy_dtype)

    return [{spec.name: draw(spec, step) for spec in specs} for step in range(count)]
