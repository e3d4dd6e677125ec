"""Rounds that end: at deadlines, with steps 5 that fail, are taken over, are late, or wait for their turn."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import pytest

from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import FileBlobs, ObjectBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.task.task import parse_task
from tests.support.coordinator_backends import postgresql_server, postgresql_url, store_url  # noqa: F401  fixtures
from tests.support.coordinator_round import Clock, add_task, describe_task, enrol, run_due, submit

pytestmark = pytest.mark.unit


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Service:
    return Service(Store(), ObjectBlobs("memory://"), clock)


def test_a_round_whose_devices_vanish_ends_at_its_deadline(
    service: Service, clock: Clock, tmp_path: Path
) -> None:
    task = add_task(service, tmp_path, goal=2, minimum=2, over_selection=1.0)
    one, two = enrol(service), enrol(service)
    assert service.ask(one, {}) is not None and service.ask(two, {}) is not None
    submit(service, task, one, "birds.1")
    assert service.tick() == []
    clock.now_s += task.deadline_s
    assert service.tick() == []
    first = service.rounds("birds")[0]
    assert first.phase == "abandoned" and "1 of at least 2" in str(first.reason)
    # nobody has been heard of for a whole deadline: no further round is wasted
    clock.now_s += task.deadline_s
    service.tick()
    assert [one.number for one in service.rounds("birds")] == [1]
    assert service.ask(one, {})["round"] == "birds.2"  # type: ignore[index]


def test_a_minimum_at_the_deadline_is_enough(service: Service, clock: Clock, tmp_path: Path) -> None:
    task = add_task(service, tmp_path)
    one, two = enrol(service), enrol(service)
    service.ask(one, {})
    service.ask(two, {})
    submit(service, task, one, "birds.1")
    clock.now_s += task.deadline_s
    assert run_due(service, tmp_path) == 1
    assert service.rounds("birds")[0].phase == "completed"
    assert service.rounds("birds")[0].metrics["uploads"] == 1


def test_a_failing_step_abandons_the_round_with_the_reason(service: Service, tmp_path: Path) -> None:
    task = add_task(service, tmp_path, global_student=True)
    one, two = enrol(service), enrol(service)
    for device in (one, two):
        service.ask(device, {})
        submit(service, task, device, "birds.1")
    service.blobs.delete(task.transfer.blob)
    assert run_due(service, tmp_path) == 1
    first = service.rounds("birds")[0]
    assert first.phase == "abandoned" and task.transfer.blob in str(first.reason)
    assert first.published is None


def test_a_reason_names_things_and_not_this_machine_s_files(service: Service, tmp_path: Path) -> None:
    good = describe_task(tmp_path / "task", service.blobs, global_student=True, goal=1, over_selection=1.0)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("readme.txt", "no bundle")
    for number, data in enumerate((b"no samples", b"no bundle", packed.getvalue())):
        blob, described = service.blobs.put(data), good.as_json()
        place = described["transfer" if number == 0 else "global_student"]
        place |= {"blob" if number == 0 else "bundle": blob, "size_bytes": len(data)}
        name = described["name"] = f"birds-{number}"
        task = service.create_task(parse_task(described))
        device = enrol(service, name)
        service.ask(device, {})
        submit(service, task, device, f"{name}.1")
        assert run_due(service, tmp_path) == 1
        reason = str(service.rounds(name)[0].reason)
        assert ("the transfer set" if number == 0 else "the global student's bundle") in reason, reason
        assert blob in reason and tempfile.gettempdir() not in reason, reason


def test_only_one_replica_runs_a_step_and_another_takes_over(
    store_url: str,  # noqa: F811
    clock: Clock,
    tmp_path: Path,
) -> None:
    if store_url == "sqlite://":
        pytest.skip("a database in memory has no replicas")
    blobs = FileBlobs(tmp_path / "blobs")
    first, second = (Service(Store(store_url), blobs, clock) for _ in range(2))
    task = add_task(first, tmp_path)
    devices = [enrol(first), enrol(second)]
    for service, device in zip((first, second), devices, strict=True):
        assert service.ask(device, {}) is not None
    for service, device in zip((second, first), devices, strict=True):
        assert submit(service, task, device, "birds.1") == "created"
    (job,) = first.tick()
    assert second.tick() == [] and first.tick() == [job]
    clock.now_s += 10
    assert second.tick() == [] and first.tick() == [job]  # renewed
    clock.now_s += 14
    assert second.tick() == []
    clock.now_s += 10
    (taken,) = second.tick()
    assert first.tick() == []
    assert not first.fail_job(job, "too late: the right has passed to another")
    second.run_job(taken, tmp_path)
    first.run_job(job, tmp_path)
    assert [one.phase for one in first.rounds("birds")] == ["completed"]


def test_a_step_past_its_deadline_is_abandoned(service: Service, clock: Clock, tmp_path: Path) -> None:
    task = add_task(service, tmp_path, distil={"deadline_s": 30.0})
    for device in (enrol(service), enrol(service)):
        service.ask(device, {})
        submit(service, task, device, "birds.1")
    (job,) = service.tick()
    clock.now_s += 30
    assert service.tick() == []
    service.run_job(job, tmp_path)
    assert service.rounds("birds")[0].phase == "abandoned"
    assert "longer than 30 s" in str(service.rounds("birds")[0].reason)


def test_steps_wait_for_their_turn_without_losing_time(
    service: Service, clock: Clock, tmp_path: Path
) -> None:
    for name in ("cats", "birds", "ants"):
        add_task(service, tmp_path / name, name=name, goal=1, over_selection=1.0, distil={"deadline_s": 30.0})
        task = service.tasks()[-1].task
        device = enrol(service, name)
        service.ask(device, {})
        submit(service, task, device, f"{name}.1")
        clock.now_s += 1
    turns = []
    for _ in range(3):
        (job,) = service.tick(at_most=1)
        assert job.seconds_left(clock.now_s) == 30.0, "the others' steps do not count"
        clock.now_s += 29
        assert service.tick(at_most=1) == [job]
        assert service.tick(at_most=1, running=[job]) == [job]
        service.run_job(job, tmp_path)
        turns.append(job.round_name)
    assert turns == ["cats.1", "birds.1", "ants.1"], "in the order in which they were collected"
    assert {service.rounds(record.name)[0].phase for record in service.tasks()} == {"completed"}


def test_nothing_is_begun_beside_a_step_that_was_not_let_go_of(
    service: Service, clock: Clock, tmp_path: Path
) -> None:
    for name in ("ants", "birds"):
        add_task(service, tmp_path / name, name=name, goal=1, over_selection=1.0, distil={"deadline_s": 30.0})
        device = enrol(service, name)
        service.ask(device, {})
        submit(service, service.tasks()[-1].task, device, f"{name}.1")
    first, second = service.tick(at_most=2)
    clock.now_s += 30
    assert service.tick(at_most=2) == []
    assert {service.rounds(name)[0].phase for name in ("ants", "birds")} == {"abandoned"}
    for name in ("ants", "birds"):
        (device,) = service.devices(name)
        service.ask(device, {})
        submit(service, service.tasks()[name == "birds"].task, device, f"{name}.2")
    assert service.tick(2, [first, second]) == []
    (job,) = service.tick(2, [first])
    assert job.round_name == "ants.2"
    assert [one.round_name for one in service.tick(2, [])] == ["ants.2", "birds.2"]
