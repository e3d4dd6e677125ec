"""Deletes what would fill the disk: uploads of rounds that have ended, and blobs that nothing ever referred to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice

from edgestill.coordinator.store.blobs import Blobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.transaction import Transaction
from edgestill.coordinator.task.task import Task
from edgestill.runtime.errors import EdgestillError

_LOG = logging.getLogger("coordinator")
_AT_ONCE = 100
"""Blobs deleted by one call within one transaction, which keeps uploads waiting, and the clock from ticking."""
_ORPHAN_S = 86_400.0
"""A blob that nothing refers to is left alone as long: its task, its upload or its round may be on its way."""
_LOOK_EVERY_S = 3600.0
_PAUSE_S = 60.0
"""After a failure, so that a store of blobs that is away is not asked with every tick."""


class Sweep:
    """Goes through ended rounds; one is marked when all of it is deleted, so that a crash makes it begin again.

    A blob is deleted under the lock of every task, while no other can appear, where nothing refers to it. An upload of
    the same bytes that is on its way takes the lock after its bytes are stored, and looks again then (`Uploads`): none
    loses its blob.

    Bytes that were stored while nothing was committed (a crash, a refusal at the last moment) are found by looking at
    all blobs now and then. Their names are committed before they are deleted, so that whoever stores the same bytes
    meanwhile knows to look again; who has put them since they were found has made them young. With a database in
    memory nothing is known of the blobs that were there before it, and none is taken for an orphan.
    """

    def __init__(self, store: Store, blobs: Blobs, clock: Callable[[], float]) -> None:
        self._store, self._blobs, self._clock = store, blobs, clock
        self._not_before_s = 0.0
        self._round: tuple[str, int] | None = None
        self._left: list[str] = []
        self._orphans: Iterator[str] = iter(())
        self._next_look_s = self._clock()

    def run(self) -> None:
        """Deletes some of what an ended round has left; a failure is logged, and tried again later."""
        if self._clock() < self._not_before_s:
            return
        try:
            self._sweep_some()
            if not self._store.in_memory:
                self._sweep_orphans()
        except (EdgestillError, OSError) as error:
            # whatever the place of blobs does, the clock that called goes on to step 5
            self._round, self._orphans = None, iter(())
            self._not_before_s = self._clock() + _PAUSE_S
            _LOG.warning("blobs that nobody needs cannot be deleted: %s", error)

    def _sweep_some(self) -> None:
        if self._round is None:
            with self._store.read() as transaction:
                self._round = transaction.round_to_sweep()
                if self._round is None:
                    return
                self._left = sorted({upload.digest for upload in transaction.uploads(*self._round)})
        some, self._left = self._left[:_AT_ONCE], self._left[_AT_ONCE:]
        if some:
            self._delete_unless_referred(some, 0.0)
        if not self._left:
            with self._store.write() as transaction:
                transaction.lock_task(self._round[0])
                transaction.end_sweep(*self._round, self._clock())
            self._round = None

    def _sweep_orphans(self) -> None:
        now_s = self._clock()
        some = list(islice(self._orphans, _AT_ONCE))
        if not some and now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            self._orphans = self._blobs.older_than(_ORPHAN_S)
            some = list(islice(self._orphans, _AT_ONCE))
        if not some:
            return
        with self._store.read() as transaction:
            some = sorted(set(some) - self._kept(transaction, some))
        if some:
            with self._store.write() as transaction:
                transaction.references.forget_orphans(now_s - _ORPHAN_S)
                transaction.references.note_orphans(some, now_s)
            self._delete_unless_referred(some, _ORPHAN_S)

    def _delete_unless_referred(self, digests: list[str], least_age_s: float) -> None:
        with self._store.write() as transaction:
            transaction.lock_all_tasks()
            kept = self._kept(transaction, digests)
            for digest in digests:
                if digest in kept:
                    continue
                if not least_age_s or (self._blobs.age_s(digest) or 0.0) > least_age_s:
                    self._blobs.delete(digest)

    def _kept(self, transaction: Transaction, digests: list[str]) -> set[str]:
        tasks = (record.task for record in transaction.tasks())
        return transaction.references.referred(digests).union(*(blobs_of(task) for task in tasks))


def blobs_of(task: Task) -> set[str]:
    """The digests that a task's definition names."""
    entries = [*task.students, *([task.global_student] if task.global_student else [])]
    samples = [one for one in (task.transfer, task.test, task.validation) if one is not None]
    digests = {entry.bundle for entry in entries} | {one.blob for one in samples}
    return digests | ({task.transfer.labels} if task.transfer.labels else set())
