"""What every engine of one benchmark gets: the same batches in the same order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.randomness import noise

# The settings of workload W1 and of `edgestill train`; AdamW's are PyTorch's defaults.
SGD_HYPERPARAMETERS = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0}
ADAMW_HYPERPARAMETERS = {
    "learning_rate": 0.001,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.01,
}
DISTILLATION_HYPERPARAMETERS = {"alpha": 0.5, "temperature": 4.0, "logit_share": 0.5}
BATCHES = 4


def read_manifest(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle's folder, unchecked: engines check it when they open the bundle."""
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def hyperparameters(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Fixed values for every hyperparameter that the bundle's step may take."""
    own = ADAMW_HYPERPARAMETERS if manifest["optimizer"]["name"] == "adamw" else SGD_HYPERPARAMETERS
    return {**DISTILLATION_HYPERPARAMETERS, **own}


def make_batches(manifest: Mapping[str, Any], seed: int, count: int = BATCHES) -> list[dict[str, np.ndarray]]:
    """`count` batches with exactly the inputs that `train_step` takes besides state, from one seed.

    Noise images cost an engine the same time as photographs do: no graph has a branch that depends on values.
    """
    generator = np.random.default_rng(seed)
    values = hyperparameters(manifest)
    batches = []
    for step in range(count):
        batch: dict[str, np.ndarray] = {}
        for spec in manifest["inputs"]["train_step"]:
            name, shape, dtype = spec["name"], spec["shape"], np.dtype(spec["dtype"])
            if name in values:
                batch[name] = np.full(shape, values[name], dtype)
            elif name == "labels":
                batch[name] = generator.integers(0, manifest["classes"], shape).astype(dtype)
            elif name.endswith("_weights"):
                batch[name] = np.ones(shape, dtype)
            elif name.startswith("noise."):
                batch[name] = noise(seed, step, name, tuple(shape))
            elif dtype == np.int64:  # tokens, of which every vocabulary has two
                batch[name] = generator.integers(0, 2, shape)
            elif dtype == np.uint8:
                batch[name] = generator.integers(0, 256, shape, dtype=np.uint8)
            else:
                batch[name] = generator.standard_normal(shape, dtype=np.float32)
        batches.append(batch)
    return batches
