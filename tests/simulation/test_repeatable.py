"""A federation repeated: whatever devices are called, and in whatever order they enrol and upload, the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.records import DeviceRecord
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.classes import KnownClasses
from edgestill.runtime.data.dataset import load_splits
from edgestill.simulation import federation as federations
from edgestill.simulation.federation import TASK, Federation
from edgestill.simulation.pool import open_pool
from edgestill.simulation.settings import SimulationSettings
from edgestill.simulation.virtual import SeededEntropy
from edgestill.simulation.virtual_device import _dealt
from tests.support.handmade_bundle import CHANNELS, CLASSES, SIZE, draw_images, write_handmade_bundle

pytestmark = pytest.mark.simulation
DEVICES, ROUNDS = 4, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repeatable")
    random = np.random.default_rng(0)
    centres = random.integers(60, 200, (CLASSES, SIZE, SIZE, CHANNELS))

    def images(labels: np.ndarray) -> np.ndarray:
        return draw_images(random, centres, labels)

    train, test = np.arange(160) % CLASSES, np.arange(80) % CLASSES
    shown = images(train)
    np.savez(folder / "data.npz", x_train=shown, y_train=train, x_test=images(test), y_test=test)
    # a quarter of it are private images, too
    other = np.arange(30) % CLASSES
    np.savez(folder / "transfer.npz", x=np.concatenate([images(other), shown[:10]]), y=np.append(other, train[:10]))
    for seed in range(2):
        write_handmade_bundle(folder / f"student{seed}", seed=seed)
    return folder


def settings(place: Path, **given: Any) -> SimulationSettings:
    return SimulationSettings(
        devices=DEVICES, rounds=ROUNDS, bundles=(place / "student0", place / "student1"), augment="flip",
        data=str(place / "data.npz"), transfer=str(place / "transfer.npz"), transfer_labels=True, transfer_count=24,
        learning_rate=0.002, distil_learning_rate=0.002, test_samples=20, **given,
    )  # fmt: skip


class Turned(Federation):
    """Devices enrol in the opposite order, each with the code that it has, and upload in the opposite order."""

    def _enrol_all(self, codes: Sequence[str]) -> list[DeviceRecord]:
        return [self._enrol(index, code) for index, code in reversed(list(enumerate(codes)))][::-1]

    def _select(self, number: int) -> list:
        selected = super()._select(number)[::-1]
        return [(replace(turn, uploads_after_s=1.0 + place), work) for place, (turn, work) in enumerate(selected)]


def run(kind: type[Federation], given: SimulationSettings, folder: Path) -> dict[str, Any]:
    """Everything that a federation leaves behind, names aside."""
    made = kind(given, list(given.bundles), given.bundles[-1], folder)
    with open_pool(1, ray=False) as pool:
        lines = [made.run_round(number, pool) for number in range(1, given.rounds + 1)]
        alone = [made.train_alone(pool, as_many_steps=steps) for steps in (False, True)]
    rounds, names = made.service.rounds(TASK), [device.name for device in made._devices]
    metrics = [{k: v for k, v in one.metrics.items() if k != "seconds"} for one in rounds]
    states = [made._state_path(index).read_bytes() for index in range(given.devices)]
    return {
        "names": names, "arrivals": [list(one.reports) for one in rounds], "lines": lines, "alone": alone,
        "metrics": metrics, "states": states, "global": [one.student_state for one in rounds],
        "after": dict(sorted(made.tally.after.items())), "best": [one.number for one in rounds if one.best],
        "reports": [[one.reports[name]["after"] for name in names] for one in rounds],
    }  # fmt: skip


def test_names_and_orders_change_no_bit(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(place)
    first = run(Federation, given, tmp_path / "first")
    monkeypatch.setattr(federations, "SeededEntropy", lambda seed: SeededEntropy(seed + 1000))
    second = run(Turned, given, tmp_path / "second")
    assert not set(first.pop("names")) & set(second.pop("names"))
    first.pop("arrivals"), second.pop("arrivals")
    assert first == second
    assert len(first["best"]) == 1 and all(first["global"]) and len(set(first["global"])) == ROUNDS
    other = run(Federation, settings(place, seed=1), tmp_path / "other")
    assert other["states"] != first["states"] and other["global"] != first["global"]


def test_each_device_draws_its_own_batches(place: Path, tmp_path: Path) -> None:
    given = settings(place)
    made = Federation(given, list(given.bundles), given.bundles[-1], tmp_path)
    seeds = {work["seed"] for _, work in made._select(1)}
    assert len(seeds) == DEVICES


def test_transfer_and_validation_images_are_nobody_s(place: Path, tmp_path: Path) -> None:
    given = settings(place)
    made = Federation(given, list(given.bundles), given.bundles[-1], tmp_path)
    task, blobs = made.task, FileBlobs(tmp_path / "blobs")
    with open_pool(1, ray=False) as pool, Bundle.open(given.bundles[0]) as bundle:
        form = replace(bundle.input, mean=(), std=())
        dealt = _dealt(made._setup(pool), form, bundle.classes, KnownClasses((), "nobody"))
        private = load_splits(given.data, form, bundle.classes).train
    reserved = {
        image.tobytes()
        for one in (task.transfer, task.validation)
        for image in federations_images(blobs, one.blob)
    }
    mine = [image.tobytes() for device in dealt for image in device.train.images]
    assert len(set(mine)) == len(mine) and not set(mine) & reserved
    shared = sum(image.tobytes() in reserved for image in private.images)
    assert 0 < shared <= 10 and len(mine) == len(private) - shared


def federations_images(blobs: FileBlobs, digest: str) -> np.ndarray:
    from edgestill.runtime.device.local_training import Transfer

    return Transfer.load(blobs.path(digest)).images
