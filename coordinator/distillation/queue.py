"""The queue of jobs that are due, each under the lease of one replica; also what time does: deadlines, new rounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from edgestill.coordinator.distillation.job import VALIDATION, Job
from edgestill.coordinator.rounds.progress import Progress, may_open
from edgestill.coordinator.rounds.round import AGGREGATING, Begun, Failed, Published, Tick
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.records import RoundRecord
from edgestill.coordinator.store.transaction import Transaction
from edgestill.coordinator.task.task import Task

# whose turn it is first: jobs that are held already count, before one more is taken
_RENEWED, _QUEUED, _OTHERS = range(3)


class JobQueue:
    """Ticks every task; `owner` is this replica, whose lease of a job lasts `lease_s` unless renewed."""

    def __init__(
        self, store: Store, progress: Progress, clock: Callable[[], float], owner: str, lease_s: float
    ) -> None:
        self._store, self._progress, self._clock = store, progress, clock
        self._owner, self._lease_s = owner, lease_s

    def tick(self, at_most: int = 1, running: Collection[Job] = ()) -> list[Job]:
        """Applies deadlines, opens rounds, and gives the aggregations that this replica is to run.

        This replica holds `at_most` of them at once; jobs in `running`, which the caller has not let go of yet, count.
        Rounds beyond that wait for their turn in the order in which their collections ended, here or on another
        replica: a job's time begins when it is given first. The same job is given again by every tick until its round
        has ended. A round opens only while devices of the task are about (heard of within its deadline), for rounds
        nobody comes to would use up the task; a device that asks later opens it.
        """
        now_s = self._clock()
        due: list[Job] = []
        waiting: list[tuple[int, float, str]] = []
        with self._store.read() as transaction:
            for name in transaction.unfinished_tasks():
                task = self._progress.task(transaction, name)
                record = transaction.round_head(name)
                if self._is_mine(transaction, record, now_s) and record is not None:
                    due.append(self._job(record))
                elif (turn := self._turn(transaction, task, record, now_s)) is not None:
                    waiting.append((turn, 0.0 if record is None else record.round.deadline_s, name))
        for turn, _, name in sorted(waiting):
            room = len({*due, *running}) < at_most
            if room or turn != _QUEUED:
                due += self._care_for(name, now_s, room)
        return due

    def end(
        self,
        job: Job,
        event: Published | Failed,
        state: str | None = None,
        published_bytes: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> bool:
        """Ends the round of a job, `published_bytes` and `metrics` for its row, `state` for the task's student.

        False when the job has lost its right or the round has ended meanwhile; nothing is written then, nor when
        `check`, which is called under the task's lock, raises.
        """
        now_s = self._clock()
        with self._store.write() as transaction:
            transaction.lock_task(job.task)
            task = self._progress.task(transaction, job.task)
            record = self._progress.load(transaction, job.task, job.number)
            owner, _ = transaction.lease(job.task, job.number) or ("", 0.0)
            if record is None or record.round.phase != AGGREGATING or owner != job.owner:
                return False
            check()
            measured = dict(metrics or {})
            values = {"published_bytes": published_bytes, "metrics": measured, "student_state": state}
            seconds = now_s - (record.round.begun_s or now_s)
            transaction.say("step 5 of %s has ended after %.1f s", record.name, seconds)
            record, _ = self._progress.apply(transaction, task, record, event, now_s, **values)
            if state is not None:
                transaction.set_task(job.task, student_state=state)
            if _is_best(transaction, job, measured):
                transaction.set_task(job.task, best_round=job.number)
        self._progress.remember(record)
        return True

    def _is_mine(self, transaction: Transaction, record: RoundRecord | None, now_s: float) -> bool:
        """Whether this replica holds the right to a step 5 for a while, so that there is nothing to write."""
        if record is None or record.round.phase != AGGREGATING or now_s >= record.round.deadline_s:
            return False
        owner, expires_s = transaction.lease(record.task, record.number) or ("", 0.0)
        return owner == self._owner and expires_s - now_s > self._lease_s / 2

    def _turn(
        self, transaction: Transaction, task: Task, record: RoundRecord | None, now_s: float
    ) -> int | None:
        """When the task's row is to be locked, among others that are; None: there is nothing to do for it."""
        if may_open(None if record is None else record.round, task):
            return _OTHERS if self._are_about(transaction, task, now_s) else None
        if record is None or record.round.final:
            return None
        if now_s >= record.round.deadline_s:
            return _OTHERS
        if record.round.phase != AGGREGATING:
            return None
        owner, expires_s = transaction.lease(task.name, record.number) or ("", 0.0)
        if owner == self._owner:
            return _RENEWED
        return _QUEUED if expires_s <= now_s else None

    def _care_for(self, name: str, now_s: float, room: bool) -> list[Job]:
        due = []
        with self._store.write() as transaction:
            transaction.lock_task(name)
            if transaction.is_finished(name):  # stopped meanwhile
                return []
            task = self._progress.task(transaction, name)
            record = self._progress.load(transaction, name)
            if record is not None:
                record, _ = self._progress.apply(transaction, task, record, Tick(), now_s)
            if may_open(None if record is None else record.round, task):
                if self._are_about(transaction, task, now_s):
                    record = self._progress.open_next(transaction, task, record, now_s)
            elif record is not None and record.round.phase == AGGREGATING:
                owner, _ = transaction.lease(name, record.number) or ("", 0.0)
                expires_s = now_s + self._lease_s
                if (room or owner == self._owner) and transaction.take_lease(
                    name, record.number, self._owner, now_s, expires_s
                ):
                    record, _ = self._progress.apply(transaction, task, record, Begun(), now_s)
                    if owner != self._owner:
                        transaction.say("step 5 of %s has started", record.name)
                    due.append(self._job(record))
        if record is not None:
            self._progress.remember(record)
        return due

    def _are_about(self, transaction: Transaction, task: Task, now_s: float) -> bool:
        seen_s = transaction.last_seen_s(task.name)
        return seen_s is not None and now_s - seen_s < task.deadline_s

    def _job(self, record: RoundRecord) -> Job:
        return Job(record.task, record.number, self._owner, record.round.deadline_s)


def _is_best(transaction: Transaction, job: Job, metrics: Mapping[str, Any]) -> bool:
    """Whether a round is better on the validation images than all before it; of equals the first one stays."""
    accuracy, best = metrics.get(VALIDATION), transaction.best_round(job.task)
    if accuracy is None or best is None:
        return accuracy is not None
    head = transaction.round_head(job.task, best)
    return head is None or accuracy > head.metrics[VALIDATION]
