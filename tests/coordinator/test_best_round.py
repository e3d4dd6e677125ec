"""The best round of a task: chosen by validation images alone, kept, and marked wherever rounds are shown."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from edgestill.coordinator.dashboard.formats import format_percent
from edgestill.coordinator.dashboard.pages import Pages
from edgestill.coordinator.distillation.global_student import evaluate_global
from edgestill.coordinator.distillation.job import VALIDATION
from edgestill.coordinator.rounds.round import Published
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.task.task import Task, parse_task
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import UsageError
from tests.support.coordinator_round import Clock, describe_task, enrol, run_due, submit
from tests.support.handmade_bundle import CHANNELS, CLASSES, SIZE

pytestmark = pytest.mark.unit
DAY_S = 86_400.0


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


@pytest.fixture
def service(tmp_path: Path, blobs: FileBlobs) -> Service:
    return Service(Store(f"sqlite:///{tmp_path / 'coordinator.db'}"), blobs, Clock())


def stored(folder: Path, blobs: FileBlobs, seed: int, samples: int = 40) -> dict:
    """An entry of labelled samples in a task."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (samples, CHANNELS, SIZE, SIZE), np.uint8)
    path = folder / f"samples-{seed}.safetensors"
    Transfer(images, random.integers(0, CLASSES, samples)).save(path)
    size_bytes = path.stat().st_size
    return {"blob": blobs.put_file(path), "samples": samples, "size_bytes": size_bytes, "labelled": True}


def add(service: Service, folder: Path, blobs: FileBlobs, **fields: object) -> Task:
    described = describe_task(folder / "task", blobs, global_student=True, goal=1, over_selection=1.0, **fields)
    return service.create_task(described)


def play(service: Service, task: Task, folder: Path, rounds: int) -> None:
    device = enrol(service, task.name)
    for number in range(1, rounds + 1):
        assert service.ask(device, {}) is not None
        submit(service, task, device, f"{task.name}.{number}")
        assert run_due(service, folder) == 1


def test_the_validation_accuracy_is_that_of_the_state_which_is_kept(
    service: Service, blobs: FileBlobs, tmp_path: Path
) -> None:
    entry = stored(tmp_path, blobs, 7)
    task = add(service, tmp_path, blobs, validation=entry, rounds=3)
    play(service, task, tmp_path, 3)
    rounds, validation = service.rounds("birds"), Transfer.load(blobs.path(entry["blob"]))
    with Bundle.open(blobs.path(task.global_student.bundle)) as bundle:
        engine = open_engine(bundle, threads=1)
        found = [
            evaluate_global(bundle, engine, wire.load(blobs.path(one.student_state)).arrays, validation).accuracy
            for one in rounds
        ]
    assert [one.metrics[VALIDATION] for one in rounds] == found
    assert rounds[found.index(max(found))].best and sum(one.best for one in rounds) == 1


@pytest.mark.parametrize(
    ("validation", "best"), [((0.5, 0.7, 0.7, 0.6), 2), ((0.5, None, 0.4, 0.6), 4), ((None,) * 4, None)]
)
def test_the_first_of_the_best_wins_whatever_the_test_set_says(
    service: Service, blobs: FileBlobs, tmp_path: Path, validation: tuple, best: int | None
) -> None:
    add(service, tmp_path, blobs, rounds=4)
    device = enrol(service)
    for number, accuracy in enumerate(validation, 1):
        service.ask(device, {})
        submit(service, service.tasks()[0].task, device, f"birds.{number}")
        (job,) = service.tick()
        # the test set would choose the worst
        metrics = {"t_uni": 1 - (accuracy or 0)} | ({} if accuracy is None else {VALIDATION: accuracy})
        service._queue.end(job, Published(f"{number:064x}"), f"{number + 16:064x}", 1, metrics)
    assert service.tasks()[0].best_round == best
    assert [one.number for one in service.rounds("birds") if one.best] == ([] if best is None else [best])
    assert [one.student_state for one in service.rounds("birds")] == [f"{n + 16:064x}" for n in range(1, 5)]


def test_the_best_and_the_last_global_student_outlive_the_sweep(
    service: Service, blobs: FileBlobs, tmp_path: Path
) -> None:
    task = add(service, tmp_path, blobs, validation=stored(tmp_path, blobs, 7), rounds=4)
    play(service, task, tmp_path, 4)
    with service.store.write() as transaction:
        transaction.set_task("birds", best_round=2)
    states = [one.student_state for one in service.rounds("birds")]
    assert len(set(states)) == 4
    for path in blobs.folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 2 * DAY_S,) * 2)
    for _ in range(3):
        service.clock.now_s += 3600
        service.tick()
    assert [blobs.size(state) is not None for state in states] == [False, True, False, True]
    assert blobs.size(task.validation.blob) is not None


def test_the_best_round_is_marked_on_the_page_and_told_to_devices(
    service: Service, blobs: FileBlobs, tmp_path: Path
) -> None:
    task = add(service, tmp_path, blobs, validation=stored(tmp_path, blobs, 7), rounds=3)
    play(service, task, tmp_path, 2)
    best = service.tasks()[0].best_round
    accuracy = service.rounds("birds")[best - 1].metrics[VALIDATION]
    page = Pages(service, Settings()).task("", 0, "", "birds", 1).text
    assert page.count('class="best"') == 1 and f"validation images: {format_percent(accuracy)}" in page
    assert service.standing(service.devices("birds")[0])["best_round"] == best


def test_a_validation_set_has_labels(service: Service, blobs: FileBlobs, tmp_path: Path) -> None:
    described = describe_task(tmp_path / "task", blobs, global_student=True).as_json()
    described["validation"] = {**described["transfer"], "labelled": False}
    with pytest.raises(UsageError, match="validation.labelled"):
        parse_task(described)
