"""`--common-head`: every student of so many classes and latents ends in the same frozen layer, and trains beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgestill
from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.common_head import common_head
from edgestill.runtime.bundle.manifest import Optimizer
from edgestill.runtime.errors import UsageError

pytestmark = pytest.mark.contract
CLASSES, LATENT = 5, 12
SMALL = {"latent_size": LATENT, "classes": CLASSES, "batch": 4, "engines": ("native",), "common_head": True}


def model(head: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    features = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, LATENT))
    return nn.Sequential(features, head)


def test_students_of_any_kind_and_seed_have_the_same_head(tmp_path: Path) -> None:
    own = model(nn.Linear(LATENT, CLASSES))
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    bundles = [
        export_bundle(ExportOptions("cnn3", widths=(4, 4, 4), seed=1, **SMALL), tmp_path / "one"),
        export_bundle(
            ExportOptions("cnn4", widths=(4, 4, 4, 8), seed=2, optimizer=Optimizer("adamw"), **SMALL),
            tmp_path / "two",
        ),
        edgestill.export(
            own, tmp_path / "own", input_shape=(3, 8, 8), split=("0", "1"), common_head=True, batch=4, engines="native"
        ).bundle.path,
    ]
    for path, name in zip(bundles, ("output", "output", "1"), strict=True):
        with Bundle.open(path) as bundle:
            manifest, state = bundle.manifest, bundle.initial_state()
            assert manifest.common_head == f"{name}.weight" and manifest.freeze == (name,)
            assert state[f"{name}.weight"].tobytes() == common_head(CLASSES, LATENT).tobytes()
            assert not state[f"{name}.bias"].any()
            slots = ("", "optimizer.momentum.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
            names = {f"{slot}{name}.{part}" for slot in slots for part in ("weight", "bias")}
            of_head = [spec for spec in bundle.state_specs if spec.name in names]
            assert sorted(spec.name for spec in of_head) == [f"{name}.bias", f"{name}.weight"], "no optimizer slots"
            assert not any(spec.written for spec in of_head)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, before[name]), "the user's module stays as it is"
    loaded = model(nn.Linear(LATENT, CLASSES))
    loaded.load_state_dict({k: torch.from_numpy(v) for k, v in state.items() if not k.startswith("optimizer.")})


def test_training_moves_everything_but_the_head(tmp_path: Path) -> None:
    path = export_bundle(ExportOptions("cnn3", widths=(4, 4, 4), **SMALL), tmp_path / "bundle")
    opened = edgestill.open(path)
    before = {name: array.copy() for name, array in opened.bundle.initial_state().items()}
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8, 3, 32, 32), np.uint8)
    opened.train((images, random.integers(0, CLASSES, 8)), epochs=2, alpha=0.0)
    after = opened.state()
    for name in ("output.weight", "output.bias"):
        assert after[name].tobytes() == before[name].tobytes()
    assert np.any(after["representation.1.weight"] != before["representation.1.weight"])


def test_a_head_that_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    own = model(nn.Sequential(nn.ReLU(), nn.Linear(LATENT, CLASSES)))
    with pytest.raises(UsageError, match="takes the place of one linear layer, and 1 is Sequential"):
        edgestill.export(
            own, tmp_path / "own", input_shape=(3, 8, 8), split=("0", "1"), common_head=True, engines="native"
        )
    with pytest.raises(UsageError, match="so many rows cannot be orthogonal"):
        export_bundle(
            ExportOptions("cnn3", widths=(4, 4, 4), **{**SMALL, "classes": LATENT + 1}), tmp_path / "many"
        )
    assert list(tmp_path.iterdir()) == []
