"""Everything that devices, the operator and the clock do to the federation, whoever calls: HTTP or a simulation.

Order of durability: the blob, then the database's commit, then the answer. Recovery after a crash is no code of its
own: `tick` finds in the store what is due, whether this process or a dead one left it there.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgestill.coordinator import credentials
from edgestill.coordinator.distillation.job import Job
from edgestill.coordinator.distillation.queue import JobQueue
from edgestill.coordinator.distillation.runner import JobRunner
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.rounds.progress import Progress, may_open
from edgestill.coordinator.rounds.round import Ask, Failed
from edgestill.coordinator.rounds.selection import (
    Hearing,
    check_unfinished,
    may_select,
    standing_of,
    student_of,
    work_for,
)
from edgestill.coordinator.store.blobs import Blobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.group_commit import GroupCommit
from edgestill.coordinator.store.overview import RoundOverview, overview_of_rounds
from edgestill.coordinator.store.records import (
    REVOKED,
    Change,
    DeviceRecord,
    RefusalCount,
    ReportRecord,
    TaskRecord,
)
from edgestill.coordinator.store.sweep import Sweep
from edgestill.coordinator.store.transaction import Transaction
from edgestill.coordinator.task.task import Task
from edgestill.coordinator.uploads.acceptance import Uploads
from edgestill.coordinator.uploads.checks import UploadTicket, parse_round_name
from edgestill.coordinator.uploads.refusal_counts import RefusalCounts
from edgestill.runtime.device.authority import fingerprint, with_fingerprint
from edgestill.runtime.errors import UsageError

__all__ = ["DeviceRecord", "Service", "Job", "UploadTicket"]

_LOG = logging.getLogger("coordinator")
_IDENTIFIED_AT_MOST = 20_000
_IDENTIFIED_S = 5.0
_STOPPED = "stopped by the operator"


class Service:
    """The federation over a store and blobs; every method may be called from any thread, and on every replica.

    `clock` gives seconds since the epoch, `entropy` random bytes; a simulation gives its own. The right to run a step
    5 is held for `lease_s` and renewed by `tick`: if this replica dies, another takes over after that time.
    `quota_bytes` is what one device may store in a task; `engine_threads` 0 leaves the number to the engine.
    """

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        clock: Callable[[], float] = time.time,
        entropy: Callable[[int], bytes] = os.urandom,
        *,
        quota_bytes: int = 1 << 30,
        max_body_bytes: int = 256 << 20,
        lease_s: float = 15.0,
        engine_threads: int = 0,
    ) -> None:
        self.store, self.blobs, self.clock = store, blobs, clock
        self._entropy = entropy
        self._progress = Progress()
        self._queue = JobQueue(store, self._progress, clock, entropy(16).hex(), lease_s)
        self._runner = JobRunner(store, blobs, self._queue, clock, engine_threads)
        self._uploads = Uploads(store, blobs, self._progress, clock, quota_bytes, max_body_bytes)
        self._identified: dict[str, tuple[DeviceRecord, float]] = {}
        self._authorities: dict[str, str] = {}
        self._authorities_at: int | None = None
        self._hearing = Hearing()
        self._hear = GroupCommit(self._hear_all)
        self._refused = RefusalCounts(store, clock)
        self._sweep = Sweep(store, blobs, clock)

    # operator

    def create_task(self, task: Task) -> Task:
        """Adds a task whose blobs are stored already. Errors: Problem `task_exists`; UsageError for a missing blob."""
        entries = [*task.students, *([task.global_student] if task.global_student else [])]
        blobs = [(entry.student, entry.bundle, entry.size_bytes) for entry in entries]
        blobs += [
            (name, samples.blob, samples.size_bytes)
            for name, samples in (
                ("transfer", task.transfer), ("test", task.test), ("validation", task.validation)
            )
            if samples is not None
        ]
        if task.transfer.labels is not None:
            blobs.append(("transfer.labels", task.transfer.labels, None))
        now_s = self.clock()
        with self.store.write() as transaction:
            transaction.lock_all_tasks()  # under which `Sweep` deletes blobs
            for what, digest, size_bytes in blobs:
                found = self.blobs.size(digest)
                if found is None or size_bytes not in (None, found):
                    raise UsageError(
                        f"task {task.name}: {what}: no blob {digest}"
                        + ("" if size_bytes is None else f" of {size_bytes} bytes"),
                        "store its blobs first",
                    )
            if transaction.lock_task(task.name):
                raise Problem("task_exists", f"there is a task {task.name} already")
            transaction.add_task(task, now_s)
            transaction.note(task.name, "task", now_s)
        return task

    def add_blob(self, path: str | Path) -> str:
        """Stores a file and returns its digest. Errors: BlobError."""
        return self.blobs.put_file(Path(path))

    def stop_task(self, name: str) -> bool:
        """Ends a task before its last round, abandoning the open one; False when it had ended already.

        What was published stays. Errors: Problem `no_such_task`.
        """
        now_s, record = self.clock(), None
        with self.store.write() as transaction:
            self._lock(transaction, name)
            if transaction.is_finished(name):
                return False
            task = self._progress.task(transaction, name)
            record = self._progress.load(transaction, name)
            if record is not None:
                record, _ = self._progress.apply(transaction, task, record, Failed(_STOPPED), now_s)
            transaction.set_task(name, finished=True, stopped_s=now_s)
            transaction.note(name, "task", now_s)
            transaction.say("task %s is stopped", name)
        if record is not None:
            self._progress.remember(record)
        return True

    def issue_code(self, task_name: str, lifetime_s: float = 86_400.0) -> str:
        """A code with which one device can enrol once, with the fingerprint of the task's authority where it has one.

        Errors: Problem `no_such_task`.
        """
        code = credentials.enrolment_code(self._entropy(credentials.CODE_BYTES))
        with self.store.write() as transaction:
            self._lock(transaction, task_name)
            transaction.add_code(credentials.hash_code(code), task_name, self.clock() + lifetime_s)
            task = self._progress.task(transaction, task_name)
        return code if task.ca_cert is None else with_fingerprint(code, task.ca_cert)

    def authority(self, wanted: str) -> str:
        """The certificate, PEM, of this fingerprint that a task carries; for everyone. Errors: Problem `not_found`."""
        if wanted not in self._authorities and self._authorities_at != (change := self.last_change()):
            found = {record.task.ca_cert for record in self.tasks()} - {None}
            self._authorities = {fingerprint(certificate): certificate for certificate in found}
            self._authorities_at = change
        if wanted in self._authorities:  # a task stays, and keeps its certificate
            return self._authorities[wanted]
        raise Problem("not_found", "no task has an authority with that fingerprint")

    def device(self, name: str) -> DeviceRecord:
        """Errors: Problem `not_found`."""
        with self.store.read() as transaction:
            device = transaction.device(name)
        if device is None:
            raise Problem("not_found", f"no device {name}")
        return device

    def revoke(self, name: str) -> bool:
        """Makes a device's token worth nothing, on every replica within `_IDENTIFIED_S`; False when it was so before.

        What it has uploaded, and others were told of, stays. Errors: Problem `not_found`.
        """
        device = self.device(name)
        if device.revoked:
            return False
        with self.store.write() as transaction:
            transaction.set_device(name, token_hash=REVOKED + name)
            transaction.note(device.task, "device", self.clock(), device=name)
            transaction.say("device %s of task %s is revoked", name, device.task)
        return True

    # device

    def enrol(self, code: str, info: Mapping[str, Any]) -> dict[str, str]:
        """Uses a code up; `{"device", "token", "task"}`, the token said this once.

        Errors: Problem `code_refused`, `task_finished`.
        """
        name = credentials.device_name(self._entropy(credentials.DEVICE_BYTES))
        token = credentials.access_token(self._entropy(credentials.TOKEN_BYTES))
        now_s = self.clock()
        with self.store.write() as transaction:
            used = transaction.use_code(credentials.hash_code(code), name, now_s)
            if used is None:
                raise Problem("code_refused")
            task, number = used
            check_unfinished(transaction, task)
            transaction.add_device(name, task, credentials.hash_token(token), info, now_s, number)
            transaction.note(task, "device", now_s, device=name)
            transaction.say("device %s is enrolled for task %s", name, task)
        return {"device": name, "token": token, "task": task}

    def authenticate(self, token: str) -> DeviceRecord:
        """The device of a token. Errors: Problem `unauthorised`."""
        token_hash = credentials.hash_token(token)
        with self.store.read() as transaction:
            device = transaction.device_with_token(token_hash)
        if device is None:
            raise Problem("unauthorised", "the token is not known here")
        if len(self._identified) >= _IDENTIFIED_AT_MOST:
            self._identified.clear()
        self._identified[token_hash] = device, time.monotonic() + _IDENTIFIED_S
        return device

    def identify(self, token: str) -> DeviceRecord:
        """The device of a token, perhaps as it was a while ago: enough where only its name and task count.

        Errors: Problem `unauthorised`.
        """
        device, until_s = self._identified.get(credentials.hash_token(token), (None, 0.0))
        return device if device is not None and time.monotonic() < until_s else self.authenticate(token)

    def inform(self, device: DeviceRecord, info: Mapping[str, Any]) -> None:
        """Replaces INFO: an engine was installed since enrolment, or another limit of memory is given."""
        if dict(device.info) == dict(info):
            return
        with self.store.write() as transaction:
            transaction.set_device(device.name, info=dict(info))
            transaction.note(device.task, "device", self.clock(), device=device.name)

    def assignment(self, device: DeviceRecord) -> dict[str, Any]:
        """The device's task and student: the same as long as its INFO is. Errors: Problem `no_fitting_student`."""
        with self.store.read() as transaction:
            task = self._progress.task(transaction, device.task)
        student = student_of(task, device)
        if device.bundle != student.bundle:
            with self.store.write() as transaction:
                transaction.set_device(device.name, student=student.student, bundle=student.bundle)
                transaction.note(task.name, "device", self.clock(), device=device.name)
        described = task.as_json()
        chosen = described.pop("students")[task.students.index(student)]
        del described["transfer"]["labels"]  # which the coordinator alone knows, and so not by their digest either
        return {"task": described, "student": chosen}

    def ask(self, device: DeviceRecord, status: Mapping[str, Any]) -> dict[str, Any] | None:
        """WORK if the device is selected for the present round, which this may open, else None.

        Who asks first is selected. Errors: Problem `task_finished`, `no_fitting_student`.
        """
        now_s = self.clock()
        with self.store.read() as transaction:
            task = self._progress.task(transaction, device.task)
            check_unfinished(transaction, task.name)
            record = self._progress.load(transaction, task.name)
            work = work_for(transaction, task, device, record, now_s)
        student_of(task, device)
        if work is None and may_select(task, record, device, now_s):
            with self.store.write() as transaction:
                self._lock(transaction, task.name)
                check_unfinished(transaction, task.name)  # or stopped meanwhile
                self._hearing.hear(transaction, device, status, now_s)
                record = self._progress.load(transaction, task.name)
                if may_open(None if record is None else record.round, task):
                    record = self._progress.open_next(transaction, task, record, now_s)
                assert record is not None
                record, _ = self._progress.apply(transaction, task, record, Ask(device.name), now_s)
                work = work_for(transaction, task, device, record, now_s)
            self._progress.remember(record)
        elif self._hearing.is_news(device, status, now_s):
            self._hear((device, status, now_s))
        return work

    def standing(self, device: DeviceRecord) -> dict[str, Any]:
        """STANDING of the present round of the device's task, for a device that waits for the others."""
        with self.store.read() as transaction:
            task = self._progress.task(transaction, device.task)
            record, best = self._progress.load(transaction, task.name), transaction.best_round(task.name)
            return standing_of(task, record, self.clock(), best)

    def check_upload(
        self,
        device: DeviceRecord,
        round_name: str,
        device_name: str,
        content_length: int | None,
        content_digest: str | None,
        content_encoding: str = "identity",
    ) -> UploadTicket:
        """Everything that can be refused before a body is read; `content_digest` in hexadecimal. Errors: Problem."""
        with self._counting("upload", device.name, device.task, round_name):
            _check_own(device, device_name)
            return self._uploads.check(device, round_name, content_length, content_digest, content_encoding)

    def take_upload(
        self,
        ticket: UploadTicket,
        body: bytes | bytearray,
        content_digest: str,
        content_encoding: str = "identity",
    ) -> str:
        """Accepts the body of a checked upload: `created`, or `same` when it was accepted before.

        Durable when this returns. Errors: Problem; BlobError and StoreError when it could not be kept, so that the
        device tries again.
        """
        round_name = f"{ticket.task.name}.{ticket.number}"
        with self._counting("upload", ticket.device, ticket.task.name, round_name):
            return self._uploads.take(ticket, body, content_digest, content_encoding)

    def submit(
        self,
        device: DeviceRecord,
        round_name: str,
        device_name: str,
        body: bytes,
        content_digest: str,
        content_encoding: str = "identity",
    ) -> str:
        """`check_upload` and `take_upload` at once, for who has the whole body. Errors: theirs."""
        ticket = self.check_upload(
            device, round_name, device_name, len(body), content_digest, content_encoding
        )
        return self.take_upload(ticket, body, content_digest, content_encoding)

    def report(
        self, device: DeviceRecord, round_name: str, device_name: str, report: Mapping[str, Any]
    ) -> None:
        """Keeps what a device says about a round; the last report wins. Errors: Problem."""
        with self._counting("report", device.name, device.task, round_name):
            _check_own(device, device_name)
            number, now_s = parse_round_name(round_name, device.task), self.clock()
            with self.store.write() as transaction:
                if transaction.round_head(device.task, number) is None:
                    raise Problem("no_such_round", f"round {round_name} has not been opened")
                transaction.put_report(device.task, number, device.name, report, now_s)
                transaction.note(device.task, "report", now_s, number, device.name)

    def readable_blob(self, device: DeviceRecord, digest: str) -> int:
        """Size of a blob that the device may read: its bundle, its task's transfer set and global outputs.

        Errors: Problem `not_found`, whether there is no such blob or it is not for this device.
        """
        with self.store.read() as transaction:
            task = self._progress.task(transaction, device.task)
            allowed = digest == task.transfer.blob or transaction.was_published(task.name, digest)
        if not allowed:
            student = task.fitting_student(device.info.get("engines", ()), device.info.get("memory_bytes"))
            allowed = digest == device.bundle or (student is not None and digest == student.bundle)
        size_bytes = self.blobs.size(digest) if allowed else None
        if size_bytes is None:
            raise Problem("not_found", "there is no such blob for this device")
        return size_bytes

    # background loop

    def tick(self, at_most: int = 1, running: Collection[Job] = ()) -> list[Job]:
        """Applies deadlines, opens rounds, and gives the aggregations to run here: see `JobQueue.tick`.

        Deletes what an ended round has left, too: see `Sweep`.
        """
        self._refused.write()
        due = self._queue.tick(at_most, running)
        self._sweep.run()
        return due

    def run_job(self, job: Job, work_folder: str | Path) -> None:
        """Runs an aggregation to its end: published, or abandoned with the reason when anything in it fails.

        `work_folder` is for temporary files. Errors: StoreError when not even the failure can be written down.
        """
        self._runner.run(job, Path(work_folder))

    def fail_job(self, job: Job, reason: str) -> bool:
        """Abandons the round of a job that cannot be done; False when that no longer matters."""
        return self._runner.fail(job, reason)

    # reading

    def tasks(self) -> list[TaskRecord]:
        """All tasks, oldest first."""
        with self.store.read() as transaction:
            return transaction.tasks()

    def rounds(self, task: str) -> list[RoundOverview]:
        """All rounds of a task, by number; none for an unknown task."""
        with self.store.read() as transaction:
            return overview_of_rounds(transaction, task)

    def devices(self, task: str) -> list[DeviceRecord]:
        """All devices of a task, in order of enrolment."""
        with self.store.read() as transaction:
            return transaction.devices(task)

    def reports(self, task: str) -> list[ReportRecord]:
        """All reports of a task, by round and device."""
        with self.store.read() as transaction:
            return transaction.reports(task)

    def refusals(self, task: str) -> list[RefusalCount]:
        """How often what was refused, by round (0: none in particular) and kind."""
        self._refused.write()
        with self.store.read() as transaction:
            return transaction.refusals(task)

    def changes(self, since: int, at_most: int = 1000) -> list[Change]:
        """What changed after the sequence `since`, in order; only the newest thousands are kept."""
        with self.store.read() as transaction:
            return transaction.changes(since, at_most)

    def last_change(self) -> int:
        """The sequence of the newest change."""
        with self.store.read() as transaction:
            return transaction.last_change()

    # inside

    def _hear_all(self, heard: Sequence[tuple[DeviceRecord, Mapping[str, Any], float]]) -> list[None]:
        """Writes down what many devices say at once: all long-polls of a moment end in the same moment."""
        with self.store.write() as transaction:
            for device, status, now_s in sorted(heard, key=lambda one: one[0].name):
                self._hearing.hear(transaction, device, status, now_s)
        return [None] * len(heard)

    def _lock(self, transaction: Transaction, task: str) -> None:
        if not transaction.lock_task(task):
            raise Problem("no_such_task", f"there is no task {task}")

    @contextmanager
    def _counting(self, what: str, device: str, task: str, round_name: str) -> Iterator[None]:
        """Counts and logs the problem that the block raises."""
        try:
            yield
        except Problem as problem:
            self._refused.add(task, round_name, problem.kind)
            _LOG.info("%s of %s for round %.60r is refused: %s", what, device, round_name, problem.kind)
            raise


def _check_own(device: DeviceRecord, device_name: str) -> None:
    if device_name != device.name:
        raise Problem("foreign_device", f"the token belongs to {device.name}")
