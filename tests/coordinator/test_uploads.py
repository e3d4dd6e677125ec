"""Uploads that share a commit, and the deletion of what ended rounds have left."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import FileBlobs, ObjectBlobs
from edgestill.coordinator.store.database import Store, StoreError
from edgestill.coordinator.store.group_commit import GroupCommit
from edgestill.coordinator.store.records import DeviceRecord
from edgestill.coordinator.task.task import Task
from edgestill.runtime.device.outputs import MOST_CLASS_COUNTS, pack, unpack
from tests.support.coordinator_round import (
    Clock,
    describe_task,
    enrol,
    make_upload,
    own_arrays,
    run_due,
    submit,
)

pytestmark = pytest.mark.unit


def wait_until(true: Any) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it does not come true")


def in_threads(calls: Iterable[Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_calls_that_wait_are_run_together_and_each_gets_its_own_result() -> None:
    first_runs, go_on = threading.Event(), threading.Event()
    batches: list[list[int]] = []
    results: dict[int, int] = {}

    def run(items: list[int]) -> list[int]:
        batches.append(sorted(items))
        first_runs.set()
        assert go_on.wait(10)
        return [item * item for item in items]

    together: GroupCommit[int, int] = GroupCommit(run)

    def call(item: int) -> None:
        results[item] = together(item)

    threads = in_threads([lambda: call(0)])
    assert first_runs.wait(10)
    threads += in_threads([lambda item=item: call(item) for item in range(1, 8)])
    wait_until(lambda: len(together._waiting) == 7)
    go_on.set()
    for thread in threads:
        thread.join()
    assert batches == [[0], [1, 2, 3, 4, 5, 6, 7]]
    assert results == {item: item * item for item in range(8)}


def test_what_a_run_raises_all_of_its_callers_get_and_no_one_else() -> None:
    def run(items: list[str]) -> list[str]:
        if "bad" in items:
            raise ValueError("bad")
        return items

    together: GroupCommit[str, str] = GroupCommit(run)
    with pytest.raises(ValueError, match="bad"):
        together("bad")
    assert together("good") == "good"


def test_every_caller_gets_an_error_of_its_own() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def run(items: list[int]) -> list[int]:
        entered.set()
        go_on.wait(30)
        raise StoreError(f"no room for {len(items)}", "make room")

    together: GroupCommit[int, int] = GroupCommit(run)
    caught: list[StoreError] = []

    def call(item: int) -> None:
        with pytest.raises(StoreError) as error:
            together(item)
        caught.append(error.value)

    threads = in_threads([lambda: call(0)])
    assert entered.wait(30)
    threads += in_threads([lambda item=item: call(item) for item in (1, 2, 3)])
    wait_until(lambda: len(together._waiting) == 3)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len({id(error) for error in caught}) == 4 and len({id(error.__cause__) for error in caught}) == 2
    assert sorted(error.message for error in caught) == ["no room for 1"] + ["no room for 3"] * 3
    assert {error.hint for error in caught} == {"make room"}


@pytest.mark.parametrize("encoding", ["identity", "zstd"])
def test_an_upload_has_room_for_the_largest_counts_of_most_classes(encoding: str) -> None:
    counts, latents = [999_999_999] * MOST_CLASS_COUNTS, np.zeros((2, 3), np.float32)
    metadata = {"samples": "999999999", "class_counts": json.dumps(counts, separators=(",", ":"))}
    body = pack({"latents": latents}, "int8", metadata, encoding == "zstd")
    _, read = unpack(body.body, body.content_encoding, {"latents": (2, 3)})
    assert body.content_encoding == encoding and json.loads(read["class_counts"]) == counts


class CountingStore(Store):
    commits = 0

    def _commit(self, connection: Any) -> None:
        self.commits += 1
        super()._commit(connection)


def test_uploads_share_a_commit_and_a_refused_one_undoes_no_other(tmp_path: Path) -> None:
    store = CountingStore(f"sqlite:///{tmp_path / 'coordinator.db'}")
    service = Service(store, FileBlobs(tmp_path / "blobs"), Clock())
    task = service.create_task(
        describe_task(tmp_path / "task", service.blobs, goal=3, over_selection=2.0, deadline_s=60.0)
    )
    devices = [enrol(service) for _ in range(6)]
    for device in devices:
        assert service.ask(device, {}) is not None
    answers: dict[str, str] = {}

    def upload(device: DeviceRecord) -> None:
        try:
            answers[device.name] = submit(service, task, device, "birds.1")
        except Problem as problem:
            answers[device.name] = problem.kind

    with store.write():  # nobody else can commit meanwhile
        threads = in_threads([lambda device=device: upload(device) for device in devices])
        accept = service._uploads._accept
        wait_until(lambda: len(accept._waiting) == 5 and accept._turn.locked())
        before = store.commits
    for thread in threads:
        thread.join()
    assert store.commits - before == 3, "the empty one here, the first upload, and the other five"
    assert sorted(answers.values()) == ["created"] * 3 + ["late"] * 3
    (only,) = service.rounds("birds")
    assert only.phase == "aggregating"
    assert set(only.accepted) == {name for name, answer in answers.items() if answer == "created"}
    for device in service.devices("birds"):
        sent = make_upload(task, "birds.1", device.name)
        assert device.stored_bytes == (len(sent.body) if device.name in only.accepted else 0)


class Federation:
    """A task of two devices whose first round is completed."""

    def __init__(self, folder: Path, blobs: Any = None) -> None:
        self.folder, self.clock = folder, Clock()
        self.url = f"sqlite:///{folder / 'coordinator.db'}"
        self.blobs = blobs or ObjectBlobs("memory://")
        self.service = self.start()
        self.task: Task = self.service.create_task(
            describe_task(folder / "task", self.blobs, rounds=3, over_selection=1.0, global_student=True)
        )
        self.devices = [enrol(self.service), enrol(self.service)]

    def start(self) -> Service:
        return Service(Store(self.url), self.blobs, self.clock)

    def complete(self, round_name: str) -> list[str]:
        """Plays a round to its end without the tick that follows; the digests of its uploads."""
        digests = []
        for device in self.devices:
            assert self.service.ask(device, {})["round"] == round_name
            digests.append(make_upload(self.task, round_name, device.name).digest)
            assert submit(self.service, self.task, device, round_name) == "created"
        (job,) = self.service.tick()
        self.service.run_job(job, self.folder)
        return digests

    def send(self, round_name: str, device: DeviceRecord, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        return self.service.submit(device, round_name, device.name, body, digest)

    def referred(self) -> list[str]:
        task, entry = self.task, self.task.students[0]
        (record,) = self.service.tasks()
        published = [one.published for one in self.service.rounds("birds") if one.published]
        return [entry.bundle, task.transfer.blob, str(record.student_state), *published]


def test_uploads_are_deleted_once_their_round_has_ended(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    digests = federation.complete("birds.1")
    assert all(federation.blobs.size(digest) for digest in digests)
    service = federation.service
    service.tick()
    assert [federation.blobs.size(digest) for digest in digests] == [None, None]
    assert all(federation.blobs.size(digest) for digest in federation.referred())
    assert [device.stored_bytes for device in service.devices("birds")] == [0, 0]
    assert submit(service, federation.task, federation.devices[0], "birds.1") == "same"
    second = federation.complete("birds.2")
    service.tick()
    assert [federation.blobs.size(digest) for digest in second] == [None, None]
    assert all(federation.blobs.size(digest) for digest in federation.referred())


def test_uploads_of_a_round_that_is_aggregated_are_kept(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    for device in federation.devices:
        federation.service.ask(device, {})
        submit(federation.service, federation.task, device, "birds.1")
    for _ in range(3):
        federation.service.tick()
    digests = [make_upload(federation.task, "birds.1", device.name).digest for device in federation.devices]
    assert all(federation.blobs.size(digest) for digest in digests)


def body_for(task: Task, name: str) -> bytes:
    return pack(own_arrays(task, "any", name), task.precision, {"samples": "5"}, compress=False).body


def test_the_same_bytes_in_an_open_round_are_kept(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    service, (one, two) = federation.service, federation.devices
    body = body_for(federation.task, "one")
    service.ask(one, {}), service.ask(two, {})
    assert federation.send("birds.1", one, body) == "created"
    assert submit(service, federation.task, two, "birds.1") == "created"
    assert run_due(service, tmp_path) == 1
    assert service.ask(one, {})["round"] == "birds.2"
    assert federation.send("birds.2", one, body) == "created"
    service.tick()
    assert federation.blobs.size(hashlib.sha256(body).hexdigest()) == len(body)
    assert submit(service, federation.task, two, "birds.1") == "same"


class SlowBlobs(ObjectBlobs):
    """Calls `after_put` between an upload's last byte and its commit."""

    after_put: Any = None

    def put(self, data: Any, digest: str | None = None) -> str:
        digest = super().put(data, digest)
        if self.after_put is not None:
            called, self.after_put = self.after_put, None
            called()
        return digest


