"""What the routes share: the service behind a bounded thread pool, the settings, figures, who waits for work."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request

from edgestill.coordinator.http.metrics import Metrics
from edgestill.coordinator.liveness import Liveness
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings

Result = TypeVar("Result")
_UPLOADS_OF_DEVICE = 2
"""At once: one is enough, and one more where a connection broke without anybody being told."""
_MODELS = 4
"""In memory at once, for those who download them."""


class Waiting:
    """Devices that hold a long-poll, as one event a task: no thread and no query each."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def event(self, task: str) -> asyncio.Event:
        """Set by the next `wake` of the task; take it before asking for work, so that none is missed."""
        return self._events.setdefault(task, asyncio.Event())

    def wake(self, task: str) -> None:
        """Lets everyone who waits for the task ask again."""
        if (event := self._events.pop(task, None)) is not None:
            event.set()

    def wake_all(self) -> None:
        for task in tuple(self._events):
            self.wake(task)


class UploadMemory:
    """How many bytes of uploads may lie in memory at once; asyncio's single thread makes it exact.

    A device has its share: uploads that it dribbles in cannot keep all others out.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._of_device: Counter[str] = Counter()
        self.used_bytes = 0

    def devices(self) -> frozenset[str]:
        """Whose uploads are arriving."""
        return frozenset(self._of_device)

    @contextmanager
    def taken(self, device: str, size_bytes: int) -> Iterator[None]:
        """Room for one upload of a device, for as long as the block lasts.

        Errors: Problem `unavailable` when the uploads that are arriving, of all or of this device, leave no room.
        """
        if self._of_device[device] >= _UPLOADS_OF_DEVICE:
            raise Problem("unavailable", f"uploads of {device} are arriving already", retry_after_s=5)
        if self.used_bytes and self.used_bytes + size_bytes > self._size_bytes:
            raise Problem("unavailable", "too many uploads are arriving at once", retry_after_s=5)
        self._of_device[device] += 1
        self.used_bytes += size_bytes
        try:
            yield
        finally:
            self.used_bytes -= size_bytes
            self._of_device[device] -= 1
            if not self._of_device[device]:
                del self._of_device[device]


@dataclass
class Context:
    """One for an app, as `app.state.context`."""

    service: Service
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    waiting: Waiting = field(default_factory=Waiting)
    stopping: bool = False

    def __post_init__(self) -> None:
        self.upload_memory = UploadMemory(self.settings.upload_memory_bytes)
        self.model_places = _MODELS
        self._limiter: anyio.CapacityLimiter | None = None
        self._alone: anyio.CapacityLimiter | None = None

    def liveness(self) -> Liveness:
        """How devices stand now."""
        return Liveness.at(self.service.clock(), self.settings.long_poll_s, self.upload_memory.devices())

    async def call(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """Runs a blocking call of the service in a thread; at most `settings.threads` at once."""
        if self._limiter is None:  # made late: a limiter belongs to a running event loop
            self._limiter = anyio.CapacityLimiter(self.settings.threads)
        return await anyio.to_thread.run_sync(partial(function, *arguments, **named), limiter=self._limiter)


    async def call_alone(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs what takes much memory in a thread of its own, one after another, beside those of `call`."""
        if self._alone is None:
            self._alone = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=self._alone)


async def context_of(request: Request) -> Context:
    """The app's context, as a dependency of routes; async, or FastAPI would take a thread to call it."""
    context: Context = request.app.state.context
    return context


def jittered_s(seconds: float) -> int:
    """Whole seconds for Retry-After, up to half longer, so that devices refused together do not return together."""
    return max(1, round(seconds * random.uniform(1.0, 1.5)))
