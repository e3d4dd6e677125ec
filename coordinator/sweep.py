"""Deletes the uploads of rounds that have ended: nobody reads them again, and they would fill the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable

from coordinator.blobs import Blobs
from coordinator.store import Store
from coordinator.task import Task
from edge_runtime.errors import EdgestillError

_LOG = logging.getLogger("coordinator")
_AT_ONCE = 100
"""Blobs deleted by one call within one transaction, which keeps uploads waiting, and the clock from ticking."""
_PAUSE_S = 60.0
"""After a failure, so that a store of blobs that is away is not asked with every tick."""


class Sweep:
    """Goes through ended rounds; one is marked when all of it is deleted, so that a crash makes it begin again.

    A blob is deleted under the lock of every task, where nothing refers to it. An upload of the same bytes that is on
    its way takes the lock after its bytes are stored, and looks again then (`Uploads`): none loses its blob.
    """

    def __init__(self, store: Store, blobs: Blobs, clock: Callable[[], float]) -> None:
        self._store, self._blobs, self._clock = store, blobs, clock
        self._not_before_s = 0.0
        self._round: tuple[str, int] | None = None
        self._left: list[str] = []

    def run(self) -> None:
        """Deletes some of what an ended round has left; a failure is logged, and tried again later."""
        if self._clock() < self._not_before_s:
            return
        try:
            self._sweep_some()
        except EdgestillError as error:
            self._round = None
            self._not_before_s = self._clock() + _PAUSE_S
            _LOG.warning("uploads of ended rounds cannot be deleted: %s", error)

    def _sweep_some(self) -> None:
        if self._round is None:
            with self._store.read() as transaction:
                self._round = transaction.round_to_sweep()
                if self._round is None:
                    return
                self._left = sorted({upload.digest for upload in transaction.uploads(*self._round)})
        some, self._left = self._left[:_AT_ONCE], self._left[_AT_ONCE:]
        if some:
            self._delete_unless_referred(some)
        if not self._left:
            with self._store.write() as transaction:
                transaction.lock_task(self._round[0])
                transaction.end_sweep(*self._round, self._clock())
            self._round = None

    def _delete_unless_referred(self, digests: list[str]) -> None:
        with self._store.write() as transaction:
            tasks = [record.task for record in transaction.tasks()]
            for name in sorted(task.name for task in tasks):
                transaction.lock_task(name)
            kept = transaction.referred(digests).union(*(_blobs_of(task) for task in tasks))
            for digest in digests:
                if digest not in kept:
                    self._blobs.delete(digest)


def _blobs_of(task: Task) -> set[str]:
    entries = [*task.students, *([task.global_student] if task.global_student else [])]
    samples = [one for one in (task.transfer, task.test) if one is not None]
    return {entry.bundle for entry in entries} | {one.blob for one in samples}