def test_an_upload_whose_bytes_are_deleted_on_its_way_is_not_acknowledged(tmp_path: Path) -> None:
    blobs = SlowBlobs("memory://")
    federation = Federation(tmp_path, blobs)
    service, (one, two) = federation.service, federation.devices
    body = body_for(federation.task, "one")
    service.ask(one, {}), service.ask(two, {})
    assert federation.send("birds.1", one, body) == "created"
    assert submit(service, federation.task, two, "birds.1") == "created"
    assert run_due(service, tmp_path) == 1
    assert service.ask(one, {})["round"] == "birds.2"
    blobs.after_put = service.tick
    with pytest.raises(Problem) as caught:
        federation.send("birds.2", one, body)
    assert caught.value.kind == "unavailable" and caught.value.retry_after_s
    assert blobs.size(hashlib.sha256(body).hexdigest()) is None
    assert federation.send("birds.2", one, body) == "created"
    assert blobs.size(hashlib.sha256(body).hexdigest()) == len(body)


class Crash(BaseException):
    pass


class CrashingBlobs(ObjectBlobs):
    deletes_left: int | None = None

    def delete(self, digest: str) -> None:
        if self.deletes_left is not None:
            if self.deletes_left == 0:
                raise Crash
            self.deletes_left -= 1
        super().delete(digest)


