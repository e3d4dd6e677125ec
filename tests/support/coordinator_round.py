"""A small federation for tests of the coordinator: a task on handmade bundles, devices that upload given numbers."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import Blobs
from edgestill.coordinator.store.records import DeviceRecord
from edgestill.coordinator.task.task import Task, parse_task
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.device.local_training import Transfer, parameters_of
from edgestill.runtime.device.outputs import pack
from tests.support.handmade_bundle import CHANNELS, CLASSES, LATENT, SIZE, write_handmade_bundle

SAMPLES = 12
INFO = {"name": "a device", "engines": ["onnxruntime"], "memory_bytes": 10**9}


@dataclass
class Clock:
    """A clock that stands still until it is told to move."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def describe_task(folder: Path, blobs: Blobs, **fields: Any) -> Task:
    """Writes a bundle, a transfer set and a test set, stores them, and returns a task of them.

    `global_student=True` gives it a global student.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = write_handmade_bundle(folder / "bundle", objective="lkd")
    packed = Path(shutil.make_archive(str(folder / "packed"), "zip", source))
    entry = {
        "student": "linear", "bundle": blobs.put_file(packed), "size_bytes": packed.stat().st_size,
        "engines": ["onnxruntime"], "memory_bytes": 1000, "parameters": 10,
        "model_digest": Bundle.open(source).model_digest,
    }  # fmt: skip
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (SAMPLES, CHANNELS, SIZE, SIZE), np.uint8)
    labels = np.arange(SAMPLES, dtype=np.int64) % CLASSES
    Transfer(images, labels).save(folder / "samples.safetensors")
    samples = {"blob": blobs.put_file(folder / "samples.safetensors"), "samples": SAMPLES, "labelled": True,
               "size_bytes": (folder / "samples.safetensors").stat().st_size}  # fmt: skip
    if fields.pop("global_student", False):
        fields["global_student"] = entry
    if fields.get("exchange") == "parameters":
        bundle = Bundle.open(source)
        shapes = {name: list(a.shape) for name, a in parameters_of(bundle, bundle.initial_state()).items()}
        fields["parameter_shapes"] = shapes
    defaults = {"name": "birds", "students": [entry], "transfer": samples, "test": samples, "rounds": 2,
                "latent_size": LATENT, "classes": CLASSES, "goal": 2, "minimum": 1, "over_selection": 1.5,
                "deadline_s": 60.0, "precision": "fp32"}  # fmt: skip
    return parse_task({**defaults, **fields})


def enrol(service: Service, task: str = "birds", **info: Any) -> DeviceRecord:
    """A new device of the task."""
    answer = service.enrol(service.issue_code(task), {**INFO, **info})
    return service.authenticate(answer["token"])


def own_arrays(task: Task, round_name: str, device: str) -> dict[str, np.ndarray]:
    """Numbers that depend on nothing but the names."""
    random = np.random.default_rng(list(f"{round_name}/{device}".encode()))
    shapes = task.expected_upload()
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Sent:
    """An upload as a device sends it."""

    body: bytes
    digest: str
    content_encoding: str


def make_upload(task: Task, round_name: str, device: str, **metadata: str) -> Sent:
    packed = pack(own_arrays(task, round_name, device), task.precision, {"samples": "5", **metadata})
    return Sent(packed.body, hashlib.sha256(packed.body).hexdigest(), packed.content_encoding)


def submit(service: Service, task: Task, device: DeviceRecord, round_name: str) -> str:
    sent = make_upload(task, round_name, device.name)
    return service.submit(device, round_name, device.name, sent.body, sent.digest, sent.content_encoding)


def run_due(service: Service, folder: Path) -> int:
    """Ticks and runs what is due; how many steps that were."""
    jobs = service.tick()
    for job in jobs:
        service.run_job(job, folder)
    return len(jobs)


def add_task(service: Service, folder: Path, **fields: Any) -> Task:
    return service.create_task(describe_task(folder / "task", service.blobs, **fields))
