"""The loop behind the server: ticks the queue, starts a worker for each job, wakes devices that wait for work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from edgestill.coordinator.http.context import Context
from edgestill.coordinator.service import Job

_LOG = logging.getLogger("coordinator")
_WAKING = frozenset({"round", "task"})  # nothing else brings a waiting device work
_JOBS_AT_ONCE = 1  # a step 5 keeps every core busy

RunJob = Callable[[Context, Job], Awaitable[None]]


class BackgroundLoop:
    """Looks at the store every `tick_s`; runs due jobs one after another, each through `run_job`."""

    def __init__(self, context: Context, run_job: RunJob) -> None:
        self._context, self._run_job = context, run_job
        self._seen: int | None = None
        self._running: dict[asyncio.Task[None], Job] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ticks until left; then lets go of waiting devices and stops a step that runs, which another may take up."""
        ticking = asyncio.create_task(self._tick_forever())
        try:
            yield
        finally:
            self._context.stopping = True
            self._context.waiting.wake_all()
            for task in (ticking, *self._running):
                task.cancel()
            await asyncio.gather(ticking, *self._running, return_exceptions=True)

    async def _tick_forever(self) -> None:
        failing = False
        while True:
            try:
                await self.tick()
                failing = False
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # a database that is away comes back; the clock must still be ticking then
                if not failing:
                    _LOG.error("the background loop failed, and goes on trying", exc_info=error)
                failing = True
            await asyncio.sleep(self._context.settings.tick_s)

    async def tick(self) -> None:
        """One look at deadlines, due steps, and changes that devices wait for."""
        context = self._context
        running = set(self._running.values())
        for job in await context.call(context.service.tick, _JOBS_AT_ONCE, running):
            if job not in running:
                task = asyncio.create_task(self._run_job(context, job))
                self._running[task] = job
                task.add_done_callback(self._finished)
        for task_name in await context.call(self._changed_tasks):
            context.waiting.wake(task_name)

    def _changed_tasks(self) -> list[str]:
        if self._seen is None:
            self._seen = self._context.service.last_change()
        changes = self._context.service.changes(self._seen)
        if changes:
            self._seen = max(change.sequence for change in changes)
        return list(dict.fromkeys(change.task for change in changes if change.kind in _WAKING))

    def _finished(self, task: asyncio.Task[None]) -> None:
        job = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("step 5 of %s cannot be run", job.round_name, exc_info=error)
