"""What time brings about: deadlines, new rounds, and who may run a step 5 that is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coordinator.progress import Progress, may_open
from coordinator.records import RoundRecord
from coordinator.rounds import AGGREGATING, Failed, Published, Tick
from coordinator.step5 import Step5
from coordinator.store import Store
from coordinator.task import Task
from coordinator.transaction import Transaction


class Schedule:
    """Ticks every task; `owner` is this replica, whose right to run a step 5 lasts `lease_s` unless renewed."""

    def __init__(
        self, store: Store, progress: Progress, clock: Callable[[], float], owner: str, lease_s: float
    ) -> None:
        self._store, self._progress, self._clock = store, progress, clock
        self._owner, self._lease_s = owner, lease_s

    def tick(self) -> list[Step5]:
        """Applies deadlines, opens rounds, and gives the aggregations that this replica is to run.

        The same job is given again by every tick until its round has ended. A round opens only while devices of the
        task are about (heard of within its deadline), for rounds nobody comes to would use up the task; a device
        that asks later opens it.
        """
        now_s = self._clock()
        due: list[Step5] = []
        with self._store.read() as transaction:
            tasks = [self._progress.task(transaction, name) for name in transaction.unfinished_tasks()]
            waiting = [task.name for task in tasks if self._needs_care(transaction, task, now_s, due)]
        for name in waiting:
            due += self._care_for(name, now_s)
        return due

    def end(
        self,
        job: Step5,
        event: Published | Failed,
        state: str | None = None,
        published_bytes: int | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Ends the round of a job, `published_bytes` and `metrics` for its row, `state` for the task's student.

        False when the job has lost its right or the round has ended meanwhile; nothing is written then.
        """
        now_s = self._clock()
        with self._store.write() as transaction:
            transaction.lock_task(job.task)
            task = self._progress.task(transaction, job.task)
            record = self._progress.load(transaction, job.task, job.number)
            owner, _ = transaction.lease(job.task, job.number) or ("", 0.0)
            if record is None or record.round.phase != AGGREGATING or owner != job.owner:
                return False
            values = {"published_bytes": published_bytes, "metrics": dict(metrics or {})}
            record, _ = self._progress.apply(transaction, task, record, event, now_s, **values)
            if state is not None:
                transaction.set_task(job.task, student_state=state)
        self._progress.remember(record)
        return True

    def _needs_care(self, transaction: Transaction, task: Task, now_s: float, due: list[Step5]) -> bool:
        """Whether the task's row must be locked; a job that this replica holds safely goes into `due`."""
        record = transaction.round_head(task.name)
        if may_open(None if record is None else record.round, task):
            return self._are_about(transaction, task, now_s)
        if record is None or record.round.final:
            return False
        if now_s >= record.round.deadline_s:
            return True
        if record.round.phase != AGGREGATING:
            return False
        owner, expires_s = transaction.lease(task.name, record.number) or ("", 0.0)
        if owner == self._owner and expires_s - now_s > self._lease_s / 2:
            due.append(self._job(record))
            return False
        return owner == self._owner or expires_s <= now_s

    def _care_for(self, name: str, now_s: float) -> list[Step5]:
        due = []
        with self._store.write() as transaction:
            transaction.lock_task(name)
            task = self._progress.task(transaction, name)
            record = self._progress.load(transaction, name)
            if record is not None:
                record, _ = self._progress.apply(transaction, task, record, Tick(), now_s)
            if may_open(None if record is None else record.round, task):
                if self._are_about(transaction, task, now_s):
                    record = self._progress.open_next(transaction, task, record, now_s)
            elif record is not None and record.round.phase == AGGREGATING:
                expires_s = now_s + self._lease_s
                if transaction.take_lease(name, record.number, self._owner, now_s, expires_s):
                    due.append(self._job(record))
        if record is not None:
            self._progress.remember(record)
        return due

    def _are_about(self, transaction: Transaction, task: Task, now_s: float) -> bool:
        seen_s = transaction.last_seen_s(task.name)
        return seen_s is not None and now_s - seen_s < task.deadline_s

    def _job(self, record: RoundRecord) -> Step5:
        return Step5(record.task, record.number, self._owner, record.round.deadline_s)
