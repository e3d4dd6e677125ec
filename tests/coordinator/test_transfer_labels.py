"""A task's images: who knows their classes, which are apart from which, and what the best round is chosen by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.coordinator.distillation import job as distillation
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.task.creation import DISTIL, LOCAL, ROUNDS, make_task
from edgestill.coordinator.task.task import Task
from edgestill.runtime.bundle import wire
from edgestill.runtime.device.local_training import Transfer, load_labels
from edgestill.runtime.errors import UsageError
from tests.support.coordinator_round import Clock, enrol, submit
from tests.support.handmade_bundle import CHANNELS, CLASSES, SIZE, give_common_head, write_handmade_bundle

pytestmark = pytest.mark.unit
SAMPLES = 60


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Bundles `one` and `two`, and the sets `transfer` and `test`, which share five images."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2 * SAMPLES, SIZE, SIZE, CHANNELS), np.uint8)
    labels = np.arange(2 * SAMPLES) % CLASSES
    np.savez(tmp_path / "transfer.npz", x=images[:SAMPLES], y=labels[:SAMPLES])
    np.savez(tmp_path / "test.npz", x=images[SAMPLES - 5 :], y=labels[SAMPLES - 5 :])
    for seed, name in enumerate(("one", "two")):
        write_handmade_bundle(tmp_path / name, seed=seed)
    return tmp_path


def make(place: Path, blobs: FileBlobs, warnings: list[str] | None = None, **fields: Any) -> Task:
    described = {
        "name": "birds", "bundles": [str(place / "one")], "global_bundle": str(place / "two"),
        "transfer": str(place / "transfer.npz"), "goal": 1, "over_selection": 1.0, **fields,
    }  # fmt: skip
    warn = (lambda _: None) if warnings is None else warnings.append
    return make_task(described, blobs.put_file, warn)


def images_of(blobs: FileBlobs, digest: str) -> set[bytes]:
    return {image.tobytes() for image in Transfer.load(blobs.path(digest)).images}


def test_the_classes_lie_apart_and_no_device_may_read_them(place: Path, blobs: FileBlobs) -> None:
    service = Service(Store(), blobs, Clock())
    task = service.create_task(make(place, blobs, transfer_labels=True, test=str(place / "test.npz")))
    assert task.transfer.labelled and set(wire.load(blobs.path(task.transfer.blob)).arrays) == {"images"}
    with np.load(place / "transfer.npz") as file:
        known = {image.transpose(2, 0, 1).tobytes(): label for image, label in zip(file["x"], file["y"], strict=True)}
    transfer = Transfer.load(blobs.path(task.transfer.blob))
    labels = load_labels(blobs.path(task.transfer.labels))
    assert [known[image.tobytes()] for image in transfer.images] == labels.tolist()

    device = enrol(service)
    told = service.assignment(device)
    assert "labels" not in told["task"]["transfer"] and task.transfer.labels not in str(told)
    assert service.readable_blob(device, task.transfer.blob) == task.transfer.size_bytes
    for secret in (task.transfer.labels, task.test.blob, task.validation.blob):
        with pytest.raises(Problem, match="no such blob"):
            service.readable_blob(device, secret)


def test_step_5_learns_the_classes(place: Path, blobs: FileBlobs) -> None:
    """The published outputs are those of a training on the same set with its classes beside its images."""
    task = make(place, blobs, transfer_labels=True, distil={"alpha": 0.3, "learning_rate": 0.01})
    service = Service(Store(), blobs, Clock(), engine_threads=1)
    service.create_task(task)
    device = enrol(service)
    service.ask(device, {})
    submit(service, task, device, "birds.1")
    (job,) = service.tick()
    inputs = service._runner._inputs(job)
    transfer = Transfer.load(blobs.path(task.transfer.blob))
    beside = replace(transfer, labels=load_labels(blobs.path(task.transfer.labels)))
    beside.save(place / "beside.safetensors")
    together = replace(task.transfer, blob=blobs.put_file(place / "beside.safetensors"), labels=None)
    without = replace(task.transfer, labels=None, labelled=False)
    bodies = [
        distillation.compute(job, replace(inputs, task=replace(task, transfer=one)), blobs, threads=1).body
        for one in (task.transfer, together, without)
    ]
    assert bodies[0] == bodies[1] != bodies[2]


def test_labels_that_do_not_fit_end_the_round_with_the_reason(place: Path, blobs: FileBlobs) -> None:
    task = make(place, blobs, transfer_labels=True)
    wire.save(place / "few.safetensors", {"labels": np.zeros(3, np.int64)})
    service = Service(Store(), blobs, Clock())
    transfer = replace(task.transfer, labels=blobs.put_file(place / "few.safetensors"))
    service.create_task(replace(task, transfer=transfer))
    device = enrol(service)
    service.ask(device, {})
    submit(service, task, device, "birds.1")
    (job,) = service.tick()
    service.run_job(job, place)
    assert "54 samples and 3 labels" in str(service.rounds("birds")[0].reason)


def test_what_the_best_round_is_chosen_by_is_held_out_of_a_labelled_transfer_set(
    place: Path, blobs: FileBlobs
) -> None:
    whole = make(place, blobs, transfer_labels=True)
    assert (whole.transfer.samples, whole.validation.samples) == (54, 6)
    part = make(place, blobs, transfer_labels=True, transfer_count=20)
    assert (part.transfer.samples, part.validation.samples) == (20, 10)
    for task in (whole, part):
        assert not images_of(blobs, task.transfer.blob) & images_of(blobs, task.validation.blob)
    assert make(place, blobs).validation is None, "nobody knows the classes"
    assert make(place, blobs, transfer_labels=True, global_bundle=None).validation is None, "there is no model"


def test_test_and_validation_images_are_apart_from_the_transfer_set(place: Path, blobs: FileBlobs) -> None:
    warnings: list[str] = []
    test = str(place / "test.npz")
    task = make(place, blobs, warnings, transfer_labels=True, test=test, distil={"alpha": 0.5})
    assert task.test.samples == SAMPLES and "5 samples of the test set" in warnings[0]
    sets = [images_of(blobs, one.blob) for one in (task.transfer, task.test, task.validation)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    with pytest.raises(UsageError, match="every sample of --test is in the transfer set"):
        make(place, blobs, test=str(place / "transfer.npz"))
    with pytest.raises(UsageError, match="every sample of --validation is in the test set"):
        make(place, blobs, test=test, validation=test)


def test_one_data_set_without_splits_serves_for_everything(place: Path, blobs: FileBlobs) -> None:
    warnings: list[str] = []
    same = str(place / "transfer.npz")
    task = make(place, blobs, warnings, transfer_labels=True, transfer_count=30, test=same)
    assert (task.transfer.samples, task.validation.samples, task.test.samples) == (30, 15, SAMPLES - 45)
    sets = [images_of(blobs, one.blob) for one in (task.transfer, task.test, task.validation)]
    assert len(set.union(*sets)) == SAMPLES
    said = " ".join(warnings)
    assert all(what in said for what in ("in the transfer set", "in the validation set", "15 validation images"))


def test_a_transfer_set_of_one_sample_holds_none_out(place: Path, blobs: FileBlobs) -> None:
    with np.load(place / "transfer.npz") as file:
        np.savez(place / "same.npz", x=np.repeat(file["x"][:1], 20, axis=0), y=np.repeat(file["y"][:1], 20))
    warnings: list[str] = []
    task = make(place, blobs, warnings, transfer=str(place / "same.npz"), transfer_labels=True)
    assert task.validation is None and any("the same samples again and again" in text for text in warnings)


def test_validation_images_that_choose_nothing_are_named(place: Path, blobs: FileBlobs) -> None:
    warnings: list[str] = []
    make(place, blobs, warnings, validation=str(place / "test.npz"), global_bundle=None)
    assert any("--validation is not used" in text for text in warnings)
    warnings.clear()
    make(place, blobs, warnings, validation=str(place / "test.npz"))
    assert not any("--validation is not used" in text for text in warnings)


def test_the_defaults_are_settings_that_convince(place: Path, blobs: FileBlobs) -> None:
    task = make(place, blobs)
    assert (task.rounds, task.local.epochs, task.local.alpha, task.local.augment) == (8, 2, 0.8, "flip")
    assert task.distil.epochs == 8 and task.distil.learning_rate is None, "0.002 is for AdamW"
    assert (ROUNDS, LOCAL["alpha"], DISTIL["epochs"]) == (8, 0.8, 8)
    given = make(place, blobs, rounds=3, local={"epochs": 1, "augment": ""}, distil={"learning_rate": 0.1})
    assert (given.rounds, given.local.epochs, given.local.augment, given.local.alpha) == (3, 1, "", 0.8)
    assert (given.distil.learning_rate, given.distil.epochs) == (0.1, 8)


def test_heads_are_compared(place: Path, blobs: FileBlobs) -> None:
    warnings: list[str] = []
    assert not make(place, blobs, warnings).common_head
    assert not any("heads are mixed" in one for one in warnings)
    with pytest.raises(UsageError, match="the task wants the common head, and .*one or .*two has"):
        make(place, blobs, common_head=True)
    give_common_head(place / "one")
    assert not make(place, blobs, warnings).common_head
    assert any("heads are mixed" in one and "two has an output layer of its own" in one for one in warnings)
    give_common_head(place / "two")
    warnings.clear()
    task = make(place, blobs, warnings, common_head=True)
    assert task.common_head and task.risks() == [] and warnings == []
    # what calls itself so and is not
    state = wire.load(place / "two/state.safetensors").arrays
    state["output.weight"] = state["output.weight"] * 2
    give_common_head_of(place / "two", state)
    with pytest.raises(UsageError, match="is not the common head that its manifest names"):
        make(place, blobs)


def give_common_head_of(folder: Path, state: dict[str, np.ndarray]) -> None:
    from tests.support.handmade_bundle import file_records, write_manifest

    wire.save(folder / "state.safetensors", state)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, manifest | {"files": file_records(folder)})
