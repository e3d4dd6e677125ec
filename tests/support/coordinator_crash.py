"""A whole task played against a coordinator on disk whose durable writes can be made to fail, one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.records import DeviceRecord
from tests.support.coordinator_round import describe_task, run_due, submit

DEVICES = 2


class Crash(BaseException):
    """The process is gone; nothing may catch it and go on."""


def crash() -> None:
    raise Crash


@dataclass
class Faults:
    """Counts durable writes; at the N-th calls `die`, before it reaches the disk or right after."""

    number: int = 0
    when: str = "before"
    die: Callable[[], None] = crash
    writes: int = 0

    def around(self, write: Callable[[], Any]) -> Any:
        self.writes += 1
        hit = self.writes == self.number
        if hit and self.when == "before":
            self.die()
        result = write()
        if hit:
            self.die()
        return result


class FaultyStore(Store):
    def __init__(self, url: str, faults: Faults) -> None:
        super().__init__(url)
        self._faults = faults

    def _commit(self, connection: Any) -> None:
        self._faults.around(lambda: super(FaultyStore, self)._commit(connection))


class FaultyBlobs(FileBlobs):
    def __init__(self, folder: Path, faults: Faults) -> None:
        super().__init__(folder)
        self._faults = faults

    def put(self, data: bytes | bytearray | Iterable[bytes], digest: str | None = None) -> str:
        return str(self._faults.around(lambda: super(FaultyBlobs, self).put(data, digest)))


class Steps:
    """A clock that a restart moves on by 20 s, past the dead process's right to run step 5."""

    def __init__(self, path: Path) -> None:
        starts = len(_lines(path))
        _note(path, "started")
        self._now_s = 1000.0 + 20 * starts

    def __call__(self) -> float:
        return self._now_s


def crashing_service(folder: Path, faults: Faults) -> Service:
    """A coordinator on the folder, as a process would open it when it starts."""
    store = FaultyStore(f"sqlite:///{folder / 'coordinator.db'}", faults)
    return Service(store, FaultyBlobs(folder / "blobs", faults), Steps(folder / "clock"))


def play(service: Service, folder: Path) -> None:
    """Goes on from wherever the store and the device's own notes stand, until the task is finished."""
    names = [task.name for task in service.tasks()]
    if "birds" not in names:
        service.create_task(
            describe_task(
                folder / f"task-{os.urandom(4).hex()}", service.blobs, global_student=True, rounds=1
            )
        )
    task = service.tasks()[0].task
    notes = folder / "acknowledged"
    while len(tokens := _lines(folder / "tokens")) < DEVICES:
        _note(
            folder / "tokens",
            service.enrol(service.issue_code("birds"), {"engines": ["onnxruntime"]})["token"],
        )
    devices: list[DeviceRecord] = [service.authenticate(token) for token in tokens]
    for _ in range(10):
        for device in devices:
            try:
                work = service.ask(device, {})
            except Problem as problem:
                assert problem.kind == "task_finished"
                return
            if work is not None and submit(service, task, device, work["round"]) in ("created", "same"):
                _note(notes, f"{work['round']} {device.name}")
        run_due(service, folder)
    raise AssertionError("the task does not finish")


def check(service: Service, folder: Path) -> None:
    """No acknowledged upload lost, none counted twice, the round completed."""
    (only,) = service.rounds("birds")
    assert only.phase == "completed", only.reason
    assert only.published is not None and service.blobs.size(only.published) == only.published_bytes
    acknowledged = _lines(folder / "acknowledged")
    assert {line.split()[1] for line in acknowledged} <= set(only.accepted)
    assert len(only.accepted) == len(set(only.accepted)) == only.metrics["uploads"] == DEVICES
    for device in service.devices("birds"):
        with service.store.read() as transaction:
            (upload,) = [u for u in transaction.uploads("birds", 1) if u.device == device.name] or [None]
        if upload is not None:
            kept_bytes = service.blobs.size(upload.digest) or 0
            # a restart ticks again, and then deletes what the ended round has left
            assert (kept_bytes, device.stored_bytes) in ((upload.size_bytes,) * 2, (0, 0))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
