"""One virtual device's part of a round, run in a worker: the code of `edgestill join` with nothing but files between
rounds and no sockets.

A worker keeps one engine open for every student, and the data dealt out, from job to job.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from benchmarks.simulation.attack import spoil
from coordinator.blobs import FileBlobs
from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.data import load_splits
from edge_runtime.device import Assignment, Device, fetch_assignment
from edge_runtime.engines import Engine, open_engine
from edge_runtime.federated_data import DeviceData, deal
from edge_runtime.journal import WorkMemory
from edge_runtime.local_round import Equipment, score_tests
from edge_runtime.local_training import LocalSettings, Transfer, train_locally
from edge_runtime.outputs import pack, unpack


@dataclass(frozen=True)
class Setup:
    """What all devices of a simulation share; `form_of` is a bundle that says what images look like."""

    folder: str
    form_of: str
    data: str
    devices: int
    gamma: float
    seed: int

    @property
    def blobs(self) -> Path:
        return Path(self.folder) / "blobs"

    def state_path(self, index: int) -> Path:
        """The student of a device between rounds."""
        return Path(self.folder) / "devices" / f"{index:06d}.safetensors"

    def pending_path(self, index: int) -> Path:
        """What it becomes when the coordinator takes the upload."""
        return self.state_path(index).with_suffix(".pending")


@dataclass(frozen=True)
class RoundJob:
    """One training of one device; JSON values are those of docs/federation.md."""

    setup: Setup
    index: int
    device: str
    assignment: Mapping[str, Any]
    work: Mapping[str, Any]
    attack: str | None
    expected: Mapping[str, tuple[int, ...]]
    engine: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a device sends; `body` is None when it gave the round up, `reason` says why."""

    round_name: str
    body: bytes | None
    content_encoding: str
    report: Mapping[str, Any]
    bytes_down: int
    setup_bytes: int
    reason: str | None = None

    @property
    def after(self) -> Mapping[str, float | None]:
        """Accuracies after the training."""
        return self.report.get("after", {})


@dataclass(frozen=True)
class AloneJob:
    """The comparison: as many epochs as in `times` rounds, on private data alone."""

    setup: Setup
    index: int
    assignment: Mapping[str, Any]
    times: int
    engine: str | None = None


class InProcessCoordinator:
    """A `Coordinator` for one round: hands out what the service has given already, and keeps what comes back."""

    def __init__(self, job: RoundJob | AloneJob) -> None:
        self._job = job
        self._blobs = FileBlobs(job.setup.blobs)
        self.body: bytes | None = None
        self.content_encoding = "identity"
        self.report_sent: Mapping[str, Any] = {}
        self._fetched: dict[str, int] = {}

    @property
    def bytes_down(self) -> int:
        """Of all blobs that were asked for, each once: a device keeps what it has downloaded."""
        return sum(self._fetched.values())

    def enrol(self, code: str, info: Mapping[str, Any]) -> dict[str, Any]:
        raise PermissionError("a virtual device is enrolled before its first round")

    def assignment(self) -> dict[str, Any]:
        return dict(self._job.assignment)

    def work(self, status: Mapping[str, Any], wait_s: float) -> dict[str, Any] | None:
        return None

    def blob(self, digest: str, size_bytes: int, target: Path) -> Path:
        """The blob where it lies: thousands of devices need no copy each."""
        self._fetched[digest] = size_bytes
        return self._blobs.path(digest)

    def submit(self, round_name: str, device: str, body: bytes, content_encoding: str) -> None:
        job = self._job
        if isinstance(job, RoundJob) and job.attack is not None:
            arrays, metadata = unpack(body, content_encoding, job.expected)
            spoiled = spoil(arrays, job.attack, int(job.work["seed"]))
            packed = pack(spoiled, metadata["precision"], metadata)
            body, content_encoding = packed.body, packed.content_encoding
        self.body, self.content_encoding = body, content_encoding

    def report(self, round_name: str, device: str, report: Mapping[str, Any]) -> None:
        self.report_sent = report


def run_round(job: RoundJob) -> Outcome:
    """Trains, packs and leaves the new student at `pending_path`; the same job gives the same bytes anywhere."""
    coordinator, setup = InProcessCoordinator(job), job.setup
    state_path = setup.state_path(job.index)
    first = not state_path.exists()
    student = None if first else wire.load(state_path).arrays
    keep = WorkMemory(Path(setup.folder) / "no-copies", student)
    equipment = _equip(setup, job.index, fetch_assignment(coordinator, keep), job.engine)
    setup_bytes = coordinator.bytes_down
    reasons: list[str] = []

    def watch(event: str, /, **details: Any) -> None:
        if event == "given up":
            reasons.append(str(details["reason"]))

    device = Device(
        job.device, coordinator, keep, equipment, conditions=None,
        clock=lambda: 0.0, sleep=lambda _: None, watch=watch,
    )  # fmt: skip
    report = device.run_round(job.work)
    if report is not None:
        _write(setup.pending_path(job.index), keep.student(equipment.bundle))
    return Outcome(
        str(job.work["round"]),
        None if report is None else coordinator.body,
        coordinator.content_encoding,
        coordinator.report_sent,
        coordinator.bytes_down - setup_bytes,
        setup_bytes if first else 0,
        reasons[-1] if reasons else None,
    )


def train_alone(job: AloneJob) -> dict[str, float | None]:
    """Accuracies of the device's student after as many epochs without any exchange."""
    coordinator = InProcessCoordinator(job)
    keep = WorkMemory(Path(job.setup.folder) / "no-copies")
    kit = _equip(job.setup, job.index, fetch_assignment(coordinator, keep), job.engine)
    settings = LocalSettings.from_json(kit.task.get("local", {}))
    settings = replace(settings, epochs=job.times * settings.epochs)
    digest = hashlib.sha256(f"alone {job.setup.seed} {job.index}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    initial = kit.bundle.initial_state()
    result = train_locally(kit.engine, kit.bundle, kit.private, None, None, settings, seed, initial, None)
    kit.engine.load_state(result.state)
    return score_tests(kit)


def _equip(setup: Setup, index: int, assignment: Assignment, engine_name: str | None) -> Equipment:
    bundle, engine = _opened(str(assignment.bundle_path), engine_name)
    data = _dealt(setup)[index]
    transfer = None if assignment.transfer_path is None else _transfer(str(assignment.transfer_path))
    tests = {"t_priv": data.t_priv, "t_uni": data.t_uni}
    return Equipment(assignment.task, bundle, engine, data.train, transfer, tests)


@cache
def _opened(path: str, engine_name: str | None) -> tuple[Bundle, Engine]:
    bundle = Bundle.open(path)
    return bundle, open_engine(bundle, engine_name, threads=1)


@lru_cache(maxsize=1)
def _dealt(setup: Setup) -> list[DeviceData]:
    with Bundle.open(setup.form_of) as bundle:
        splits = load_splits(setup.data, bundle.input, bundle.classes)
    return deal(splits.train, setup.devices, setup.gamma, setup.seed, held_out=splits.test)


@lru_cache(maxsize=2)
def _transfer(path: str) -> Transfer:
    return Transfer.load(path)


def _write(path: Path, state: Mapping[str, Any]) -> None:
    """Atomically, but not durably: a simulation that is killed starts anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        for chunk in wire.encode(state):
            file.write(chunk)
    os.replace(partial, path)
