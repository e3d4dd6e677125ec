"""Blobs that nothing ever referred to: deleted in time, and never from under somebody who needs them."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import Blobs, FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.runtime.errors import UsageError
from tests.support.coordinator_backends import blobs, postgresql_server, postgresql_url, s3_server  # noqa: F401  fixtures
from tests.support.coordinator_round import Clock, describe_task, enrol, make_upload, run_due, submit

pytestmark = pytest.mark.unit
DAY_S = 86_400.0


class AgedBlobs(FileBlobs):
    """Blobs of a chosen age, and a call between an upload's last byte and its commit."""

    after_put: Any = None

    def age(self, *digests: str) -> None:
        for digest in digests:
            os.utime(self.path(digest), (time.time() - 2 * DAY_S,) * 2)

    def put(self, data: Any, digest: str | None = None) -> str:
        digest = super().put(data, digest)
        if self.after_put is not None:
            called, self.after_put = self.after_put, None
            called()
        return digest


@pytest.fixture
def aged(tmp_path: Path) -> AgedBlobs:
    return AgedBlobs(tmp_path / "blobs")


@pytest.fixture
def service(tmp_path: Path, aged: AgedBlobs) -> Service:
    return Service(Store(f"sqlite:///{tmp_path / 'coordinator.db'}"), aged, Clock())


def digests_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if len(path.name) == 64}


def test_what_nothing_refers_to_is_deleted_after_a_day(
    service: Service, aged: AgedBlobs, tmp_path: Path
) -> None:
    task = service.create_task(describe_task(tmp_path, aged, global_student=True, goal=2))
    devices = [enrol(service), enrol(service)]
    for device in devices:
        service.ask(device, {})
        submit(service, task, device, "birds.1")
    assert run_due(service, tmp_path) == 1
    service.ask(devices[0], {})
    submit(service, task, devices[0], "birds.2")
    service.tick()
    needed = digests_in(aged.folder)
    assert len(needed) == 5, "bundle, samples, published, the global student's state, the upload to birds.2"
    old, young = aged.put(b"nobody committed this"), aged.put(b"nor this, but it may be on its way")
    aged.age(old, *needed)
    service.clock.now_s += 3600
    service.tick()
    assert digests_in(aged.folder) == needed | {young}


def test_an_upload_on_its_way_is_not_acknowledged_without_its_bytes(
    service: Service, aged: AgedBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = service.create_task(describe_task(tmp_path, aged, deadline_s=9 * DAY_S))
    device = enrol(service)
    service.ask(device, {})
    sent = make_upload(task, "birds.1", device.name)
    aged.put(sent.body)  # and then the coordinator was killed
    aged.age(sent.digest)

    def tick() -> None:  # its sweep has asked for the age right before the bytes were put again
        with monkeypatch.context() as patch:
            patch.setattr(aged, "age_s", lambda digest: 2 * DAY_S)
            service.tick()

    aged.after_put = tick
    with pytest.raises(Problem) as caught:
        submit(service, task, device, "birds.1")
    assert caught.value.kind == "unavailable" and aged.size(sent.digest) is None
    assert submit(service, task, device, "birds.1") == "created"
    assert hashlib.sha256(aged.path(sent.digest).read_bytes()).hexdigest() == sent.digest


def test_bytes_that_are_put_again_are_young(service: Service, aged: AgedBlobs, tmp_path: Path) -> None:
    task = service.create_task(describe_task(tmp_path, aged))
    device = enrol(service)
    service.ask(device, {})
    sent = make_upload(task, "birds.1", device.name)
    aged.put(sent.body)
    aged.age(sent.digest)
    aged.after_put = service.tick
    assert submit(service, task, device, "birds.1") == "created"
    assert aged.size(sent.digest) == len(sent.body)


def test_a_task_is_not_created_on_blobs_that_are_gone(
    service: Service, aged: AgedBlobs, tmp_path: Path
) -> None:
    task = describe_task(tmp_path, aged)
    aged.age(task.transfer.blob)
    service.tick()
    with pytest.raises(UsageError, match="transfer"):
        service.create_task(task)


@pytest.mark.parametrize("method", ["delete", "age_s", "older_than"])
def test_a_folder_that_does_not_obey_keeps_no_round_from_its_step_5(
    service: Service, aged: AgedBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    task = service.create_task(describe_task(tmp_path, aged, goal=1))
    aged.age(aged.put(b"nobody committed this"))
    device = enrol(service)
    service.ask(device, {})
    submit(service, task, device, "birds.1")

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(aged, method, refuse)
    assert run_due(service, tmp_path) == 1
    assert service.rounds("birds")[0].phase == "completed"


def test_a_look_at_all_blobs_comes_to_its_end_however_long_it_takes(
    service: Service, aged: AgedBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = service.create_task(describe_task(tmp_path, aged))
    orphan = aged.put(b"nobody committed this")
    aged.age(orphan)
    monkeypatch.setattr(aged, "older_than", lambda _: iter([task.transfer.blob] * 250 + [orphan]))
    for _ in range(3):  # a hundred a tick; the next look falls due between two of them
        service.tick()
        service.clock.now_s += 2 * 3600
    assert aged.size(orphan) is None and aged.size(task.transfer.blob)


@pytest.mark.contract
def test_no_task_appears_while_all_are_locked(
    postgresql_url: str,  # noqa: F811
    aged: AgedBlobs,
    tmp_path: Path,
) -> None:
    """Else it could be created on a blob that another replica is about to delete."""
    here, there = Store(postgresql_url), Service(Store(postgresql_url), aged, Clock())
    task = describe_task(tmp_path, aged)
    with ThreadPoolExecutor(1) as pool:
        with here.write() as transaction:
            transaction.lock_all_tasks()
            creating = pool.submit(there.create_task, task)
            assert not wait([creating], timeout=1.0).done
            aged.delete(task.transfer.blob)
        with pytest.raises(UsageError, match="transfer"):
            creating.result(timeout=30)
    here.close()
    there.store.close()


def test_a_database_in_memory_takes_nothing_for_an_orphan(aged: AgedBlobs) -> None:
    digest = aged.put(b"of a run before")
    aged.age(digest)
    Service(Store(), aged, Clock()).tick()
    assert aged.size(digest)


@pytest.mark.contract
def test_ages_are_those_of_the_place(blobs: Blobs) -> None:  # noqa: F811
    digest = blobs.put(b"bytes")
    assert list(blobs.older_than(3600)) == []
    assert list(blobs.older_than(-3600)) == [digest]
    assert abs(blobs.age_s(digest) or 0.0) < 3600 and blobs.age_s("0" * 64) is None
