"""The dashboard's server-sent events: one poll of the store for all browsers, streams that resume.

Source: the HTML standard, "Server-sent events" (`id`, `event`, `data`, `retry`, `Last-Event-ID`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

RETRY_MS = 2000
SUBSCRIBERS_AT_MOST = 200


@dataclass(frozen=True)
class News:
    """The tasks that changed up to the store's change number `sequence`; none named: any of them may have."""

    sequence: int
    tasks: frozenset[str]


def format_event(news: News) -> bytes:
    """One event `change`: its id resumes the stream, its data names the tasks."""
    data = json.dumps({"tasks": sorted(news.tasks)})
    return f"id: {news.sequence}\nevent: change\ndata: {data}\n\n".encode()


@dataclass(eq=False)
class _Subscriber:
    sequence: int
    tasks: set[str] = field(default_factory=set)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, news: News) -> None:
        if news.sequence > self.sequence:
            self.sequence = news.sequence
            self.tasks |= news.tasks
            self.woken.set()


class ChangeFeed:
    """Fans the store's changes out to any number of streams; reads only while somebody listens.

    `read(since)` gives the news after that change number, None when there is none; `latest()` the last number.
    """

    def __init__(
        self,
        read: Callable[[int], Awaitable[News | None]],
        latest: Callable[[], Awaitable[int]],
        poll_s: float = 1.0,
        heartbeat_s: float = 15.0,
    ) -> None:
        self._read, self._latest = read, latest
        self._poll_s, self._heartbeat_s = poll_s, heartbeat_s
        self._subscribers: set[_Subscriber] = set()
        self._task: asyncio.Task[None] | None = None
        self.announced = 0
        """The newest change number that a stream was told: a page that is asked for now must not be older."""

    @property
    def full(self) -> bool:
        """Whether no further stream should be opened."""
        return len(self._subscribers) >= SUBSCRIBERS_AT_MOST

    async def stream(self, since: int | None) -> AsyncIterator[bytes]:
        """Events after the change number `since`, or from now on; changes between two sends come as one event.

        Whoever missed something, or comes with a number of another store, gets one event at once, without tasks.
        """
        latest = await self._latest()
        start = latest if since is None else since
        subscriber = _Subscriber(latest)
        self._subscribers.add(subscriber)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll(subscriber.sequence))
        try:
            yield f"retry: {RETRY_MS}\n\n".encode()
            if start != latest:
                self.announced = max(self.announced, latest)
                yield format_event(News(latest, frozenset()))
            while True:
                try:
                    await asyncio.wait_for(subscriber.woken.wait(), self._heartbeat_s)
                except TimeoutError:
                    yield b": still here\n\n"  # so that a dead connection is noticed, and no proxy closes a live one
                    continue
                news = News(subscriber.sequence, frozenset(subscriber.tasks))
                subscriber.tasks.clear()
                subscriber.woken.clear()
                yield format_event(news)
        finally:
            self._subscribers.discard(subscriber)
            if not self._subscribers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _poll(self, since: int) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                news = await self._read(since)
            except (
                Exception
            ):  # the store may be away for a while; the streams stay and the next poll tries again
                logger.warning("the dashboard cannot read changes", exc_info=True)
                continue
            if news is not None:
                since = news.sequence
                self.announced = max(self.announced, since)
                for subscriber in tuple(self._subscribers):
                    subscriber.tell(news)


def news_of(changes: Iterable[tuple[int, str]]) -> News | None:
    """The news in (sequence, task) pairs; None when there are none."""
    pairs = tuple(changes)
    if not pairs:
        return None
    return News(max(sequence for sequence, _ in pairs), frozenset(task for _, task in pairs))
