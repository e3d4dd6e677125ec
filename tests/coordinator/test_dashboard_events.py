"""News of changes: the form of events, one reading for many streams, and streams that outlast a store's absence."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from edgestill.coordinator.dashboard.events import (
    SUBSCRIBERS_AT_MOST,
    ChangeFeed,
    News,
    format_event,
    news_of,
)


def test_events_are_in_the_form_of_the_standard():
    event = format_event(News(17, frozenset({"birds", "ants"})))
    assert event == b'id: 17\nevent: change\ndata: {"tasks": ["ants", "birds"]}\n\n'
    assert news_of([]) is None
    assert news_of([(3, "a"), (5, "b"), (4, "a")]) == News(5, frozenset("ab"))


class Changes:
    """What a ChangeFeed reads, counted; `fails` makes the next readings raise."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str]] = []
        self.readings = self.fails = 0

    async def read(self, since: int) -> News | None:
        self.readings += 1
        if self.fails:
            self.fails -= 1
            raise OSError("away")
        return news_of(one for one in self.entries if one[0] > since)

    async def latest(self) -> int:
        return len(self.entries)

    def add(self, task: str) -> None:
        self.entries.append((len(self.entries) + 1, task))

    def feed(self, **options) -> ChangeFeed:
        return ChangeFeed(self.read, self.latest, **{"poll_s": 0.01, "heartbeat_s": 30.0, **options})


def parse_events(data: bytes) -> list[tuple[int, list[str]]]:
    return [(int(number), json.loads(tasks)["tasks"]) for number, tasks in
            re.findall(rb"id: (\d+)\nevent: change\ndata: (.*)\n\n", data)]  # fmt: skip


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_many_streams_are_fed_by_one_reading():
    async def scenario():
        changes = Changes()
        feed = changes.feed(poll_s=0.2)
        streams = [feed.stream(None) for _ in range(50)]
        assert {await anext(one) for one in streams} == {b"retry: 2000\n\n"}
        changes.add("birds")
        changes.add("ants")
        got = [parse_events(await anext(one)) for one in streams]
        assert got == [[(2, ["ants", "birds"])]] * 50
        assert changes.readings < 50
        for one in streams:
            await one.aclose()
        readings = changes.readings
        await asyncio.sleep(0.5)
        assert changes.readings == readings  # nobody listens, nothing is read

    run(scenario())


@pytest.mark.parametrize(("since", "expected"), [(1, [(3, [])]), (3, []), (99, [(3, [])]), (None, [])])
def test_a_stream_resumes_after_what_was_seen(since, expected):
    async def scenario():
        changes = Changes()
        for task in ("a", "b", "c"):
            changes.add(task)
        stream = changes.feed().stream(since)
        await anext(stream)
        got = [parse_events(await anext(stream))[0] for _ in expected]
        changes.add("d")
        got += parse_events(await anext(stream))
        await stream.aclose()
        assert got == [*expected, (4, ["d"])]

    run(scenario())


def test_a_store_that_is_away_for_a_while_ends_no_stream(caplog):
    async def scenario():
        changes = Changes()
        stream = changes.feed().stream(None)
        await anext(stream)
        changes.fails = 3
        changes.add("birds")
        assert parse_events(await anext(stream)) == [(1, ["birds"])]
        await stream.aclose()

    run(scenario())
    assert "cannot read changes" in caplog.text


def test_a_quiet_stream_is_kept_open_and_streams_are_counted():
    async def scenario():
        changes = Changes()
        feed = changes.feed(heartbeat_s=0.01)
        streams = [feed.stream(None) for _ in range(SUBSCRIBERS_AT_MOST)]
        for one in streams:
            await anext(one)
        assert feed.full
        assert await anext(streams[0]) == b": still here\n\n"
        for one in streams:
            await one.aclose()
        assert not feed.full

    run(scenario())
