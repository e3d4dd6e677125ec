"""Whole rounds with every objective: devices and the coordinator's step 5, on small exported students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from edgestill.simulation.federation import Federation
from edgestill.simulation.pool import open_pool
from edgestill.simulation.settings import SimulationSettings

pytestmark = pytest.mark.simulation
CLASSES, SIZE, LATENT = 3, 8, 5
OBJECTIVES = {
    "lkd": Objective("lkd"), "crd": Objective("crd", negatives=12, features=6), "lpd": Objective("lpd"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle an objective, private data and a transfer set."""
    folder = tmp_path_factory.mktemp("objectives")
    for name, objective in OBJECTIVES.items():
        options = ExportOptions(
            widths=(4, 4, 4), latent_size=LATENT, classes=CLASSES, batch=8, input=InputSpec((3, SIZE, SIZE)),
            objective=objective, engines=("onnxruntime",),
        )  # fmt: skip
        export_bundle(options, folder / name)
    draw = np.random.default_rng(0)
    labels = np.arange(120) % CLASSES
    images = (draw.integers(0, 90, (120, SIZE, SIZE, 3)) + 80 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(folder / "d.npz", x_train=images[:90], y_train=labels[:90], x_test=images[90:], y_test=labels[90:])
    np.savez(folder / "t.npz", x=draw.integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8))
    return folder


def federate(place: Path, work: Path, devices: tuple[str, ...], whole: str | None) -> tuple[list[dict], Federation]:
    settings = SimulationSettings(
        devices=4, rounds=2, gamma=5.0, bundles=tuple(place / name for name in devices), batch=8, align=True,
        global_bundle=None if whole is None else place / whole, mode="consensus" if whole is None else "global",
        data=str(place / "d.npz"), transfer=str(place / "t.npz"), transfer_count=24, test_samples=20,
        distil_epochs=2,
    )  # fmt: skip
    bundles, global_bundle = list(settings.bundles), settings.global_bundle
    federation = Federation(settings, bundles, global_bundle, work)
    with open_pool(1, ray=False) as pool:
        return [federation.run_round(number, pool) for number in (1, 2)], federation


def heads(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: array for name, array in state.items() if name.startswith("crd.")}


@pytest.mark.parametrize(("devices", "whole"), [(("crd",), "crd"), (("lpd",), "lpd"), (("crd", "lpd", "lkd"), None)])
def test_rounds_with_relational_students(
    place: Path, tmp_path: Path, devices: tuple[str, ...], whole: str | None
) -> None:
    lines, federation = federate(place, tmp_path, devices, whole)
    assert [line["phase"] for line in lines] == ["completed", "completed"]
    assert federation.refusals() == {} and all(line["accepted"] == 4 for line in lines)
    assert lines[1]["published"] != lines[0]["published"]
    overview = federation.service.rounds("simulation")[-1]
    if whole is not None:
        assert overview.metrics["distil_steps"] == 2 * 3 and np.isfinite(overview.metrics["distil_loss"])
    if devices == ("crd",):
        # in round 1 nothing is published yet; in round 2 the heads learn from what is
        initial = heads(Bundle.open(place / "crd").initial_state())
        state = heads(wire.load(tmp_path / "devices" / "000000.safetensors").arrays)
        assert initial and any((state[name] != initial[name]).any() for name in initial)
