"""Runs one job: reads what it needs from store and blobs, computes, and ends its round whatever happens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edgestill.coordinator.distillation import job as distillation
from edgestill.coordinator.distillation.job import Job
from edgestill.coordinator.distillation.queue import JobQueue
from edgestill.coordinator.rounds.round import Failed, Published
from edgestill.coordinator.store.blobs import BlobError, Blobs
from edgestill.coordinator.store.database import Store
from edgestill.runtime.bundle import wire
from edgestill.runtime.data.classes import names_as_metadata
from edgestill.runtime.errors import EdgestillError, UsageError

_LOG = logging.getLogger("coordinator")
_LONGEST_REASON = 500


class JobRunner:
    """Runs the jobs that `queue` gives; `engine_threads` 0 leaves the number to the engine."""

    def __init__(
        self, store: Store, blobs: Blobs, queue: JobQueue, clock: Callable[[], float], engine_threads: int
    ) -> None:
        self._store, self._blobs, self._queue, self._clock = store, blobs, queue, clock
        self._engine_threads = engine_threads

    def run(self, job: Job, work_folder: Path) -> None:
        """Ends the round: published, or abandoned with the reason when anything fails.

        Errors: StoreError when not even the failure can be written down.
        """
        try:
            inputs = self._inputs(job)
            result = distillation.compute(
                job, inputs, self._blobs, lambda: self._clock() >= job.deadline_s, self._engine_threads
            )
            self._publish(job, result, work_folder)
        except Exception as error:
            # whatever it is, one round's failure must not become every later round's
            _LOG.exception("step 5 of %s failed", job.round_name)
            message = (
                error.message if isinstance(error, EdgestillError) else f"{type(error).__name__}: {error}"
            )
            self.fail(job, message)

    def fail(self, job: Job, reason: str) -> bool:
        """Abandons the round of a job that cannot be done; False when that no longer matters."""
        return self._queue.end(job, Failed(reason[:_LONGEST_REASON]))

    def _inputs(self, job: Job) -> distillation.Inputs:
        with self._store.read() as transaction:
            record = transaction.task(job.task)
            if record is None:
                raise UsageError(
                    f"there is no task {job.task}", "check that job and database belong together"
                )
            previous = transaction.last_published(job.task, before=job.number)
            uploads = transaction.uploads(job.task, job.number)
            numbers = transaction.numbers_of_uploads(job.task, job.number)
        return distillation.Inputs(
            record.task, uploads, previous and previous[0], record.student_state, numbers
        )

    def _publish(self, job: Job, result: distillation.Result, work_folder: Path) -> None:
        """Stores and publishes a result; nothing when the job has lost its right or the round has ended meanwhile."""
        published = self._blobs.put(result.body)
        state = None
        if result.state is not None:
            path = work_folder / "student.safetensors"
            wire.save(path, result.state, names_as_metadata(result.class_names))
            state = self._blobs.put_file(path)

        def check() -> None:  # the same bytes may have been an orphan's, see `Sweep`
            for digest in filter(None, (published, state)):
                if self._blobs.size(digest) is None:
                    raise BlobError(
                        f"blob {digest} was deleted while it was published", "nothing; it is rare"
                    )

        event = Published(published)
        self._queue.end(job, event, state, len(result.body), result.metrics, check)