@pytest.mark.parametrize("deleted", [0, 1])
def test_a_crash_while_deleting_is_made_up_for(tmp_path: Path, deleted: int) -> None:
    blobs = CrashingBlobs("memory://")
    federation = Federation(tmp_path, blobs)
    digests = federation.complete("birds.1")
    blobs.deletes_left = deleted
    with pytest.raises(Crash):
        federation.service.tick()
    blobs.deletes_left = None
    assert [blobs.size(digest) is None for digest in sorted(digests)] == [deleted == 1, False]
    again = federation.start()
    again.tick()
    assert [blobs.size(digest) for digest in digests] == [None, None]
    assert [device.stored_bytes for device in again.devices("birds")] == [0, 0]


def test_a_token_is_looked_up_once_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    service = Federation(tmp_path).service
    answer = service.enrol(service.issue_code("birds"), {"engines": ["onnxruntime"]})
    assert service.identify(answer["token"]).name == answer["device"]
    service.store.close()
    Path(str(service.store.url.database)).unlink()
    assert service.identify(answer["token"]).name == answer["device"], "read without the database"
    with pytest.raises(Problem) as caught:
        Service(Store(), ObjectBlobs("memory://"), Clock()).identify(answer["token"])
    assert caught.value.kind == "unauthorised"
